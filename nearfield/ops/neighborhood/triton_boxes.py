"""What the Triton kernels of neighborhood attention share: lanes, windows, boxes, loads.

Three axes always; a grid with fewer has sides of 1 in front. A token at coordinate c of an axis of dilation d
is at position c // d of the dilation group c % d; windows and boxes are intervals of positions. A key box has
its first position and one lane a token; `triton_plan.py` counts the same boxes.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    jit = triton.jit
    INT_TUPLES = ("grid", "kernel_size", "stride", "dilation", "offset")

    def kernel(function: Callable[..., Any]) -> Any:
        """A kernel of which sizes of the pattern make no variants, except by being 1."""
        names = [name for name in INT_TUPLES if name in function.__code__.co_varnames]
        return triton.jit(do_not_specialize_on_alignment=names)(function)
else:  # the module still imports; nobody launches

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, never compiled."""
        return function

    tl, kernel = None, jit


@jit
def lanes(T: tl.constexpr):
    """Coordinates of each lane in a box with sides T."""
    r = tl.arange(0, T[0] * T[1] * T[2])
    return r // (T[1] * T[2]), r // T[2] % T[1], r % T[2]


@jit
def locate(work, sizes, item, outer, grid, offset, PACKED: tl.constexpr):
    """Batch entry (or packed grid), box in it, its sides, and its first query and first key in flat order."""
    if PACKED:
        batch = tl.load(work + 2 * item)
        box = tl.load(work + 2 * item + 1)
        sides = (
            tl.load(sizes + 4 * batch + 1),
            tl.load(sizes + 4 * batch + 2),
            tl.load(sizes + 4 * batch + 3),
        )
        first = tl.load(sizes + 4 * batch).to(tl.int64)
        return batch.to(tl.int64), box, sides, first, first
    else:
        batch = outer.to(tl.int64)
        first_key = batch * grid[0] * grid[1]
        return batch, item, grid, first_key * (grid[2] - offset), first_key * grid[2]


@jit
def base(batch, first, head, strides, PACKED: tl.constexpr):
    """Where a head's tokens begin, in elements."""
    if PACKED:
        return first * strides[3] + head.to(tl.int64) * strides[4]
    else:
        return batch * strides[0] + head.to(tl.int64) * strides[4]


@jit
def per_axis(strides, sides, PACKED: tl.constexpr):
    """Elements from token to token on each axis."""
    if PACKED:
        plane = sides[1].to(tl.int64) * sides[2]
        return plane * strides[3], sides[2].to(tl.int64) * strides[3], strides[3]
    else:
        return strides[1], strides[2], strides[3]


@jit
def split_box(box, sides, dilation, offset, T: tl.constexpr):
    """Dilation groups and first positions of box number `box`; positions count from token `offset` on."""
    n2 = tl.cdiv(tl.cdiv(sides[2] - offset, dilation[2]), T[2])
    n1 = tl.cdiv(tl.cdiv(sides[1], dilation[1]), T[1])
    n0 = tl.cdiv(tl.cdiv(sides[0], dilation[0]), T[0])
    at2 = box % n2
    at1 = box // n2 % n1
    at0 = box // n2 // n1 % n0
    group = box // n2 // n1 // n0
    g2 = group % dilation[2]
    g1 = group // dilation[2] % dilation[1]
    g0 = group // dilation[2] // dilation[1]
    start = tl.cdiv(tl.maximum(offset - g2, 0), dilation[2])
    return (g0, g1, g2), (at0 * T[0], at1 * T[1], start + at2 * T[2])


@jit
def lengths(sides, group, dilation):
    """Tokens of a dilation group on each axis."""
    return (
        (sides[0] - group[0] + dilation[0] - 1) // dilation[0],
        (sides[1] - group[1] + dilation[1] - 1) // dilation[1],
        (sides[2] - group[2] + dilation[2] - 1) // dilation[2],
    )


