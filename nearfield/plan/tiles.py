"""Tiles of a pattern: the best ones, row-major ones to compare, and the bytes that tile order costs."""

from __future__ import annotations

from itertools import product
from math import prod

from nearfield.ops.neighborhood.geometry import Axis, Bound

AREAS = (64, 128)  # tokens a tile; what matrix units are fed with
LANES = 16  # queries that the CPU kernels keep side by side
LANE_KEYS = 24  # keys that such a row of lanes costs besides those it sees: reading queries, writing outputs
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}

Tile = tuple[int, ...]


def best_tile(bound: Bound, *, q_tile: Tile | None = None, kv_tile: Tile | None = None) -> tuple[Tile, Tile]:
    """The (query, key) tiles with the highest tile-wise speed-up among sides that are powers of two.

    A tile that is given stays. Between equal speed-ups the least computed area wins, then the fewest masked
    tiles, then the largest tiles.
    """

    def merit(pair: tuple[Tile, Tile]) -> tuple[float, ...]:
        tiles, area = bound.tiles(*pair), prod(pair[0]) * prod(pair[1])
        return (
            tiles.dense / tiles.static if tiles.static else 0.0,
            -tiles.static * area,
            -tiles.partial_share,
            area,
        )

    queries = [q_tile] if q_tile is not None else candidates(bound)
    keys = [kv_tile] if kv_tile is not None else candidates(bound)
    return max(product(queries, keys), key=merit)


def candidates(bound: Bound) -> list[Tile]:
    """Tiles of 64 or 128 tokens whose sides are powers of two, not needlessly longer than the grid's."""
    longest = [_power_above(-(-axis.size // axis.dilation)) for axis in bound.axes]
    areas = {min(area, prod(longest)) for area in AREAS}
    powers = [1 << i for i in range(max(AREAS).bit_length())]
    sides = product(*([p for p in powers if p <= limit] for limit in longest))
    return [tile for tile in sides if prod(tile) in areas]


def lane_box(bound: Bound, group: int = 1) -> tuple[Tile, float]:
    """The box of queries that the CPU kernels keep side by side, and the key reads of all boxes, per group.

    `group` query heads share a key/value head, and lanes. A read is one key for all lanes of a box.
    """
    shares: list[dict[int, tuple[int, int]]] = []  # side -> boxes, keys that they see
    for axis in bound.axes:
        queries = max(axis.size - bound.offset, 1) if len(bound.axes) == 1 else axis.size
        sides = range(1, min(LANES, -(-queries // axis.dilation)) + 1)
        shares.append({side: _boxes(axis, side, bound.offset, bound.pattern.num_sinks) for side in sides})
    best: tuple[float, Tile] = (float("inf"), ())
    for heads, *sides_of in product(range(1, min(group, LANES) + 1), *shares):
        box = tuple(sides_of)
        if heads * prod(box) <= LANES:
            found = [share[side] for share, side in zip(shares, box, strict=True)]
            reads = prod(keys for _, keys in found) + LANE_KEYS * prod(boxes for boxes, _ in found)
            best = min(best, (-(-group // heads) * float(reads), box))
    return best[1], best[0]


def flattened(bound: Bound, q_tile: int, kv_tile: int) -> float:
    """The tile-wise speed-up if tokens were cut into tiles in row-major order, as a 1-D kernel would.

    Key tiles with at least one key between the ends of some window count, whatever the dilation.
    """
    visited, last = 0, bound.axes[-1]
    width = last.size
    for first in range(bound.offset, bound.num_keys, q_tile):
        touched: set[int] = set(range(-(-min(bound.pattern.num_sinks, bound.num_keys) // kv_tile)))
        stop = min(first + q_tile, bound.num_keys)
        while first < stop:  # one line of the grid at a time
            *line, column = bound.coordinates(first)
            end = min(stop - first, width - column) + column
            windows = [last.window(i) for i in range(column, min(end, column + last.dilation))]
            windows += [last.window(i) for i in range(max(column, end - last.dilation), end)]
            low, high = min(w[0] for w in windows), max(w[-1] for w in windows)
            for place in product(*(axis.window(i) for axis, i in zip(bound.axes, line, strict=False))):
                begin = 0
                for side, i in zip(bound.grid, place, strict=False):
                    begin = begin * side + i
                touched.update(range((begin * width + low) // kv_tile, (begin * width + high) // kv_tile + 1))
            first += end - column
        visited += len(touched)
    dense = -(-bound.num_queries // q_tile) * -(-bound.num_keys // kv_tile)
    return dense / visited if visited else 0.0


def permutation_bytes(
    bound: Bound,
    q_tile: Tile,
    kv_tile: Tile,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
) -> int:
    """Bytes read and written, per sample, to put queries, keys and values in tile order and the output back.

    0 where row-major order already is tile order. Every axis is padded to a multiple of tile * dilation.
    """
    item = item_bytes(dtype)
    total = 0
    channels = {q_tile: heads * (head_dim + value_dim)}  # in: query; out: output
    channels[kv_tile] = channels.get(kv_tile, 0) + kv_heads * (head_dim + value_dim)
    for tile, width in channels.items():
        if not _is_row_major(bound, tile):
            steps = [side * axis.dilation for side, axis in zip(tile, bound.axes, strict=True)]
            padded = prod(-(-side // step) * step for side, step in zip(bound.grid, steps, strict=True))
            total += (bound.num_keys + padded) * width * item
    return total


def item_bytes(dtype: str) -> int:
    """Bytes of one number."""
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype={dtype!r} is unknown. Choose one of {', '.join(ITEM_BYTES)}.")
    return ITEM_BYTES[dtype]


def _boxes(axis: Axis, side: int, first: int, num_sinks: int) -> tuple[int, int]:
    """Boxes of `side` queries on an axis and the keys they see, summed; none goes beyond a long stride."""
    if 1 < axis.stride >= side and not first and not num_sinks:
        length = -(-axis.size // axis.dilation)
        whole, rest = divmod(length, axis.stride)
        boxes = axis.dilation * (whole * -(-axis.stride // side) + -(-rest // side))
        return boxes, boxes * min(axis.kernel_size, length)
    visited = axis.tiles(side, 1, num_sinks=num_sinks, first=first).static
    return -(-(axis.size - first) // side), visited


def _is_row_major(bound: Bound, tile: Tile) -> bool:
    """Whether tiles are runs of consecutive tokens: unit sides, then one of any length, then whole sides."""
    if any(axis.dilation > 1 for axis in bound.axes):
        return False
    long = next((i for i, side in enumerate(tile) if side > 1), len(tile) - 1)
    return all(tile[i] == bound.grid[i] for i in range(long + 1, len(tile)))


def _power_above(number: int) -> int:
    """The smallest power of two not below `number`."""
    return 1 << max(number - 1, 0).bit_length()
