"""Attention to chosen blocks by Triton kernels, on a GPU: forward; Triton is imported when they first run."""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nearfield.ops.kernels import by_batch, side_by_side

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256  # channels of which tiles fit a program
ROWS = 16  # queries times heads of a program, the least that tl.dot takes
KEYS = 64  # read at once, at most
SPLIT = 256  # keys of a program, about
MOST_SPLITS = 64
LOG2E = 1.4426950408889634
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor block_indices, Tensor? key_mask, SymInt block_size, "
    "bool is_causal, float scale) -> (Tensor, Tensor)"
)


def unfit(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot run this, or None."""
    if query.device.type != "cuda" and not is_interpreted():
        return f"the GPU kernels need tensors on a GPU, these are on {query.device.type!r}."
    if _absent():
        return "the package triton is not installed: pip install triton."
    if query.dtype not in DTYPES:
        return f"the GPU kernels compute in float32, bfloat16 and float16, not in {query.dtype}."
    if query.shape[-1] > WIDEST or not 1 <= value.shape[-1] <= WIDEST:
        return f"the GPU kernels take 1 to {WIDEST} channels, given {query.shape[-1]}, {value.shape[-1]}."
    return None


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, which is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _absent() -> bool:
    return find_spec("triton") is None


# to a trace the answers are constants
_absent._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    """Output `[B, N, H, Dv]` and log-sum-exp `[B, N, H]`, of at least one key and one block."""
    return _attend(query, key, value, block_indices, key_mask, block_size, is_causal, scale)


@torch.library.custom_op("nearfield::triton_topk", mutates_args=(), schema=SCHEMA)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    key_mask: Tensor | None,
    block_size: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from nearfield.ops.topk import triton_kernels as kernels

    (batch, num_queries, heads, dim), (num_keys, kv_heads), dv = query.shape, key.shape[1:3], value.shape[-1]
    out, lse = _results(query, key, value)
    if not lse.numel():
        return out, lse
    query, key, value = (side_by_side(x) for x in (query, key, value))
    lists = _each_once(block_indices, -(-num_keys // block_size))
    num_lists, length = lists.shape[1], lists.shape[-1]
    per_list, group = num_queries // num_lists, heads // kv_heads
    planes, tiles = batch * kv_heads * num_lists, -(-per_list * group // ROWS)
    splits = min(MOST_SPLITS, -(-length // max(1, SPLIT // block_size)))
    parts = query.new_empty((planes, splits, per_list * group, dv), dtype=torch.float32)
    part_lse = parts.new_empty(parts.shape[:3])
    mask = part_lse if key_mask is None else side_by_side(key_mask).view(torch.uint8)
    wide, narrow = _block(dv), _block(dim)
    with torch.cuda.device(query.device) if query.device.type == "cuda" else nullcontext():
        kernels.split_kernel[splits, tiles, planes](
            query, key, value, lists, mask, parts, part_lse,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *lists.stride()[:3], mask.stride(0),
            num_keys - num_queries, num_keys, per_list, num_lists, group, kv_heads, length, block_size,
            dim, dv, scale * LOG2E,
            CAUSAL=is_causal, HAS_MASK=key_mask is not None, ROWS=ROWS,
            BN=min(KEYS, max(16, 1 << (block_size - 1).bit_length())), BD=narrow, BDV=wide,
            # tf32 holds every float16 and bfloat16
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_stages=2,
        )  # fmt: skip
        kernels.merge_kernel[tiles, planes](
            parts, part_lse, out, lse, *out.stride()[:3], *lse.stride(),
            splits, per_list, num_lists, group, kv_heads, dv, ROWS=ROWS, BDV=wide,
        )  # fmt: skip
    return out, lse


@_attend.register_fake
def _results(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


_attend.register_vmap(by_batch(_attend, 5))


def _each_once(block_indices: Tensor, blocks: int) -> Tensor:
    """Lists in ascending order; -1 for what is no block, or one named before."""
    lists = block_indices.sort(-1).values
    no_block = (lists < 0) | (lists >= blocks)
    no_block[..., 1:] |= lists[..., 1:] == lists[..., :-1]
    return lists.masked_fill(no_block, -1)


def _block(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())
