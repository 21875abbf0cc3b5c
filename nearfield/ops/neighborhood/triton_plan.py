"""Boxes of the Triton kernels, in integers: what a box visits, what it sees whole, which sides to give it.

A query box is one of a dilation group: `first` to `last` are positions inside the group on one axis. The key
boxes that it visits begin where its first window begins, not on a lattice. A box is whole if every query of
the query box sees every key of it on every axis; such boxes need no mask. The kernels compute the same
numbers (triton_boxes.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Literal, NamedTuple

from nearfield.ops.neighborhood.geometry import Axis, Bound

# How boxes that are walked reach a kernel: row by row; as a whole, by the hardware of sm_90 and later; or so
# and by warps of their own, apart from the groups of warps that compute (sm_90, gluon_forward.py).
Way = Literal["rows", "boxes", "groups"]
WAYS: tuple[Way, ...] = ("rows", "boxes", "groups")
RANK = 3  # axes of a kernel; a grid that has fewer gets sides of 1 in front
Sides = tuple[int, ...]


class Visit(NamedTuple):
    """The boxes that one box visits on one axis: where the first begins, how many, and which are whole."""

    start: int
    boxes: int
    first_whole: int
    whole: int


class Config(NamedTuple):
    """Tokens of a query box and of a key box, how a program of the GPU runs, and what a score costs in it.

    Costs are relative to the other configurations of the same problem.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    cost: float = 1.0


@dataclass(frozen=True)
class Tiling:
    """Sides of boxes on three axes, which of the two loops over them a kernel needs, and how it is fed."""

    q_tile: Sides
    kv_tile: Sides
    warps: int
    stages: int
    partial: bool
    whole: bool
    way: Way = "rows"


