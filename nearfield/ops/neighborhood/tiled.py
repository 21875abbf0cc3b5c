"""Neighborhood attention in tiles: pure torch, any device, forward and backward, memory linear in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.ops.neighborhood.geometry import Axis, Bound, Neighborhood
from nearfield.ops.neighborhood.tiled_blocks import Upstream, sum_dtype
from nearfield.ops.neighborhood.tiled_boxes import (
    Sinks,
    boxes_backward,
    boxes_forward,
    far_backward,
    far_forward,
)
from nearfield.ops.neighborhood.tiled_causal import causal_backward, causal_forward, fits

NAME = "nearfield::tiled_attention"
# Schemas in words: torch cannot infer them where a checker of annotations has wrapped the functions.
PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values, "
    "Tensor? bias, Tensor? key_mask, Tensor? sink_logits, SymInt[] kernel_size, SymInt[] stride, "
    "SymInt[] dilation, bool[] is_causal, str border, SymInt num_sinks, float scale"
)
FORWARD = f"({PROBLEM}) -> (Tensor, Tensor)"
BACKWARD = (
    f"(Tensor grad, Tensor? grad_lse, Tensor out, Tensor lse, {PROBLEM}, bool want_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def supports(query: Tensor, key: Tensor, value: Tensor, bound: Bound, **options: object) -> str | None:
    """None: every pattern, option, dtype and device runs here."""
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, *grid, H, Dv] and log-sum-exp [B, *grid, H], of checked arguments."""
    axes, pattern = bound.axes, bound.pattern
    return _forward(
        query,
        key,
        value,
        additional_keys,
        additional_values,
        bias,
        key_mask,
        sink_logits,
        [axis.kernel_size for axis in axes],
        [axis.stride for axis in axes],
        [axis.dilation for axis in axes],
        [axis.is_causal for axis in axes],
        pattern.border,
        pattern.num_sinks,
        scale,
    )


@torch.library.custom_op(NAME, mutates_args=(), schema=FORWARD)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    sink_logits: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    border: str,
    num_sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    bound = _bound(query, key, kernel_size, stride, dilation, is_causal, border, num_sinks)
    places, dv = query.shape[1:-2], value.shape[-1]
    q, k, v, more_k, more_v = _operands(query, key, value, additional_keys, additional_values)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=sum_dtype(q.dtype))
    if q.numel():
        mask = None if key_mask is None else key_mask.flatten(1)
        kind = _kind(bound, bias, key_mask)
        if kind == "text":
            causal_forward(q, k, v, bound, scale, out, lse)
        elif kind == "boxes":
            boxes_forward(q, k, v, bound, bias, mask, scale, out, lse)
        else:
            far_forward(q, k, v, None, scale, out.zero_(), lse.fill_(-torch.inf))
        if num_sinks and kind == "boxes":
            sinks = Sinks(bound, mask, q.device)
            far_forward(q, sinks.gather(k), sinks.gather(v), sinks, scale, out, lse)
        if more_k is not None and more_v is not None and more_k.shape[1]:
            far_forward(q, more_k, more_v, None, scale, out, lse)
        if sink_logits is not None:
            total = torch.logaddexp(lse, sink_logits.to(lse.dtype))
            out.mul_(torch.exp(lse - total).unsqueeze(-1))
            lse = total
    return out[..., :dv].to(query.dtype).contiguous().unflatten(1, places), lse.unflatten(1, places)


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), schema=BACKWARD)
def _backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    sink_logits: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    border: str,
    num_sinks: int,
    scale: float,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    bound = _bound(query, key, kernel_size, stride, dilation, is_causal, border, num_sinks)
    q, k, v, more_k, more_v, g, o = _widened(
        _operands(query, key, value, additional_keys, additional_values, grad, out)
    )
    statistics = lse.flatten(1, -2)
    statistics = statistics.masked_fill(statistics == -torch.inf, 0)  # a row without keys: exp(-inf - 0) = 0
    g_lse = None if grad_lse is None else grad_lse.flatten(1, -2).to(statistics.dtype)
    if g_lse is not None:
        g_lse = g_lse.masked_fill(lse.flatten(1, -2) == -torch.inf, 0)
        g_lse = g_lse if bool(g_lse.any()) else None
    up = Upstream(g, g_lse, o, statistics)
    wide = sum_dtype(q.dtype)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    more = (dk.new_empty(0), dv.new_empty(0))
    table = None if bias is None or not want_bias else bias.new_zeros(bias.flatten(1).shape, dtype=wide)
    logits = dk.new_empty(0)
    if q.numel():
        mask = None if key_mask is None else key_mask.flatten(1)
        kind = _kind(bound, bias, key_mask)
        if kind == "text":
            causal_backward(q, k, v, up, bound, scale, (dq, dk, dv))
        elif kind == "boxes":
            boxes_backward(q, k, v, up, bound, bias, mask, scale, (dq, dk, dv), table)
        else:
            dk, dv = far_backward(q, k, v, up, None, scale, dq)
        if num_sinks and kind == "boxes":
            sinks = Sinks(bound, mask, q.device)
            few = (sinks.gather(k), sinks.gather(v))
            parts = far_backward(q, *few, up, sinks, scale, dq)
            for total, part in zip((dk, dv), parts, strict=True):
                sinks.add_to(total, part)
    if more_k is not None and more_v is not None:
        more = far_backward(q, more_k, more_v, up, None, scale, dq)
    if sink_logits is not None:
        delta = (g.to(wide) * o).sum(-1)
        delta = delta if g_lse is None else delta - g_lse
        logits = -(torch.exp(sink_logits.to(wide) - lse.flatten(1, -2)) * delta).sum((0, 1))
    grads = [
        x[..., : like.shape[-1]].reshape(like.shape).to(like.dtype)
        for x, like in ((dq, query), (dk, key), (dv, value))
    ]
    for x, like in ((more[0], additional_keys), (more[1], additional_values)):
        grads.append(
            query.new_empty(0) if like is None else x[..., : like.shape[-1]].to(like.dtype).contiguous()
        )
    grads.append(query.new_empty(0) if table is None else table.reshape(bias.shape).to(bias.dtype))
    grads.append(query.new_empty(0) if sink_logits is None else logits.to(sink_logits.dtype))
    return tuple(x.contiguous() for x in grads)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=sum_dtype(query.dtype))
    return query.new_empty(*query.shape[:-1], value.shape[-1]), lse


