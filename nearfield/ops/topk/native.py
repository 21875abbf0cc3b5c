"""Attention to chosen blocks, their scores and their choice by the C++ kernels of csrc/: forward, on a CPU.

Keys are read where they lie, nothing is gathered. A step of a decoder calls these once a layer, so that what
they cost beside the kernels counts: operators are defined without the wrapper that derivatives would need.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from nearfield.core import library
from nearfield.ops.kernels import DTYPES, by_batch, call, side_by_side
from nearfield.ops.topk.geometry import count_blocks

MISFIT = (
    "The tensors do not fit one another. Call the functions of nearfield.ops.topk, which say what is wrong."
)

# the fields of library.Decode and of library.Shares from the first tensor on
DECODE, DECODE_AT = Struct("6q 6q 6q 6q 6q P2q P3q 3q P3q"), library.Decode.query.offset
SHARES, SHARES_AT = Struct("6q 6q P P"), library.Shares.query.offset


def define(name: str, schema: str, tensors: int) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the operator `nearfield::name`, computed on a CPU by the function below; vmap is a batch.

    Its first `tensors` arguments begin with the batch.
    """
    full = f"nearfield::{name}"

    def make(run: Callable[..., Any]) -> Any:
        torch.library.define(full, schema)
        torch.library.impl(full, "cpu", run)
        op = getattr(torch.ops.nearfield, name).default
        is_one = schema.endswith("-> Tensor")
        map_ = by_batch((lambda *given: (op(*given),)) if is_one else op, tensors)

        def map_one(*given: Any) -> tuple[Any, Any]:
            (found,), (dim,) = map_(*given)
            return found, dim

        torch.library.register_vmap(full, map_one if is_one else map_)
        return op

    return make


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, Dv]` and log-sum-exp `[B, N, H]`."""
    return attention(query, key, value, block_indices, key_mask, block_size, is_causal, scale)


@define(
    "native_topk",
    "(Tensor query, Tensor key, Tensor value, Tensor block_indices, Tensor? key_mask, SymInt block_size, "
    "bool is_causal, float scale) -> (Tensor, Tensor)",
    5,
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    key_mask: Tensor | None,
    block_size: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, Dv]` and log-sum-exp `[B, N, H]`; a mask has a row for each batch."""
    mask = None if key_mask is None else (key_mask.shape, key_mask.dtype)
    dtypes = (query.dtype, key.dtype, value.dtype, block_indices.dtype)
    shapes = (query.shape, key.shape, value.shape, block_indices.shape)
    blank, shape = _blank(shapes, dtypes, mask, block_size, is_causal, scale)
    out, lse = query.new_empty(shape), query.new_empty(shape[:3], dtype=torch.float32)
    if not lse.numel():
        return out, lse
    problem = library.Decode.from_buffer_copy(blank)
    query, key, value = side_by_side(query), side_by_side(key), side_by_side(value)
    block_indices = side_by_side(block_indices)
    seen = (0, 0, 0)
    if key_mask is not None:
        key_mask = side_by_side(key_mask)
        seen = (key_mask.data_ptr(), key_mask.stride(0), 0)
    (qb, qn, qh, _), (kb, kn, kh, _), (vb, vn, vh, _) = query.stride(), key.stride(), value.stride()
    (ob, on, oh, _), (lb, ln, lh), (ib, i_n, ih, _) = out.stride(), lse.stride(), block_indices.stride()
    _, lists, _, length = block_indices.shape
    DECODE.pack_into(
        problem, DECODE_AT,
        query.data_ptr(), qb, 0, 0, qn, qh,
        key.data_ptr(), kb, 0, 0, kn, kh,
        value.data_ptr(), vb, 0, 0, vn, vh,
        out.data_ptr(), ob, 0, 0, on, oh,
        lse.data_ptr(), lb, 0, 0, ln, lh,
        *seen, 0, 0, 0, 0,  # no addend
        is_causal, block_size, length, block_indices.data_ptr(), ib, i_n if lists > 1 else 0, ih,
    )  # fmt: skip
    try:
        call("nearfield_decode_forward", problem)
    except RuntimeError:
        blocks = count_blocks(key.shape[1], block_size)
        if (block_indices >= blocks).any():
            raise ValueError(
                f"block_indices name block {int(block_indices.max())}. There are {blocks}, counted from 0."
            ) from None
        raise
    return out, lse


@torch.library.register_fake("nearfield::native_topk")
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


@lru_cache(maxsize=1024)
def _blank(
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    mask: tuple[tuple[int, ...], torch.dtype] | None,
    block_size: int,
    is_causal: bool,
    scale: float,
) -> tuple[bytes, tuple[int, ...]]:
    """A problem without its tensors, checked, for kernels trust it; and the shape of its output."""
    (batch, rows, heads, dim), key, value, block_indices = shapes
    _, keys, kv_heads, _ = key
    fits = (
        key == (batch, keys, kv_heads, dim)
        and value[:-1] == key[:-1]
        and block_indices[:-1] in ((batch, rows, kv_heads), (batch, 1, kv_heads))
        and dtypes == (*dtypes[:1] * 3, torch.int64)
        and (mask is None or mask == ((batch, keys), torch.bool))
        and block_size >= 1
        and not (is_causal and rows > keys)
        and not heads % kv_heads
    )
    if not fits:
        raise ValueError(MISFIT)
    problem = library.Decode(DTYPES[dtypes[0]], batch, rows, keys, heads, kv_heads, dim, value[-1], scale)
    return bytes(problem), (batch, rows, heads, value[-1])


@define(
    "native_block_shares",
    "(Tensor query, Tensor rows, Tensor? key_mask, SymInt num_rows, SymInt block_size, bool is_bound, "
    "bool is_causal, float scale, float last_part) -> Tensor",
    3,
)
def shares(
    query: Tensor,
    rows: Tensor,
    key_mask: Tensor | None,
    num_rows: int,
    block_size: int,
    is_bound: bool,
    is_causal: bool,
    scale: float,
    last_part: float,
) -> Tensor:
    """Shares `[B, N, Hkv, blocks]` of blocks of the first `num_rows` keys `[B, M, Hkv, D]`.

    Or of rows that sum blocks up, one of them a block: of bounds these have 2 D channels.
    """
    (batch, queries, heads, dim), (_, room, kv_heads, width) = query.shape, rows.shape
    fits = (
        rows.shape[0] == batch
        and width == dim << is_bound
        and 0 <= num_rows <= room
        and not heads % kv_heads
        and block_size >= 1
        and (key_mask is None or (key_mask.shape == (batch, num_rows) and key_mask.dtype == torch.bool))
        and not (is_causal and queries > num_rows)
        and 0 < last_part <= 1
    )
    if not fits:
        raise ValueError(MISFIT)
    blocks = count_blocks(num_rows, block_size)
    out = query.new_empty((batch, queries, kv_heads, blocks), dtype=torch.float32)
    if not out.numel():
        return out
    query, rows = side_by_side(query), side_by_side(rows)
    key_mask = None if key_mask is None else key_mask.contiguous()
    (qb, qn, qh, _), (rb, rn, rh, _) = query.stride(), rows.stride()
    problem = library.Shares(
        DTYPES[query.dtype], DTYPES[rows.dtype], batch, queries, num_rows, heads, kv_heads, dim,
        block_size, is_bound, is_causal, scale, last_part,
    )  # fmt: skip
    SHARES.pack_into(
        problem, SHARES_AT, query.data_ptr(), qb, 0, 0, qn, qh, rows.data_ptr(), rb, 0, 0, rn, rh,
        0 if key_mask is None else key_mask.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    call("nearfield_block_shares", problem)
    return out


@torch.library.register_fake("nearfield::native_block_shares")
def _(query: Tensor, rows: Tensor, mask: Tensor | None, num_rows: int, block_size: int, *_: Any) -> Tensor:
    blocks = count_blocks(num_rows, block_size)
    return query.new_empty((*query.shape[:2], rows.shape[2], blocks), dtype=torch.float32)


@define(
    "native_choose_blocks",
    "(Tensor scores, SymInt num_blocks, SymInt block_size, SymInt num_keys, SymInt sink_blocks, "
    "SymInt num_recent, SymInt list_length) -> Tensor",
    1,
)
def choose(
    scores: Tensor,
    num_blocks: int,
    block_size: int,
    num_keys: int,
    sink_blocks: int,
    num_recent: int,
    list_length: int,
) -> Tensor:
    """Lists `[B, N, Hkv, list_length]` of the chosen blocks."""
    batch, queries, kv_heads, blocks = scores.shape
    if blocks != count_blocks(num_keys, block_size) or queries > num_keys or scores.dtype != torch.float32:
        raise ValueError(MISFIT)
    out = scores.new_empty((batch, queries, kv_heads, list_length), dtype=torch.int64)
    if out.numel():
        scores = scores.contiguous()
        problem = library.Choice(
            batch, queries, num_keys, kv_heads, block_size, num_blocks, sink_blocks, num_recent, list_length,
            scores.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        call("nearfield_choose_blocks", problem)
    return out


@torch.library.register_fake("nearfield::native_choose_blocks")
def _(scores: Tensor, *numbers: int) -> Tensor:
    return scores.new_empty((*scores.shape[:3], numbers[-1]), dtype=torch.int64)
