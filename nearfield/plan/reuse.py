"""Which layers of a decoder choose the key blocks that a step reads, and which take over an earlier layer's.

A plan is an integer for each layer (`ReusePolicy.sources`). `best_reuse` and `fewest_selections` make one of
the overlaps of the layers' choices: O[i][j], the share of layer j's blocks that layer i chose too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import Any, NamedTuple

from nearfield.plan.pattern import _exactly

Sources = tuple[int | None, ...]
Overlap = Sequence[Sequence[float]]

SCORES = ("mass", "mean", "bound", "hash")
LIMITS = {"num_tokens": 1, "block_size": 1, "num_sinks": 0, "num_recent": 0}  # the least of each
SPARSITY, SELECTING = 0.91, 0.3  # published: of so many layers, that share may choose


@dataclass(frozen=True)
class ReusePolicy:
    """What each layer does in a decoding step, and how many keys a sparse one reads.

    `sources[layer]` is None where the layer attends to everything, its own number where it selects the blocks
    with the highest score, and an earlier number where it reuses that layer's: always the last one before it
    that selects. `(None, 1, 1, 3, None, 3)`: layers 0 and 4 are full, 1 and 3 select, 2 and 5 reuse.

    A sparse layer reads `num_tokens // block_size` blocks. Those with the first `num_sinks` and the last
    `num_recent` keys are always among them.
    """

    sources: Sources
    num_tokens: int = 2048
    block_size: int = 64
    num_sinks: int = 64
    num_recent: int = 512
    score: str = "bound"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise ValueError("sources=() has no layer. Give one entry a layer.")
        last = None
        for layer, source in enumerate(self.sources):
            if source is not None and type(source) is not int:
                raise ValueError(f"Layer {layer} has the source {source!r}. Give None or a layer's number.")
            last = layer if source == layer else last
            if source is not None and source != last:
                allowed = f"{last}, the last that selects before it" if last is not None else "no other layer"
                raise ValueError(
                    f"Layer {layer} has the source {source}. It may reuse the blocks of {allowed}; give its "
                    f"own number, {layer}, where it selects, and None where it attends to everything."
                )
        for name, least in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number from {least}.")
        if self.num_tokens < self.block_size:
            raise ValueError(
                f"num_tokens={self.num_tokens} is less than one block of {self.block_size} keys."
            )
        if self.num_sinks + self.num_recent > self.num_tokens:
            raise ValueError(
                f"num_sinks={self.num_sinks} and num_recent={self.num_recent} are more than the "
                f"num_tokens={self.num_tokens} that are read, so nothing is left to choose. Lower them."
            )
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r} is unknown. Choose one of {', '.join(SCORES)}.")

    @property
    def full(self) -> tuple[int, ...]:
        """The layers that attend to everything."""
        return tuple(layer for layer, source in enumerate(self.sources) if source is None)

    @property
    def selecting(self) -> tuple[int, ...]:
        """The layers that choose blocks."""
        return tuple(layer for layer, source in enumerate(self.sources) if source == layer)

    @property
    def reusing(self) -> tuple[int, ...]:
        """The layers that take over an earlier layer's blocks."""
        return tuple(j for j, source in enumerate(self.sources) if source is not None and source != j)

    @property
    def num_blocks(self) -> int:
        """Blocks that a sparse layer reads, unless sinks and recent keys alone lie in more."""
        return self.num_tokens // self.block_size

    @property
    def least_tokens(self) -> int:
        """With fewer keys a step is dense."""
        return self.num_tokens + self.block_size

    def keys_read(self, num_tokens: int) -> int:
        """Of `num_tokens` cached keys, those whose values a sparse layer reads in a step."""
        if num_tokens < self.least_tokens:
            return num_tokens
        size, blocks = self.block_size, ceil(num_tokens / self.block_size)
        first_recent = (num_tokens - self.num_recent) // size if self.num_recent else blocks
        forced = min(ceil(self.num_sinks / size), first_recent) + blocks - first_recent
        read = max(self.num_blocks, forced) * size
        return read - (blocks * size - num_tokens if self.num_recent else 0)  # the last block may be ragged

    def bytes_read(
        self, num_tokens: int, *, kv_heads: int, key_dim: int, value_dim: int, itemsize: int
    ) -> list[int]:
        """Bytes that each layer reads of a cache of `num_tokens` keys in one step of one sequence.

        A selecting layer also reads what its score needs: all keys ("mass"), one or two vectors a block
        ("mean", "bound"), one bit a key dimension ("hash").
        """
        pair = kv_heads * (key_dim + value_dim) * itemsize
        blocks = ceil(num_tokens / self.block_size)
        vector = kv_heads * key_dim * itemsize
        looked = {
            "mass": num_tokens * vector,
            "mean": blocks * vector,
            "bound": 2 * blocks * vector,
            "hash": num_tokens * kv_heads * ceil(key_dim / 8),
        }[self.score]
        dense = num_tokens < self.least_tokens
        sparse = self.keys_read(num_tokens) * pair
        found = []
        for layer, source in enumerate(self.sources):
            selects = source == layer and not dense
            found.append(num_tokens * pair if source is None else sparse + selects * looked)
        return found

    def dense_bytes(
        self, num_tokens: int, *, kv_heads: int, key_dim: int, value_dim: int, itemsize: int
    ) -> list[int]:
        """The same, were every layer full."""
        return [num_tokens * kv_heads * (key_dim + value_dim) * itemsize] * len(self.sources)

    def to_json(self) -> dict[str, Any]:
        """The policy as plain JSON values."""
        return {**asdict(self), "sources": list(self.sources)}

    @classmethod
    def from_json(cls, data: Any) -> ReusePolicy:
        """The policy that `to_json` wrote; anything else is a `ValueError`."""
        given = _exactly("A policy", data, tuple(field.name for field in fields(cls)))
        if not isinstance(given["sources"], list):
            raise ValueError(f"sources={given['sources']!r} must be a list of layers' numbers and nulls.")
        return cls(**{**given, "sources": tuple(given["sources"])})


