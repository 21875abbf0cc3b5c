"""Which keys a query sees: the one geometry that masks, kernels, cost plans and pictures ask.

Integers only. A `Neighborhood` is a pattern without a grid; `.on(grid)` binds it and answers. Each axis is
independent and the neighborhood is the product of the axes' windows. On one axis a token belongs to the
dilation group `i % dilation` at position `p = i // dilation`; groups never see each other, and inside a group
the window is one interval `[start, end)`. Source: GNA (arXiv 2504.16922) and NATTEN's published semantics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product
from math import prod
from typing import Any, Literal, NamedTuple

from nearfield.core.dims import per_dim

Border = Literal["shift", "truncate", "pad"]
BORDERS = ("shift", "truncate", "pad")
LARGEST = 2**40  # sums and products with token indices stay inside 64 bits


@dataclass(frozen=True)
class Neighborhood:
    """A local attention pattern: each query sees the `kernel_size` keys around it, itself counted.

    `Neighborhood(7)` on a 56 x 56 grid shows each token a 7 x 7 square; `Neighborhood(1024, is_causal=True,
    num_sinks=4)` shows a text token the last 1024 tokens and the first 4. Runs of `stride` queries share one
    window; `dilation` leaves gaps. At a border the window is shifted inwards ("shift": always `kernel_size`
    keys), cut ("truncate"), or reaches zero keys outside ("pad": their logit is the bias there, or 0).

    An int or bool stands for every dimension. `num_sinks` is for one dimension only. Raises `ValueError` for
    sizes below 1, a stride above the kernel size, an unknown border, or sinks on a grid of several axes.
    """

    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    border: Border = "shift"
    num_sinks: int = 0

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation", "is_causal"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name in ("kernel_size", "stride", "dilation"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= LARGEST:
                    raise ValueError(
                        f"{name}={value!r} must hold whole numbers of at least 1, at most 2**40."
                    )
        if self.border not in BORDERS:
            raise ValueError(f"border={self.border!r} is unknown. Choose one of {', '.join(BORDERS)}.")
        causal = self.is_causal if isinstance(self.is_causal, tuple) else (self.is_causal,)
        if not all(isinstance(flag, bool) for flag in causal):
            raise ValueError(
                f"is_causal={self.is_causal!r} must be true or false, or one of these per dimension."
            )
        ranks = {
            len(v)
            for v in (self.kernel_size, self.stride, self.dilation, self.is_causal)
            if isinstance(v, tuple)
        }
        if len(ranks) > 1 or 0 in ranks:
            raise ValueError(
                f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation} and "
                f"is_causal={self.is_causal} differ in their number of dimensions. Give one, or one for each."
            )
        for stride, size in zip(*_broadcast(self.stride, self.kernel_size), strict=True):
            if stride > size:
                raise ValueError(
                    f"stride={self.stride} exceeds kernel_size={self.kernel_size}: some keys would be unseen."
                )
        if (
            isinstance(self.num_sinks, bool)
            or not isinstance(self.num_sinks, int)
            or not (0 <= self.num_sinks <= LARGEST)
        ):
            raise ValueError(f"num_sinks={self.num_sinks!r} must be a whole number of at least 0.")

    def on(self, grid: tuple[int, ...] | int, *, num_queries: int | None = None) -> Bound:
        """The pattern bound to a token grid.

        `num_queries` below the number of keys is for decoding: one causal axis, queries aligned at the end.
        """
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        return _bind_once(self, grid, num_queries)

    def bind(self, grid: tuple[int, ...], num_queries: int | None = None) -> Bound:
        """As `on`, worked out anew each time: for sides that are symbols of a trace, unfit for a cache."""
        return _bind(self, grid, num_queries)


class Tiles(NamedTuple):
    """How many (query tile, key tile) pairs an attention visits; products over axes.

    `static`: key tiles on a fixed lattice that a query tile's windows touch. `full`: those of them in which
    every query sees every key, so no mask is needed. `dynamic`: key tiles laid from the window's start
    instead. `dense`: all tile pairs, what full attention visits.
    """

    static: int
    dynamic: int
    full: int
    dense: int

    @property
    def partial_share(self) -> float:
        """Visited lattice tiles that need a mask / visited lattice tiles."""
        return 1 - self.full / self.static if self.static else 0.0


@dataclass(frozen=True)
class Axis:
    """One dimension of a bound pattern. `start` and `end` are positions inside a dilation group."""

    size: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    border: Border

    @property
    def left(self) -> int:
        """Keys of a centred window before its leader; even windows lean left."""
        return self.kernel_size // 2

    @property
    def right(self) -> int:
        """Keys of a centred window after its leader."""
        return self.kernel_size - 1 - self.left

    def group_size(self, group: Any, size: Any = None) -> Any:
        """Tokens in dilation group `group` (an int or an integer tensor) of an axis of `size` tokens."""
        size = self.size if size is None else size
        return (size - group + self.dilation - 1) // self.dilation

    def interval(self, position: Any, group: Any = 0, *, size: Any = None) -> tuple[Any, Any]:
        """`[start, end)` of the window of the query at `position` of `group`, before any cut at the border.

        With border "shift" it always lies inside the group; otherwise it may reach below 0 or past the end.
        Works on ints and, elementwise, on integer tensors: kernels and masks use this very formula. `size`
        stands for the axis's own where each row has a length of its own.
        """
        last = self.group_size(group, size) - 1
        first_of_run = position // self.stride * self.stride
        if self.is_causal:
            leader = _smaller(first_of_run + self.stride - 1, last)
            start, end = leader - self.kernel_size + 1, position + 1
            return (_larger(start, 0) if self.border == "shift" else start), end
        leader = _smaller(first_of_run + self.stride // 2, last)
        start = leader - self.left
        if self.border == "shift":
            start = _larger(_smaller(start, last + 1 - self.kernel_size), 0)
        return start, start + self.kernel_size

    def window(self, index: int) -> range:
        """Keys on this axis that query `index` sees, as token indices."""
        group, position = index % self.dilation, index // self.dilation
        start, end = self.interval(position, group)
        start, end = max(start, 0), min(end, self.group_size(group))
        return range(group + start * self.dilation, group + end * self.dilation, self.dilation)

    def inverse(self, index: int) -> range:
        """Queries on this axis that see key `index`, as token indices: one interval of its dilation group."""
        group, key = index % self.dilation, index // self.dilation
        length = self.group_size(group)
        k, s = self.kernel_size, self.stride
        if self.is_causal:
            low = key
            seen_by_last = key + k >= length
            high_run = (key + k - s) // s
        else:
            low = max(0, -(-(key - self.right - s // 2) // s)) * s
            seen_by_last = key + self.left >= length - 1
            high_run = (key + self.left - s // 2) // s
            if self.border == "shift":
                low = 0 if key < k else low
                seen_by_last = seen_by_last or key >= length - k
        high = length - 1 if seen_by_last else min(high_run * s + s - 1, length - 1)
        return range(group + low * self.dilation, group + (high + 1) * self.dilation, self.dilation)

    @cached_property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs on this axis."""
        return self.pairs_from(0)

    def pairs_from(self, first: int) -> int:
        """Visible (query, key) pairs of the queries from token `first` on, in closed form."""
        total = 0
        for group, count, start in self.kinds(first):
            length = self.group_size(group)
            total += count * (self._pairs_before(length, length) - self._pairs_before(start, length))
        return total

    def span(self, first: int, last: int, group: int = 0) -> tuple[int, int]:
        """`[start, end)` of the keys that some query from position `first` to `last` of `group` sees."""
        (start, _), (_, end) = self.interval(first, group), self.interval(last, group)
        return max(start, 0), min(end, self.group_size(group))

    def shared(self, first: int, last: int, group: int = 0) -> tuple[int, int]:
        """`[start, end)` of the keys seen by all queries from position `first` to `last` of `group`."""
        (_, end), (start, _) = self.interval(first, group), self.interval(last, group)
        return max(start, 0), min(end, self.group_size(group))

    def kinds(self, first: int = 0) -> list[tuple[int, int, int]]:
        """Kinds of dilation group: (one of them, how many, position of its first query from token `first`).

        Groups differ in length by at most one, so at most three kinds stand for all of them.
        """
        d = self.dilation
        edges = sorted({0, self.size % d, first % d, d})
        return [(low, high - low, (first - low + d - 1) // d) for low, high in pairwise(edges)]

    def tiles(self, q_tile: int, kv_tile: int, *, num_sinks: int = 0, first: int = 0) -> Tiles:
        """Tile pairs on this axis, over all dilation groups, for the queries from token `first` on."""
        return _count_tiles(self, q_tile, kv_tile, num_sinks, first)

    def _pairs_before(self, stop: int, length: int) -> int:
        """Visible pairs of the first `stop` queries of a dilation group of `length` tokens."""
        k, s = self.kernel_size, self.stride
        runs, rest = divmod(stop, s)
        if self.is_causal:
            unseen = s * _ramp(runs * s - k, s, runs) + rest * max(min(runs * s + s, length) - k, 0)
            return stop * (stop + 1) // 2 - unseen
        if self.border == "shift":
            return stop * min(k, length)
        leader = min(runs * s + s // 2, length - 1)
        before = s * _ramp(self.left - s // 2, s, runs) + rest * max(self.left - leader, 0)
        beyond = self.right + 1 - length
        after = s * _ramp((runs - 1) * s + s // 2 + beyond, s, runs) + rest * max(leader + beyond, 0)
        return stop * k - before - after


@dataclass(frozen=True)
class Bound:
    """A pattern on a grid of keys. Tokens count row-major; the last `num_queries` of them are queries."""

    pattern: Neighborhood
    grid: tuple[int, ...]
    axes: tuple[Axis, ...]
    num_queries: int

    @property
    def num_keys(self) -> int:
        """Tokens of the grid."""
        return prod(self.grid)

    @property
    def offset(self) -> int:
        """Token index of the first query: 0 unless queries are fewer than keys."""
        return self.num_keys - self.num_queries

    def coordinates(self, token: Any) -> tuple[Any, ...]:
        """Grid coordinates of a token index (an int or an integer tensor)."""
        found = []
        for side in reversed(self.grid):
            found.append(token % side)
            token = token // side
        return tuple(reversed(found))

    def windows(self, query: int) -> tuple[range, ...]:
        """Per axis the key coordinates that query number `query` sees, sinks aside."""
        return tuple(
            axis.window(i) for axis, i in zip(self.axes, self.coordinates(query + self.offset), strict=True)
        )

    def keys(self, query: int) -> list[int]:
        """Token indices that query number `query` sees, in order, sinks included."""
        seen = {self._flat(place) for place in product(*self.windows(query))}
        return sorted(seen.union(self._sinks(query)))

    def queries(self, key: int) -> list[int]:
        """Query numbers that see token `key`, in order: the inverse window."""
        places = product(*(axis.inverse(j) for axis, j in zip(self.axes, self.coordinates(key), strict=True)))
        seen = {self._flat(place) - self.offset for place in places}
        if key < self.pattern.num_sinks:
            seen.update(range(max(key - self.offset, 0) if self.axes[0].is_causal else 0, self.num_queries))
        return sorted(q for q in seen if q >= 0)

    def num_padded(self, query: int) -> int:
        """Zero keys that the query reaches outside the grid (border "pad" only)."""
        if self.pattern.border != "pad":
            return 0
        sizes = []
        for axis, i in zip(self.axes, self.coordinates(query + self.offset), strict=True):
            start, end = axis.interval(i // axis.dilation, i % axis.dilation)
            sizes.append(end - start)
        return prod(sizes) - prod(len(window) for window in self.windows(query))

    @cached_property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs, sinks included, each counted once."""
        if len(self.axes) > 1:
            return prod(axis.num_pairs for axis in self.axes)
        axis, first = self.axes[0], self.offset
        total = axis.pairs_from(first)
        for sink in range(min(self.pattern.num_sinks, self.num_keys)):
            window = axis.inverse(sink)
            unheard = min(len(window), max(0, -((window.start - first) // window.step)))
            may_see = self.num_keys - max(sink, first) if axis.is_causal else self.num_queries
            total += may_see - (len(window) - unheard)
        return total

    @property
    def kept(self) -> float:
        """Visible pairs / all pairs."""
        return self.num_pairs / (self.num_queries * self.num_keys) if self.num_queries else 0.0

    def tiles(self, q_tile: int | tuple[int, ...], kv_tile: int | tuple[int, ...]) -> Tiles:
        """Tile pairs that a kernel with these query and key tiles visits, over all dilation groups."""
        found = []
        for axis, q, kv in zip(
            self.axes, self.tile_sides("q_tile", q_tile), self.tile_sides("kv_tile", kv_tile), strict=True
        ):
            found.append(axis.tiles(q, kv, num_sinks=self.pattern.num_sinks, first=self.offset))
        return Tiles(*(prod(counts) for counts in zip(*found, strict=True)))

    def is_block_sparse(self, q_tile: int | tuple[int, ...], kv_tile: int | tuple[int, ...]) -> bool:
        """Whether no visited tile needs a mask: windows begin and end with key tiles, runs with query tiles.

        Exact, counted over real tokens: a last tile that the grid cuts short still counts as whole. NATTEN's
        arithmetic test is stricter: it refuses causal axes and misses windows that the border makes equal.
        """
        tiles = self.tiles(q_tile, kv_tile)
        return tiles.full == tiles.static and (self.pattern.border != "pad" or not self._reaches_outside)

    @property
    def mask_mod(self) -> Callable[[Any, Any, Any, Any], Any]:
        """FlexAttention's `mask_mod(batch, head, query, key)`: true where the query sees the key."""

        def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
            query = query + self.offset
            seen = query >= 0
            for axis, i, j in zip(self.axes, self.coordinates(query), self.coordinates(key), strict=True):
                start, end = axis.interval(i // axis.dilation, i % axis.dilation)
                at = j // axis.dilation
                seen = seen & (i % axis.dilation == j % axis.dilation) & (start <= at) & (at < end)
            if self.pattern.num_sinks:
                sink = key < self.pattern.num_sinks
                seen = seen | (sink & (key <= query) if self.axes[0].is_causal else sink)
            return seen

        return visible

    @property
    def _reaches_outside(self) -> bool:
        """Whether some window has keys outside the grid."""
        for axis in self.axes:
            for group, _, _ in axis.kinds():
                length = axis.group_size(group)
                if length and (
                    axis.interval(0, group)[0] < 0 or axis.interval(length - 1, group)[1] > length
                ):
                    return True
        return False

    def tile_sides(self, name: str, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """One tile side per axis, checked."""
        sides = per_dim(name, value, len(self.axes))
        if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
            raise ValueError(f"{name}={value!r} must hold whole numbers of at least 1.")
        return sides

    def _flat(self, place: tuple[int, ...]) -> int:
        token = 0
        for side, i in zip(self.grid, place, strict=True):
            token = token * side + i
        return token

    def _sinks(self, query: int) -> range:
        seen = min(self.pattern.num_sinks, self.num_keys)
        return range(min(seen, query + self.offset + 1) if self.axes[0].is_causal else seen)


def _bind(pattern: Neighborhood, grid: tuple[int, ...], num_queries: int | None) -> Bound:
    rank = len(grid)
    if not 1 <= rank <= 3 or any(side < 1 for side in grid):
        raise ValueError(f"grid={grid} must have one to three sides of at least 1 token.")
    if pattern.num_sinks and rank > 1:
        raise ValueError(
            f"num_sinks={pattern.num_sinks} on a grid of {rank} dimensions. Sinks are for one dimension."
        )
    sizes = per_dim("kernel_size", pattern.kernel_size, rank)
    strides = per_dim("stride", pattern.stride, rank)
    dilations = per_dim("dilation", pattern.dilation, rank)
    causal = per_dim("is_causal", pattern.is_causal, rank)
    for side, size, dilation, is_causal in zip(grid, sizes, dilations, causal, strict=True):
        if pattern.border == "shift" and not is_causal and size * dilation > side:
            largest = (
                f"kernel_size of at most {side // dilation}" if dilation <= side else f"dilation below {side}"
            )
            raise ValueError(
                f"kernel_size={size} with dilation={dilation} needs {size * dilation} tokens on an axis of "
                f"{side}. Use {largest}, or border='truncate', which clips."
            )
    if num_queries is None:
        num_queries = prod(grid)
    elif num_queries != prod(grid) and (rank > 1 or not causal[0] or not 0 <= num_queries <= grid[0]):
        raise ValueError(
            f"{num_queries} queries for a grid of {grid} keys. "
            "Fewer queries than keys are allowed in one causal dimension only, aligned at the end."
        )
    axes = tuple(
        Axis(*entries, pattern.border)
        for entries in zip(grid, sizes, strides, dilations, causal, strict=True)
    )
    return Bound(pattern, grid, axes, num_queries)


_bind_once = lru_cache(maxsize=512)(_bind)


@lru_cache(maxsize=4096)
def _count_tiles(axis: Axis, q_tile: int, kv_tile: int, num_sinks: int, first: int) -> Tiles:
    static = dynamic = full = 0
    for group, count, start in axis.kinds(first):
        length = axis.group_size(group)
        for low in range(start, length, q_tile):
            high = min(low + q_tile, length) - 1
            touched, whole = axis.span(low, high, group), [axis.shared(low, high, group)]
            lattice = -(-touched[1] // kv_tile) - touched[0] // kv_tile
            laid = -(-(touched[1] - touched[0]) // kv_tile)
            if num_sinks and axis.dilation > 1:  # sinks of other groups: a block of their own, masked
                reach = min(num_sinks, group + high * axis.dilation + 1) if axis.is_causal else num_sinks
                lattice += -(-min(reach, axis.size) // kv_tile)
                laid += -(-min(reach, axis.size) // kv_tile)
            elif num_sinks:
                reach = min(num_sinks, high + 1 if axis.is_causal else length)
                ahead = -(-reach // kv_tile)
                lattice += min(ahead, touched[0] // kv_tile) + max(0, ahead - -(-touched[1] // kv_tile))
                laid = ahead + laid if reach < touched[0] else -(-max(reach, touched[1]) // kv_tile)
                whole = _united((0, min(num_sinks, low + 1 if axis.is_causal else length)), whole[0])
            static += count * lattice
            dynamic += count * laid
            full += count * sum(_whole_tiles(begin, end, kv_tile, length) for begin, end in whole)
    dense = -(-(axis.size - first) // q_tile) * -(-axis.size // kv_tile)
    return Tiles(static, dynamic, full, dense)


def _whole_tiles(begin: int, end: int, tile: int, length: int) -> int:
    """Lattice tiles inside `[begin, end)`; the one that the end of the axis cuts short counts."""
    stop = -(-length // tile) if end >= length else end // tile
    return max(0, stop - -(-begin // tile))


def _united(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    """The union of two intervals, `a` beginning first, as disjoint intervals."""
    if b[1] <= b[0]:
        return [a]
    return [a, b] if a[1] < b[0] else [(a[0], max(a[1], b[1]))]


def _ramp(first: int, step: int, count: int) -> int:
    """The sum of max(first - step * i, 0) for i below `count`."""
    terms = min(count, -(-first // step)) if first > 0 else 0
    return terms * first - step * (terms * (terms - 1) // 2)


def _broadcast(*values: Any) -> list[tuple[Any, ...]]:
    """Each value as a tuple of the common number of dimensions."""
    rank = max([len(v) for v in values if isinstance(v, tuple)] or [1])
    return [v if isinstance(v, tuple) else (v,) * rank for v in values]


def _smaller(a: Any, b: Any) -> Any:
    """Minimum of two ints or integer tensors."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return a.clamp(max=b) if not isinstance(a, int) else b.clamp(max=a)


def _larger(a: Any, b: Any) -> Any:
    """Maximum of two ints or integer tensors."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return a.clamp(min=b) if not isinstance(a, int) else b.clamp(min=a)
