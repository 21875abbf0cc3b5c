"""Chunks of tokens, forward and backward by formula: inside a chunk all pairs, from chunk to chunk a state.

Everything is [B, H, chunks, C, D]. All chunks of a call are computed at once, except for the state, which
goes through them one by one. With the delta rule a chunk first solves a triangular system for what each of
its tokens writes (the WY form): (I + A) u = beta (v - k S), A the decayed overlaps beta_t k_t k_s with the
earlier keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nearfield.ops.linear.decay import blocks, decay_of


@dataclass
class Stretch:
    """Some chunks one after the other; q is scaled already."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None  # [B, H, chunks, C, 1 or K]
    beta: Tensor | None  # [B, H, chunks, C, 1]

    def __post_init__(self) -> None:
        """Everything that does not depend on the state."""
        self.decay = decay_of(self.g)
        self.q_in, self.k_out = times(self.q, self.decay.into), times(self.k, self.decay.out_of)
        self.written, self.forgotten = self.v, None
        if self.beta is not None:
            self.overlaps = self.decay.scores(self.k, self.k).tril_(-1)
            self.inverse = inverse(self.beta * self.overlaps)
            self.k_in = times(self.k, self.decay.into)
            self.forgotten = self.inverse @ (self.beta * self.k_in)
            self.written = self.inverse @ (self.beta * self.v)

    def run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the state [B, H, K, V] after the last chunk."""
        state = self._carry(state)
        return self.decay.scores(self.q, self.k) @ self.written + self.q_in @ self.states, state

    def _carry(self, state: Tensor) -> Tensor:
        """The state after the last chunk; keeps those before each, and what each token writes."""
        whole, written = self.decay.whole, self.written
        gains = self.k_out.mT @ written if self.forgotten is None else torch.empty(0)
        self.states = state.new_empty(*self.k.shape[:3], *state.shape[-2:])
        if self.forgotten is not None:
            self.written = torch.empty_like(written)
        for i in range(self.k.shape[2]):
            self.states[:, :, i] = state
            if self.forgotten is not None:
                self.written[:, :, i] = written[:, :, i] - self.forgotten[:, :, i] @ state
                gain = self.k_out[:, :, i].mT @ self.written[:, :, i]
            else:
                gain = gains[:, :, i]
            state = gain + (state if whole is None else state * whole[:, :, i])
        return state

    def backward(
        self, state: Tensor, grad: Tensor, grad_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """Gradients of q, k, v, g, beta and the first state, given those of the output and the last state."""
        self._carry(state)
        scores = self.decay.scores(self.q, self.k)
        d_written = scores.mT @ grad
        grads_after, grad_state, d_written = self._carry_back(grad, grad_state, d_written)

        dq, dk = self.decay.scores_backward(self.q, self.k, (grad @ self.written.mT).tril_())
        dq_in, dk_out = grad @ self.states.mT, self.written @ grads_after.mT
        d_into, dv, dbeta = dq_in * self.q_in, d_written, None
        if self.beta is not None:
            d_wanted = self.inverse.mT @ d_written
            d_system = (d_wanted @ self.written.mT).tril_(-1)  # minus the gradient of A
            dv = self.beta * d_wanted
            dk_in = -(dv @ self.states.mT)
            dbeta = ((self.v - self.k_in @ self.states) * d_wanted).sum(-1, keepdim=True)
            dbeta -= (d_system * self.overlaps).sum(-1, keepdim=True)
            for part in self.decay.scores_backward(self.k, self.k, -self.beta * d_system):
                dk += part
            dk += times(dk_in, self.decay.into)
            d_into = d_into + dk_in * self.k_in
        dq += times(dq_in, self.decay.into)
        dk += times(dk_out, self.decay.out_of)
        if self.decay.whole is None:
            return dq, dk, dv, None, dbeta, grad_state
        d_whole = (self.states * grads_after * self.decay.whole).sum(-1)  # [B, H, chunks, K]
        return dq, dk, dv, self.decay.gradient(d_into, dk_out * self.k_out, d_whole), dbeta, grad_state

    def _carry_back(
        self, grad: Tensor, grad_state: Tensor, d_written: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the states after each chunk and before all, and of what each token writes."""
        whole, forgotten = self.decay.whole, self.forgotten
        gains = self.q_in.mT @ grad
        grads_after = torch.empty_like(self.states)
        for i in reversed(range(self.k.shape[2])):
            grads_after[:, :, i] = grad_state
            gain = gains[:, :, i]
            if forgotten is not None:
                d_written[:, :, i] += self.k_out[:, :, i] @ grad_state
                gain = gain - forgotten[:, :, i].mT @ d_written[:, :, i]
            grad_state = gain + (grad_state if whole is None else grad_state * whole[:, :, i])
        if forgotten is None:
            d_written += self.k_out @ grads_after
        return grads_after, grad_state, d_written


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """x, decayed by `factor` if there is one."""
    return x if factor is None else x * factor


def inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1 for a strictly lower triangular [..., C, C], from the inverses of its halves.

    Many small products: torch's triangular solver takes several times as long for chunks.
    """
    size = lower.shape[-1]
    out = torch.eye(size, dtype=lower.dtype, device=lower.device).repeat(*lower.shape[:-2], 1, 1)
    half = 1
    while half < size:
        tiles = out.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
        before, after = (tiles.diagonal(dim1=-6, dim2=-3)[..., i, :, i, :, :].movedim(-1, -3) for i in (0, 1))
        blocks(out, half).copy_(-(after @ (blocks(lower, half) @ before)))
        half *= 2
    return out
