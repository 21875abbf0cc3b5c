"""How much each query cares for each block of keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import check, no_transform, scale_or_default
from nearfield.ops.kernels import missing, unfit
from nearfield.ops.topk import native
from nearfield.ops.topk.geometry import check_block_size, check_causal, count_blocks
from nearfield.ops.topk.summary import (
    BlockSummary,
    by_block,
    check_score,
    hash_bits,
    summarize_blocks,
)

OP = "block_scores"
AT_ONCE = 1 << 23  # numbers of the largest intermediate result, which queries in turn keep within


def block_scores(
    query: Float[Tensor, "b n heads dim"],
    key: Float[Tensor, "b m kv_heads dim"],
    *,
    block_size: int,
    score: str = "mass",
    summary: BlockSummary | None = None,
    key_mask: Bool[Tensor, "#b m"] | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b n kv_heads blocks"]:
    """The share of each block of keys in a query's attention, the mean of the heads that share the keys.

    `"mass"` is the attention itself, summed in the block. The others guess it from a `summary` of the blocks:
    `"mean"` from the mean key, as if all keys of the block were it, `"bound"` from an upper bound of the
    scores, sum_d max(q_d least_d, q_d greatest_d) (Quest, arXiv 2406.10774): a softmax over blocks, each as
    often as it has keys. `"hash"` is no share but nearness: signs of a random rotation of the group's mean
    query that the nearest key of the block has in common with it (HyLRA's published runtime).

    Queries are the last of the keys if causal. A block of which a query sees nothing has score 0, any other
    a positive one.
    """
    check_block_size(block_size)
    check_score(score)
    _check(query, key, key_mask)
    batch, num_queries, _, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    if is_causal:
        check_causal(num_queries, num_keys)
    blocks = count_blocks(num_keys, block_size)
    if summary is not None and (summary.score, summary.block_size) != (score, block_size):
        raise ValueError(
            f"The summary is of blocks of {summary.block_size} keys for score={summary.score!r}, "
            f"asked for are {block_size} and {score!r}. Make another with summarize_blocks."
        )
    needed = num_keys if score == "hash" else blocks
    if summary is not None and score != "mass" and summary.table.shape[2] < needed:
        raise ValueError(
            f"The summary has {summary.table.shape[2]} rows, {num_keys} keys need {needed}. "
            "Bring it up to date with extend_blocks."
        )
    factor = scale_or_default(scale, head_dim)
    # a summary tells nothing of a part of a block
    sees_all = key_mask is None and (not is_causal or num_queries == 1)

    def ask_native() -> Verdict:
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
            return Verdict(
                "the CPU kernels score without gradients. Use torch.no_grad(), or another backend."
            )
        if score == "hash" or (score != "mass" and not sees_all):
            return Verdict("the CPU kernels know no hashes, and of summaries only queries that see all keys.")
        return Verdict(no_transform() or unfit(query, query, factor) or missing())

    # the definition in torch answers to both names of what runs anywhere
    name = choose(OP, backend, {"native": ask_native, "tiled": Verdict, "reference": Verdict})
    if summary is None and score != "mass":
        summary = summarize_blocks(key, block_size=block_size, score=score, key_mask=key_mask)
    if not blocks or not query.numel():
        return query.new_zeros((batch, num_queries, num_kv_heads, blocks), dtype=_wide(query))
    if name == "native" and score == "mass":
        mask = None if key_mask is None else key_mask.expand(batch, num_keys)
        return native.shares(query, key, mask, num_keys, block_size, False, is_causal, factor, 1.0)
    grouped = query.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 1, 3, 4)  # [B, Hkv, N, G, D]
    if score == "mass" or summary is None:
        return _in_turn(_mass, grouped, key, block_size, key_mask, is_causal, factor)
    if name == "native":
        rows, last = summary.table.transpose(1, 2), (num_keys - (blocks - 1) * block_size) / block_size
        return native.shares(query, rows, None, blocks, 1, score == "bound", False, factor, last)
    if score == "hash":
        return _in_turn(_nearness, grouped, key, block_size, key_mask, is_causal, summary.table)
    return _guess(grouped, key, summary, key_mask, is_causal, factor).transpose(1, 2)


def _in_turn(
    find: Callable[..., Tensor],
    grouped: Tensor,
    key: Tensor,
    block_size: int,
    key_mask: Tensor | None,
    is_causal: bool,
    more: float | Tensor,
) -> Tensor:
    """`[B, N, Hkv, blocks]` by a function that compares queries with all keys, for some queries at a time."""
    (batch, kv_heads, num_queries, group), num_keys = grouped.shape[:4], key.shape[1]
    step = max(1, AT_ONCE // (batch * kv_heads * group * num_keys))
    found = []
    for first in range(0, num_queries, step):
        part = grouped[:, :, first : first + step]
        at = num_keys - num_queries + first if is_causal else None
        seen = _seen(part.shape[2], num_keys, at, key_mask, key)
        found.append(find(part, key, block_size, seen, more).transpose(1, 2))
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def _seen(
    num_queries: int, num_keys: int, first: int | None, key_mask: Tensor | None, key: Tensor
) -> Tensor | None:
    """Which keys are seen `[B or 1, 1, N or 1, 1, M]` by queries from place `first` on; None: all are."""
    seen = None
    if first is not None and (num_queries > 1 or first + 1 < num_keys):
        at = torch.arange(num_keys, device=key.device)
        seen = (at <= at[first : first + num_queries, None])[None, None, :, None]
    if key_mask is not None:
        mask = key_mask[:, None, None, None]
        seen = mask if seen is None else seen & mask
    return seen


def _mass(grouped: Tensor, key: Tensor, size: int, seen: Tensor | None, scale: float) -> Tensor:
    """Shares `[B, Hkv, N, blocks]`."""
    wide = _wide(key)
    logits = (grouped.flatten(2, 3).to(wide) * scale) @ key.to(wide).permute(0, 2, 3, 1)
    logits = logits.unflatten(2, grouped.shape[2:4])  # [B, Hkv, N, G, M]
    logits = logits if seen is None else logits.masked_fill(~seen, -torch.inf)
    mass = logits.softmax(-1).mean(-2)
    short = -key.shape[1] % size
    shares = (F.pad(mass, (0, short)) if short else mass).unflatten(-1, (-1, size)).sum(-1)
    if seen is None:
        return _positive(shares)
    return _visible(shares, F.pad(seen[..., 0, :], (0, short)).unflatten(-1, (-1, size)).any(-1))


def _nearness(grouped: Tensor, key: Tensor, size: int, seen: Tensor | None, table: Tensor) -> Tensor:
    """Signs in common with the nearest key of each block, as a part of all signs and one more."""
    dim, num_keys = key.shape[-1], key.shape[1]
    own = hash_bits(grouped.to(torch.float32).mean(-2))  # [B, Hkv, N, bytes]
    unlike = torch.zeros((*own.shape[:3], num_keys), dtype=torch.int32, device=key.device)
    counts = torch.tensor([n.bit_count() for n in range(256)], dtype=torch.int32, device=key.device)
    for byte in range(own.shape[-1]):
        both = own[..., byte, None] ^ table[:, :, None, :num_keys, byte]
        unlike = unlike + counts[both.long()]
    common = (dim + 1 - unlike).to(_wide(key)) / (dim + 1)
    if seen is not None:
        common = common.masked_fill(~seen[..., 0, :], 0)
    return F.pad(common, (0, -num_keys % size)).unflatten(-1, (-1, size)).amax(-1)


def _guess(
    grouped: Tensor,
    key: Tensor,
    summary: BlockSummary,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """A softmax over blocks by what the summary knows of them."""
    (num_queries, group), (num_keys, size) = grouped.shape[2:4], (key.shape[1], summary.block_size)
    blocks = count_blocks(num_keys, size)
    table = summary.table[:, :, :blocks].to(_wide(key))
    queries = grouped.to(table.dtype) * scale
    rows = (
        torch.cat([queries.clamp(min=0), queries.clamp(max=0)], -1) if summary.score == "bound" else queries
    )
    logits = (rows.flatten(2, 3) @ table.transpose(-1, -2)).unflatten(2, (num_queries, group))
    if key_mask is None and (not is_causal or num_queries == 1):  # every query sees every key
        last = num_keys - (blocks - 1) * size
        if last < size:
            logits[..., -1] += math.log(last / size)
        return _positive(logits.softmax(-1).mean(-2))
    lengths = _lengths(num_queries, key, size, key_mask, is_causal)[:, None]  # [B or 1, 1, N, blocks]
    if is_causal:
        at = torch.arange(num_keys - num_queries, num_keys, device=key.device)
        own = _own(queries, key, summary, key_mask, at)
        block = torch.arange(blocks, device=key.device)
        logits = torch.where((block == at[:, None] // size)[:, None], own[..., None], logits)
    logits = logits + lengths.to(logits.dtype).log()[..., None, :]
    return _visible(logits.softmax(-1).mean(-2), lengths > 0)


def _own(queries: Tensor, key: Tensor, summary: BlockSummary, key_mask: Tensor | None, at: Tensor) -> Tensor:
    """Logits `[B, Hkv, N, G]` of the block that a query stands in, of which it sees the first part."""
    size, num_keys, num_queries = summary.block_size, key.shape[1], len(at)
    start = (num_keys - num_queries) // size * size
    keys = key[:, start:].to(queries.dtype)
    hidden = None if key_mask is None else ~key_mask[:, start:, None, None]

    def running(fill: float, run: str) -> Tensor:  # [B, Hkv, N, 1, D]
        x = keys if hidden is None else keys.masked_fill(hidden, fill)
        x = getattr(by_block(x, size, fill), run)(2)
        x = x if isinstance(x, Tensor) else x.values
        return x.flatten(1, 2)[:, at - start].transpose(1, 2).unsqueeze(3)

    if summary.score == "mean":
        ones = torch.ones_like(keys[..., :1]) if hidden is None else (~hidden).to(keys.dtype)
        count = by_block(ones, size, 0).cumsum(2).flatten(1, 2)[:, at - start].transpose(1, 2).unsqueeze(3)
        return (queries * running(0, "cumsum") / count.clamp(min=1)).sum(-1)
    most, least = running(-torch.inf, "cummax"), running(torch.inf, "cummin")
    if hidden is not None:
        most, least = most.masked_fill(most.isinf(), 0), least.masked_fill(least.isinf(), 0)
    return torch.maximum(queries * most, queries * least).sum(-1)


def _lengths(
    num_queries: int, key: Tensor, block_size: int, key_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """How many keys of each block a query sees `[B or 1, N or 1, blocks]`."""
    num_keys = key.shape[1]
    start = torch.arange(0, num_keys, block_size, device=key.device)
    end = (start + block_size).clamp(max=num_keys)[None]
    if is_causal:
        at = torch.arange(num_keys - num_queries, num_keys, device=key.device)[:, None]
        end = torch.minimum(end, at + 1)
    end = torch.maximum(end, start)
    if key_mask is None:
        return (end - start)[None]
    before = F.pad(key_mask.cumsum(-1), (1, 0))
    return before[:, end] - before[:, start][:, None]


def _positive(shares: Tensor) -> Tensor:
    """Shares of blocks that are all seen: a share too small for its dtype is not 0, which means unseen."""
    return shares.clamp(min=torch.finfo(shares.dtype).tiny)


def _visible(shares: Tensor, seen: Tensor) -> Tensor:
    return torch.where(
        seen, _positive(shares), 0
    )  # also where a query sees nothing, of which the softmax is NaN


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(query: Tensor, key: Tensor, key_mask: Tensor | None) -> None:
    if query.dim() != 4 or key.dim() != 4 or not query.is_floating_point():
        raise ValueError(
            f"query has shape {list(query.shape)}, key {list(key.shape)}. "
            "Give floating numbers [batch, tokens, heads, head_dim]."
        )
    check("key", key, (query.shape[0], *key.shape[1:-1], query.shape[-1]), query, query.dtype)
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} query heads cannot share {key.shape[2]} key heads. "
            "The first number must be a multiple of the second."
        )
    if key_mask is not None:
        rows = 1 if key_mask.shape[:1] == (1,) else key.shape[0]
        check("key_mask", key_mask, (rows, key.shape[1]), query, torch.bool)
