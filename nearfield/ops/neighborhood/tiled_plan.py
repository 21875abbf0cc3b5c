"""Tiles of queries and the box of keys that each of them needs, for any bound pattern. Integers, cached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from nearfield.ops.neighborhood.geometry import Axis, Bound

CACHED_BYTES = 1 << 25  # chunks of a plan stay in memory up to this size; larger plans are worked out anew


@dataclass(frozen=True)
class AxisTiles:
    """The tiles of one axis, dilation group after dilation group."""

    query: Tensor  # [tiles, rows] coordinate of each query; a short tile repeats its last one
    real: Tensor  # [tiles, rows] false for such a repetition
    key: Tensor  # [tiles, keys] coordinate of each key, clamped into the axis
    inside: Tensor  # [tiles, keys] whether that key lies in the axis
    low: Tensor  # [tiles, rows] first slot that the query sees
    high: Tensor  # [tiles, rows] one past the last
    place: Tensor  # [tiles, rows] the query's own slot
    kind: Tensor  # [tiles] tiles of one kind agree in all but `query` and `key`


@dataclass(frozen=True)
class Chunk:
    """Tiles that are computed together. `slots` is 1 when one mask fits them all, else their number."""

    query: Tensor  # [tiles * rows] query number
    real: Tensor | None  # [tiles, rows] false where a short tile repeats its last query; None: all real
    key: Tensor  # [tiles * keys] token index
    outside: Tensor | None  # [slots, keys] keys off the grid (border "pad"); None: none
    visible: Tensor  # [slots, rows, keys]
    offsets: Tensor | None  # [slots, rows, keys] entry of the flat bias table, clamped; only with a bias
    tiles: int


def num_slots(bound: Bound, shape: tuple[int, ...]) -> int:
    """Keys of the box of one tile."""
    return prod(tiles.key.shape[1] for tiles in _axes(bound, shape))


def chunks(
    bound: Bound, shape: tuple[int, ...], tiles_at_once: int, with_bias: bool, device: torch.device
) -> Iterable[Chunk]:
    """All tiles of a bound pattern, `tiles_at_once` at a time, those with one mask next to each other."""
    tiles = prod(len(axis.kind) for axis in _axes(bound, shape))
    rows, width = prod(shape), num_slots(bound, shape)
    masks = min(tiles, -(-tiles // tiles_at_once) + 3 ** len(shape))
    if tiles * (rows + width) * 8 + masks * rows * width * (9 if with_bias else 1) > CACHED_BYTES:
        return _chunks(bound, shape, tiles_at_once, with_bias, device)
    return _kept_chunks(bound, shape, tiles_at_once, with_bias, device)


@lru_cache(maxsize=64)
def _kept_chunks(
    bound: Bound, shape: tuple[int, ...], tiles_at_once: int, with_bias: bool, device: torch.device
) -> tuple[Chunk, ...]:
    return tuple(_chunks(bound, shape, tiles_at_once, with_bias, device))


def _chunks(
    bound: Bound, shape: tuple[int, ...], tiles_at_once: int, with_bias: bool, device: torch.device
) -> Iterator[Chunk]:
    axes = _axes(bound, shape)
    counts = [len(axis.kind) for axis in axes]
    kinds = _flat(
        [a.kind[:, None] for a in axes], [int(a.kind.amax()) + 1 for a in axes], _all_tiles(counts)
    )[:, 0]
    kinds, order = torch.sort(kinds, stable=True)
    edges = (torch.nonzero(kinds.diff()).flatten() + 1).tolist()
    for low, high in _cuts(len(order), edges, tiles_at_once):
        of = [tiles[order[low:high]] for tiles in _all_tiles(counts)]
        same = bool(kinds[low] == kinds[high - 1])
        some = [tiles[:1] if same else tiles for tiles in of]
        windows = []
        for axis, i in zip(axes, some, strict=True):
            slot = torch.arange(axis.key.shape[1])
            windows.append((slot >= axis.low[i].unsqueeze(-1)) & (slot < axis.high[i].unsqueeze(-1)))
        inside = _all([a.inside[i] for a, i in zip(axes, some, strict=True)])
        real = _all([a.real[i] for a, i in zip(axes, of, strict=True)])
        yield Chunk(
            query=(_flat([a.query for a in axes], bound.grid, of) - bound.offset).flatten().to(device),
            real=None if bool(real.all()) else real.to(device),
            key=_flat([a.key for a in axes], bound.grid, of).flatten().to(device),
            outside=None if bound.pattern.border != "pad" or bool(inside.all()) else (~inside).to(device),
            visible=_all(windows).to(device),
            offsets=_offsets(axes, bound, some).to(device) if with_bias else None,
            tiles=high - low,
        )


@lru_cache(maxsize=256)
def _axis_tiles(axis: Axis, rows: int, first: int) -> AxisTiles:
    """The tiles of the queries from coordinate `first` on."""
    starts, groups = [], []
    for g in range(min(axis.dilation, axis.size)):
        begin = max(0, -(-(first - g) // axis.dilation))
        starts.append(torch.arange(begin, axis.group_size(g), rows)[:, None])
        groups.append(torch.full_like(starts[-1], g))
    start, group = torch.cat(starts), torch.cat(groups)
    length = axis.group_size(group)
    position = torch.minimum(start + torch.arange(rows), length - 1)
    low, high = axis.interval(position, group)
    if axis.border != "pad":
        low, high = low.clamp(min=0), torch.minimum(high, length)
    base = low.amin(1, keepdim=True)
    width = int((high.amax(1, keepdim=True) - base).amax())
    if axis.border != "pad":
        base = torch.minimum(base, (length - width).clamp(min=0))
    at = base + torch.arange(width)
    inside = (at >= 0) & (at < length)
    low, high, place = low - base, high - base, position - base
    return AxisTiles(
        query=position * axis.dilation + group,
        real=position == start + torch.arange(rows),
        key=torch.minimum(at.clamp(min=0), length - 1) * axis.dilation + group,
        inside=inside,
        low=low,
        high=high,
        place=place,
        kind=torch.unique(torch.cat([low, high, place, inside], 1), dim=0, return_inverse=True)[1],
    )


def _axes(bound: Bound, shape: tuple[int, ...]) -> list[AxisTiles]:
    return [_axis_tiles(axis, rows, bound.offset) for axis, rows in zip(bound.axes, shape, strict=True)]


def _offsets(axes: list[AxisTiles], bound: Bound, some: list[Tensor]) -> Tensor:
    """Key minus query + kernel_size - 1 per axis, as one index into the flat bias table."""
    found, spans = [], []
    for axis, tiles, i in zip(bound.axes, axes, some, strict=True):
        spans.append(2 * axis.kernel_size - 1)
        offset = torch.arange(tiles.key.shape[1]) - tiles.place[i].unsqueeze(-1) + axis.kernel_size - 1
        found.append(offset.clamp(0, spans[-1] - 1))
    table = found[0]
    for span, offset in zip(spans[1:], found[1:], strict=True):
        table = table[:, :, None, :, None] * span + offset[:, None, :, None, :]
        table = table.flatten(3, 4).flatten(1, 2)
    return table


def _cuts(length: int, edges: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Cuts `range(length)` into pieces of at most `most`, at the edges wherever that makes no piece small."""
    low, edges = 0, [*edges, length]
    while low < length:
        high = min(low + most, length)
        inside = [edge for edge in edges if low + most // 2 <= edge <= high and edge > low]
        first = next(edge for edge in edges if edge > low)
        high = first if most // 4 < first - low <= most else inside[-1] if inside else high
        yield low, high
        low = high


def _all_tiles(counts: list[int]) -> list[Tensor]:
    """Per axis the tile of every tile of the grid, row-major."""
    return [tiles.flatten() for tiles in torch.meshgrid(*[torch.arange(n) for n in counts], indexing="ij")]


def _flat(values: list[Tensor], sides: Iterable[int], of: list[Tensor]) -> Tensor:
    """Row-major index [tiles, entries] from the coordinates [tiles of the axis, entries of the axis]."""
    found = torch.zeros(len(of[0]), 1, dtype=torch.long)
    for value, side, tiles in zip(values, sides, of, strict=True):
        found = (found[:, :, None] * side + value[tiles][:, None, :]).flatten(1)
    return found


def _all(conditions: list[Tensor]) -> Tensor:
    """Outer `and` over axes: [tiles, x] -> [tiles, x0 x1 ...], or the same with two such dimensions."""
    found = conditions[0]
    for more in conditions[1:]:
        if found.dim() == 2:
            found = (found[:, :, None] & more[:, None, :]).flatten(1)
        else:
            found = (found[:, :, None, :, None] & more[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    return found
