"""Neighborhood attention by its definition: every score, a mask, one softmax. Never optimised.

It keeps all query-key scores, so it is for tiny problems, for checking and for export. Everything is plain
torch: any device, float64, double backward, forward-mode derivatives, vmap, tracing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.ops.neighborhood.geometry import Axis, Bound


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
    """Output `[B, *grid, H, Dv]` and log-sum-exp `[B, *grid, H]`, of checked arguments."""
    wide = torch.promote_types(query.dtype, torch.float32)
    places = query.shape[1:-2]
    num_kv_heads = key.shape[-2]

    window, offsets = _windows(bound, query.device)
    visible = _visible(window, bound, key_mask)  # [B or 1, N, M]
    halo = [pair for axis in reversed(bound.axes) for pair in _halo(axis)]
    key, value = (F.pad(x, (0, 0, 0, 0, *halo)).flatten(1, -3) for x in (key, value))  # [B, M, Hkv, D]
    if additional_keys is not None and additional_values is not None:
        key, value = torch.cat([key, additional_keys], 1), torch.cat([value, additional_values], 1)
        visible = F.pad(visible, (0, additional_keys.shape[1]), value=True)

    query = query.flatten(1, -3).unflatten(2, (num_kv_heads, -1))  # [B, N, Hkv, G, D]
    scores = torch.einsum("bnhgd,bmhd->bhgnm", query.to(wide), key.to(wide)) * scale
    if bias is not None:
        entries: tuple[slice | Tensor, ...] = (slice(None), *offsets)
        table = bias.to(wide)[entries].flatten(1 + len(places)).flatten(1, -2)  # [H, N, M]
        table = table.masked_fill(~window, 0)  # a sink outside the window has no offset in the table
        table = F.pad(table, (0, scores.shape[-1] - table.shape[-1]))
        scores = scores + table.unflatten(0, (num_kv_heads, -1))
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    if sink_logits is not None:  # one more key, with this logit and the value zero
        logits = sink_logits.to(wide).reshape(num_kv_heads, -1, 1, 1)
        scores = torch.cat([scores, logits.expand(*scores.shape[:-1], 1)], -1)
        value = F.pad(value, (0, 0, 0, 0, 0, 1))

    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    unseeing = total == 0
    total = total.masked_fill(unseeing, 1)
    lse = (total.log() + top).masked_fill(unseeing, -torch.inf).squeeze(-1)  # [B, Hkv, G, N]
    weights = (weights / total).to(value.dtype).to(wide)
    out = torch.einsum("bhgnm,bmhd->bnhgd", weights, value.to(wide)).to(value.dtype)
    out = out.flatten(2, 3).unflatten(1, places)
    return out, lse.flatten(1, 2).transpose(1, 2).unflatten(1, places).reshape(*out.shape[:-1])


def _halo(axis: Axis) -> tuple[int, int]:
    """Zero keys before and after an axis that windows may reach."""
    reach = (axis.kernel_size - 1) * axis.dilation if axis.border == "pad" else 0
    return reach, 0 if axis.is_causal else reach


def _windows(bound: Bound, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Which keys (zero keys outside included) lie in each query's window `[N, M]`; per axis the index of
    their offset in a bias table, shaped to broadcast over `[*query grid, *key grid]`."""
    rank = len(bound.axes)
    window, offsets = torch.ones((), dtype=torch.bool, device=device), []
    for number, axis in enumerate(bound.axes):
        before, after = _halo(axis)
        i = torch.arange(bound.offset if rank == 1 else 0, axis.size, device=device)[:, None]
        j = torch.arange(-before, axis.size + after, device=device)
        start, end = axis.interval(i // axis.dilation, i % axis.dilation)
        at = j // axis.dilation
        inside = (i % axis.dilation == j % axis.dilation) & (start <= at) & (at < end)  # [n, m]
        shape = [1] * (2 * rank)
        shape[number], shape[rank + number] = inside.shape
        window = window & inside.reshape(shape)
        offset = (at - i // axis.dilation + axis.kernel_size - 1).clamp(0, 2 * axis.kernel_size - 2)
        offsets.append(offset.reshape(shape))
    return window.flatten(rank).flatten(0, -2), offsets


def _visible(window: Tensor, bound: Bound, key_mask: Tensor | None) -> Tensor:
    """Which keys each query sees: its window and the sinks, unless masked `[B or 1, N, M]`."""
    halo = [pair for axis in reversed(bound.axes) for pair in _halo(axis)]
    visible = window[None]
    if key_mask is None and not bound.pattern.num_sinks:
        return visible
    if key_mask is None:
        key_mask = torch.ones((1, *bound.grid), dtype=torch.bool, device=window.device)
    if bound.pattern.num_sinks:
        sink = key_mask & (key_mask.cumsum(1) <= bound.pattern.num_sinks)
        sink = F.pad(sink, halo)[:, None]
        if bound.axes[0].is_causal:
            i = torch.arange(bound.offset, bound.axes[0].size, device=window.device)[:, None]
            sink = sink & (torch.arange(-halo[0], bound.axes[0].size, device=window.device) <= i)
        visible = visible | sink
    return visible & F.pad(key_mask, halo, value=True).flatten(1)[:, None]
