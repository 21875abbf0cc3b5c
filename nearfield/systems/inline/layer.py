"""InLine attention with its local residual, and the softmax layers of PVT and CSwin that it replaces."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.nn.attention import HEADS
from nearfield.nn.convolution import convolve, pad_to
from nearfield.nn.pyramid import PatchEmbed
from nearfield.ops.dense import dense_attention
from nearfield.ops.linear import inline_attention
from nearfield.ops.window import window_attention

TO_TILES = "b (ny y) (nx x) h d -> (b ny nx) y x (h d)"
TO_MAP = "(b ny nx) y x (h d) -> b (ny y) (nx x) h d"


class LocalResidual(nn.Module):
    """A 3 x 3 convolution of the values whose kernel, one a sample and channel, is made of the mean input.

        w = W2 gelu(W1 mean(x)),   out[p, c] = sum over the nine offsets o of w[c, o] v[p + o, c]

    W1 and W2 connect channels of the same head only. Values beyond the edge of the map are 0.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.fc1 = nn.Conv1d(dim, dim, 1, groups=num_heads)
        self.fc2 = nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)

    def forward(
        self, values: Float[Tensor, "b y x dim"], source: Float[Tensor, "b *places dim"]
    ) -> Float[Tensor, "b y x dim"]:
        batch, height, width, dim = values.shape
        kernels = self.kernels(source).reshape(batch * dim, 1, 3, 3)
        maps = values.movedim(-1, 1).reshape(1, batch * dim, height, width)
        out = F.conv2d(maps, kernels, padding=1, groups=batch * dim)
        return out.view(batch, dim, height, width).movedim(1, -1)

    def kernels(self, source: Float[Tensor, "b *places dim"]) -> Float[Tensor, "b dim 3 3"]:
        """The kernels for each sample of `source`."""
        mean = source.flatten(1, -2).mean(1).unsqueeze(-1)  # [B, C, 1]
        return self.fc2(F.gelu(self.fc1(mean))).unflatten(1, (-1, 3, 3)).squeeze(-1)


class InLineAttention(nn.Module):
    """Linear attention of every token to every token, and a residual that sees each token's neighbours.

        A_ij = (scale * q_i k_j - mean_m(scale * q_i k_m) + 1) / N

    Rows sum to one by subtraction, so different queries never share a row, as they do where rows are divided
    by their sum. `position` adds a depthwise convolution of the values with fixed weights, as CSwin has.
    """

    def __init__(self, dim: int, num_heads: int, *, residual: bool = True, position: bool = False):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.residual = LocalResidual(dim, num_heads) if residual else None
        self.position = depthwise(dim) if position else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b *places dim"],
        *,
        grid: tuple[int, int] | None = None,
        source: Float[Tensor, "b *places dim"] | None = None,
    ) -> Float[Tensor, "b *places dim"]:
        """`x` is a map, or a sequence that ends in a map of sides `grid`, whose tokens alone have neighbours.

        The residual makes its kernels of `source`, of `x` if not given.
        """
        q, k, v = rearrange(self.qkv(x), HEADS, three=3, h=self.num_heads)
        out = inline_attention(q, k, v).output.flatten(-2)
        grid = grid or (x.shape[1], x.shape[2])
        tokens = v.flatten(-2).flatten(1, -2)  # [B, N, C]
        others = tokens.shape[1] - grid[0] * grid[1]
        values = tokens[:, others:].unflatten(1, grid)
        local = []
        if self.residual is not None:
            local.append(self.residual(values, x if source is None else source))
        if self.position is not None:
            local.append(convolve(self.position, values))
        if local:
            out = out + F.pad(sum(local[1:], local[0]).flatten(1, 2), (0, 0, others, 0)).view(x.shape)
        return self.proj(out)


class ReducedAttention(nn.Module):
    """Every token attends to the map made `reduction` times smaller by a convolution, as in PVT."""

    def __init__(self, dim: int, num_heads: int, reduction: int = 1):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        norm = nn.LayerNorm(dim)
        self.reduce = (
            PatchEmbed(dim, dim, reduction, reduction, norm=norm, pad=False)
            if reduction > 1
            else nn.Identity()
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        k, v = rearrange(
            self.kv(self.reduce(x)), "b y x (two h d) -> two b (y x) h d", two=2, h=self.num_heads
        )
        return self.proj(dense_attention(q, k, v).flatten(-2)).view(x.shape)


class StripeAttention(nn.Module):
    """Half of the heads attend within stripes of columns, half within stripes of rows, as in CSwin.

    Stripes are `stripe` tokens wide and as long as the map; None lets all heads see everything. The values
    go through a depthwise convolution too, within each stripe. Sides that the stripes do not divide are
    padded behind their end by zeros, which are attended like tokens.
    """

    def __init__(self, dim: int, num_heads: int, stripe: int | None):
        super().__init__()
        check_heads(dim, num_heads)
        branches = 1 if stripe is None else 2
        if num_heads % branches:
            raise ValueError(f"num_heads={num_heads} must be even: half of them see columns, half rows.")
        self.num_heads, self.stripe = num_heads, stripe
        self.qkv = nn.Linear(dim, 3 * dim)
        self.positions = nn.ModuleList(depthwise(dim // branches) for _ in range(branches))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        height, width = x.shape[1:3]
        if self.stripe is None:
            tiles = [(height, width)]
        else:
            wide = min(self.stripe, height), min(self.stripe, width)
            x = pad_to(x, wide)
            tiles = [(x.shape[1], wide[1]), (wide[0], x.shape[2])]
        parts = rearrange(self.qkv(x), HEADS, three=3, h=self.num_heads).chunk(len(tiles), -2)
        out = []
        for (q, k, v), tile, position in zip(parts, tiles, self.positions, strict=True):
            inside = {"ny": v.shape[1] // tile[0], "nx": v.shape[2] // tile[1], "h": v.shape[-2]}
            local = convolve(position, rearrange(v, TO_TILES, y=tile[0], x=tile[1]))
            out.append(window_attention(q, k, v, window_size=tile) + rearrange(local, TO_MAP, **inside))
        return self.proj(torch.cat(out, -2)[:, :height, :width].flatten(-2))


def depthwise(dim: int) -> nn.Conv2d:
    """A 3 x 3 convolution of each channel by itself."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


def check_heads(dim: int, num_heads: int) -> None:
    """Refuse heads that do not divide the channels."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim={dim} is no multiple of num_heads={num_heads}. Choose heads that divide it.")
