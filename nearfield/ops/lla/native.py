"""Local linear attention by the C++ kernels of csrc/lla.h: on a CPU, forward and backward, any strides.

The systems are solved by conjugate gradients in float32. The forward keeps the corrections that it found; the
backward computes the softmax weights again and solves once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfield.core import library
from nearfield.ops.kernels import (
    DTYPES,
    by_batch,
    call,
    missing,
    no_second_derivative,
    side_by_side,
    unfit,
)
from nearfield.ops.neighborhood.geometry import Bound
from nearfield.ops.neighborhood.native import BORDERS

__all__ = ["attend", "missing", "unfit"]

NAME = "nearfield::native_lla"
NUM_TENSORS = 5  # that a problem begins with, the last of them the key mask
PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor ridge, Tensor? key_mask, SymInt kernel_size, "
    "bool is_causal, str border, SymInt max_iterations, float tolerance, float scale"
)
FORWARD = f"({PROBLEM}) -> (Tensor, Tensor)"
BACKWARD = f"(Tensor grad, Tensor correction, {PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor)"
INPUTS = ("query", "key", "value", "ridge")
MISFIT = (
    "The tensors do not fit one another. Call the functions of nearfield.ops.lla, which say what is wrong."
)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    ridge: Tensor,
    key_mask: Tensor | None,
    max_iterations: int,
    tolerance: float,
    scale: float,
) -> Tensor:
    """Output `[B, N, H, Dv]`, differentiable in the tensors and the float32 ridge `[B, N, H]`.

    `bound` is a window or all of one dimension, without sinks; masked keys may hold anything.
    """
    axis = bound.axes[0]
    pattern = (axis.kernel_size, axis.is_causal, axis.border)
    return _forward(query, key, value, ridge, key_mask, *pattern, max_iterations, tolerance, scale)[0]


@torch.library.custom_op(NAME, mutates_args=(), device_types="cpu", schema=FORWARD)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    results = _results(*arguments[:3])
    _run("nearfield_lla_forward", arguments, dict(zip(("out", "correction"), results, strict=True)))
    return results


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), device_types="cpu", schema=BACKWARD)
def _backward(grad: Tensor, correction: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    query, value = arguments[0], arguments[2]
    fits = grad.shape == (*query.shape[:-1], value.shape[-1]) and grad.dtype == query.dtype
    if not fits or correction.shape != query.shape or correction.dtype != torch.float32:
        raise ValueError(MISFIT)
    grads = _gradients(arguments)
    results = {f"grad_{name}": x for name, x in zip(INPUTS, grads, strict=True)}
    _run("nearfield_lla_backward", arguments, {"grad_out": grad, "correction": correction, **results})
    if not query.numel():  # no query sees the keys
        for x in grads:
            x.zero_()
    return grads


def _results(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape, dtype=torch.float32)


def _gradients(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[: len(INPUTS)])


def _run(name: str, arguments: tuple[Any, ...], results: dict[str, Tensor]) -> None:
    """Call a kernel, which trusts its arguments: they are checked here."""
    query, key, value, ridge, key_mask, kernel_size, is_causal, border, iterations, tolerance, scale = (
        arguments
    )
    (batch, rows, heads, dim), (_, keys, kv_heads, _) = query.shape, key.shape
    if (
        key.shape != (batch, keys, kv_heads, dim)
        or value.shape[:-1] != key.shape[:-1]
        or ridge.shape != query.shape[:-1]
        or not query.dtype == key.dtype == value.dtype
        or ridge.dtype != torch.float32
        or not (key_mask is None or (key_mask.shape == (batch, keys) and key_mask.dtype == torch.bool))
        or heads % kv_heads
        or rows > keys
        or (rows < keys and not is_causal)
        or (border == "shift" and not is_causal and kernel_size > keys)
    ):
        raise ValueError(MISFIT)
    if not query.numel():
        return
    problem = library.LocalLinear(
        dtype=DTYPES[query.dtype],
        border=BORDERS[border],
        batch=batch,
        num_queries=rows,
        num_keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        value_dim=value.shape[-1],
        kernel_size=kernel_size,
        is_causal=is_causal,
        max_iterations=iterations,
        tolerance=tolerance,
        scale=scale,
    )
    held = []  # copies must outlive the call
    for field, x in (*zip(INPUTS, arguments, strict=False), *results.items()):
        if "ridge" not in field:  # which has no channels
            x = side_by_side(x)
            held.append(x)
        first, token, head = x.stride()[:3]
        setattr(problem, field, (x.data_ptr(), (first, 0, 0, token, head)))
    if key_mask is not None:
        held.append(key_mask.contiguous())
        problem.key_mask = held[-1].data_ptr()
    call(name, problem)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _results(query, key, value)


@_backward.register_fake
def _(grad: Tensor, correction: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _gradients(arguments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:NUM_TENSORS])
    ctx.rest = inputs[NUM_TENSORS:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (1 + len(ctx.rest))
    if grad is None:
        return (None,) * len(INPUTS) + nothing
    found = _backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *(x if n else None for x, n in zip(found, ctx.needs_input_grad, strict=False)), *nothing


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative)
_forward.register_vmap(by_batch(_forward, NUM_TENSORS))
_backward.register_vmap(by_batch(_backward, 2 + NUM_TENSORS))
