"""Neighborhood attention in tiles: pure torch, any device, forward and backward, memory linear in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.ops.neighborhood import operator
from nearfield.ops.neighborhood.geometry import Axis, Bound
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
FORWARD, BACKWARD = operator.schemas()


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
    return _forward(
        query,
        key,
        value,
        additional_keys,
        additional_values,
        bias,
        key_mask,
        sink_logits,
        *operator.pattern_arguments(bound),
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
    bound = operator.bound_again(query, key, kernel_size, stride, dilation, is_causal, border, num_sinks)
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
    bound = operator.bound_again(query, key, kernel_size, stride, dilation, is_causal, border, num_sinks)
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


operator.register("tiled", _forward, _backward)


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