class Reuse(NamedTuple):
    """A layer's source each, as `ReusePolicy` takes them.

    `least` is the smallest overlap of a reusing layer with its source, `total` the sum over layers and
    calibration sets; layers that do not reuse count 1.
    """

    sources: Sources
    least: float
    total: float


def best_reuse(
    overlap: Overlap | Sequence[Overlap],
    *,
    sensitive: Collection[int] = (),
    max_changes: int | None = None,
    parity: bool = False,
) -> Reuse:
    """The sources with the largest `least` and, among those, the largest `total`.

    Sensitive layers are full. At most `max_changes + 1` layers do not reuse, the sensitive ones counted; None
    is the published ceil(0.91 * 0.3 * layers) + sensitive layers. `overlap` is one matrix or several, one for
    each calibration text: `least` and `total` then go over all of them.

    `parity=True` is the published programme. It keeps one best (least, total) for each state, which finds the
    largest `least` but not always the largest `total`, and lets no layer reuse across a sensitive one, except
    at an overlap of 0.
    """
    tables = _tables(overlap)
    layers = len(tables[0])
    full = _layers(sensitive, layers)
    if max_changes is None:
        max_changes = ceil(layers * SPARSITY * SELECTING) + len(full)
    if isinstance(max_changes, bool) or not isinstance(max_changes, int) or max_changes < 0:
        raise ValueError(f"max_changes={max_changes!r} must be a whole number from 0.")
    if parity:
        return _published(tables, full, max_changes)
    sparse = [layer for layer in range(layers) if layer not in full]
    most = max_changes + 1 - len(full)
    if sparse and most < 1:
        raise ValueError(
            f"max_changes={max_changes} leaves no layer that selects beside {len(full)} full ones. Give at "
            f"least {len(full)}."
        )
    if not sparse:
        return _reuse(tables, full, [])
    # The largest `least` first: the highest floor under all overlaps that so many selections can hold.
    floors = sorted({low for i, j in _pairs(sparse) if (low := _least(tables, i, j)) < 1} | {1.0})
    low, high = 0, len(floors) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _walk(tables, sparse, floors[middle], most):
            low = middle
        else:
            high = middle - 1
    found = _walk(tables, sparse, floors[low], most)
    count = max(found, key=lambda count: (found[count][0], -count))
    return _reuse(tables, full, found[count][1])


