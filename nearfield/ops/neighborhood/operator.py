"""What operators opaque to torch share, whatever computes them: schemas, fakes, derivatives, vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from nearfield.ops.neighborhood.geometry import Border, Bound, Neighborhood

NUM_TENSORS = 8  # that a forward operator begins with
BIAS, KEY_MASK, SINK_LOGITS = 5, 6, 7  # their places among these
# Schemas in words: torch cannot infer them where a checker of annotations has wrapped the functions.
TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values, "
    "Tensor? bias, Tensor? key_mask, Tensor? sink_logits"
)
PATTERN = (
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] dilation, bool[] is_causal, str border, "
    "SymInt num_sinks, float scale"
)


def schemas(problem: str = f"{TENSORS}, {PATTERN}") -> tuple[str, str]:
    """Of the forward operator on the arguments `problem`, and of its backward."""
    return f"({problem}) -> (Tensor, Tensor)", (
        f"(Tensor grad, Tensor? grad_lse, Tensor out, Tensor lse, {problem}, bool want_bias) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


def bind(geometry: Neighborhood, grid: tuple[int, ...], num_queries: int | None = None) -> Bound:
    """`geometry.on(grid)`, past its cache where sides may be symbols of a trace."""
    if torch.compiler.is_compiling() or any(type(side) is not int for side in (*grid, num_queries or 0)):
        return geometry.bind(grid, num_queries)
    return geometry.on(grid, num_queries=num_queries)


def pattern_arguments(bound: Bound) -> tuple[Any, ...]:
    """What PATTERN names, without the scale."""
    axes, pattern = bound.axes, bound.pattern
    return (
        [axis.kernel_size for axis in axes],
        [axis.stride for axis in axes],
        [axis.dilation for axis in axes],
        [axis.is_causal for axis in axes],
        pattern.border,
        pattern.num_sinks,
    )


def bound_again(
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    border: Border,
    num_sinks: int,
) -> Bound:
    """The geometry that `pattern_arguments` took apart, on the grid of the keys."""
    grid = tuple(key.shape[1:-2])
    pattern = Neighborhood(
        tuple(kernel_size),
        tuple(stride),
        tuple(dilation),
        tuple(is_causal),
        border=border,
        num_sinks=num_sinks,
    )
    return pattern.on(grid, num_queries=query.shape[1] if len(grid) == 1 else None)


def register(backend: str, forward: CustomOpDef, backward: CustomOpDef, *, batched: bool = True) -> None:
    """Give an operator and its backward, which have `schemas()`, all that torch asks of them.

    `batched`: the tensors begin with a batch, which vmap may enlarge.
    """

    def differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        nothing = (None,) * len(ctx.rest)
        if grad is None and grad_lse is None:
            return (None,) * NUM_TENSORS + nothing
        grad = torch.zeros_like(out) if grad is None else grad
        needed = ctx.needs_input_grad
        want_bias = tensors[BIAS] is not None and needed[BIAS]
        found = backward(grad, grad_lse, out, lse, *tensors, *ctx.rest, want_bias)
        found = (*found[:KEY_MASK], None, found[KEY_MASK])
        return (
            *(g if x is not None and n else None for g, x, n in zip(found, tensors, needed, strict=False)),
            *nothing,
        )

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f'The "{backend}" backend has no second derivatives. '
            'Call with backend="reference", which has them.'
        )

    def map_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if not batched or in_dims[BIAS] is not None or in_dims[SINK_LOGITS] is not None:
            return each(forward, info, in_dims, args)  # bias and sink logits have no batch
        folded = list(args)
        for i in (0, 1, 2, 3, 4, KEY_MASK):
            x, dim = args[i], in_dims[i]
            if x is not None:
                x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                folded[i] = x.flatten(0, 1)
        found = forward(*folded)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0, 0)

    def map_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return each(backward, info, in_dims, args)

    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(differentiate, setup_context=_save)
    backward.register_autograd(refuse)
    forward.register_vmap(map_forward)
    backward.register_vmap(map_backward)


def each(
    op: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """vmap by a loop."""
    found = [
        op(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(*query.shape[:-1], value.shape[-1]), lse


def _fake_backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    like, want_bias = [*rest[:KEY_MASK], rest[SINK_LOGITS]], rest[-1]
    like[BIAS] = like[BIAS] if want_bias else None
    return tuple(x.new_empty(x.shape) if isinstance(x, Tensor) else grad.new_empty(0) for x in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:NUM_TENSORS])
    ctx.rest = inputs[NUM_TENSORS:]
    ctx.set_materialize_grads(False)
