"""HTNet: levels of attention within blocks; convolution and pooling merge four blocks into one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.nn.convolution import convolve
from nearfield.nn.mlp import Mlp
from nearfield.nn.pyramid import PatchEmbed, Pyramid, Stage
from nearfield.ops.window import window_attention


class BlockAttention(nn.Module):
    """Tokens attend within blocks of `block_size`; heads need not divide `dim`, what is over is left out."""

    def __init__(self, dim: int, num_heads: int, block_size: int):
        super().__init__()
        self.num_heads, self.block_size = num_heads, block_size
        inner = num_heads * (dim // num_heads)
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        q, k, v = self.heads(x)
        return self.proj(window_attention(q, k, v, window_size=self.block_size).flatten(-2))

    def heads(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "three b y x heads d"]:
        """Query, key and value of each head."""
        return rearrange(self.qkv(x), "b y x (three h d) -> three b y x h d", three=3, h=self.num_heads)


class Block(nn.Module):
    """Attention within blocks, then a feed-forward network; each added to what came in."""

    def __init__(self, dim: int, num_heads: int, block_size: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = BlockAttention(dim, num_heads, block_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """Twice the channels by a 3 x 3 convolution, a norm, and the largest of 3 x 3 places at every second."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, 3, padding=1)
        self.norm = nn.LayerNorm(dim)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        return convolve(self.pool, self.norm(convolve(self.conv, x)))


class Level(Stage):
    """A stage that first adds to all channels of a token one number, for its place in its block."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], block_size: int):
        super().__init__(downsample, blocks)
        self.block_size = block_size
        self.pos_emb = nn.Parameter(torch.randn(block_size**2))

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        x = self.downsample(x)
        down, across = (side // self.block_size for side in x.shape[1:3])
        x = x + self.pos_emb.view(self.block_size, self.block_size).repeat(down, across)[..., None]
        for block in self.blocks:
            x = block(x)
        return x


class HTNet(Pyramid):
    """Levels that halve the map; weights before the classifier begin as torch makes them, as published."""

    tile: int  # the side of a picture that is one block at the last level

    def initialise(self) -> None:
        return

    def no_weight_decay(self) -> set[str]:
        return {f"stages.{level}.pos_emb" for level in range(len(self.stages))}

    def embed(self, images: Float[Tensor, "b channels y x"]) -> Float[Tensor, "b y2 x2 dim"]:
        if any(side % self.tile for side in images.shape[-2:]):
            raise ValueError(
                f"A picture of {tuple(images.shape[-2:])} does not tile into this net's blocks. "
                f"Give sides in multiples of {self.tile}."
            )
        return super().embed(images)


def htnet(
    *,
    num_classes: int = 3,
    in_channels: int = 3,
    image_size: int = 28,
    patch_size: int = 7,
    dim: int = 256,
    num_heads: int = 3,
    depths: tuple[int, ...] = (2, 2, 10),
) -> HTNet:
    """HTNet of any size; `dim` and `num_heads` are of the first level and double with each.

    Of `image_size` and the number of levels follows how many tokens a block holds, the same at each level:
    `(image_size / patch_size / 2 ** (levels - 1)) ** 2`. Where that is one, as published, attention passes
    its values through.
    """
    levels = len(depths)
    side, rest = divmod(image_size, patch_size * 2 ** (levels - 1))
    if rest or side < 1:
        raise ValueError(
            f"image_size={image_size} does not split into patches of {patch_size} and {levels} levels of "
            f"blocks. Give a multiple of {patch_size * 2 ** (levels - 1)}, or fewer depths."
        )
    dims = [dim * 2**level for level in range(levels)]
    stages = []
    for level, (width, depth) in enumerate(zip(dims, depths, strict=True)):
        down: nn.Module = Merge(dims[level - 1], width) if level else nn.Identity()
        blocks = [Block(width, num_heads * 2**level, side) for _ in range(depth)]
        stages.append(Level(down, blocks, side))
    net = HTNet(
        PatchEmbed(in_channels, dim, patch_size, patch_size, pad=False),
        stages,
        dims,
        num_classes=num_classes,
        strides=(patch_size, 1, *(2,) * (levels - 1)),
        norm=nn.LayerNorm(dims[-1]),
    )
    net.tile = image_size
    return net


htnet_official = htnet
htnet_blocks4 = partial(htnet, depths=(2, 10))
htnet_56 = partial(htnet, image_size=56)
