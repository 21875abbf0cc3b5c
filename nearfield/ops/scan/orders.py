"""Orders in which the tokens of a grid are scanned: four paths, as lists of whole numbers."""

from __future__ import annotations

from functools import lru_cache

ORDERS = ("snake", "raster")


def paths(height: int, width: int, order: str) -> tuple[tuple[int, ...], ...]:
    """The four paths over a grid: the number `y * width + x` of each token, in the order of the visit.

    "raster" goes along rows, along columns, and back along both. "snake" turns round at the end of each
    line, so that neighbours on the path are neighbours on the grid: along rows from the upper left and from
    the lower left, along columns from the lower left and from the lower right.
    """
    if order == "raster":
        rows = tuple(range(height * width))
        columns = tuple(y * width + x for x in range(width) for y in range(height))
        return rows, columns, rows[::-1], columns[::-1]
    down, up, right = range(height), range(height)[::-1], range(width)
    return (
        tuple(y * width + x for i, y in enumerate(down) for x in _turned(right, i)),
        tuple(y * width + x for i, y in enumerate(up) for x in _turned(right, i)),
        tuple(y * width + x for i, x in enumerate(right) for y in _turned(up, i)),
        tuple(y * width + x for i, x in enumerate(right[::-1]) for y in _turned(up, i)),
    )


def _turned(line: range, number: int) -> range:
    """A line of the grid, backwards if its number is odd."""
    return line[::-1] if number % 2 else line


@lru_cache(maxsize=256)
def tables(height: int, width: int, order: str) -> tuple[tuple[int, ...], ...]:
    """How rows are picked for the four paths side by side, [T, 4] flattened, and how they are put back.

    From rows of [T], each path its token; from rows of [T, 4], where each token has a row for every path; and
    from the rows of the paths to those of the tokens.
    """
    visits = paths(height, width, order)
    shared = tuple(token for tokens in zip(*visits, strict=True) for token in tokens)
    own = tuple(token * len(visits) + i % len(visits) for i, token in enumerate(shared))
    return shared, own, inverse(own)


def inverse(path: tuple[int, ...]) -> tuple[int, ...]:
    """When each token is visited."""
    place = [0] * len(path)
    for time, token in enumerate(path):
        place[token] = time
    return tuple(place)
