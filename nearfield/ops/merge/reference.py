"""Merging by its definition: a matrix that says which tokens go into which, and weighted averages."""

from __future__ import annotations

import torch
from torch import Tensor


def adjacent(x: Tensor, weight: Tensor, likeness: Tensor, num_merges: int) -> tuple[Tensor, Tensor]:
    """Merged tokens `[B, L, C]` and the 0/1 matrix `[B, L, N]` whose rows are their spans."""
    batch, num_tokens = x.shape[:2]
    best = likeness.argsort(dim=-1, descending=True, stable=True)[:, :num_merges]
    absorbed = x.new_zeros(batch, num_tokens, dtype=torch.bool)
    absorbed = absorbed.scatter(1, best + 1, True)
    source = (~absorbed).cumsum(1) - 1
    return average(x, weight, source, num_tokens - num_merges)


def bipartite(x: Tensor, weight: Tensor, likeness: Tensor, num_merges: int) -> tuple[Tensor, Tensor]:
    """Merged tokens `[B, L, C]`, and the 0/1 matrix `[B, L, N]` of who is in which."""
    best = likeness.argsort(dim=-1, descending=True, stable=True)[
        ..., 0
    ]  # [B, even]: the odd token most alike
    score = likeness.gather(-1, best[..., None]).squeeze(-1)
    going = score.argsort(dim=-1, descending=True, stable=True)[:, :num_merges]
    gone = x.new_zeros(x.shape[:2], dtype=torch.bool).scatter(1, 2 * going, True)
    rank = (~gone).cumsum(1) - 1
    target = rank.gather(1, 2 * best.gather(1, going) + 1)
    return average(x, weight, rank.scatter(1, 2 * going, target), x.shape[1] - num_merges)


def average(x: Tensor, weight: Tensor, source: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For each of `length` groups the average of its tokens by weight (0 without weight), and the matrix."""
    groups = source[:, None] == torch.arange(length, device=x.device)[:, None]  # [B, L, N]
    weighted = groups * weight[:, None]
    total = weighted.sum(-1, keepdim=True)
    return weighted @ x.to(weight.dtype) / total.masked_fill(total == 0, 1), groups
