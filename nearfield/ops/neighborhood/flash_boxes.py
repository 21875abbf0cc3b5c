"""A grid in the order of its boxes, for kernels that know one row of tokens and blocks of it.

Each axis is cut into dilation groups and these into sides of a box; the tokens of a box stand one after the
other. Key boxes lie on a lattice. A box that the grid cuts short has idle slots: keys that nobody sees, and
queries that repeat the last one of their group, so that every row of scores has a visible key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from nearfield.ops.neighborhood.geometry import Axis, Bound

Tile = tuple[int, ...]
MASK = 0.5  # what masking a pair of boxes costs of computing it


@dataclass(frozen=True)
class Order:
    """Where tokens stand: `token[slot]`, `slot[token]`, and which slots are idle (None: none is)."""

    token: Tensor
    slot: Tensor
    idle: Tensor | None


@dataclass(frozen=True)
class Boxes:
    """A pattern on its grid in the order of boxes.

    `some[i, j]`: a query of box i sees a key of key box j; `whole[i, j]`: all see all. An element is visible
    where `first <= place < end` on every axis: `first` and `end` by the slot of a query, `place` by that of a
    key, one table an axis.
    """

    queries: Order
    keys: Order
    first: tuple[Tensor, ...]
    end: tuple[Tensor, ...]
    place: tuple[Tensor, ...]
    some: Tensor
    whole: Tensor


def cut(bound: Bound, q_area: int, kv_area: int, device: torch.device) -> Boxes:
    """The boxes of `q_area` queries and `kv_area` keys whose sides waste least."""
    return _cut(bound, *best_tiles(bound, q_area, kv_area), device)


@lru_cache(maxsize=512)
def best_tiles(bound: Bound, q_area: int, kv_area: int) -> tuple[Tile, Tile]:
    """Sides of the query box and of the key box, powers of two: those of the least computed area."""
    longest = [_power_above(-(-axis.size // axis.dilation)) for axis in bound.axes]

    def cost(pair: tuple[Tile, Tile]) -> tuple[float, Any]:
        tiles = bound.tiles(*pair)
        return tiles.static + MASK * (tiles.static - tiles.full), pair

    return min(product(_tiles(q_area, longest), _tiles(kv_area, longest)), key=cost)


@lru_cache(maxsize=64)
def _cut(bound: Bound, q_tile: Tile, kv_tile: Tile, device: torch.device) -> Boxes:
    queries = [_lanes(axis, side) for axis, side in zip(bound.axes, q_tile, strict=True)]
    keys = [_lanes(axis, side) for axis, side in zip(bound.axes, kv_tile, strict=True)]
    first, end, place, some, whole = [], [], [], [], []
    for axis, (group, position, _), (key_group, key_position, idle) in zip(
        bound.axes, queries, keys, strict=True
    ):
        length = axis.group_size(group)
        start, stop = axis.interval(position, group)
        apart = -(-axis.size // axis.dilation) + 1  # groups are that far from one another: none sees another
        start = start.clamp(min=0) + group * apart
        stop = torch.minimum(stop, length) + group * apart
        at = (key_position + key_group * apart).masked_fill(idle, -1)
        first.append(start)
        end.append(stop)
        place.append(at)
        low, high = key_position[:, 0] + key_group[:, 0] * apart, at.amax(-1)
        some.append((start.amin(-1)[:, None] <= high) & (low < stop.amax(-1)[:, None]))
        inside = (start.amax(-1)[:, None] <= low) & (high < stop.amin(-1)[:, None])
        whole.append(inside & ~idle.any(-1))
    return Boxes(
        _order(bound, queries, device),
        _order(bound, keys, device),
        _tables(first, device),
        _tables(end, device),
        _tables(place, device),
        _outer(some).to(device),
        _outer(whole).to(device),
    )


def _lanes(axis: Axis, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dilation group, position in it and idleness of each slot of an axis, [boxes, side]."""
    longest = -(-axis.size // axis.dilation)
    group = torch.arange(min(axis.dilation, axis.size))[:, None, None]
    position = torch.arange(-(-longest // side) * side).view(1, -1, side)
    length = axis.group_size(group)
    idle = (position >= length).flatten(0, 1)
    at = torch.minimum(position, length - 1).flatten(0, 1)
    return group.expand(-1, *position.shape[1:]).flatten(0, 1), at, idle


def _order(bound: Bound, lanes: list[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> Order:
    token, idle = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.bool)
    rank = len(lanes)
    for i, (axis, (group, position, is_idle)) in enumerate(zip(bound.axes, lanes, strict=True)):
        token = token * axis.size + _placed(group + position * axis.dilation, i, rank)
        idle = idle | _placed(is_idle, i, rank)
    token, idle = token.flatten(), idle.flatten()
    slot = torch.empty(bound.num_keys, dtype=torch.int64)
    slot[token[~idle]] = (~idle).nonzero().flatten()
    return Order(token.to(device), slot.to(device), idle.to(device) if idle.any() else None)


def _placed(x: Tensor, at: int, rank: int) -> Tensor:
    """[boxes, side] of one axis, shaped to broadcast over [boxes of each axis, sides of each axis]."""
    shape = [1] * (2 * rank)
    shape[at], shape[rank + at] = x.shape
    return x.reshape(shape)


def _tables(parts: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """What stands in all slots, [boxes, side] of each axis given."""
    rank = len(parts)
    shape = [x.shape[0] for x in parts] + [x.shape[1] for x in parts]
    spread = (_placed(x, i, rank).expand(shape).flatten() for i, x in enumerate(parts))
    return tuple(x.to(device, torch.int32) for x in spread)


def _outer(parts: list[Tensor]) -> Tensor:
    """[query boxes, key boxes] of all axes from those of each axis."""

    def both(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None, :, None] & b[None, :, None, :]).flatten(2).flatten(0, 1)

    return reduce(both, parts)


def _tiles(area: int, longest: list[int]) -> list[Tile]:
    """Sides that are powers of two with the product `area`, none needlessly longer than its axis."""
    powers = [1 << i for i in range(area.bit_length())]
    fits = [tile for tile in product(powers, repeat=len(longest)) if prod(tile) == area]
    short = [tile for tile in fits if all(s <= limit for s, limit in zip(tile, longest, strict=True))]
    return short or [min(fits, key=lambda tile: prod(max(s, n) for s, n in zip(tile, longest, strict=True)))]


def _power_above(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()
