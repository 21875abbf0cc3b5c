"""Attention of a few new queries to a cache by Triton kernels: the keys are split, the parts merged.

All query heads of a key/value head are rows of one tile, so the cache is read once. A key that no row sees is
not read.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfield.ops.neighborhood import operator
from nearfield.ops.neighborhood.triton_boxes import jit, load_rows, tl

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? visible, Tensor? addend, float scale) -> "
    "(Tensor, Tensor)"
)
PROGRAMS = 264  # that keep a large GPU busy: two for each of its processors
SPLITS = 64  # parts of the keys at most
COLUMNS = 64  # keys of a tile
ROWS = 64  # rows of a tile at most
LOG2E = 1.4426950408889634
MISFIT = "The tensors do not fit one another. Call neighborhood_attention_decode, which says what is wrong."


def decode(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, addend: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, Dv] and log-sum-exp [B, N, H] over the keys that are `visible` [B or 1, N, M], or all.

    `addend` [B or 1, H, N, M] is added to the scores. There are no derivatives.
    """
    return _decode(query, key, value, visible, addend, scale)


@jit
def part_kernel(
    query, key, value, visible, addend, out, lse,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    seen_batch, seen_token, add_batch, add_head, add_token,
    batches, queries, keys, heads, group_size, head_dim, value_dim, tiles, splits, share, scale,
    D: tl.constexpr, DV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr, HAS_VISIBLE: tl.constexpr, HAS_ADDEND: tl.constexpr,
):  # fmt: skip
    """Output [splits, B, N, H, DV] and log-sum-exp of a tile of rows over one part of the keys."""
    kv_heads = heads // group_size
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    kv_head = tl.program_id(0) // tiles // splits % kv_heads
    batch = (tl.program_id(0) // tiles // splits // kv_heads).to(tl.int64)
    row = tile * BR + tl.arange(0, BR)
    rows = row < group_size * queries
    head = kv_head * group_size + row // queries
    token = row % queries
    place = batch * q_batch + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    q = load_rows(query, place, rows, head_dim, D, EVEN, True)
    key += batch * k_batch + kv_head.to(tl.int64) * k_head
    value += batch * v_batch + kv_head.to(tl.int64) * v_head
    seen_row = visible + batch * seen_batch + token.to(tl.int64) * seen_token
    add_row = addend + batch * add_batch + head.to(tl.int64) * add_head + token.to(tl.int64) * add_token

    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, DV], tl.float32)
    for first in range(split * share, tl.minimum(split * share + share, keys), BN):
        column = first + tl.arange(0, BN)
        is_there = column < keys
        seen = rows[:, None] & is_there[None, :]
        if HAS_VISIBLE:
            seen = tl.load(seen_row[:, None] + column[None, :], mask=seen, other=0) != 0
            is_there = tl.max(seen.to(tl.int32), 0) > 0
        k = load_rows(key, column.to(tl.int64) * k_token, is_there, head_dim, D, EVEN, True)
        v = load_rows(value, column.to(tl.int64) * v_token, is_there, value_dim, DV, EVEN_V, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_ADDEND:
            scores += tl.load(add_row[:, None] + column[None, :], mask=seen, other=0.0) * 1.4426950408889634
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        w = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(w, 1)
        acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    whole = tl.where(total == 0.0, 1.0, total)
    at = ((split.to(tl.int64) * batches + batch) * queries + token) * heads + head
    columns = tl.arange(0, DV)
    result = (acc / whole[:, None]).to(out.dtype.element_ty)
    inside = rows[:, None] & (columns < value_dim)[None, :]
    tl.store(out + (at * value_dim)[:, None] + columns[None, :], result, mask=inside)
    log = tl.where(total == 0.0, float("-inf"), top * 0.6931471805599453 + tl.log(whole))
    tl.store(lse + at, log, mask=rows)


@jit
def merge_kernel(
    parts, logs, out, lse, rows, splits, value_dim, S: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """One row of the output and its log-sum-exp from those of the parts."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, S)
    column = tl.arange(0, DV)
    there = split < splits
    log = tl.load(logs + split.to(tl.int64) * rows + row, mask=there, other=float("-inf"))
    top = tl.max(log, 0)
    level = tl.where(top == float("-inf"), 0.0, top)
    w = tl.exp(log - level)
    total = tl.sum(w, 0)
    whole = tl.where(total == 0.0, 1.0, total)
    at = (split.to(tl.int64) * rows + row)[:, None] * value_dim + column[None, :]
    part = tl.load(parts + at, mask=there[:, None] & (column < value_dim)[None, :], other=0.0)
    merged = tl.sum(part * (w / whole)[:, None], 0)
    tl.store(out + row * value_dim + column, merged.to(out.dtype.element_ty), mask=column < value_dim)
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), level + tl.log(whole)))


@torch.library.custom_op("nearfield::triton_decode", mutates_args=(), schema=SCHEMA)
def _decode(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, addend: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    (batch, queries, heads, dim), (_, keys, kv_heads, _), dv = query.shape, key.shape, value.shape[-1]
    if (
        key.shape != (batch, keys, kv_heads, dim)
        or value.shape[:-1] != key.shape[:-1]
        or not (visible is None or visible.shape in ((batch, queries, keys), (1, queries, keys)))
        or not (addend is None or addend.shape in ((batch, heads, queries, keys), (1, heads, queries, keys)))
        or not (query.dtype == key.dtype == value.dtype and (visible is None or visible.dtype == torch.bool))
    ):
        raise ValueError(MISFIT)
    out, lse = _results(query, value)
    if not lse.numel():
        return out, lse
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (query, key, value))
    seen = q if visible is None else visible.contiguous().view(torch.uint8)
    add = q if addend is None else addend.to(torch.float32).contiguous()
    rows = max(16, min(ROWS, 1 << (heads // kv_heads * queries - 1).bit_length()))
    tiles = -(-(heads // kv_heads * queries) // rows)
    programs = tiles * kv_heads * batch
    splits = max(1, min(SPLITS, -(-PROGRAMS // programs), -(-keys // COLUMNS)))
    share = -(-max(keys, 1) // (splits * COLUMNS)) * COLUMNS
    splits = -(-max(keys, 1) // share)
    parts, logs = out, lse
    if splits > 1:
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
        logs = lse.new_empty((splits, *lse.shape))
    D, DV = (max(16, 1 << (x - 1).bit_length()) for x in (dim, dv))
    with torch.cuda.device_of(q):
        part_kernel[(programs * splits,)](
            q, k, v, seen, add, parts, logs, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            seen.stride(0) if len(seen) > 1 else 0, seen.stride(1), add.stride(0) if len(add) > 1 else 0,
            *add.stride()[1:3], batch, queries, keys, heads, heads // kv_heads, dim, dv, tiles, splits, share,
            scale * LOG2E, D=D, DV=DV, EVEN=dim == D, EVEN_V=dv == DV, BR=rows, BN=COLUMNS,
            HAS_VISIBLE=visible is not None, HAS_ADDEND=addend is not None, num_warps=4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(lse.numel(),)](
                parts, logs, out, lse, lse.numel(), splits, dv, S=1 << (splits - 1).bit_length(), DV=DV,
                num_warps=4,
            )  # fmt: skip
    return out, lse


@_decode.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, addend: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _results(query, value)


@_decode.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return operator.each(_decode, info, in_dims, args)


def _results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)
