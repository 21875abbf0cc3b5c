"""Halo attention by the CPU kernels: a block is a run of queries that share the window of their leader.

The kernels know that pattern as a neighborhood whose stride is the block. Position logits are further
channels; because a key has a different place in the window of each block, its channel is its coordinate
modulo the length of the window, which differs between the keys of any one window. Keys outside the grid
have value zero, so they count in the denominator alone, and its part is a product over the axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfield.ops.halo.blocks import Blocks
from nearfield.ops.halo.positions import AXIS_LOGITS, axis_logits, one_hot
from nearfield.ops.kernels import WIDEST
from nearfield.ops.neighborhood import native
from nearfield.ops.neighborhood.geometry import Border

NOTHING = -1e30  # the logarithm of no weight at all, in numbers that have derivatives


def supports(query: Tensor, value: Tensor, blocks: Blocks, with_tables: bool, scale: float) -> str | None:
    """Why the kernels cannot run this, or None."""
    if blocks.query_stride != 1:
        return "the CPU kernels need as many queries as keys, so query_stride=1."
    width = query.shape[-1] + (sum(blocks.windows) if with_tables else 0)
    if width > WIDEST:
        return f"the CPU kernels take {WIDEST} channels, and position logits make it {width}."
    return native.unfit(query, value, scale) or native.missing()


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
    """Output `[B, *grid, H, Dv]` of checked arguments; `tables` has one for each axis, or is empty."""
    is_masked = blocks.border == "mask"
    if not tables:
        border: Border = "truncate" if is_masked else "pad"
        return native.attend_numbers(query, key, value, blocks.windows, blocks.block, border, scale=scale)[0]

    logits, insides, channels = [], [], []
    for axis, table in enumerate(tables):
        index, inside = _places(blocks, axis, query.device)
        logits.append(axis_logits(query, table, index, axis, position_scale))
        insides.append(inside)
        side, width = blocks.grid[axis], blocks.windows[axis]
        hot = one_hot(torch.arange(side, device=query.device) % width, width, key)
        channels.append(_along(hot, axis, len(blocks.grid)).expand(*key.shape[:-1], width))
    query, key = torch.cat([query * scale, *logits], -1), torch.cat([key, *channels], -1)
    out, lse = native.attend_numbers(query, key, value, blocks.windows, blocks.block, "truncate", scale=1.0)
    if is_masked:
        return out
    outside = _weight_outside([x.to(lse.dtype) for x in logits], insides)
    return (out * torch.sigmoid(lse - outside).unsqueeze(-1)).to(value.dtype)


def _places(blocks: Blocks, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each query coordinate and channel: the entry of the table, and whether that key is in the grid."""
    size, width = blocks.block[axis], blocks.windows[axis]
    at = torch.arange(blocks.grid[axis], device=device)[:, None]
    first = at // size * size - blocks.halo[axis]  # of the window
    place = (torch.arange(width, device=device) - first) % width
    key = first + place
    inside = (key >= 0) & (key < blocks.grid[axis])
    return width - 1 + place - at % size, inside


def _along(x: Tensor, axis: int, rank: int) -> Tensor:
    """`x [side, C]` shaped to broadcast over `[B, *grid, H, C]`."""
    shape = [1] * (rank + 3)
    shape[1 + axis], shape[-1] = x.shape
    return x.reshape(shape)


def _weight_outside(logits: list[Tensor], insides: list[Tensor]) -> Tensor:
    """Log-sum-exp `[B, *grid, H]` over the keys of the window that lie outside the grid.

    With two axes these are the keys outside on the first, and those inside on the first, outside on the
    second: sums of products, hence products of sums.
    """
    sums = [_split_sum(x, inside, axis) for axis, (x, inside) in enumerate(zip(logits, insides, strict=True))]
    if len(sums) == 1:
        return sums[0][1]
    (within_y, without_y), (within_x, without_x) = sums
    return torch.logaddexp(without_y + torch.logaddexp(within_x, without_x), within_y + without_x)


def _split_sum(logits: Tensor, inside: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the places of one axis inside the grid, and over those outside it."""
    rank = logits.dim() - 3
    here = _along(inside, axis, rank)
    fixed = logits.detach()
    within = fixed.masked_fill(~here, NOTHING).amax(-1, keepdim=True)
    without = fixed.masked_fill(here, NOTHING).amax(-1, keepdim=True)
    weights = (logits - torch.where(here, within, without)).exp()
    sides = torch.stack([inside, ~inside], 1).to(logits.dtype)  # [side, 2, window]
    sums = torch.einsum(AXIS_LOGITS[rank][axis], weights, sides)
    # a sum over any place is at least 1; one over none becomes NOTHING without a derivative that divides by 0
    sums = sums.clamp(min=torch.finfo(sums.dtype).tiny).log() + torch.cat([within, without], -1)
    return sums[..., 0], sums[..., 1]
