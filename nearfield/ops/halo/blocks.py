"""Which keys the queries of a block see, and which entry of a table belongs to each pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, device


@dataclass(frozen=True)
class Blocks:
    """Blocks of queries on a grid of keys; every tuple has one entry for each axis of the grid."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    halo: tuple[int, ...]
    query_stride: int
    rel_step: int  # how far apart two neighbouring queries of a block are to the tables
    border: str

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks on each axis."""
        return tuple(side // size for side, size in zip(self.grid, self.block, strict=True))

    @property
    def rows(self) -> tuple[int, ...]:
        """Queries of a block on each axis."""
        return tuple(size // self.query_stride for size in self.block)

    @property
    def windows(self) -> tuple[int, ...]:
        """Keys that a block sees on each axis, those outside the grid counted."""
        return tuple(size + 2 * halo for size, halo in zip(self.block, self.halo, strict=True))

    @property
    def padding(self) -> list[int]:
        """What `F.pad` adds to `[B, *grid, H, D]` so that every window lies inside."""
        return [0, 0, 0, 0, *(halo for halo in reversed(self.halo) for _ in range(2))]

    def offsets(self, axis: int, device: device) -> Tensor:
        """Entry of the table for each query of a block and each key of its window: `[rows, window]`."""
        row = torch.arange(self.rows[axis], device=device)[:, None] * self.rel_step
        return self.windows[axis] - 1 + torch.arange(self.windows[axis], device=device) - row
