"""A transformer block on a map that learns positions from neighbours, as DaViT's and L2ViT's."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from nearfield.nn.convolution import ConvPosition
from nearfield.nn.mlp import Mlp
from nearfield.nn.residual import DropPath


class PositionBlock(nn.Module):
    """Position code, attention, position code, feed-forward network; each added to what came in."""

    def __init__(self, dim: int, attention: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.cpe1 = ConvPosition(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.cpe2 = ConvPosition(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))