# (bytes of an element, widest head_dim) -> configurations. Those of two bytes by what an H200 measured (rows
# of 256 channels: of what spills nothing), the later of a pair for small windows; those of four bytes fit
# registers and shared memory.
FORWARD: dict[tuple[int, int], tuple[Config, ...]] = {
    (2, 32): (Config(64, 64, 4, 3), Config(32, 32, 1, 3, 1.5)),
    (2, 64): (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    (2, 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    (2, 256): (Config(64, 32, 8, 2),),
    (4, 64): (Config(32, 32, 8, 2),),
    (4, 128): (Config(32, 16, 8, 1),),
    (4, 256): (Config(16, 16, 4, 1),),
}
QUERIES: dict[tuple[int, int], tuple[Config, ...]] = {  # gradients of the queries
    (2, 32): (Config(64, 32, 2, 2), Config(32, 32, 1, 2, 1.2)),
    (2, 64): (Config(64, 64, 4, 2),),
    (2, 128): (Config(64, 64, 4, 2),),
    (2, 256): (Config(64, 16, 8, 2),),
    (4, 64): (Config(32, 32, 8, 1),),
    (4, 128): (Config(16, 16, 8, 1),),
    (4, 256): (Config(16, 16, 8, 1),),
}
KEYS: dict[tuple[int, int], tuple[Config, ...]] = {  # gradients of keys and values
    (2, 32): (Config(64, 32, 2, 2), Config(32, 32, 1, 2, 1.3)),
    (2, 64): (Config(64, 64, 4, 2),),
    (2, 128): (Config(32, 64, 4, 2),),
    (2, 256): (Config(32, 32, 8, 1),),
    (4, 64): (Config(32, 32, 8, 1),),
    (4, 128): (Config(16, 32, 8, 1),),
    (4, 256): (Config(16, 16, 4, 1),),
}
TABLES = {"forward": FORWARD, "queries": QUERIES, "keys": KEYS}
# where whole boxes can be fetched and were faster so: forward, gradients of queries, gradients of keys
BOXED: dict[tuple[str, int, int], tuple[Config, ...]] = {
    ("forward", 2, 64): (Config(64, 64, 4, 4),),
    ("forward", 2, 128): (Config(128, 128, 8, 3), Config(64, 64, 4, 3, 1.16)),
    ("forward", 2, 256): (Config(128, 64, 8, 2), Config(64, 32, 4, 2, 1.2)),
    ("queries", 2, 64): (Config(64, 64, 4, 3),),
    ("queries", 2, 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 2, 1.07)),
    ("queries", 2, 256): (Config(64, 32, 4, 1),),
    ("keys", 2, 64): (Config(128, 64, 4, 2),),
    ("keys", 2, 128): (Config(64, 64, 4, 2), Config(32, 64, 4, 2, 1.15)),
    ("keys", 2, 256): (Config(32, 64, 8, 2),),
}
# by (bytes of an element, head_dim), for plain patterns alone; those of UNTIMED work and are left to tuning
GROUPS: dict[tuple[int, int], tuple[Config, ...]] = {(2, 128): (Config(128, 128, 4, 2, 0.77),)}
UNTIMED: dict[tuple[int, int], tuple[Config, ...]] = {(2, 64): (Config(128, 128, 4, 2),)}
# GPUs before sm_90, and sm_120, keep operands in registers: smaller boxes where one of the above would spill
OLDER: dict[tuple[str, int, int], tuple[Config, ...]] = {("keys", 2, 128): (Config(32, 64, 8, 2),)}
MASK = 0.2  # what masking a tile costs of computing it: 0.15 to 0.3 on an H200


def key_boxes(axis: Axis, first: int, last: int, group: int, side: int, *, outside: bool = False) -> Visit:
    """Key boxes that queries `first` to `last` visit; `outside`: also of keys beyond the grid."""
    (start, whole_stop), (whole_start, stop) = axis.interval(first, group), axis.interval(last, group)
    if not outside:
        length = axis.group_size(group)
        start, whole_start = max(start, 0), max(whole_start, 0)
        stop, whole_stop = min(stop, length), min(whole_stop, length)
    return _visit(start, stop, whole_start, whole_stop, side)


def query_boxes(axis: Axis, first: int, last: int, group: int, side: int, first_query: int = 0) -> Visit:
    """Query boxes that visit keys `first` to `last`, among queries from position `first_query` on."""
    d = axis.dilation
    near, far = (axis.inverse(group + key * d) for key in (first, last))
    (start, whole_stop), (whole_start, stop) = ((r.start // d, r[-1] // d + 1) for r in (near, far))
    start, whole_start = max(start, first_query), max(whole_start, first_query)
    return _visit(start, stop, whole_start, whole_stop, side)


def _visit(start: int, stop: int, whole_start: int, whole_stop: int, side: int) -> Visit:
    count = -(-max(stop - start, 0) // side)
    first_whole = -(-max(whole_start - start, 0) // side)
    return Visit(start, count, first_whole, max(max(whole_stop - start, 0) // side - first_whole, 0))


def num_boxes(size: int, dilation: int, side: int) -> int:
    """Boxes of every dilation group; those of a short group may be empty."""
    longest = -(-size // dilation)
    return -(-longest // side)


def on_three_axes(bound: Bound) -> tuple[Axis, ...]:
    """The axes of a grid with axes of one token in front."""
    return (*(Axis(1, 1, 1, 1, False, "shift"),) * (RANK - len(bound.axes)), *bound.axes)


@lru_cache(maxsize=4096)
def visits(axis: Axis, q_side: int, kv_side: int, first: int, inverse: bool) -> tuple[int, int]:
    """Pairs of boxes visited on an axis, and whole ones, over all groups; queries from token `first` on.

    `inverse`: key boxes are stationary and visit query boxes.
    """
    visited = whole = 0
    for group, groups, start in axis.kinds(first):
        length = axis.group_size(group)
        for low in range(0 if inverse else start, length, kv_side if inverse else q_side):
            if inverse:
                found = query_boxes(axis, low, min(low + kv_side, length) - 1, group, q_side, start)
            else:
                found = key_boxes(axis, low, min(low + q_side, length) - 1, group, kv_side)
            visited += groups * found.boxes
            whole += groups * found.whole
    return visited, whole


def configs(kind: str, item: int, dim: int, arch: int = 90, way: Way = "rows") -> tuple[Config, ...]:
    """What a kernel of `kind` may run as on a GPU of compute capability `arch`; `tiling` chooses."""
    if way == "groups":
        return GROUPS.get((item, dim), ()) if kind == "forward" and arch == 90 else ()
    widest = min(width for size, width in TABLES[kind] if size == item and dim <= width)
    # 227 KB of shared memory, from which products read; 12.x is like 8.x and has 99
    is_large = 90 <= arch < 120
    if way == "boxes":
        return BOXED.get((kind, item, widest), ()) if is_large else ()
    found = TABLES[kind][item, widest]
    return found if is_large else OLDER.get((kind, item, widest), found)


@lru_cache(maxsize=512)
def tiling(
    bounds: tuple[Bound, ...], kind: str, item: int, dim: int, arch: int = 90, way: Way = "rows"
) -> Tiling:
    """The boxes in which a kernel of `kind` ("forward", "queries" or "keys") takes grids of one pattern.

    `item` is the size of an element in bytes, `dim` the wider of head_dim and value_dim; `way` the most that
    options and layout allow. Among the sides that are powers of two, those of the least cost; the largest of
    the grids decides.
    """
    largest = max(bounds, key=lambda bound: bound.num_keys)
    ways = [
        (config, w) for w in WAYS[1 : WAYS.index(way) + 1] for config in configs(kind, item, dim, arch, w)
    ]
    ways = ways or [(config, "rows") for config in configs(kind, item, dim, arch)]
    costed = [_costed(largest, kind, config, w)[0] for config, w in ways]
    return fitted(bounds, min(costed, key=lambda found: found[0])[1], kind)


def candidates(
    bound: Bound, kind: str, item: int, dim: int, arch: int = 90, *, most: int = 8
) -> tuple[Tiling, ...]:
    """Boxes worth a measurement, at most so many: first what `tiling` takes, then others by cost.

    Among them are further configurations than the static ones: best sides of each, second best of the static.
    """
    best_way = way_of(bound, dim)
    first = tiling((bound,), kind, item, dim, arch, best_way)
    static = [
        (config, way)
        for way in WAYS[: WAYS.index(best_way) + 1]
        for config in configs(kind, item, dim, arch, way)
    ]
    if best_way == "groups" and kind == "forward" and arch == 90:
        static += [(config, best_way) for config in UNTIMED.get((item, dim), ())]
    ways = dict.fromkeys((near, way) for config, way in static for near in _near(config, item, way))
    costed = [found for way in ways for found in _costed(bound, kind, *way)[: 1 + (way in static)]]
    others = [fitted((bound,), found, kind) for _, found in sorted(costed, key=lambda found: found[0])]
    return tuple(dict.fromkeys([first, *others]))[:most]


def way_of(bound: Bound, dim: int) -> Way:
    """The most that a pattern allows on tensors that lie well, without further options."""
    if dim < 16 or dim & (dim - 1) or any(axis.dilation > 1 for axis in bound.axes):
        return "rows"
    return "boxes" if bound.pattern.border == "pad" or bound.pattern.num_sinks else "groups"


def fitted(bounds: tuple[Bound, ...], tiles: Tiling, kind: str) -> Tiling:
    """The same boxes with the loops that these grids need."""
    partial, whole = loops(bounds, tiles, kind == "keys")
    return replace(tiles, partial=partial, whole=whole)


def _near(config: Config, item: int, way: Way) -> list[Config]:
    """A configuration and its neighbours: of another depth, other warps, boxes half or twice as long."""
    rows, columns, warps, stages, _ = config
    if way == "groups":
        return [config, config._replace(stages=stages + 1)]
    least = 32 if item == 2 else 16
    found = [
        config,
        *(config._replace(stages=n) for n in (stages - 1, stages + 1) if 1 <= n <= 4),
        *(config._replace(warps=n) for n in (warps // 2, warps * 2) if 2 <= n <= 8),
        *(config._replace(rows=n) for n in (rows // 2, rows * 2) if least <= n <= 128),
        *(config._replace(columns=n) for n in (columns // 2, columns * 2) if least <= n <= 128),
    ]
    return list(dict.fromkeys(found))


def _costed(bound: Bound, kind: str, config: Config, way: Way) -> list[tuple[float, Tiling]]:
    """Every choice of sides that are powers of two, and its cost in scores; the least first."""
    axes = on_three_axes(bound)
    longest = [_power_above(-(-axis.size // axis.dilation)) for axis in axes]
    found = []
    for q_tile, kv_tile in product(_tiles(config.rows, longest), _tiles(config.columns, longest)):
        pairs = _visits(bound, q_tile, kv_tile, kind == "keys")
        visited, whole = (prod(counts) for counts in zip(*pairs, strict=True))
        cost = config.cost * config.rows * config.columns * (visited + MASK * (visited - whole))
        found.append((cost, Tiling(q_tile, kv_tile, config.warps, config.stages, True, True, way)))
    return sorted(found, key=lambda pair: pair[0])


def loops(bounds: tuple[Bound, ...], tiles: Tiling, inverse: bool) -> tuple[bool, bool]:
    """Whether some pair of boxes needs a mask, and whether some needs none."""
    partial = whole = False
    for bound in bounds:
        found = _visits(bound, tiles.q_tile, tiles.kv_tile, inverse)
        visited, full = (prod(counts) for counts in zip(*found, strict=True))
        partial, whole = partial or full < visited, whole or full > 0
    return partial, whole


def _visits(bound: Bound, q_tile: Sides, kv_tile: Sides, inverse: bool) -> list[tuple[int, int]]:
    """Pairs of boxes visited on each axis, and whole ones."""
    firsts = (*(0,) * (RANK - 1), bound.offset)
    parts = zip(on_three_axes(bound), q_tile, kv_tile, firsts, strict=True)
    return [visits(axis, q, k, first, inverse) for axis, q, k, first in parts]


def _tiles(area: int, longest: list[int]) -> list[Sides]:
    """Sides that are powers of two with the product `area`, none needlessly longer than its axis."""
    powers = [1 << i for i in range(area.bit_length())]
    fits = [t for t in product(powers, repeat=RANK) if prod(t) == area]
    # a grid smaller than the area leaves lanes idle, on the innermost axis
    short = [t for t in fits if all(side <= limit for side, limit in zip(t[:-1], longest, strict=False))]
    return [t for t in short if t[-1] <= longest[-1]] or short[:1]


def _power_above(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()
