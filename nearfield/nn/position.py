"""Learned positions of one grid, on any other."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def resize_positions(
    positions: Float[Tensor, "1 y x dim"], grid: Sequence[int], *, mode: str = "bicubic"
) -> Float[Tensor, "1 y2 x2 dim"]:
    """Positions interpolated to the sides `grid`, and themselves where those are theirs.

    By cubic curves, or by `mode="bilinear"`.
    """
    if tuple(positions.shape[1:3]) == tuple(grid):
        return positions
    resized = F.interpolate(positions.movedim(-1, 1), size=tuple(grid), mode=mode, align_corners=False)
    return resized.movedim(1, -1)
