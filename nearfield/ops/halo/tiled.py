"""Halo attention in pure torch: each block is one entry of a batch of torch's fused attention.

The windows of keys are copied, with the position logits as further channels; scores are never kept. Where
no derivatives are asked for, only the copies of a few rows of blocks exist at a time.
"""

from __future__ import annotations

from itertools import chain, product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nearfield.ops.halo.blocks import Blocks
from nearfield.ops.halo.positions import axis_logits, one_hot

BLOCKS = {1: "b (nx x) h d -> (b nx) h x d", 2: "b (ny y) (nx x) h d -> (b ny nx) h (y x) d"}
AXES = "yx"
AT_ONCE = 1 << 23  # numbers in the copies of keys that exist at a time, where no derivatives keep them


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    tables: tuple[Tensor, ...],
    *,
    scale: float,
    position_scale: float,
) -> Tensor:
    """Output `[B, *query grid, H, Dv]` of checked arguments; `tables` has one for each axis, or is empty."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *tables))
    dv = value.shape[-1]
    query, channels = _with_positions(query, blocks, tables, scale, position_scale)
    missing = query.shape[-1] - dv  # the fused attention of a CPU wants values as wide as queries
    query, value = _widen(query, -missing), _widen(value, missing)
    key, value = (F.pad(x, blocks.padding) for x in (key, value))

    count = blocks.counts[0]
    if needs_grad or torch.compiler.is_compiling():  # whose sides may be symbols, which no loop can run over
        return _rows(query, key, value, channels, blocks, 0, count)[..., :dv]
    pairs = query.shape[0] * query.shape[-2] * prod(blocks.counts[1:]) * prod(blocks.windows)
    step = max(1, AT_ONCE // max(pairs * query.shape[-1], 1))
    starts = range(0, count, step)
    out = [_rows(query, key, value, channels, blocks, n, min(n + step, count)) for n in starts]
    return torch.cat(out, 1)[..., :dv]


def _with_positions(
    query: Tensor, blocks: Blocks, tables: tuple[Tensor, ...], scale: float, position_scale: float
) -> tuple[Tensor, Tensor | None]:
    """The query with its further channels, and those of the keys of each window: `[*blocks, *window, C]`."""
    rank, windows = len(blocks.grid), blocks.windows
    parts, channels = [query * scale], []
    for axis, table in enumerate(tables):
        index = blocks.offsets(axis, query.device).repeat(blocks.counts[axis], 1)
        parts.append(axis_logits(query, table, index, axis, position_scale))
        place = torch.arange(windows[axis], device=query.device)
        hot = one_hot(place, windows[axis], query)
        channels.append(hot.reshape((windows[axis], *(1,) * (rank - 1 - axis), windows[axis])))
    if blocks.border == "mask":  # a key outside meets a channel that is 1 in every query
        parts.append(query.new_ones((*query.shape[:-1], 1)))
        lowest = torch.finfo(query.dtype).min / 2
        outside = F.pad(query.new_zeros((1, *blocks.grid, 1, 1)), blocks.padding, value=lowest)
        channels.append(_windows(outside, blocks)[0].squeeze(rank))
    if not channels:
        return parts[0], None
    whole = (*blocks.counts, *windows)
    return torch.cat(parts, -1), torch.cat([x.expand(*whole, x.shape[-1]) for x in channels], -1)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    channels: Tensor | None,
    blocks: Blocks,
    first: int,
    last: int,
) -> Tensor:
    """The output of the blocks whose number on the first axis lies in `[first, last)`."""
    rows, size, rank = blocks.rows, blocks.block[0], len(blocks.grid)
    here = slice(first * size, (last - 1) * size + blocks.windows[0])
    k, v = (_windows(x[:, here], blocks) for x in (key, value))  # [B, *blocks, H, *window, D]
    parts = [k]
    if channels is not None:
        c = channels[first:last].unsqueeze(rank)
        parts.append(c.expand(*k.shape[:-1], c.shape[-1]))
    width = sum(x.shape[-1] for x in parts)
    if width < query.shape[-1]:
        parts.append(k.new_zeros(()).expand(*k.shape[:-1], query.shape[-1] - width))
    k = torch.cat(parts, -1) if len(parts) > 1 else k
    k, v = (x.flatten(0, rank).flatten(2, -2) for x in (k, v))  # [B * blocks, H, M, D]
    tokens, batch = BLOCKS[rank].split(" -> ")
    sides = dict(zip(AXES[-rank:], rows, strict=True))
    q = rearrange(query[:, first * rows[0] : last * rows[0]], BLOCKS[rank], **sides)
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    counts = dict(zip(("ny", "nx")[-rank:], (last - first, *blocks.counts[1:]), strict=True))
    return rearrange(out, f"{batch} -> {tokens}", **sides, **counts)


def _windows(x: Tensor, blocks: Blocks) -> Tensor:
    """The windows of a padded map, as a view: `[B, *blocks, H, *window, D]`."""
    return _Windows.apply(x, blocks.windows, blocks.block)


class _Windows(torch.autograd.Function):
    """torch's own derivative of overlapping windows goes through them key by key; ours adds whole parts."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, windows: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        for axis, (width, size) in enumerate(zip(windows, sizes, strict=True)):
            x = x.unfold(1 + axis, width, size)
        return x.movedim(2 + len(sizes), -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.windows, ctx.sizes = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rank = len(ctx.sizes)
        batch, *counts, heads = grad.shape[: 2 + rank]
        reach = [-(-width // size) for width, size in zip(ctx.windows, ctx.sizes, strict=True)]
        sides = [(n + r - 1, size) for n, r, size in zip(counts, reach, ctx.sizes, strict=True)]
        total = grad.new_zeros((batch, *chain(*sides), heads, grad.shape[-1]))  # [B, ny, y, nx, x, H, D]
        order = [0, *chain(*((1 + a, 2 + rank + a) for a in range(rank))), 1 + rank, 2 + 2 * rank]
        for part in product(*map(range, reach)):  # windows cut to one block at most, which do not overlap
            target, found = total, grad
            for axis, number in enumerate(part):
                size, start = ctx.sizes[axis], number * ctx.sizes[axis]
                length = min(size, ctx.windows[axis] - start)
                target = target.narrow(1 + 2 * axis, number, counts[axis]).narrow(2 + 2 * axis, 0, length)
                found = found.narrow(2 + rank + axis, start, length)
            target += found.permute(order)
        for axis in range(rank):
            total = total.flatten(1 + axis, 2 + axis).narrow(1 + axis, 0, ctx.shape[1 + axis])
        return total, None, None


def _widen(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, channels)) if channels > 0 else x
