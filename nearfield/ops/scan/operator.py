"""What scans opaque to torch share, whatever computes them: schemas, fakes, derivatives, vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from nearfield.ops.neighborhood.operator import each

NUM_TENSORS = 9  # that the operators begin with
D, Z, DT_BIAS, INITIAL_STATE = 5, 6, 7, 8  # their places among these
TIMED = (0, 1, 3, 4, Z)  # those with a batch and tokens
# Schemas in words: torch cannot infer them where a checker of annotations has wrapped the functions.
PROBLEM = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_state, SymInt[]? cu_seqlens, bool dt_softplus, bool reverse"
)
FORWARD = f"({PROBLEM}, bool keep) -> (Tensor, Tensor, Tensor)"
BACKWARD = (
    f"(Tensor? grad, Tensor? grad_final_state, Tensor chunk_states, {PROBLEM}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

Shapes = Callable[..., tuple[int, ...]]


def num_sequences(x: Tensor, cu_seqlens: Any) -> int:
    """How many runs of tokens have a state of their own."""
    return x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def register(backend: str, forward: CustomOpDef, backward: CustomOpDef, chunk_states: Shapes) -> None:
    """Give an operator and its backward all that torch asks of them.

    `chunk_states(x, A, B, cu_seqlens)` is the shape of the states that are kept for the backward.
    """

    def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, _, A, B, *_ = arguments
        return results(x, A, chunk_states(x, A, B, arguments[9]) if arguments[12] else (0,), arguments[9])

    def fake_backward(grad: Any, grad_state: Any, kept: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return gradients(arguments)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[2], *inputs[:NUM_TENSORS])
        ctx.rest = inputs[NUM_TENSORS:-1]
        ctx.set_materialize_grads(False)

    def differentiate(
        ctx: Any, grad: Tensor | None, grad_state: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept, *tensors = ctx.saved_tensors
        nothing = (None,) * (len(ctx.rest) + 1)
        if grad is None and grad_state is None:
            return (None,) * NUM_TENSORS + nothing
        found = backward(grad, grad_state, kept, *tensors, *ctx.rest)
        needed = zip(found, tensors, ctx.needs_input_grad, strict=False)
        return *(g if x is not None and n else None for g, x, n in needed), *nothing

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f'The "{backend}" backend has no second derivatives. '
            'Call with backend="reference", which has them.'
        )

    def map_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        tables = any(in_dims[i] is not None for i in (2, D, DT_BIAS))
        if tables or args[9] is not None or args[12]:  # kept states lie in an order of their own
            return each(forward, info, in_dims, args)
        folded = list(args)
        for i in (*TIMED, INITIAL_STATE):
            if args[i] is not None:
                x, dim = args[i], in_dims[i]
                x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                folded[i] = x.flatten(0, 1)
        out, state, kept = forward(*folded)
        out, state = (x.unflatten(0, (info.batch_size, -1)) for x in (out, state))
        return (out, state, kept.expand(info.batch_size, 0)), (0, 0, 0)

    def map_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return each(backward, info, in_dims, args)

    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(refuse)
    forward.register_vmap(map_forward)
    backward.register_vmap(map_backward)


def results(
    x: Tensor, A: Tensor, chunk_states: tuple[int, ...], cu_seqlens: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the output, the last states and the kept ones."""
    final = (num_sequences(x, cu_seqlens), *A.shape)
    return (
        x.new_empty(x.shape),
        x.new_empty(final, dtype=torch.float32),
        x.new_empty(chunk_states, dtype=torch.float32),
    )


def gradients(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Memory for the gradient of each of the tensors; an empty one for those that are not there."""
    like = arguments[:NUM_TENSORS]
    return tuple(like[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in like)
