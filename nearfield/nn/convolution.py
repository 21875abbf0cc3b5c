"""Convolutions on maps whose channels come last, as all else here has them."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def convolve(
    conv: Callable[[Tensor], Tensor], x: Float[Tensor, "b *grid dim"]
) -> Float[Tensor, "b *outer out"]:
    """A module for channels in second place, a convolution, a pooling or a batch norm, applied to `x`.

    Nothing is copied: to torch such a map is one in its channels-last format, and the result comes back so.
    """
    return conv(x.movedim(-1, 1)).movedim(1, -1)


def pad_to(x: Float[Tensor, "b *grid dim"], sizes: tuple[int, ...]) -> Float[Tensor, "b *outer dim"]:
    """`x` with zeros behind the end of each side, up to the next multiple of the size for that side."""
    missing = [-side % size for side, size in zip(x.shape[1:-1], sizes, strict=True)]
    if not any(missing):
        return x
    return F.pad(x, (0, 0, *(part for extra in reversed(missing) for part in (0, extra))))


class ConvPosition(nn.Module):
    """`x` plus a depthwise convolution of it: a position code made of the neighbours (CPE, DPE)."""

    def __init__(self, dim: int, kernel_size: int = 3, rank: int = 2):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.proj = conv(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        return x + convolve(self.proj, x)
