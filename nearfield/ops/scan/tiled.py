"""Selective scans in segments: pure torch, any device, forward and backward, memory linear in tokens.

Time is the outermost axis, and one position after the other is worked on for all sequences, channels and
states at once. Of the states only those at the starts of segments are kept; the backward computes the others
again, segment by segment. Decays are factors of at most one, and nothing is divided by them: no product of
them overflows, and where one underflows the past is forgotten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfield.ops.scan.steps import skip_and_gate, step_sizes

SEGMENT = 16  # positions whose states exist at once: few enough for a cache


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, C] and last state [B, C, N] for B and C of [B, T, G, N]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    groups, state_size = B.shape[2:]
    step = step_sizes(dt, dt_bias, dt_softplus, wide)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], state_size)
    if not x.shape[1]:
        return skip_and_gate(x.to(wide), x, D, z).to(x.dtype), initial_state.to(wide)
    timed = [m.to(wide).transpose(0, 1) for m in (x, step, B, C)]  # [T, B, ...]
    if reverse:
        timed = [m.flip(0) for m in timed]
    for place in (0, 1):
        timed[place] = timed[place].unflatten(2, (groups, -1))  # [T, B, G, channels]
    y, state, _ = Recurrence.apply(
        *timed, A.to(wide).unflatten(0, (groups, -1)), initial_state.to(wide).unflatten(1, (groups, -1))
    )
    y = (y.flip(0) if reverse else y).flatten(2).transpose(0, 1)
    return skip_and_gate(y, x, D, z).to(x.dtype), state.flatten(1, 2)


class Recurrence(torch.autograd.Function):
    """Sums over states [T, B, G, c], the last state [B, G, c, N] and the states at the starts of segments.

    Of x and step [T, B, G, c], B and C [T, B, G, N], A [G, c, N] and the first state [B, G, c, N].
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, step: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, starts = [], []
        for first in range(0, x.shape[0], SEGMENT):
            part = slice(first, first + SEGMENT)
            starts.append(state)
            _, states = _states(x[part], step[part], B[part], A, state)
            rows.append(torch.einsum("tbgcn,tbgn->tbgc", states, C[part]))
            state = states[-1].clone()
        return torch.cat(rows), state, torch.stack(starts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5], output[2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return RecurrenceBackward.apply(grad, grad_state, *ctx.saved_tensors)


class RecurrenceBackward(torch.autograd.Function):
    """The gradients of `Recurrence`, in the order of its arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        carried: Tensor,
        x: Tensor,
        step: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        starts: Tensor,
    ) -> tuple[Tensor, ...]:
        parts: list[tuple[Tensor, ...]] = []
        grad_A = torch.zeros_like(A)
        for number in reversed(range(starts.shape[0])):
            part = slice(number * SEGMENT, (number + 1) * SEGMENT)
            u, delta, pull = x[part], step[part], grad[part]
            decay, states = _states(u, delta, B[part], A, starts[number])
            grads = pull[..., None] * C[part][..., None, :]  # of the states
            carried = _accumulate(grads, decay, carried)
            before = torch.cat([starts[number][None], states[:-1]])
            exponent = grads * decay * before  # the gradient of delta A
            grad_B = torch.einsum("tbgcn,tbgc->tbgn", grads, delta * u)
            grad_C = torch.einsum("tbgcn,tbgc->tbgn", states, pull)
            inner = torch.einsum("tbgcn,tbgn->tbgc", grads, B[part])
            grad_step = torch.einsum("tbgcn,gcn->tbgc", exponent, A) + inner * u
            grad_A = grad_A + torch.einsum("tbgcn,tbgc->gcn", exponent, delta)
            parts.append((inner * delta, grad_step, grad_B, grad_C))
        return *(torch.cat(found) for found in zip(*reversed(parts), strict=True)), grad_A, carried

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(
            'The "tiled" backend has no second derivatives. Call with backend="reference", which has them.'
        )


def _states(x: Tensor, step: Tensor, B: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states [t, B, G, c, N] of a segment that begins in `state`."""
    decay = torch.exp(step[..., None] * A)
    inputs = (step * x)[..., None] * B[..., None, :]
    states = []
    for kept, added in zip(decay.unbind(0), inputs.unbind(0), strict=True):
        state = torch.addcmul(added, kept, state)
        states.append(state)
    return decay, torch.stack(states)


def _accumulate(grads: Tensor, decay: Tensor, carried: Tensor) -> Tensor:
    """Adds to the gradient of each state what arrives from later ones; what arrives before the segment."""
    grads[-1] += carried
    for t in range(grads.shape[0] - 2, -1, -1):
        grads[t] += decay[t + 1] * grads[t + 1]
    return decay[0] * grads[0]
