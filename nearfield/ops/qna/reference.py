"""Query-and-attend by its definition: the scores of each window, a mask, one softmax. Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    score: Tensor, value: Tensor, position_bias: Tensor | None, kernel_size: tuple[int, ...]
) -> Tensor:
    """Output `[B, *grid, H, D]` of checked arguments."""
    wide = torch.promote_types(value.dtype, torch.float32)
    grid = tuple(score.shape[1:-1])
    window, offsets = _windows(grid, kernel_size, score.device)
    scores = score.to(wide).flatten(1, -2).transpose(1, 2).unsqueeze(2)  # [B, H, 1, M]
    if position_bias is not None:
        entries: tuple[slice | Tensor, ...] = (slice(None), *offsets)
        scores = scores + position_bias.to(wide)[entries]  # [H, N, M]
    weights = scores.masked_fill(~window, -torch.inf).softmax(-1)
    out = torch.einsum("bhnm,bmhd->bnhd", weights, value.to(wide).flatten(1, -3))
    return out.unflatten(1, grid).to(value.dtype)


def _windows(
    grid: tuple[int, ...], kernel_size: tuple[int, ...], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Which tokens lie in the window of each token, `[N, M]`; per axis, the entry of their offset there."""
    places = torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid)).reshape(
        -1, len(grid)
    )
    offsets = places[None] - places[:, None] + torch.tensor(kernel_size, device=device) // 2  # [N, M, axes]
    sizes = torch.tensor(kernel_size, device=device)
    window = ((offsets >= 0) & (offsets < sizes)).all(-1)
    inside = torch.minimum(offsets.clamp(min=0), sizes - 1)
    return window, list(inside.unbind(-1))
