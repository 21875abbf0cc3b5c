"""The feed-forward network of a block, with or without a convolution between its layers."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.nn.convolution import convolve


class Mlp(nn.Module):
    """Linear, GELU, linear.

    `conv_size` puts a depthwise convolution of that size, with zero padding, before the GELU; it then needs a
    map `[B, Y, X, C]` and tells its tokens where they are.
    """

    def __init__(self, dim: int, hidden: int, *, conv_size: int | None = None, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = (
            None
            if conv_size is None
            else nn.Conv2d(hidden, hidden, conv_size, padding=conv_size // 2, groups=hidden)
        )
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        x = self.fc1(x)
        if self.conv is not None:
            x = convolve(self.conv, x)
        return self.drop(self.fc2(self.drop(F.gelu(x))))
