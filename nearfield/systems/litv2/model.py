"""LITv2 models: blocks without attention on fine maps, HiLo attention on the coarser ones."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.nn.convolution import pad_to
from nearfield.nn.hilo import HiLo
from nearfield.nn.mlp import Mlp
from nearfield.nn.pyramid import PatchEmbed, Pyramid, Stage
from nearfield.nn.residual import DropPath, drop_path_rates


class DeformableMerge(nn.Module):
    """Half the resolution by a 2 x 2 convolution each of whose taps reads where a learned offset points.

    Offsets are in pixels, (dy, dx) for each tap, and start at 0, where it is an ordinary convolution of
    stride 2. Between pixels values are interpolated; outside the map they are 0. Batch norm and GELU follow.
    """

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.offset = nn.Conv2d(dim_in, 8, 2, 2)
        self.conv = nn.Conv2d(dim_in, dim, 2, 2)
        self.norm = nn.BatchNorm2d(dim)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        x = pad_to(x, (2, 2)).movedim(-1, 1)
        return F.gelu(self.norm(self.conv(moved(x, self.offset(x))))).movedim(1, -1)


def moved(x: Float[Tensor, "b dim y x"], offset: Float[Tensor, "b 8 y2 x2"]) -> Float[Tensor, "b dim y x"]:
    """The map as the taps of a 2 x 2 convolution of stride 2 read it, each at its offset (dy, dx).

    Places are computed in float32 at least: in half precision those of a large map are no longer exact.
    """
    height, width = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    dy, dx = rearrange(offset.to(wide), "b (ky kx two) y x -> two b (y ky) (x kx)", ky=2, kx=2, two=2)
    rows = torch.arange(height, dtype=wide, device=x.device)[:, None] + dy
    columns = torch.arange(width, dtype=wide, device=x.device) + dx
    # -1 and 1 are the middles of the outermost pixels
    places = torch.stack([columns * (2 / (width - 1)) - 1, rows * (2 / (height - 1)) - 1], -1)
    read = F.grid_sample(x.to(wide), places, padding_mode="zeros", align_corners=True)
    return read.to(x.dtype)


class Block(nn.Module):
    """Attention, if there is one, then a feed-forward network with a 3 x 3 convolution inside; each added."""

    def __init__(
        self, dim: int, attention: nn.Module | None, *, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim) if attention is not None else None
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), conv_size=3)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        if self.attn is not None and self.norm1 is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def litv2(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    alpha: float = 0.9,
    window_sizes: tuple[int | None, ...] = (None, None, 2, 1),
    pad: bool = True,
) -> Pyramid:
    """A LITv2 of any size; `window_sizes` are those of HiLo in each stage, None for no attention.

    No weight depends on a window above 1: larger ones at test time cost less on large pictures, and the
    published detectors have 4 in the third stage. `alpha` is the share of low heads; `pad=False` refuses maps
    that a window does not divide.
    """
    rates = drop_path_rates(drop_path, depths)
    stages = []
    for number, (dim, heads, window) in enumerate(zip(dims, num_heads, window_sizes, strict=True)):
        blocks = [
            Block(dim, HiLo(dim, heads, window, alpha, pad=pad) if window else None, drop_path=rate)
            for rate in rates[number]
        ]
        stages.append(Stage(DeformableMerge(dims[number - 1], dim) if number else nn.Identity(), blocks))
    stem = PatchEmbed(in_channels, dims[0], 4, 4, norm=nn.LayerNorm(dims[0]))
    net = Pyramid(stem, stages, dims, num_classes=num_classes, norm=nn.LayerNorm(dims[-1]))
    net.apply(_initialise)
    return net


def _initialise(module: nn.Module) -> None:
    """Depthwise 3 x 3 convolutions start so as to keep the variance of what an activation halves."""
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        nn.init.normal_(module.weight, std=(2 / 9) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


SMALL, BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
SMALL_HEADS, BASE_HEADS = (3, 6, 12, 24), (4, 8, 16, 32)
SHALLOW, DEEP = (2, 2, 6, 2), (2, 2, 18, 2)

litv2_small = partial(litv2, SMALL, SHALLOW, SMALL_HEADS)
litv2_medium = partial(litv2, SMALL, DEEP, SMALL_HEADS, drop_path=0.3)
litv2_base = partial(litv2, BASE, DEEP, BASE_HEADS, drop_path=0.5)
litv2_base_384 = partial(litv2, BASE, DEEP, BASE_HEADS, drop_path=0.5)  # the base trained on at 384 px
litv2_small_alpha00 = partial(litv2_small, alpha=0.0)
litv2_small_alpha02 = partial(litv2_small, alpha=0.2)
litv2_small_alpha04 = partial(litv2_small, alpha=0.4)
litv2_small_alpha05 = partial(litv2_small, alpha=0.5)
litv2_small_alpha07 = partial(litv2_small, alpha=0.7)
litv2_small_alpha10 = partial(litv2_small, alpha=1.0)
