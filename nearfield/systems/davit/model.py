"""DaViT models: each depth unit is a block of window attention and one of channel attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.nn.attention import WindowAttention
from nearfield.nn.position_block import PositionBlock
from nearfield.nn.pyramid import PatchEmbed, Pyramid, Stage
from nearfield.nn.residual import drop_path_rates
from nearfield.ops.checks import no_autocast


class ChannelAttention(nn.Module):
    """Channels attend to the channels of their group, with all positions as their features.

    As published: `A = softmax(kᵀ v · d^-0.5)` over the channels of v, output `A q`. With `scale_by_tokens`,
    as in Florence-2's towers, `A = softmax(qᵀ k · N^-0.5)` and output `A v`, which does not sharpen with
    resolution. The sum over positions is taken in float32: in half precision it overflows on large maps.
    """

    def __init__(self, dim: int, num_groups: int, *, scale_by_tokens: bool = False):
        super().__init__()
        self.num_groups, self.scale_by_tokens = num_groups, scale_by_tokens
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        maps, values = self.maps(x)
        out = values @ maps.to(values.dtype).mT
        return self.proj(rearrange(out, "b g n d -> b n (g d)")).view(x.shape)

    def maps(
        self, x: Float[Tensor, "b *grid dim"]
    ) -> tuple[Float[Tensor, "b g d d"], Float[Tensor, "b g n d"]]:
        """The attention of channels to channels, and the values that it weighs."""
        q, k, v = rearrange(
            self.qkv(x.flatten(1, -2)), "b n (three g d) -> three b g n d", three=3, g=self.num_groups
        )
        if not self.scale_by_tokens:
            q, k, v = k, v, q
        scale = q.shape[-2 if self.scale_by_tokens else -1] ** -0.5
        with no_autocast(x):
            return ((q.float() * scale).mT @ k.float()).softmax(-1), v


def davit(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    window_size: int = 7,
    drop_path: float = 0.1,
    overlapped: bool = False,
    scale_by_tokens: bool = False,
    attentions: tuple[str, ...] = ("window", "channel"),
) -> Pyramid:
    """A DaViT of any size; `attentions` says which kinds of block a depth unit holds, in order.

    `overlapped` downsamples by 3 x 3 convolutions and `scale_by_tokens` by changes the channel attention, as
    in Florence-2's towers.
    """
    rates = drop_path_rates(drop_path, tuple(len(attentions) * depth for depth in depths))
    stages = []
    for number, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
        make: dict[str, Callable[[], nn.Module]] = {
            "window": partial(WindowAttention, dim, heads, window_size),
            "channel": partial(ChannelAttention, dim, heads, scale_by_tokens=scale_by_tokens),
        }
        unknown = set(attentions) - set(make)
        if unknown:
            raise ValueError(f"attentions={attentions}: {', '.join(unknown)} is none of {', '.join(make)}.")
        kinds = attentions * depths[number]
        blocks = [
            PositionBlock(dim, make[kind](), drop_path=rate)
            for kind, rate in zip(kinds, rates[number], strict=True)
        ]
        down: nn.Module = nn.Identity()
        if number:
            kernel, padding = (3, 1) if overlapped else (2, 0)
            before = nn.LayerNorm(dims[number - 1])
            down = PatchEmbed(dims[number - 1], dim, kernel, 2, padding=padding, norm_before=before)
        stages.append(Stage(down, blocks))
    stem = PatchEmbed(in_channels, dims[0], 7, 4, padding=3, norm=nn.LayerNorm(dims[0]))
    norm = nn.LayerNorm(dims[-1])
    return Pyramid(stem, stages, dims, num_classes=num_classes, norm=norm, norm_pooled=True)


SMALL, BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
SMALL_HEADS, BASE_HEADS = (3, 6, 12, 24), (4, 8, 16, 32)

davit_tiny = partial(davit, SMALL, (1, 1, 3, 1), SMALL_HEADS)
davit_small = partial(davit, SMALL, (1, 1, 9, 1), SMALL_HEADS)
davit_base = partial(davit, BASE, (1, 1, 9, 1), BASE_HEADS)
davit_large = partial(davit, (192, 384, 768, 1536), (1, 1, 9, 1), (6, 12, 24, 48), window_size=12)
davit_huge = partial(davit, (256, 512, 1024, 2048), (1, 1, 9, 1), (8, 16, 32, 64))
davit_giant = partial(davit, (384, 768, 1536, 3072), (1, 1, 12, 3), (12, 24, 48, 96))
davit_base_fl = partial(
    davit, BASE, (1, 1, 9, 1), BASE_HEADS, window_size=12, overlapped=True, scale_by_tokens=True
)
davit_huge_fl = partial(
    davit,
    (256, 512, 1024, 2048),
    (1, 1, 9, 1),
    (8, 16, 32, 64),
    window_size=12,
    overlapped=True,
    scale_by_tokens=True,
)
