"""What both opaque operators share, whatever computes them: schemas, fakes, derivatives, vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? g, Tensor? beta, Tensor? initial_state"
NUM_TENSORS = 6
NUM_CONSTANTS = 3
# `chunk` tokens go through at once; for the backward the state is kept before every `stretch` tokens and at
# the end. (With the end there are two at least: torch would take a count of one for a constant.)
CONSTANTS = "float scale, SymInt chunk, SymInt stretch"
FORWARD = f"({TENSORS}, {CONSTANTS}) -> (Tensor, Tensor, Tensor)"  # output, last state, states kept
BACKWARD = (
    f"(Tensor grad, Tensor grad_state, Tensor states, {TENSORS}, {CONSTANTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def state_dtype(x: Tensor) -> torch.dtype:
    """Of states and sums: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def register(backend: str, forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Give an operator and its backward, which have the schemas above, all that torch asks of them."""

    def differentiate(
        ctx: Any, grad: Tensor | None, grad_state: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        states, *tensors = ctx.saved_tensors
        query, value = tensors[0], tensors[2]
        grad = value.new_zeros(*query.shape[:-1], value.shape[-1]) if grad is None else grad
        grad_state = torch.zeros_like(states[:, :, 0]) if grad_state is None else grad_state
        found = backward(grad, grad_state, states, *tensors, *ctx.constants)
        grads = (None if x is None else g for g, x in zip(found, tensors, strict=True))
        return (*grads, *(None,) * NUM_CONSTANTS)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f'The "{backend}" backend has no second derivatives. '
            'Call with backend="reference", which has them.'
        )

    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(differentiate, setup_context=_save)
    backward.register_autograd(refuse)
    forward.register_vmap(_as_batch(forward, NUM_TENSORS))
    backward.register_vmap(_as_batch(backward, 3 + NUM_TENSORS))


def _as_batch(op: CustomOpDef, num_tensors: int) -> Callable[..., tuple[Any, Any]]:
    """vmap by a larger batch, with which all tensors begin."""

    def call(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        folded = list(args)
        for i in range(num_tensors):
            x, dim = args[i], in_dims[i]
            if x is not None:
                x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                folded[i] = x.flatten(0, 1)
        found = op(*folded)  # a result of one dimension stands for an absent gradient
        parts = tuple(x.unflatten(0, (info.batch_size, -1)) if x.dim() > 1 else x for x in found)
        return parts, tuple(0 if x.dim() > 1 else None for x in found)

    return call


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, tokens, heads, dim), dv, stretch = query.shape, value.shape[-1], rest[-1]
    kept = (tokens + stretch - 1) // stretch + 1
    return (
        value.new_empty(batch, tokens, heads, dv),
        query.new_empty(batch, heads, dim, dv, dtype=state_dtype(query)),
        query.new_empty(batch, heads, kept, dim, dv, dtype=state_dtype(query)),
    )


def _fake_backward(grad: Tensor, grad_state: Tensor, states: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(states.new_empty(0) if x is None else x.new_empty(x.shape) for x in rest[:NUM_TENSORS])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2], *inputs[:NUM_TENSORS])
    ctx.constants = inputs[NUM_TENSORS:]
    ctx.set_materialize_grads(False)
