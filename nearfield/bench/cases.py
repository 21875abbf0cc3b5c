"""The problems that are timed, by id: one table for the runner, the docs and the committed results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

from nearfield.ops.neighborhood.geometry import Bound, Neighborhood

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One problem: a pattern on a grid, with heads and sizes.

    `device` is the smallest that it is meant for. Hidden cases try the runner itself and stand in no table.
    """

    id: str
    grid: tuple[int, ...]
    pattern: Neighborhood
    num_heads: int
    head_dim: int
    batch: int = 1
    device: str = "cpu"
    is_hidden: bool = False

    @cached_property
    def bound(self) -> Bound:
        """The pattern on the grid."""
        return self.pattern.on(self.grid)

    @property
    def is_causal(self) -> bool:
        """True for a causal pattern of one dimension, which full causal attention can stand in for."""
        return len(self.grid) == 1 and self.bound.axes[0].is_causal

    def useful_flops(self, direction: Direction) -> float:
        """Floating point operations on visible pairs; masked and padded work never counts.

        Forward: 4 per pair, head and channel. Backward alone: 2.5 times that.
        """
        forward = 4.0 * self.bound.num_pairs * self.head_dim * self.num_heads * self.batch
        return 2.5 * forward if direction == "backward" else forward

    def dense_flops(self, direction: Direction) -> float:
        """The same count where every query sees every key."""
        return self.useful_flops(direction) / self.bound.kept


def _vision(num_heads: int) -> Case:
    id = f"vision-56-k7-h{num_heads}"
    return Case(id, (56, 56), Neighborhood(7), num_heads, 32, batch=64, device="cuda")


def _large(id: str, grid: tuple[int, ...], pattern: Neighborhood, num_heads: int = 24) -> Case:
    return Case(id, grid, pattern, num_heads, 128, device="cuda")


def _cosmos(sparsity: int, window: tuple[int, ...], stride: tuple[int, ...], *dilation: int) -> Case:
    """One kind of layer of Cosmos-Predict2 (2B) at 720p: the window is whole in time."""
    pattern = Neighborhood((24, *window), (1, *stride), (1, *dilation))
    return _large(f"cosmos-24x44x80-{sparsity}pct", (24, 44, 80), pattern, num_heads=16)


_VIDEO, _VIDEO_WINDOW = (30, 48, 80), (18, 24, 24)

CASES: tuple[Case, ...] = (
    Case("causal-1d-16k-w512", (16384,), Neighborhood(512, is_causal=True), 8, 64),
    Case("causal-1d-8k-full", (8192,), Neighborhood(8192, is_causal=True), 9, 64),
    Case("2d-56-k7", (56, 56), Neighborhood(7), 4, 32),
    Case("2d-56-k13", (56, 56), Neighborhood(13), 4, 32),
    Case("2d-128-k7", (128, 128), Neighborhood(7), 8, 64),
    Case("2d-128-k13", (128, 128), Neighborhood(13), 8, 64),
    Case("3d-16x32x32-k577", (16, 32, 32), Neighborhood((5, 7, 7)), 4, 64),
    # the sizes of published figures for Hopper (GNA, arXiv 2504.16922, and NATTEN's profiler pages)
    _large("dense-16k-d128", (16384,), Neighborhood(16384), num_heads=16),
    _large("flux-256-k80", (256, 256), Neighborhood(80)),
    _large("flux-256-k80-s16", (256, 256), Neighborhood(80, stride=16)),
    _large("hunyuan-30x48x80", _VIDEO, Neighborhood(_VIDEO_WINDOW)),
    _large("hunyuan-30x48x80-s16x8x8", _VIDEO, Neighborhood(_VIDEO_WINDOW, stride=(16, 8, 8))),
    _vision(4),
    _large("1d-32k-w2048", (32768,), Neighborhood(2048), num_heads=1),
    _large("1d-32k-w2048-s256", (32768,), Neighborhood(2048, stride=256), num_heads=1),
    _cosmos(92, (12, 24), (4, 8), 1, 1),
    _cosmos(98, (4, 16), (1, 1), 11, 5),
    _cosmos(95, (12, 16), (4, 1), 1, 5),
    _cosmos(77, (20, 40), (4, 8), 1, 1),
    _cosmos(55, (28, 56), (4, 8), 1, 1),
    _vision(12),
    _large("1d-32k-w2048-s2048", (32768,), Neighborhood(2048, stride=2048), num_heads=1),
    Case("tiny-1d", (64,), Neighborhood(8, is_causal=True), 2, 16, is_hidden=True),
    Case("tiny-2d", (12, 12), Neighborhood(5), 2, 16, is_hidden=True),
)


def find(id: str, table: Sequence[Any] = CASES) -> Any:
    """The case of that id, or `ValueError` with the nearest ones."""
    for case in table:
        if case.id == id:
            return case
    known = [case.id for case in table if not case.is_hidden]
    near = ", ".join(get_close_matches(id, known, 3, 0.3) or known)
    raise ValueError(f"No bench case is called {id!r}. Did you mean {near}?")


def for_device(device: str, table: Sequence[Any] = CASES) -> tuple[Any, ...]:
    """The table's cases for a device: its own first, on "cuda" those of a CPU after them."""
    found = (case for case in table if not case.is_hidden and case.device in ("cpu", device))
    return tuple(sorted(found, key=lambda case: case.device != device))
