"""Halo attention by its definition: the windows as copies, every score, one softmax. Never optimised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nearfield.ops.halo.blocks import Blocks

BLOCKS = {1: "b (nx x) h d -> b nx x h d", 2: "b (ny y) (nx x) h d -> b ny nx (y x) h d"}
AXES = "yx"


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
    wide = torch.promote_types(query.dtype, torch.float32)
    q = _split(query.to(wide), blocks.rows)  # [B, *blocks, N, H, D]
    k, v = (_windows(x.to(wide), blocks) for x in (key, value))  # [B, *blocks, M, H, D]
    scores = torch.einsum("...nhd,...mhd->...hnm", q, k) * scale
    if tables:
        positions = _positions([table.to(wide) for table in tables], blocks)
        scores = scores + torch.einsum("...nhd,nmd->...hnm", q, positions) * position_scale
    if blocks.border == "mask":
        inside = _windows(key.new_ones((1, *blocks.grid, 1, 1)), blocks)[..., 0, 0] > 0  # [1, *blocks, M]
        scores = scores.masked_fill(~inside[..., None, None, :], -torch.inf)
    out = torch.einsum("...hnm,...mhd->...nhd", scores.softmax(-1), v)
    tokens, split = BLOCKS[len(blocks.grid)].split(" -> ")
    return rearrange(out, f"{split} -> {tokens}", **_sides(blocks.rows)).to(value.dtype)


def _windows(x: Tensor, blocks: Blocks) -> Tensor:
    """A copy of the keys of each block, zeros outside the grid: `[B, *blocks, M, H, D]`."""
    x = F.pad(x, blocks.padding)
    for axis, (count, size, width) in enumerate(
        zip(blocks.counts, blocks.block, blocks.windows, strict=True)
    ):
        start = torch.arange(count, device=x.device)[:, None] * size
        at = start + torch.arange(width, device=x.device)  # [blocks, window]
        x = x.index_select(1 + axis, at.flatten())
    return _split(x, blocks.windows)


def _split(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return rearrange(x, BLOCKS[len(sizes)], **_sides(sizes))


def _sides(sizes: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(AXES[-len(sizes) :], sizes, strict=True))


def _positions(tables: list[Tensor], blocks: Blocks) -> Tensor:
    """What the query is multiplied with for each pair of a block, summed over the axes: `[N, M, D]`."""
    parts = [table[blocks.offsets(axis, table.device)] for axis, table in enumerate(tables)]
    if len(parts) == 1:
        return parts[0]
    height, width = parts
    both = height[:, None, :, None] + width[None, :, None, :]  # [rows, rows, window, window, D]
    return both.flatten(2, 3).flatten(0, 1)