@_backward.register_fake
def _(grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: object) -> tuple[Tensor, ...]:
    inputs, want_bias = [*rest[:6], rest[7]], rest[-1]
    like = [x if isinstance(x, Tensor) else None for x in inputs]
    like[5] = like[5] if want_bias else None
    return tuple(grad.new_empty(0) if x is None else x.new_empty(x.shape) for x in like)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.geometry = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple:
    out, lse, *tensors = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 15
    grad = torch.zeros_like(out) if grad is None else grad
    want_bias = tensors[5] is not None and ctx.needs_input_grad[5]
    found = _backward(grad, grad_lse, out, lse, *tensors, *ctx.geometry, want_bias)
    found = [*found[:6], None, found[6]]
    needed = [
        x if x is not None and need else None for x, need in zip(found, ctx.needs_input_grad[:8], strict=True)
    ]
    return *needed, *([None] * 7)


def _no_double_backward(ctx: Any, *grads: Tensor) -> tuple:
    raise NotImplementedError(
        'The "tiled" backend has no second derivatives. Call with backend="reference", which has them.'
    )


def _each(op: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: tuple, args: tuple) -> tuple:
    """vmap by a loop."""
    found = [
        op(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])


@_forward.register_vmap
def _(info: Any, in_dims: tuple, *args: Any) -> tuple:
    """vmap by a larger batch, unless bias or sink logits, which have no batch, are mapped over."""
    if in_dims[5] is not None or in_dims[7] is not None:
        return _each(_forward, info, in_dims, args)
    folded = list(args)
    for i in (0, 1, 2, 3, 4, 6):
        x, dim = args[i], in_dims[i]
        if x is not None:
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            folded[i] = x.flatten(0, 1)
    found = _forward(*folded)
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0, 0)


@_backward.register_vmap
def _(info: Any, in_dims: tuple, *args: Any) -> tuple:
    return _each(_backward, info, in_dims, args)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_no_double_backward)


def _bound(
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    border: str,
    num_sinks: int,
) -> Bound:
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


def _kind(bound: Bound, bias: Tensor | None, key_mask: Tensor | None) -> str:
    """Which way a problem goes: "dense" (all see all), "text" (a sliding causal window) or "boxes"."""
    if bias is None and key_mask is None and all(_sees_all(axis) for axis in bound.axes):
        return "dense"
    return "text" if fits(bound, bias, key_mask) else "boxes"


def _sees_all(axis: Axis) -> bool:
    if axis.is_causal or axis.dilation > 1 or axis.border == "pad":
        return False
    return axis.interval(0)[1] >= axis.size and axis.interval(axis.size - 1)[0] <= 0


def _operands(*tensors: Tensor | None) -> list[Any]:
    """The tensors as [B, tokens, heads, D] with one D: the narrower of keys and values gain zeros."""
    dim = max(x.shape[-1] for x in tensors if x is not None)
    flat = [None if x is None else x.flatten(1, -3) for x in tensors]
    return [x if x is None or x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1])) for x in flat]


def _widened(tensors: list[Any]) -> list[Any]:
    """On a CPU in float32 at least: the fused backward is up to three times slower in half precision."""
    return [x if x is None or x.device.type != "cpu" else x.to(sum_dtype(x.dtype)) for x in tensors]
