"""L2ViT models: blocks of window attention alternate with blocks of linear attention over all positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.nn.attention import HEADS, WindowAttention
from nearfield.nn.convolution import ConvPosition, convolve, pad_to
from nearfield.nn.mlp import Mlp
from nearfield.nn.position_block import PositionBlock
from nearfield.nn.pyramid import ConvStem, PatchEmbed, Pyramid, Stage
from nearfield.nn.residual import DropPath, drop_path_rates
from nearfield.ops.linear import enhanced_linear_attention


class Stem(ConvStem):
    """A quarter of the resolution by two convolutions, then a norm; odd sides get zeros behind their end."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__(in_channels, dim, nn.ReLU)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        return self.norm(super().forward(pad_to(x, (4, 4))))


class LinearAttention(nn.Module):
    """Every token attends to every token at a cost linear in their number.

        A_ij = temperature * relu(q_i) relu(k_j) / max(sum_m relu(q_i) relu(k_m), min_denominator)

    The learned temperature of each head starts at `head_dim ** -0.5`. The floor of 100 is that of the
    published models; the sum grows with the number of tokens, so it holds fewer of them on larger maps.
    """

    def __init__(self, dim: int, num_heads: int, *, min_denominator: float = 100.0):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim={dim} is no multiple of num_heads={num_heads}. Choose heads that divide it."
            )
        self.num_heads, self.min_denominator = num_heads, min_denominator
        self.qkv = nn.Linear(dim, 3 * dim)
        self.temperature = nn.Parameter(torch.full((num_heads,), (dim // num_heads) ** -0.5))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        q, k, v = self.heads(x)
        out, _ = enhanced_linear_attention(
            q, k, v, temperature=self.temperature, min_denominator=self.min_denominator
        )
        return self.proj(out.flatten(-2))

    def heads(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "three b *grid heads d"]:
        """Queries, keys and values."""
        return rearrange(self.qkv(x), HEADS, three=3, h=self.num_heads)

    def sums(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b n heads"]:
        """What each row of weights sums to before it is divided; below `min_denominator` the floor holds."""
        q, k, _ = self.heads(x.flatten(1, -2)).relu()
        return (q * k.sum(1, keepdim=True)).sum(-1)


class Concentration(nn.Module):
    """Two depthwise 7 x 7 convolutions: brings back to its surroundings what linear attention spread."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        return convolve(lambda maps: self.conv2(self.norm(F.gelu(self.conv1(maps)))), x)


class LinearBlock(nn.Module):
    """Position code, linear attention, concentration, feed-forward network; each added to what came in."""

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        *,
        concentrate: bool = True,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.cpe1 = ConvPosition(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm3 = nn.LayerNorm(dim) if concentrate else None
        self.local = Concentration(dim) if concentrate else None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        x = self.mix(self.cpe1(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mix(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        """Tokens after attention and concentration, which are what brings them together."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.local is not None and self.norm3 is not None:
            x = x + self.drop_path(self.local(self.norm3(x)))
        return x


def l2vit(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    window_size: int = 7,
    drop_path: float = 0.1,
    min_denominator: float = 100.0,
    blocks: tuple[str, ...] = ("window", "linear"),
    concentrate: bool = True,
) -> Pyramid:
    """An L2ViT of any size; the kinds of block in `blocks` take turns within each stage.

    `concentrate=False` leaves the convolutions behind linear attention out. `min_denominator` is the floor
    below the sums that divide linear attention.
    """
    unknown = set(blocks) - {"window", "linear"}
    if unknown or not blocks:
        raise ValueError(f"blocks={blocks}: give one or more of window, linear.")
    rates = drop_path_rates(drop_path, depths)
    stages = []
    for number, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
        make: dict[str, Callable[..., nn.Module]] = {
            "window": lambda rate, dim=dim, heads=heads: PositionBlock(
                dim, WindowAttention(dim, heads, window_size), drop_path=rate
            ),
            "linear": lambda rate, dim=dim, heads=heads: LinearBlock(
                dim,
                LinearAttention(dim, heads, min_denominator=min_denominator),
                concentrate=concentrate,
                drop_path=rate,
            ),
        }
        inside = [make[blocks[place % len(blocks)]](rate) for place, rate in enumerate(rates[number])]
        down: nn.Module = nn.Identity()
        if number:
            down = PatchEmbed(dims[number - 1], dim, 2, 2, norm_before=nn.LayerNorm(dims[number - 1]))
        stages.append(Stage(down, inside))
    net = Pyramid(
        Stem(in_channels, dims[0]), stages, dims, num_classes=num_classes, norm=nn.LayerNorm(dims[-1])
    )
    net.apply(_initialise)
    return net


def _initialise(module: nn.Module) -> None:
    """Convolutions start as the linear layers do."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


SMALL, BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
SMALL_HEADS, BASE_HEADS = (3, 6, 12, 24), (4, 8, 16, 32)

l2vit_tiny = partial(l2vit, SMALL, (2, 2, 6, 2), SMALL_HEADS)
l2vit_small = partial(l2vit, SMALL, (2, 2, 18, 2), SMALL_HEADS)
l2vit_base = partial(l2vit, BASE, (2, 2, 18, 2), BASE_HEADS, drop_path=0.3)
l2vit_base_384 = partial(l2vit, BASE, (2, 2, 18, 2), BASE_HEADS, drop_path=0.2, window_size=12)
