"""Is a converted model still as good? Two figures for a language model, two for an encoder, each paired.

Perplexity over the last half of the positions sees the average token; retrieval sees the one that matters and
stands far back. A local plan can leave the first almost alone and destroy the second, so both are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, expm1
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 2000  # bootstrap resamples
SPAN = 128  # neighbouring tokens are resampled together: their losses are not independent


@dataclass(frozen=True)
class Change:
    """Relative change of perplexity, after / before - 1: mean over slices, the worst slice, 95 % interval."""

    before: float
    after: float
    mean: float
    worst: float
    low: float
    high: float
    slices: tuple[float, ...]

    def json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "worst": self.worst,
            "interval": [self.low, self.high],
            "slices": self.slices,
        }


def perplexity_change(before: Sequence[Tensor], after: Sequence[Tensor], *, seed: int = 0) -> Change:
    """Paired, over the same tokens: a block bootstrap over runs of 128 tokens, drawn inside every slice."""
    added = [a.double() - b.double() for a, b in zip(after, before, strict=True)]
    means = [float(d.mean()) for d in added]
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(DRAWS, dtype=torch.float64)
    for d in added:
        spans = d[: len(d) // SPAN * SPAN].view(-1, SPAN).mean(1) if len(d) >= SPAN else d
        drawn = torch.randint(len(spans), (DRAWS, len(spans)), generator=generator)
        total += spans[drawn].mean(1) / len(added)
    low, high = total.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean_before = float(torch.cat([b.double() for b in before]).mean())
    mean_after = float(torch.cat([a.double() for a in after]).mean())
    return Change(
        exp(mean_before),
        exp(mean_after),
        expm1(sum(means) / len(means)),
        expm1(max(means)),
        expm1(low),
        expm1(high),
        tuple(expm1(m) for m in means),
    )


@dataclass(frozen=True)
class Recall:
    """Share of answers found before and after, and whether the loss is within one point or within chance.

    `low` and `high` bound the paired 95 % bootstrap interval of after - before.
    """

    before: float
    after: float
    low: float
    high: float
    count: int

    @property
    def kept(self) -> bool:
        return self.before - self.after <= 0.01 + 1e-9 or self.high >= 0.0

    def json(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "after": self.after,
            "interval": [self.low, self.high],
            "prompts": self.count,
            "kept": self.kept,
        }


def recall_change(before: Sequence[bool], after: Sequence[bool], *, seed: int = 0) -> Recall:
    """Paired comparison over the same questions."""
    b, a = (torch.tensor(x, dtype=torch.float64) for x in (before, after))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(b), (DRAWS, len(b)), generator=generator)
    low, high = (a - b)[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Recall(float(b.mean()), float(a.mean()), low, high, len(b))


@dataclass(frozen=True)
class FeatureChange:
    """How far features moved: mean of 1 - cosine with its interval, and how often the nearest neighbour
    (among all other token features) stayed the same."""

    mean: float
    worst: float
    low: float
    high: float
    same_neighbour: float


def feature_change(before: Sequence[Tensor], after: Sequence[Tensor], *, seed: int = 0) -> FeatureChange:
    """`before[i]`, `after[i]` are the token features [n, dim] of input i."""
    turned = (
        1 - F.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in zip(after, before, strict=True)
    )
    far = [d.clamp_min(0) for d in turned]  # rounding can take equal features below zero
    means = torch.stack([d.mean() for d in far])
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(DRAWS, dtype=torch.float64)
    for d in far:
        drawn = torch.randint(len(d), (DRAWS, min(len(d), 512)), generator=generator)
        total += d[drawn].mean(1) / len(far)
    low, high = total.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return FeatureChange(float(means.mean()), float(means.max()), low, high, _same_neighbour(before, after))


def _same_neighbour(before: Sequence[Tensor], after: Sequence[Tensor], most: int = 2048) -> float:
    """Nearest neighbour of each token feature among all the others, before and after."""

    def nearest(features: Sequence[Tensor]) -> Tensor:
        x = torch.cat(list(features))
        x = F.normalize(x[:: max(len(x) // most, 1)].float(), dim=-1)
        near = x @ x.T
        return near.fill_diagonal_(-2).argmax(-1)

    return float((nearest(before) == nearest(after)).double().mean())
