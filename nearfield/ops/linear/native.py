"""Linear attention by the C++ kernels of csrc/: on a CPU, step by step, forward and backward, any strides.

States are float32 whatever the inputs are. A step costs three multiplications for each number of the state,
at any length, and a backward about four times as much; it keeps a state for every 64th token of the heads
that are at work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from nearfield.core import library
from nearfield.ops.kernels import DTYPES, call, no_second_derivative, side_by_side

NAME = "nearfield::native_linear"
INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? beta, Tensor? g, Tensor? initial_state, float scale"
FORWARD = f"({INPUTS}) -> (Tensor, Tensor)"
BACKWARD = (
    f"(Tensor grad, Tensor? grad_final_state, {INPUTS}, bool want_g, bool want_initial_state) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
NUM_TENSORS = 6  # among INPUTS

RESULTS = ("grad_out", "grad_query", "grad_key", "grad_value", "grad_beta", "grad_g")
PLACE = Struct("6q")  # nearfield_tensor
MISFIT = (
    "The tensors do not fit one another. Call the functions of nearfield.ops.linear, which say what is wrong."
)


def gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] of S = exp(g) S + k v, o = scale q S, and the last S [B, H, K, V].

    `g` is [B, T, H], or [B, T, H, K] with a decay for each channel of the keys, or None.
    """
    return _forward(query, key, value, None, g, initial_state, scale)


def delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] of S = exp(g) S, then S += beta k (v - k S), o = scale q S, and the last S.

    `beta` is [B, T, H]; `g` as in `gated`.
    """
    return _forward(query, key, value, beta, g, initial_state, scale)


@torch.library.custom_op(NAME, mutates_args=(), device_types="cpu", schema=FORWARD)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    out, final_state = _results(*inputs)
    problem, given = _describe(*inputs)
    if not out.numel():
        initial_state = given[-1]
        return out, final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    _point(problem, "out", out)
    problem.final_state = final_state.data_ptr()
    call("nearfield_linear_forward", problem)
    return out, final_state


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), device_types="cpu", schema=BACKWARD)
def _backward(
    grad: Tensor, grad_final_state: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *inputs, want_g, want_initial_state = arguments
    beta, g, initial_state = inputs[3:NUM_TENSORS]
    problem, given = _describe(*inputs)
    out, state = _results(*inputs)
    if grad.shape != out.shape or grad.dtype != out.dtype:
        raise ValueError(MISFIT)
    if grad_final_state is not None:
        grad_final_state = grad_final_state.to(torch.float32).contiguous()
        if grad_final_state.shape != state.shape:
            raise ValueError(MISFIT)
    grads = [x.new_empty(x.shape) for x in inputs[:3]]
    grad_beta = grad.new_empty(0) if beta is None else beta.new_empty(beta.shape, dtype=torch.float32)
    g_read = given[4]
    grad_g = grad.new_empty(0) if g_read is None else g_read.new_empty(g_read.shape if want_g else 0)
    grad_state = grad.new_empty(0)
    if initial_state is not None:
        grad_state = state if want_initial_state else state.new_empty(0)
    if out.numel():
        grad = side_by_side(grad)
        for name, x in zip(RESULTS, (grad, *grads, grad_beta, grad_g), strict=True):
            if x.numel():
                _point(problem, name, x)
        if grad_final_state is not None:
            problem.grad_final_state = grad_final_state.data_ptr()
        if grad_state.numel():
            problem.grad_initial_state = grad_state.data_ptr()
        call("nearfield_linear_backward", problem)
    else:
        for x in (*grads, grad_beta, grad_g):
            x.zero_()
        if grad_state.numel():
            grad_state.zero_() if grad_final_state is None else grad_state.copy_(grad_final_state)
    return (
        *grads,
        grad_beta if beta is None else grad_beta.to(beta.dtype),
        grad_g if g is None else grad_g.to(g.dtype),
        grad_state if initial_state is None else grad_state.to(initial_state.dtype),
    )


@_forward.register_fake
def _results(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Memory for the output and the state, by the query: a default device may be set elsewhere."""
    (batch, length, heads, dim), dv = query.shape, value.shape[-1]
    state = query.new_empty((batch, heads, dim, dv), dtype=torch.float32)
    return query.new_empty((batch, length, heads, dv)), state


