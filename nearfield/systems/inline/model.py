"""InLine models: DeiT, PVT, Swin and CSwin with linear attention in the place of their softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.core.dims import per_dim
from nearfield.nn.attention import Attention
from nearfield.nn.backbone import Backbone
from nearfield.nn.mlp import Mlp
from nearfield.nn.position import resize_positions
from nearfield.nn.pyramid import PatchEmbed, Pyramid, Stage
from nearfield.nn.residual import DropPath, drop_path_rates
from nearfield.nn.swin import PatchMerging, ShiftedWindowAttention
from nearfield.systems.inline.layer import InLineAttention, ReducedAttention, StripeAttention

Softmax = Callable[[int], nn.Module]  # the host's own layer for the block of this number in its stage


class Block(nn.Module):
    """Attention, then the feed-forward network; each added to what came in.

    With `from_raw` the local residual's kernels come of what the first norm has not seen, as in CSwin.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        from_raw: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.from_raw = from_raw

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        return self.mix(x)

    def mix(
        self, x: Float[Tensor, "b *places dim"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b *places dim"]:
        """The same for a sequence that ends in a map of sides `grid`."""
        if isinstance(self.attn, InLineAttention):
            mixed = self.attn(self.norm1(x), grid=grid, source=x if self.from_raw else None)
        else:
            mixed = self.attn(self.norm1(x))
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Tokens(NamedTuple):
    """What runs from block to block of a DeiT: the class token, then the patches of a map."""

    x: Tensor  # [B, 1 + Y X, C]
    grid: tuple[int, int]


class TokenBlock(Block):
    """The same on a class token and patches."""

    def forward(self, state: Tokens) -> Tokens:  # type: ignore[override]
        return Tokens(self.mix(state.x, state.grid), state.grid)


class DeiT(Backbone):
    """A vision transformer with a class token, which alone goes into the classifier.

    Features are `[B, 1 + N, C]`, the class token first. Pictures of other sides than `image_size` get
    interpolated positions.
    """

    parts_name = "blocks"
    global_pool = "token"
    normed_anywhere = True

    def __init__(
        self,
        dim: int,
        blocks: Sequence[nn.Module],
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        num_classes: int,
        in_channels: int,
    ):
        super().__init__(dim, num_classes)
        self.stem = PatchEmbed(in_channels, dim, patch_size, patch_size)
        height, width = (max(1, side // patch_size) for side in per_dim("image_size", image_size, 2))
        self.grid = height, width
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + height * width, dim))
        for each in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(each, std=0.02)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = self.make_head(num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size, "module": f"blocks.{number}"}
            for number in range(len(blocks))
        ]
        self.initialise()

    def embed(self, images: Float[Tensor, "b channels y x"]) -> Tokens:
        patches = self.stem(images.movedim(1, -1))
        height, width = patches.shape[1:3]
        patches = patches + resize_positions(self.pos_embed[:, 1:].unflatten(1, self.grid), (height, width))
        token = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        return Tokens(torch.cat([token, patches.flatten(1, 2)], 1), (height, width))

    def as_map(self, state: Tokens) -> Float[Tensor, "b y x dim"]:
        return state.x[:, 1:].unflatten(1, state.grid)

    def finish(self, state: Tokens) -> Float[Tensor, "b tokens dim"]:
        return self.norm(state.x)

    def pool(self, features: Float[Tensor, "b tokens dim"]) -> Float[Tensor, "b dim"]:
        """The class token."""
        return features[:, 0]

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def _normed(self, state: Tokens) -> Tokens:
        return Tokens(self.norm(state.x), state.grid)


class PositionedEmbed(nn.Module):
    """Patches that do not overlap, a norm, and a learned position for each of a map of sides `grid`.

    Other maps get interpolated positions; what is left of a side that the patches do not divide is cut off.
    """

    def __init__(self, dim_in: int, dim: int, patch_size: int, grid: tuple[int, ...]):
        super().__init__()
        self.patches = PatchEmbed(dim_in, dim, patch_size, patch_size, norm=nn.LayerNorm(dim), pad=False)
        self.pos_embed = nn.Parameter(torch.empty(1, *grid, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        x = self.patches(x)
        return x + resize_positions(self.pos_embed, x.shape[1:3], mode="bilinear")


class Swin(Pyramid):
    """A pyramid that keeps the biases of its windows from decay."""

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".relative_bias")}


def kinds(pattern: str, depths: Sequence[int]) -> list[str]:
    """The letter of each block, by stage: `kinds("IIMS2", (2, 2, 6, 2))` is II, II, IISSSS, SS.

    I is InLine attention and S the host's softmax; M, with a number at the end, begins with so many of I. G
    is softmax over all tokens, which the paper compares with and no published model has.
    """
    letters = pattern.rstrip("0123456789")
    first = pattern[len(letters) :]
    if len(letters) != len(depths) or set(letters) - set("ISMG") or ("M" in letters) != bool(first):
        raise ValueError(
            f"pattern={pattern!r}: give one of I, S, G, M for each of the {len(depths)} stages, "
            "and with M a number at the end, as in 'IIMS2'."
        )
    each = {"M": lambda depth: ("I" * int(first) + "S" * depth)[:depth]}
    return [
        each[letter](depth) if letter == "M" else letter * depth
        for letter, depth in zip(letters, depths, strict=True)
    ]


def layers(kind: str, dim: int, num_heads: int, softmax: Softmax, **options: bool) -> list[nn.Module]:
    """The attention of each block of a stage; `options` are InLine's."""
    made: list[nn.Module] = []
    for number, letter in enumerate(kind):
        if letter == "I":
            made.append(InLineAttention(dim, num_heads, **options))
        else:
            made.append(softmax(number) if letter == "S" else Attention(dim, num_heads))
    return made


def inline_deit(
    dim: int,
    num_heads: int,
    depth: int = 12,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    drop_path: float = 0.1,
    pattern: str = "I",
    residual: bool = True,
) -> DeiT:
    """A DeiT of any size; `pattern` says which attention its blocks have (see `kinds`)."""
    (rates,) = drop_path_rates(drop_path, (depth,))
    (kind,) = kinds(pattern, (depth,))
    attentions = layers(kind, dim, num_heads, lambda _: Attention(dim, num_heads), residual=residual)
    blocks = [
        TokenBlock(dim, attention, drop_path=rate, eps=1e-6)
        for attention, rate in zip(attentions, rates, strict=True)
    ]
    return DeiT(
        dim,
        blocks,
        image_size=image_size,
        patch_size=patch_size,
        num_classes=num_classes,
        in_channels=in_channels,
    )


def inline_pvt(
    depths: tuple[int, ...],
    dims: tuple[int, ...] = (64, 128, 320, 512),
    num_heads: tuple[int, ...] = (2, 4, 10, 16),
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 224,
    drop_path: float = 0.1,
    pattern: str = "IIII",
    residual: bool = True,
    reductions: tuple[int, ...] = (8, 4, 2, 1),
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
) -> Pyramid:
    """A PVT of any size; softmax stages attend to maps that are `reductions` times smaller."""
    rates, stages = drop_path_rates(drop_path, depths), []
    grid = tuple(max(1, side // 4) for side in per_dim("image_size", image_size, 2))
    stem = PositionedEmbed(in_channels, dims[0], 4, grid)
    for number, (dim, heads, kind) in enumerate(zip(dims, num_heads, kinds(pattern, depths), strict=True)):
        down: nn.Module = nn.Identity()
        if number:
            grid = tuple(max(1, side // 2) for side in grid)
            down = PositionedEmbed(dims[number - 1], dim, 2, grid)
        softmax = partial(_reduced, dim, heads, reductions[number])
        blocks = [
            Block(dim, attention, mlp_ratio=mlp_ratios[number], drop_path=rate, eps=1e-6)
            for attention, rate in zip(
                layers(kind, dim, heads, softmax, residual=residual), rates[number], strict=True
            )
        ]
        stages.append(Stage(down, blocks))
    return Pyramid(stem, stages, dims, num_classes=num_classes)


def inline_swin(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    pattern: str = "IIIS",
    residual: bool = True,
    window_size: int = 7,
) -> Swin:
    """A Swin of any size; softmax stages have windows, every other block's shifted by half of one."""
    rates, stages = drop_path_rates(drop_path, depths), []
    for number, (dim, heads, kind) in enumerate(zip(dims, num_heads, kinds(pattern, depths), strict=True)):
        attentions = layers(kind, dim, heads, partial(_shifted, dim, heads, window_size), residual=residual)
        blocks = [
            Block(dim, attention, drop_path=rate)
            for attention, rate in zip(attentions, rates[number], strict=True)
        ]
        stages.append(Stage(PatchMerging(dims[number - 1], dim) if number else nn.Identity(), blocks))
    stem = PatchEmbed(in_channels, dims[0], 4, 4, norm=nn.LayerNorm(dims[0]))
    return Swin(stem, stages, dims, num_classes=num_classes, norm=nn.LayerNorm(dims[-1]))


def inline_cswin(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    pattern: str = "IISS",
    residual: bool = True,
    stripes: tuple[int | None, ...] = (1, 2, 7, None),
) -> Pyramid:
    """A CSwin of any size; softmax stages have stripes of these widths, None for attention to everything."""
    rates, stages = drop_path_rates(drop_path, depths), []
    for number, (dim, heads, kind) in enumerate(zip(dims, num_heads, kinds(pattern, depths), strict=True)):
        softmax = partial(_striped, dim, heads, stripes[number])
        attentions = layers(kind, dim, heads, softmax, residual=residual, position=True)
        blocks = [
            Block(dim, attention, drop_path=rate, from_raw=True)
            for attention, rate in zip(attentions, rates[number], strict=True)
        ]
        down: nn.Module = nn.Identity()
        if number:
            down = PatchEmbed(dims[number - 1], dim, 3, 2, padding=1, norm=nn.LayerNorm(dim), pad=False)
        stages.append(Stage(down, blocks))
    stem = PatchEmbed(in_channels, dims[0], 7, 4, padding=2, norm=nn.LayerNorm(dims[0]))
    return Pyramid(stem, stages, dims, num_classes=num_classes, norm=nn.LayerNorm(dims[-1]))


def _reduced(dim: int, num_heads: int, reduction: int, _: int) -> nn.Module:
    return ReducedAttention(dim, num_heads, reduction)


def _shifted(dim: int, num_heads: int, window_size: int, number: int) -> nn.Module:
    return ShiftedWindowAttention(dim, num_heads, window_size, shift=number % 2 * (window_size // 2))


def _striped(dim: int, num_heads: int, stripe: int | None, _: int) -> nn.Module:
    return StripeAttention(dim, num_heads, stripe)


SWIN, SWIN_BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
SWIN_HEADS, BASE_HEADS = (3, 6, 12, 24), (4, 8, 16, 32)
CSWIN, CSWIN_BASE, CSWIN_HEADS = (64, 128, 256, 512), (96, 192, 384, 768), (2, 4, 8, 16)

inline_deit_tiny = partial(inline_deit, 192, 6)
inline_deit_small = partial(inline_deit, 320, 10, image_size=288)
inline_deit_base = partial(inline_deit, 384, 12, image_size=448)
inline_pvt_tiny = partial(inline_pvt, (2, 2, 2, 2))
inline_pvt_small = partial(inline_pvt, (3, 4, 6, 3))
inline_pvt_medium = partial(inline_pvt, (3, 4, 18, 3), drop_path=0.3)
inline_pvt_large = partial(inline_pvt, (3, 8, 27, 3), drop_path=0.3)
inline_swin_tiny = partial(inline_swin, SWIN, (2, 2, 6, 2), SWIN_HEADS)
inline_swin_small = partial(inline_swin, SWIN, (2, 2, 18, 2), SWIN_HEADS, pattern="IISS", drop_path=0.3)
inline_swin_base = partial(inline_swin, SWIN_BASE, (2, 2, 18, 2), BASE_HEADS, pattern="IIMS2", drop_path=0.5)
inline_cswin_tiny = partial(inline_cswin, CSWIN, (2, 4, 18, 1), CSWIN_HEADS)
inline_cswin_small = partial(inline_cswin, CSWIN, (3, 6, 29, 2), CSWIN_HEADS, drop_path=0.4)
inline_cswin_base = partial(inline_cswin, CSWIN_BASE, (3, 6, 29, 2), BASE_HEADS, drop_path=0.5)
inline_cswin_base_384 = partial(
    inline_cswin, CSWIN_BASE, (3, 6, 29, 2), BASE_HEADS, drop_path=0.5, stripes=(1, 2, 12, None)
)
