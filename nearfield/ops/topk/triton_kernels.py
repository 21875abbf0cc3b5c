"""Kernels of attention to listed blocks of keys for GPUs: parts of a list side by side, then their merging.

A plane is a batch, a key head and a list; its rows are the queries of the list times the heads of the key
head. Tensors of tokens are [B, T, heads, channels] with any strides but the last.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    jit = triton.jit
else:  # the module still imports; nobody launches

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, never compiled."""
        return function


@jit
def split_kernel(
    q, k, v, lists, mask, out, lse,
    qb, qn, qh, kb, kn, kh, vb, vn, vh, lb, ln, lh, mb,
    LATE, M, PER_LIST, NUM_LISTS, GROUP, KV_HEADS, LENGTH, SIZE, D, DV, scale,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each row the sum of values [planes, splits, rows, DV], and the log of the denominator, base 2."""
    split, splits, tile, plane = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.program_id(2)
    head, b = plane // NUM_LISTS % KV_HEADS, (plane // NUM_LISTS // KV_HEADS).to(tl.int64)
    r, ds, vs = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BD), tl.arange(0, BDV)
    inside = r < PER_LIST * GROUP
    query = plane % NUM_LISTS * PER_LIST + r // GROUP
    place = query.to(tl.int64) * qn + (head * GROUP + r % GROUP).to(tl.int64) * qh
    queries = tl.load(
        q + b * qb + place[:, None] + ds[None, :], mask=inside[:, None] & (ds < D)[None, :], other=0.0
    ).to(tl.float32)
    k += b * kb + head.to(tl.int64) * kh
    v += b * vb + head.to(tl.int64) * vh
    lists += b * lb + (plane % NUM_LISTS).to(tl.int64) * ln + head.to(tl.int64) * lh
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BDV], tl.float32)
    share = tl.cdiv(LENGTH, splits)
    for i in range(split * share, tl.minimum((split + 1) * share, LENGTH)):
        block = tl.load(lists + i)
        for start in range(0, tl.where(block < 0, 0, SIZE), BN):
            within = start + tl.arange(0, BN)
            at = block * SIZE + within
            there = (within < SIZE) & (at < M)
            keys = tl.load(
                k + at[:, None] * kn + ds[None, :], mask=there[:, None] & (ds < D)[None, :], other=0.0
            ).to(tl.float32)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            seen = there[None, :] & inside[:, None]
            if CAUSAL:
                seen = seen & (at[None, :] <= (LATE + query)[:, None])
            if HAS_MASK:
                seen = seen & (tl.load(mask + b * mb + at, mask=there, other=0) != 0)[None, :]
            scores = tl.where(seen, scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp2(scores - safe[:, None])
            shrink = tl.exp2(top - safe)
            values = tl.load(
                v + at[:, None] * vn + vs[None, :], mask=there[:, None] & (vs < DV)[None, :], other=0.0
            ).to(tl.float32)
            total = total * shrink + tl.sum(weights, 1)
            sums = sums * shrink[:, None] + tl.dot(weights, values, input_precision=PRECISION)
            top = higher
    row = (plane.to(tl.int64) * splits + split) * PER_LIST * GROUP + r
    nothing = total == 0.0
    whole = tl.where(nothing, 1.0, total)
    tl.store(
        out + row[:, None] * DV + vs[None, :],
        sums / whole[:, None],
        mask=inside[:, None] & (vs < DV)[None, :],
    )
    tl.store(lse + row, tl.where(nothing, -float("inf"), top + tl.log2(whole)), mask=inside)


@jit
def merge_kernel(
    parts, part_lse, out, lse, ob, on, oh, eb, en, eh,
    SPLITS, PER_LIST, NUM_LISTS, GROUP, KV_HEADS, DV, ROWS: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """The output and the log-sum-exp of each row, from its splits."""
    tile, plane = tl.program_id(0), tl.program_id(1)
    head, b = plane // NUM_LISTS % KV_HEADS, (plane // NUM_LISTS // KV_HEADS).to(tl.int64)
    r, vs = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BDV)
    inside = r < PER_LIST * GROUP
    within = inside[:, None] & (vs < DV)[None, :]
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BDV], tl.float32)
    for split in range(SPLITS):
        row = (plane.to(tl.int64) * SPLITS + split) * PER_LIST * GROUP + r
        new = tl.load(part_lse + row, mask=inside, other=-float("inf"))
        part = tl.load(parts + row[:, None] * DV + vs[None, :], mask=within, other=0.0)
        higher = tl.maximum(top, new)
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        shrink, weight = tl.exp2(top - safe), tl.exp2(new - safe)
        total = total * shrink + weight
        sums = sums * shrink[:, None] + part * weight[:, None]
        top = higher
    nothing = total == 0.0
    whole = tl.where(nothing, 1.0, total)
    query = (plane % NUM_LISTS * PER_LIST + r // GROUP).to(tl.int64)
    h = (head * GROUP + r % GROUP).to(tl.int64)
    place = b * ob + query * on + h * oh
    tl.store(
        out + place[:, None] + vs[None, :], (sums / whole[:, None]).to(out.dtype.element_ty), mask=within
    )
    found = tl.where(nothing, -float("inf"), (top + tl.log2(whole)) * 0.6931471805599453)
    tl.store(lse + b * eb + query * en + h * eh, found, mask=inside)
