"""Softmax attention over all tokens of a grid, and inside windows of it."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.core.dims import per_dim
from nearfield.nn.convolution import pad_to
from nearfield.ops.dense import dense_attention
from nearfield.ops.window import window_attention

HEADS = "b ... (three h d) -> three b ... h d"


class Attention(nn.Module):
    """Every token attends to every token; the grid may have any sides."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True):
        super().__init__()
        _require_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        q, k, v = rearrange(self.qkv(x.flatten(1, -2)), HEADS, three=3, h=self.num_heads)  # [B, N, H, D]
        return self.proj(dense_attention(q, k, v).flatten(-2)).view(x.shape)


class WindowAttention(nn.Module):
    """Tokens attend within tiles of `window_size`.

    A grid that the window does not divide is padded behind its end by zeros, which are attended like tokens,
    as in Swin, DaViT and L2ViT; the result is cropped.
    """

    def __init__(
        self, dim: int, num_heads: int, window_size: int | tuple[int, ...], *, qkv_bias: bool = True
    ):
        super().__init__()
        _require_heads(dim, num_heads)
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        grid = x.shape[1:-1]
        window = per_dim("window_size", self.window_size, len(grid))
        q, k, v = rearrange(self.qkv(pad_to(x, window)), HEADS, three=3, h=self.num_heads)
        out = window_attention(q, k, v, window_size=window).flatten(-2)
        return self.proj(out[(slice(None), *map(slice, grid))])


def _require_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim={dim} is no multiple of num_heads={num_heads}. Choose heads that divide it.")
