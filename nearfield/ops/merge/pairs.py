"""What adjacent and bipartite merging decide by: likeness of tokens, and the order in which pads go."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.ops.checks import check

BOTH_MASKED, ONE_MASKED = -2.0, -3.0  # below every cosine: real pairs merge first, pads among themselves next
SMALLEST = 1e-6  # weight of a token whose metric is 0


def adjacent_likeness(
    metric: Tensor, parity: int, window_size: int | None, key_mask: Tensor | None
) -> Tensor:
    """Cosine of each token and the next one `[B, N]`; -inf where they are no pair inside a window."""
    unit = _unit(metric)
    score = (unit * unit.roll(-1, 1)).sum(-1)
    if key_mask is not None:
        behind = key_mask.roll(-1, 1)
        score = torch.where(key_mask & behind, score, torch.where(key_mask | behind, ONE_MASKED, BOTH_MASKED))
    place = torch.arange(metric.shape[1], device=metric.device)
    apart = (place % 2 != parity) | (place == metric.shape[1] - 1)
    if window_size is not None:
        apart = apart | (place % window_size == window_size - 1)
    return score.masked_fill(apart, -torch.inf)


def crossed_likeness(metric: Tensor, key_mask: Tensor | None) -> Tensor:
    """Cosine of each even token and each odd one `[B, even, odd]`."""
    unit = _unit(metric)
    score = unit[:, 0::2] @ unit[:, 1::2].transpose(-1, -2)
    if key_mask is None:
        return score
    even, odd = key_mask[:, 0::2, None], key_mask[:, None, 1::2]
    score = score.masked_fill(~even, BOTH_MASKED)  # a masked token may go anywhere: it weighs nothing
    return score.masked_fill(even & ~odd, ONE_MASKED)


def checked(x: Tensor, metric: Tensor, name: str, counts: Tensor | None, key_mask: Tensor | None) -> int:
    """The number of tokens, once shapes, dtypes and devices fit; callers know `counts` as `name`."""
    for what, y in (("x", x), ("metric", metric)):
        if not isinstance(y, Tensor) or y.dim() != 3 or not y.is_floating_point():
            raise TypeError(f"{what} must be a tensor of floating numbers [batch, tokens, features].")
    check("metric", metric, (*x.shape[:2], metric.shape[-1]), x)
    if key_mask is not None:
        check("key_mask", key_mask, tuple(x.shape[:2]), x, torch.bool)
    if counts is not None and (counts.shape != x.shape[:2] or counts.is_floating_point()):
        raise ValueError(
            f"{name} has shape {list(counts.shape)} and dtype {counts.dtype}. "
            f"Give whole numbers of shape {list(x.shape[:2])}."
        )
    return x.shape[1]


def _unit(metric: Tensor) -> Tensor:
    return F.normalize(metric.detach().to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
