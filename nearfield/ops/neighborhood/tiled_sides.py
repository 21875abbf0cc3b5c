"""Sides of the tiles that the tiled backend takes: integers, so that plans can ask without torch."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from nearfield.ops.neighborhood.geometry import Axis, Bound

# Gathering a key costs as much as this many queries' scores with it (measured, head_dim 32 to 64).
GATHER = 28
LONGEST = {1: 256, 2: 16, 3: 8}  # longest side of a tile by rank, unless one stride is longer
MOST_ROWS = 1024


class Side(NamedTuple):
    """One axis cut into tiles of `queries`, each with a box of `keys`.

    The backend gathers a few keys fewer on an axis so short that its border moves windows of every tile.
    """

    queries: int
    tiles: int
    keys: int


@lru_cache(maxsize=512)
def best_sides(bound: Bound, group: int) -> tuple[Side, ...]:
    """Per axis the side of the tiles of least cost, whole strides; `group` query heads share a key."""

    def cost(sides: tuple[Side, ...]) -> tuple[bool, int]:
        rows, tiles, slots = (prod(numbers) for numbers in zip(*sides, strict=True))
        return rows > MOST_ROWS, tiles * slots * (rows * group + GATHER)

    return min(product(*(_options(axis, LONGEST[len(bound.axes)]) for axis in bound.axes)), key=cost)


def side_of(axis: Axis, queries: int) -> Side:
    """The axis in tiles of so many queries, whole strides, dilation group after dilation group."""
    length = -(-axis.size // axis.dilation)
    more = (-(-queries // axis.stride) - 1) * axis.stride  # keys from the first window of a tile to its last
    tiles = min(axis.dilation, axis.size) * -(-length // queries)
    return Side(queries, tiles, min(length, axis.kernel_size + more))


def _options(axis: Axis, longest: int) -> list[Side]:
    """Each side of a tile worth a thought."""
    length = -(-axis.size // axis.dilation)
    step = axis.stride if longest <= 16 else -(-16 // axis.stride) * axis.stride
    sides = {min(side, length) for side in (axis.stride, *range(step, longest + 1, step))}
    return [side_of(axis, queries) for queries in sorted(sides)]