def fewest_selections(
    overlap: Overlap | Sequence[Overlap], *, sensitive: Collection[int] = (), threshold: float
) -> Reuse:
    """The sources with the fewest selecting layers where every overlap is at least `threshold`, and, among
    those, the largest `total`. Sensitive layers are full.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be a share, from 0 to 1.")
    tables = _tables(overlap)
    full = _layers(sensitive, len(tables[0]))
    sparse = [layer for layer in range(len(tables[0])) if layer not in full]
    found = _walk(tables, sparse, threshold, len(sparse))
    return _reuse(tables, full, found[min(found)][1] if sparse else [])


def _walk(
    tables: Sequence[Overlap], sparse: Sequence[int], floor: float, most: int
) -> dict[int, tuple[float, list[int]]]:
    """By the number of selecting layers, up to `most`: the largest total with no overlap below `floor`, and
    the layers that select.

    One state for each source and number of selections. Totals alone are compared, and what follows adds the
    same to all that share a state, so that keeping the best of each is exact.
    """
    states: dict[tuple[int, int], tuple[float, Any]] = {}  # (source, count) -> (total, (layer, those before))
    for j in sparse:
        grown: dict[tuple[int, int], tuple[float, Any]] = {}
        ahead: dict[int, tuple[float, Any]] = {0: (0.0, None)} if j == sparse[0] else {}
        for (source, count), (total, chosen) in states.items():
            if count not in ahead or total > ahead[count][0]:
                ahead[count] = (total, chosen)
            if _least(tables, source, j) >= floor:
                grown[source, count] = (total + _sum(tables, source, j), chosen)
        for count, (total, chosen) in ahead.items():
            if count < most:
                grown[j, count + 1] = (total + len(tables), (j, chosen))
        states = grown
    best: dict[int, tuple[float, Any]] = {}
    for (_, count), state in states.items():
        if count not in best or state[0] > best[count][0]:
            best[count] = state
    return {count: (total, _unlinked(chosen)) for count, (total, chosen) in best.items()}


def _published(tables: Sequence[Overlap], full: Collection[int], max_changes: int) -> Reuse:
    """The published programme over the states (source, changes), overlaps with sensitive layers at 0."""
    layers = range(len(tables[0]))

    def value(i: int, j: int) -> tuple[float, float]:
        if i == j:
            return 1.0, float(len(tables))
        if i in full or j in full:
            return 0.0, 0.0
        return _least(tables, i, j), _sum(tables, i, j)

    states: dict[tuple[int, int], tuple[float, float, Any]] = {(0, 0): (*value(0, 0), (0, None))}
    for j in layers[1:]:
        grown: dict[tuple[int, int], tuple[float, float, Any]] = {}
        for (source, changes), (least, total, chosen) in sorted(states.items(), key=lambda item: item[0]):
            for i, more in ((source, changes), (j, changes + 1)):
                if more > max_changes:
                    continue
                low, added = value(i, j)
                state = (min(least, low), total + added, chosen if i == source else (j, chosen))
                if (i, more) not in grown or state[:2] > grown[i, more][:2]:
                    grown[i, more] = state
        states = grown
    best = max(sorted(states), key=lambda at: states[at][:2])
    least, total, chosen = states[best]
    # At run time a layer that does not select takes the blocks of the last that did.
    selecting = [layer for layer in _unlinked(chosen) if layer not in full]
    sparse = [layer for layer in layers if layer not in full]
    selecting = sorted({*selecting, *sparse[:1]})
    return Reuse(follow(len(layers), full, selecting), least, total)


def _reuse(tables: Sequence[Overlap], full: Collection[int], selecting: Sequence[int]) -> Reuse:
    """The sources that follow from who is full and who selects, and their worth."""
    sources = follow(len(tables[0]), full, selecting)
    pairs = [(j if i is None else i, j) for j, i in enumerate(sources)]
    least = min(1.0 if i == j else _least(tables, i, j) for i, j in pairs)
    return Reuse(sources, least, sum(len(tables) if i == j else _sum(tables, i, j) for i, j in pairs))


def follow(layers: int, full: Collection[int], selecting: Collection[int]) -> Sources:
    """The sources where these layers are full and these select: the others reuse the last that selects."""
    found: list[int | None] = []
    last = None
    for layer in range(layers):
        last = layer if layer in selecting else last
        found.append(None if layer in full else last)
    return tuple(found)


def _unlinked(chosen: Any) -> list[int]:
    found: list[int] = []
    while chosen is not None:
        layer, chosen = chosen
        found.append(layer)
    return found[::-1]


def _pairs(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((i, j) for at, j in enumerate(layers) for i in layers[:at])


def _least(tables: Sequence[Overlap], i: int, j: int) -> float:
    return min(table[i][j] for table in tables)


def _sum(tables: Sequence[Overlap], i: int, j: int) -> float:
    return sum(table[i][j] for table in tables)


def _tables(overlap: Any) -> list[list[list[float]]]:
    """Several matrices, whether one or more were given, checked above their diagonals."""
    nested = _lists(overlap)
    if nested and isinstance(nested[0], list) and nested[0] and not isinstance(nested[0][0], list):
        nested = [nested]
    if not nested:
        raise ValueError("overlap is empty. Give a matrix of layers by layers, or several.")
    layers = len(nested[0]) if isinstance(nested[0], list) else 0
    for table in nested:
        if not isinstance(table, list) or len(table) != layers or not layers:
            raise ValueError("overlap must be a matrix of layers by layers, or several of the same size.")
        for i, row in enumerate(table):
            if not isinstance(row, list) or len(row) != layers:
                raise ValueError(f"Row {i} of overlap does not have one number for each of {layers} layers.")
            for j, value in enumerate(row[i + 1 :], start=i + 1):
                if isinstance(value, list) or not 0 <= value <= 1:
                    raise ValueError(f"overlap[{i}][{j}]={value!r} must be a share, from 0 to 1.")
    return nested


def _lists(data: Any) -> Any:
    """Nested lists of what is nested: sequences, or an array that can say itself as lists."""
    if hasattr(data, "tolist"):
        return data.tolist()
    return [_lists(each) for each in data] if isinstance(data, Iterable) else data


def _layers(sensitive: Collection[int], layers: int) -> frozenset[int]:
    for layer in sensitive:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
            raise ValueError(
                f"sensitive={tuple(sensitive)} must hold layers' numbers from 0 to {layers - 1}."
            )
    return frozenset(sensitive)
