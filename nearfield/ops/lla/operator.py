"""What the operators opaque to torch share, whatever computes them: a schema, fakes, derivatives, vmap.

One operator serves softmax with a given correction and with one that is solved for: a `ridge` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef

from nearfield.ops.lla.solver import Settled
from nearfield.ops.neighborhood.geometry import Border, Bound, Neighborhood

NUM_TENSORS = 6  # that the operators' problem begins with
PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? ridge, Tensor? correction, Tensor? key_mask, "
    "SymInt kernel_size, bool is_causal, str border, SymInt num_sinks, "
    "str method, SymInt max_iterations, float tolerance, bool wide, bool detached, float scale"
)
FORWARD = f"({PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD = (
    f"(Tensor grad, Tensor solved, Tensor lse, Tensor key_mean, Tensor value_mean, {PROBLEM}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Options(NamedTuple):
    """What follows the tensors, as the schema names it."""

    kernel_size: int
    is_causal: bool
    border: Border
    num_sinks: int
    method: str
    max_iterations: int
    tolerance: float
    wide: bool
    detached: bool
    scale: float

    def settled(self, query: Tensor) -> Settled:
        """The solver again."""
        dtype = torch.float64 if self.wide else torch.promote_types(query.dtype, torch.float32)
        return Settled(self.method, self.max_iterations, self.tolerance, dtype)

    def bound(self, query: Tensor, key: Tensor) -> Bound:
        """The geometry again, on the keys."""
        pattern = Neighborhood(
            self.kernel_size, is_causal=self.is_causal, border=self.border, num_sinks=self.num_sinks
        )
        return pattern.on(key.shape[1], num_queries=query.shape[1])


def options(bound: Bound, how: Settled, detached: bool, scale: float) -> Options:
    """Of a problem that `misfit` lets pass."""
    axis, pattern = bound.axes[0], bound.pattern
    wide = how.dtype == torch.float64
    return Options(
        axis.kernel_size, axis.is_causal, axis.border, pattern.num_sinks, *how[:3], wide, detached, scale
    )


def misfit(bound: Bound) -> str | None:
    """Why the operators cannot take this geometry, or None."""
    axis = bound.axes[0]
    if len(bound.axes) > 1:
        return f"it takes one dimension, given {len(bound.axes)}."
    if axis.stride > 1 or axis.dilation > 1:
        return f"it takes stride 1 and dilation 1, given {axis.stride} and {axis.dilation}."
    return None


def register(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Give an operator and its backward, of schemas FORWARD and BACKWARD, all that torch asks of them."""

    def differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        *results, query, key, value, ridge, correction, key_mask = ctx.saved_tensors
        found = backward(grad, *results, query, key, value, ridge, correction, key_mask, *ctx.rest)
        needed = (
            g if x is not None and n else None
            for g, x, n in zip(
                found, (query, key, value, ridge, correction), ctx.needs_input_grad, strict=False
            )
        )
        return *needed, None, *((None,) * len(ctx.rest))

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            'Fast local linear attention has no second derivatives. Call with backend="reference", which has.'
        )

    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(differentiate, setup_context=_save)
    backward.register_autograd(refuse)
    forward.register_vmap(_folded(forward, NUM_TENSORS))
    backward.register_vmap(_folded(backward, 5 + NUM_TENSORS))


def _folded(op: Callable[..., tuple[Tensor, ...]], tensors: int) -> Callable[..., Any]:
    """vmap by a larger batch, with which every tensor begins."""

    def call(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        folded = list(args)
        for i, (x, dim) in enumerate(zip(args[:tensors], in_dims, strict=False)):
            if x is not None:
                x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                folded[i] = x.flatten(0, 1)
        found = op(*folded)
        apart = (info.batch_size, -1)
        unfolded = tuple(x.unflatten(0, apart) if x.dim() > 1 else x.expand(apart) for x in found)
        return unfolded, (0,) * len(found)

    return call


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, ridge: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    wide = Options(*rest[2:]).settled(query).dtype
    rows, dv = query.shape[:-1], value.shape[-1]
    return (
        query.new_empty(*rows, dv),
        query.new_empty(*rows, query.shape[-1], dtype=wide) if ridge is not None else query.new_empty(0),
        query.new_empty(rows, dtype=wide),
        query.new_empty(*rows, query.shape[-1], dtype=wide),
        query.new_empty(*rows, dv, dtype=wide),
    )


def _fake_backward(
    grad: Tensor, solved: Tensor, lse: Tensor, key_mean: Tensor, value_mean: Tensor, *problem: Any
) -> tuple[Tensor, ...]:
    return tuple(grad.new_empty(0) if x is None else x.new_empty(x.shape) for x in problem[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:NUM_TENSORS])
    ctx.rest = inputs[NUM_TENSORS:]
    ctx.set_materialize_grads(False)