@jit
def window(p, length, K, S, CAUSAL: tl.constexpr, SHIFT: tl.constexpr):
    """[start, end) of the window of the query at position p, before any cut at the border."""
    run = p // S * S
    if CAUSAL:
        start = tl.minimum(run + S - 1, length - 1) - K + 1
        if SHIFT:
            start = tl.maximum(start, 0)
        return start, p + 1
    else:
        start = tl.minimum(run + S // 2, length - 1) - K // 2
        if SHIFT:
            start = tl.maximum(tl.minimum(start, length - K), 0)
        return start, start + K


@jit
def seen_by(j, length, K, S, CAUSAL: tl.constexpr, SHIFT: tl.constexpr):
    """[first, after the last) of the queries that see the key at position j."""
    if CAUSAL:
        low = j
        high = (j + K - S) // S * S + S
        high = tl.where(j + K >= length, length, tl.minimum(high, length))
    else:
        left = K // 2
        low = tl.cdiv(tl.maximum(j - (K - 1 - left) - S // 2, 0), S) * S
        high = (j + left - S // 2) // S * S + S
        by_last = j + left >= length - 1
        if SHIFT:
            low = tl.where(j < K, 0, low)
            by_last = by_last | (j >= length - K)
        high = tl.where(by_last, length, tl.minimum(high, length))
    return low, high


@jit
def visit(start, stop, whole_start, whole_stop, T: tl.constexpr):
    """Where the boxes of one axis begin, how many, the first that is whole, and how many are."""
    count = tl.cdiv(tl.maximum(stop - start, 0), T)
    first = tl.cdiv(tl.maximum(whole_start - start, 0), T)
    return start, count, first, tl.maximum(tl.maximum(whole_stop - start, 0) // T - first, 0)


@jit
def key_boxes(
    first, length, K, S, TQ: tl.constexpr, TK: tl.constexpr, CAUSAL: tl.constexpr, SHIFT: tl.constexpr,
    OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Key boxes of one axis that the query box from position `first` on visits."""
    start, whole_stop = window(first, length, K, S, CAUSAL, SHIFT)
    whole_start, stop = window(tl.minimum(first + TQ, length) - 1, length, K, S, CAUSAL, SHIFT)
    if not OUTSIDE:
        start = tl.maximum(start, 0)
        whole_start = tl.maximum(whole_start, 0)
        stop = tl.minimum(stop, length)
        whole_stop = tl.minimum(whole_stop, length)
    return visit(start, stop, whole_start, whole_stop, TK)


@jit
def query_boxes(
    first, length, first_query, K, S, TQ: tl.constexpr, TK: tl.constexpr, CAUSAL: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Query boxes of one axis that visit the key box from position `first` on."""
    start, whole_stop = seen_by(first, length, K, S, CAUSAL, SHIFT)
    whole_start, stop = seen_by(tl.minimum(first + TK, length) - 1, length, K, S, CAUSAL, SHIFT)
    start = tl.maximum(start, first_query)
    return visit(start, stop, tl.maximum(whole_start, first_query), whole_stop, TQ)


@jit
def divided(t, n):
    """t // n and t % n by a float32 inverse, which is taken before a loop.

    Exact below 2**21: of boxes, which are that many where a query sees 2**26 keys or more.
    """
    quotient = ((tl.cast(t, tl.float32) + 0.5) * (1.0 / tl.cast(n, tl.float32))).to(tl.int32)
    return quotient, t - quotient * n


@jit
def whole_box(t, v0, v1, v2, T: tl.constexpr, RANK: tl.constexpr):
    """First positions of the whole box number t."""
    if RANK == 1:
        return v0[0], v1[0], v2[0] + (v2[2] + t) * T[2]
    else:
        row, b2 = divided(t, tl.maximum(v2[3], 1))
        at2 = v2[0] + (v2[2] + b2) * T[2]
        if RANK == 2:
            return v0[0], v1[0] + (v1[2] + row) * T[1], at2
        else:
            b0, b1 = divided(row, tl.maximum(v1[3], 1))
            return v0[0] + (v0[2] + b0) * T[0], v1[0] + (v1[2] + b1) * T[1], at2


@jit
def beside(b, v):
    """The number of a box among those of an axis that are not whole, as its number among all."""
    return b + tl.where(b >= v[2], v[3], 0)


@jit
def partial_box(t, v0, v1, v2, T: tl.constexpr, RANK: tl.constexpr):
    """First positions of box number t of those that are not whole.

    They fill slabs: those beside the whole ones on axis 0, then among the others beside them on axis 1, then
    on axis 2.
    """
    if RANK == 1:
        return v0[0], v1[0], v2[0] + beside(t, v2) * T[2]
    else:
        ends = tl.maximum(v2[1] - v2[3], 1)
        n2 = tl.maximum(v2[1], 1)
        if RANK == 2:
            u = t - (v1[1] - v1[3]) * v2[1]
            row, b2 = divided(t, n2)
            deep, end = divided(u, ends)
            b1 = tl.where(u < 0, beside(row, v1), v1[2] + deep)
            b2 = tl.where(u < 0, b2, beside(end, v2))
            return v0[0], v1[0] + b1 * T[1], v2[0] + b2 * T[2]
        else:
            u = t - (v0[1] - v0[3]) * v1[1] * v2[1]
            w = u - v0[3] * (v1[1] - v1[3]) * v2[1]
            row, b2 = divided(tl.where(u < 0, t, u), n2)
            deep, end = divided(w, ends)
            row = tl.where(w < 0, row, deep)
            b0, b1 = divided(
                row, tl.maximum(tl.where(u < 0, v1[1], tl.where(w < 0, v1[1] - v1[3], v1[3])), 1)
            )
            b1 = tl.where(u < 0, b1, tl.where(w < 0, beside(b1, v1), v1[2] + b1))
            b0 = tl.where(u < 0, beside(b0, v0), v0[2] + b0)
            b2 = tl.where(w < 0, b2, beside(end, v2))
            return v0[0] + b0 * T[0], v1[0] + b1 * T[1], v2[0] + b2 * T[2]


@jit
def coordinates(at, lane, group, dilation):
    """Positions of the lanes of the box at `at`, and the coordinates of their tokens."""
    p = (at[0] + lane[0], at[1] + lane[1], at[2] + lane[2])
    return p, tokens(p, group, dilation)


@jit
def tokens(p, group, dilation):
    """Coordinates of the tokens at positions p of a dilation group."""
    return (
        group[0] + p[0] * dilation[0],
        group[1] + p[1] * dilation[1],
        group[2] + p[2] * dilation[2],
    )


@jit
def wide(x):
    """x in 64 bits, in which tokens times strides fit."""
    return tl.cast(x, tl.int64)


@jit
def elements(c, strides):
    """How far the tokens at coordinates c are from the first, in elements."""
    return wide(c[0]) * strides[0] + wide(c[1]) * strides[1] + wide(c[2]) * strides[2]


@jit
def lane_elements(lane, dilation, strides, FAR: tl.constexpr):
    """How far the tokens of a box are from its first, in elements; FAR where 32 bits do not hold it."""
    c = (lane[0] * dilation[0], lane[1] * dilation[1], lane[2] * dilation[2])
    if FAR:
        return elements(c, strides)
    else:
        return tl.cast(c[0] * strides[0] + c[1] * strides[1] + c[2] * strides[2], tl.int32)


@jit
def flat(c, sides):
    """Tokens at coordinates c in row-major order."""
    return (wide(c[0]) * sides[1] + c[1]) * sides[2] + c[2]


@jit
def below(p, length, RANK: tl.constexpr):
    """Which positions lie before the end of their group."""
    inside = p[2] < length[2]
    if RANK > 1:
        inside = inside & (p[1] < length[1])
    if RANK > 2:
        inside = inside & (p[0] < length[0])
    return inside


@jit
def not_before(p, RANK: tl.constexpr):
    """Which positions are not before the beginning of the grid."""
    inside = p[2] >= 0
    if RANK > 1:
        inside = inside & (p[1] >= 0)
    if RANK > 2:
        inside = inside & (p[0] >= 0)
    return inside


@jit
def clamped(p, length):
    """Positions, those past the end of their group replaced by the last."""
    return (
        tl.minimum(p[0], length[0] - 1),
        tl.minimum(p[1], length[1] - 1),
        tl.minimum(p[2], length[2] - 1),
    )


@jit
def in_windows(start, end, j, RANK: tl.constexpr):
    """[rows, columns]: which positions j of columns lie in the intervals of rows."""
    seen = (j[2][None, :] >= start[2][:, None]) & (j[2][None, :] < end[2][:, None])
    if RANK > 1:
        seen = seen & (j[1][None, :] >= start[1][:, None]) & (j[1][None, :] < end[1][:, None])
    if RANK > 2:
        seen = seen & (j[0][None, :] >= start[0][:, None]) & (j[0][None, :] < end[0][:, None])
    return seen


@jit
def windows(p, length, kernel_size, stride, CAUSAL: tl.constexpr, SHIFT: tl.constexpr):
    """[start, end) of the windows at positions p, before any cut; a p past the end counts as the last."""
    p = clamped(p, length)
    s0, e0 = window(p[0], length[0], kernel_size[0], stride[0], CAUSAL[0], SHIFT)
    s1, e1 = window(p[1], length[1], kernel_size[1], stride[1], CAUSAL[1], SHIFT)
    s2, e2 = window(p[2], length[2], kernel_size[2], stride[2], CAUSAL[2], SHIFT)
    return (s0, s1, s2), (e0, e1, e2)


@jit
def cut(start, end, length):
    """Windows as far as there are keys."""
    return (
        (tl.maximum(start[0], 0), tl.maximum(start[1], 0), tl.maximum(start[2], 0)),
        (tl.minimum(end[0], length[0]), tl.minimum(end[1], length[1]), tl.minimum(end[2], length[2])),
    )


@jit
def load_rows(x, place, inside, width, W: tl.constexpr, EVEN: tl.constexpr, CHECK: tl.constexpr):
    """Rows of x at `place`, W channels of which `width` exist; zeros where not `inside` (if CHECK)."""
    column = tl.arange(0, W)
    at = x + place[:, None] + column[None, :]
    if CHECK:
        if EVEN:
            return tl.load(at, mask=inside[:, None], other=0.0)
        else:
            return tl.load(at, mask=inside[:, None] & (column < width)[None, :], other=0.0)
    else:
        if EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=(column < width)[None, :] & (inside | True)[:, None], other=0.0)


@jit
def load_box(x, batch, at, channel, T: tl.constexpr, W: tl.constexpr):
    """Rows of a box of [batch, three axes, channels], of which x is a descriptor; zeros outside."""
    return tl.reshape(x.load([batch, at[0], at[1], at[2], channel]), [T[0] * T[1] * T[2], W])


@jit
def store_rows(x, value, row, inside, width, W: tl.constexpr, EVEN: tl.constexpr):
    """Write whole rows of a contiguous x, as far as they are `inside`."""
    column = tl.arange(0, W)
    if EVEN:
        tl.store(x + (row * W)[:, None] + column[None, :], value.to(x.dtype.element_ty), mask=inside[:, None])
    else:
        at = x + (row * width)[:, None] + column[None, :]
        tl.store(at, value.to(x.dtype.element_ty), mask=inside[:, None] & (column < width)[None, :])


@jit
def sees_extra(place, token, start, end, group, dilation, CAUSAL: tl.constexpr):
    """Which queries see which extra keys, of arguments that broadcast: a key has the place -1 if all see it,
    -2 if none does, else its token's in one dimension, which a query sees here unless it is in its window."""
    at = place // dilation
    near = (place % dilation == group) & (at >= start) & (at < end)
    seen = (place >= 0) & (~near)
    if CAUSAL:
        seen = seen & (place <= token)
    return (place == -1) | seen
