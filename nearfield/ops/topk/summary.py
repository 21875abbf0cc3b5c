"""What a choice of blocks keeps of their keys: made once, brought up to date as keys arrive."""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.ops.topk.geometry import check_block_size, count_blocks

Score = Literal["mass", "mean", "bound", "hash"]
SCORES: tuple[str, ...] = get_args(Score)


class BlockSummary(NamedTuple):
    """What `score` needs of the keys: for each block, or with "hash" for each key, a row of the table.

    There may be more rows than blocks: room for those to come. To reorder a batch reorders the table.
    """

    score: str
    block_size: int
    # "mean": means [B, Hkv, blocks, D]; "bound": greatest, then least of each channel [B, Hkv, blocks, 2 D];
    # "hash": bits of signs [B, Hkv, keys, bytes]; "mass" reads the keys themselves
    table: Tensor


def summarize_blocks(
    key: Float[Tensor, "b m kv_heads dim"],
    *,
    block_size: int,
    score: str,
    key_mask: Bool[Tensor, "#b m"] | None = None,
) -> BlockSummary:
    """What `block_scores` needs of the keys of each block, to be kept beside a cache of keys.

        summary = summarize_blocks(keys, block_size=64, score="bound")            # of a prompt
        summary = extend_blocks(summary, keys, first=len_before)                  # each step, all keys given
        scores = block_scores(query, keys, block_size=64, score="bound", summary=summary)

    Keys under a False `key_mask` leave no trace.
    """
    check_block_size(block_size)
    check_score(score)
    if key.dim() != 4 or not key.is_floating_point():
        raise ValueError(
            f"key has shape {list(key.shape)} and dtype {key.dtype}. "
            "Give floating numbers [batch, tokens, heads, head_dim]."
        )
    return BlockSummary(score, block_size, _rows(key, block_size, score, key_mask))


def extend_blocks(
    summary: BlockSummary,
    key: Float[Tensor, "b m kv_heads dim"],
    *,
    first: int,
    key_mask: Bool[Tensor, "#b m"] | None = None,
) -> BlockSummary:
    """The summary after all keys from number `first` on are new: appended, or left when some were cropped.

    `key` are all keys that there are now. The table is written to, and doubled when it is full; after a crop
    to `m` keys give `first=m`.
    """
    size, table, num_keys = summary.block_size, summary.table, key.shape[1]
    if summary.score == "mass" or not num_keys:
        return summary
    key = key.detach()  # the table is written to, step after step
    block = min(first, num_keys - 1) // size  # the last that is left may have lost keys
    start = block * size
    mask = None if key_mask is None else key_mask[:, start:]
    rows = _rows(key[:, start:], size, summary.score, mask)
    at = start if summary.score == "hash" else block
    end = at + rows.shape[2]
    if end > table.shape[2]:
        larger = table.new_zeros((*table.shape[:2], 2 * end, table.shape[3]))
        larger[:, :, :at] = table[:, :, :at]
        table = larger
    table[:, :, at:end] = rows
    return summary._replace(table=table)


def check_score(score: str) -> None:
    """Refuse what is no score."""
    if score not in SCORES:
        near = get_close_matches(str(score), SCORES, n=1) or SCORES
        raise ValueError(f"score={score!r} is unknown. Did you mean {' or '.join(map(repr, near))}?")


def by_block(key: Tensor, block_size: int, fill: float) -> Tensor:
    """Keys `[B, M, Hkv, D]` as `[B, blocks, block_size, Hkv, D]`, `fill` behind the last."""
    short = -key.shape[1] % block_size
    return F.pad(key, (0, 0, 0, 0, 0, short), value=fill).unflatten(1, (-1, block_size))


def _rows(key: Tensor, block_size: int, score: str, key_mask: Tensor | None) -> Tensor:
    """The table of these keys alone."""
    batch, num_keys, heads, dim = key.shape
    wide = torch.promote_types(key.dtype, torch.float32)
    blocks = count_blocks(num_keys, block_size)
    if score == "mass":
        return key.new_empty((batch, heads, 0, 0))
    if score == "hash":
        return hash_bits(key).transpose(1, 2).contiguous()
    if not blocks:
        return key.new_empty((batch, heads, 0, dim if score == "mean" else 2 * dim))
    hidden = None if key_mask is None else ~key_mask[..., None, None]
    if score == "mean":
        kept = key.to(wide) if hidden is None else key.to(wide).masked_fill(hidden, 0)
        total = by_block(kept, block_size, 0).sum(2)
        if hidden is None:
            means = total / min(block_size, num_keys)
            if last := num_keys % block_size:
                means[:, -1] = total[:, -1] / last
        else:
            means = total / by_block((~hidden).to(wide), block_size, 0).sum(2).clamp(min=1)
        return means.transpose(1, 2).contiguous()
    if hidden is None and num_keys <= block_size:  # a step of a decoder
        most, least = key.amax(1, keepdim=True), key.amin(1, keepdim=True)
    else:
        fill = key if hidden is None else key.masked_fill(hidden, -torch.inf)
        most = by_block(fill, block_size, -torch.inf).amax(2)
        fill = key if hidden is None else key.masked_fill(hidden, torch.inf)
        least = by_block(fill, block_size, torch.inf).amin(2)
    both = torch.cat([most, least], -1).transpose(1, 2)
    if hidden is not None:  # a block without a key
        both = both.masked_fill(both.isinf(), 0)
    return both.contiguous()


def hash_bits(x: Tensor) -> Tensor:
    """Signs of a random rotation of the channels of `x`, eight to a byte `[..., bytes]`."""
    dim = x.shape[-1]
    is_positive = x.to(torch.float32) @ rotation(dim, x.device) > 0
    is_positive = F.pad(is_positive, (0, -dim % 8)).unflatten(-1, (-1, 8))
    powers = 2 ** torch.arange(8, device=x.device)
    return (is_positive * powers).sum(-1).to(torch.uint8)


@lru_cache(maxsize=16)
def rotation(dim: int, device: torch.device) -> Tensor:
    """One orthogonal matrix `[dim, dim]` for each dim, always the same."""
    draw = torch.Generator().manual_seed(dim)
    with torch.inference_mode(False), torch.no_grad():
        square = torch.randn(dim, dim, generator=draw, dtype=torch.float64)
        q, r = torch.linalg.qr(square)
        return (q * r.diagonal().sign()).to(device, torch.float32)
