"""What several runs that differ by their seed found: in words, as dots, and how sure a mean is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

Found = Mapping[str, Sequence[float]]


def by_seed(found: Found) -> str:
    """`mixed 0.912, 0.897; high only 0.871, 0.880`."""
    return "; ".join(f"{name} {', '.join(f'{value:.3f}' for value in each)}" for name, each in found.items())


def means(found: Found) -> list[float]:
    """The mean over the seeds, of each in turn."""
    return [sum(each) / len(each) for each in found.values()]


def interval(sample: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean, over samples drawn from this one."""
    import torch

    values = torch.as_tensor(sample, dtype=torch.float64)
    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_interval(ours: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean difference of pairs."""
    return interval([a - b for a, b in zip(ours, other, strict=True)])


def draw_seeds(axes: Any, found: Found, label: str) -> None:
    """A dot for each seed, those of one name above it."""
    for place, each in enumerate(found.values()):
        axes.plot([place] * len(each), each, "o", alpha=0.7)
    axes.set_xticks(range(len(found)), [fill(name, 14) for name in found])
    axes.set(ylabel=label)
