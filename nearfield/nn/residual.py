"""What residual branches pass through: samples dropped while training, and a factor for each channel."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DropPath(nn.Module):
    """While training, zero for a random `rate` of the samples and the others scaled up (stochastic depth)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate={rate} must be at least 0 and below 1.")
        self.rate = rate

    def forward(self, x: Float[Tensor, "b *rest"]) -> Float[Tensor, "b *rest"]:
        if not self.training or self.rate == 0:
            return x
        kept = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * kept.bernoulli_(1 - self.rate) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, dim: int, init: float = 1e-6):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b dim"]:
        return x * self.gamma


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that rise in equal steps from 0 at the first block to `rate` at the last, by stage."""
    total = sum(depths)
    rates = [rate * number / max(total - 1, 1) for number in range(total)]
    return [rates[sum(depths[:stage]) : sum(depths[: stage + 1])] for stage in range(len(depths))]