@_backward.register_fake
def _(grad: Tensor, grad_final_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, _, want_g, want_initial_state = arguments
    wanted = (True, True, True, True, want_g, want_initial_state)
    return tuple(
        grad.new_empty(0) if x is None else x.new_empty(x.shape if is_wanted else 0)
        for x, is_wanted in zip(inputs, wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_final_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, _, value, *_ = tensors = ctx.saved_tensors
    needed = ctx.needs_input_grad[:NUM_TENSORS]
    if grad is None and grad_final_state is None:
        return (None,) * (NUM_TENSORS + 1)
    if grad is None:
        grad = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    wanted = [x is not None and n for x, n in zip(tensors, needed, strict=True)]
    found = _backward(grad, grad_final_state, *tensors, ctx.scale, *wanted[-2:])
    return *(x if n else None for x, n in zip(found, wanted, strict=True)), None


def _fold(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, Any]]:
    """vmap by a larger batch."""

    def mapped(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        folded = list(args)
        for i, (x, dim) in enumerate(zip(args, in_dims, strict=True)):
            if isinstance(x, Tensor):
                x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                folded[i] = x.flatten(0, 1)
        found = op(*folded)
        # a gradient that is not there has no batch
        there = [x.dim() > 1 for x in found]
        return tuple(
            x.unflatten(0, (info.batch_size, -1)) if is_there else x
            for x, is_there in zip(found, there, strict=True)
        ), tuple(0 if is_there else None for is_there in there)

    return mapped


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative)
_forward.register_vmap(_fold(_forward))
_backward.register_vmap(_fold(_backward))


def _describe(*inputs: Any) -> tuple[Any, list[Tensor | None]]:
    """The problem without results, checked, for kernels trust it; and its tensors as they read them."""
    query, key, value, beta, g, initial_state, scale = inputs
    g = g if g is None or g.dtype in DTYPES else g.to(torch.float32)
    given = [
        side_by_side(query),
        side_by_side(key),
        side_by_side(value),
        beta if beta is None or beta.dtype == torch.float32 else beta.to(torch.float32),
        g if g is None or g.dim() == 3 else side_by_side(g),
        initial_state if initial_state is None else initial_state.to(torch.float32).contiguous(),
    ]
    specs = tuple([None if x is None else (x.shape, x.dtype) for x in given])
    problem = library.Linear.from_buffer_copy(_blank(specs, scale))
    if query.numel() and value.numel():
        for name, x in zip(("query", "key", "value", "beta", "g"), given, strict=False):
            if x is not None:
                _point(problem, name, x)
        if initial_state is not None:
            problem.initial_state = given[-1].data_ptr()
    return problem, given


@lru_cache(maxsize=1024)
def _blank(specs: tuple[Any, ...], scale: float) -> bytes:
    """A problem without its tensors, whose shapes and dtypes are `specs`."""
    (query, dtype), (key, key_dtype), (value, value_dtype), beta, g, initial_state = specs
    (batch, length, heads, dim), dv = query, value[-1]
    tokens = (batch, length, heads)
    fits = (
        key == query and value == (*tokens, dv) and dtype == key_dtype == value_dtype and dtype in DTYPES,
        beta is None or beta[0] == tokens,
        g is None or g[0] in (tokens, (*tokens, dim)),
        initial_state is None or initial_state[0] == (batch, heads, dim, dv),
    )
    if not all(fits):
        raise ValueError(MISFIT)
    g_dtype, gates = (0, 0) if g is None else (DTYPES[g[1]], 1 if len(g[0]) == 3 else dim)
    return bytes(library.Linear(DTYPES[dtype], g_dtype, gates, batch, length, heads, dim, dv, scale))


def _point(problem: Any, name: str, x: Tensor) -> None:
    """Fill in a nearfield_tensor: [B, T, H] or [B, T, H, D], with tokens on axis x. ctypes takes longer."""
    batch, token, head, *_ = x.stride()
    at = getattr(library.Linear, name).offset
    PLACE.pack_into(problem, at, x.data_ptr(), batch, 0, 0, token, head)
