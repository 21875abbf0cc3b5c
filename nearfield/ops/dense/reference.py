"""Dense attention by its definition: all scores, then weights by a score function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]


def softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Weights that sum to one over the visible keys; none where nothing is visible."""
    scores = scores.masked_fill(~visible, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def relu(scores: Tensor, visible: Tensor) -> Tensor:
    """Positive scores / number of visible keys: no competition between keys."""
    return scores.relu().masked_fill(~visible, 0) / _count(visible)


def squared_relu(scores: Tensor, visible: Tensor) -> Tensor:
    """Squared positive scores / number of visible keys."""
    return scores.relu().square().masked_fill(~visible, 0) / _count(visible)


SCORES: dict[str, Score] = {"softmax": softmax, "relu": relu, "squared_relu": squared_relu}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: Score,
    visible: Tensor | None,
    addend: Tensor | None,
    scale: float,
) -> Tensor:
    """Output `[B, N, H, Dv]`; `visible` and `addend` broadcast to `[B, H, N, M]`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    num_kv_heads = key.shape[2]
    grouped = query.unflatten(2, (num_kv_heads, -1)).to(wide)
    scores = torch.einsum("bnhgd,bmhd->bhgnm", grouped, key.to(wide)).flatten(1, 2) * scale  # [B, H, N, M]
    if addend is not None:
        scores = scores + addend.to(wide)
    if visible is None:
        visible = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device)
    weights = (
        score(scores, visible.expand(scores.shape)).to(value.dtype).to(wide).unflatten(1, (num_kv_heads, -1))
    )
    return torch.einsum("bhgnm,bmhd->bnhgd", weights, value.to(wide)).flatten(2, 3).to(value.dtype)


def _count(visible: Tensor) -> Tensor:
    return visible.sum(-1, keepdim=True).clamp(min=1)
