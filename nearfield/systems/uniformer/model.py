"""UniFormer models: of pictures, of clips, and light ones that pay for half of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.nn.attention import Attention, WindowAttention
from nearfield.nn.pyramid import ConvStem, PatchEmbed, Pyramid, Stage
from nearfield.nn.residual import drop_path_rates
from nearfield.systems.uniformer.layer import (
    BatchNorm,
    Block,
    ClipEmbed,
    LocalAttention,
    SplitBlock,
    State,
    TokenBlock,
    halved,
)

KINDS = ("local", "global", "window", "hybrid")
SPLITS = (None, "official", "sequential")
LOCAL_THEN_GLOBAL = ("local", "local", "global", "global")
EVERY = 4  # of so many blocks of a hybrid stage one, the last, is global

Split = Literal["official", "sequential"]


def uniformer(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    head_dim: int = 64,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    conv_stem: bool = False,
    layer_scale: float | None = None,
    blocks: Sequence[str] = LOCAL_THEN_GLOBAL,
    window_size: int | tuple[int, ...] = 14,
) -> Pyramid:
    """A UniFormer of any size for pictures of any sides.

    `blocks` says what attends in each stage: "local" affinities, "global" attention, attention inside the
    tiles of "window", or "hybrid", tiles but for every fourth block. Published detectors have the last two
    in the third stage, with the same weights; `FeaturePyramid` adds their norms. `conv_stem` has all changes
    of resolution overlap; `layer_scale` is for the stages that are not local.
    """
    stem: nn.Module = PatchEmbed(in_channels, dims[0], 4, 4, norm=nn.LayerNorm(dims[0]))
    if conv_stem:
        stem = ConvStem(in_channels, dims[0], nn.GELU)
    downs: list[nn.Module] = [nn.Identity()]
    for before, dim in zip(dims, dims[1:], strict=False):
        if conv_stem:
            downs.append(PatchEmbed(before, dim, 3, 2, padding=1, norm=BatchNorm(dim)))
        else:
            downs.append(PatchEmbed(before, dim, 2, 2, norm=nn.LayerNorm(dim)))
    rates, stages = drop_path_rates(drop_path, depths), []
    for number, kind in enumerate(_kinds(blocks, dims)):
        factors = None if kind == "local" else layer_scale
        inside = [
            _block(kind, place, dims[number], head_dim, window_size, drop_path=rate, layer_scale=factors)
            for place, rate in enumerate(rates[number])
        ]
        stages.append(Stage(downs[number], inside))
    net = Pyramid(stem, stages, dims, num_classes=num_classes, norm=BatchNorm(dims[-1]))
    net.apply(_initialise)
    return net


def uniformer_video(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    head_dim: int = 64,
    *,
    num_classes: int = 400,
    in_channels: int = 3,
    drop_path: float = 0.1,
    split: Split | None = None,
    blocks: Sequence[str] = LOCAL_THEN_GLOBAL,
    window_size: int | tuple[int, ...] = 14,
    long_kernels: bool = False,
) -> Pyramid:
    """A UniFormer of any size for clips `[B, channels, T, Y, X]` of any length; the stem halves the frames.

    Attention goes over all positions of all frames. With `split` it goes over the frames at each position
    and then over the positions of each frame: "sequential" adds both in turn, "official" is the order of the
    official code (`SplitBlock`). `blocks` as for pictures; tiles then have three sides, those of `split` two.
    `long_kernels` has every change of resolution see three frames.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is none of {', '.join(map(repr, SPLITS))}.")
    frames = 3 if long_kernels else 1
    stem = ClipEmbed(in_channels, dims[0], 4, frames=3, frame_stride=2)
    rates, stages = drop_path_rates(drop_path, depths), []
    for number, kind in enumerate(_kinds(blocks, dims)):
        down = ClipEmbed(dims[number - 1], dims[number], 2, frames=frames) if number else nn.Identity()
        inside = [
            _block(kind, place, dims[number], head_dim, window_size, rank=3, split=split, drop_path=rate)
            for place, rate in enumerate(rates[number])
        ]
        stages.append(Stage(down, inside))
    net = Pyramid(stem, stages, dims, num_classes=num_classes, norm=BatchNorm(dims[-1], rank=3))
    net.apply(_initialise)
    return net


class Logits(NamedTuple):
    """What both heads of a light model say."""

    map: Float[Tensor, "b classes"]
    token: Float[Tensor, "b classes"]


class TokenStage(nn.Module):
    """A change of resolution, then blocks of a map and a class token.

    The token starts here, or with `dim_before` comes from the stage before, as do the scores, which become
    means of 2 x 2 positions that sum to what they summed to.
    """

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[TokenBlock], dim: int, *, dim_before: int | None = None
    ):
        super().__init__()
        self.downsample = downsample
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if dim_before is None else None
        self.widen = None if dim_before is None else nn.Linear(dim_before, dim)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, state: Tensor | State) -> State:
        if isinstance(state, State) and self.widen is not None:
            score = None if state.score is None else halved(state.score, state.map.shape[1:3])
            found = State(self.downsample(state.map), self.widen(state.token), score)
        elif isinstance(state, Tensor) and self.cls_token is not None:
            x = self.downsample(state)
            found = State(x, self.cls_token.repeat(len(x), 1, 1), None)
        else:
            raise TypeError(f"{type(state).__name__}: one stage alone starts the class token, the first.")
        for block in self.blocks:
            found = block(found)
        return found


class UniFormerLight(Pyramid):
    """Two local stages, then two in which a class token says which tokens are worth attention.

    `forward` gives the logits of the map, as published models do at inference. Published training falls by
    the mean of the losses of both logits, which `forward_both` gives:

        both = model.forward_both(images)
        loss = (cross_entropy(both.map, labels) + cross_entropy(both.token, labels)) / 2

    By `forward` alone the head of the class token learns nothing, and is not needed.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Any],
        dims: Sequence[int],
        *,
        num_classes: int,
    ):
        super().__init__(stem, stages, dims, num_classes=num_classes, norm=BatchNorm(dims[-1]))
        self.norm_token: nn.Module = nn.LayerNorm(dims[-1])
        self.head_token = self.make_head(num_classes)

    def as_map(self, state: Tensor | State) -> Float[Tensor, "b y x dim"]:
        return state.map if isinstance(state, State) else state

    def finish(self, state: Tensor | State) -> Float[Tensor, "b y x dim"]:
        return self.norm(self.as_map(state))

    def forward_both(self, x: Float[Tensor, "b channels y x"]) -> Logits:
        """Logits of the map and of the class token, for training."""
        state: Any = self.embed(x)
        for part in self.parts:
            state = self._step(part, state)
        if not isinstance(state, State):
            raise ValueError("A model cut before its third stage has no class token. Take its features.")
        return Logits(
            self.forward_head(self.finish(state)), self.head_token(self.norm_token(state.token[:, 0]))
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes`, none for 0."""
        super().reset_classifier(num_classes, global_pool)
        weight = next(self.parameters())
        self.head_token = self.make_head(num_classes).to(weight.device, weight.dtype)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or max(wanted) + 1 < len(self.feature_info):
            self.norm_token = nn.Identity()
        return wanted

    def no_weight_decay(self) -> set[str]:
        return {"stages.2.cls_token"} & dict(self.named_parameters()).keys()


def uniformer_light(
    dims: tuple[int, int, int, int],
    depths: tuple[int, int, int, int],
    head_dim: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    mlp_ratio: float = 3.0,
    prune_ratio: float = 0.5,
    trade_off: float = 0.5,
    layer_scale: float | None = None,
) -> UniFormerLight:
    """A light UniFormer of any size; `prune_ratio` is the share of tokens that pass whole blocks.

    All pass the first block with attention, which sets the scores; 1 prunes nowhere. `trade_off` is the share
    of a block's own attention in the running scores. The ratio may change after training, by
    `set_prune_ratio`.
    """
    rates = drop_path_rates(drop_path, depths)
    stages: list[nn.Module] = []
    for number, dim in enumerate(dims):
        down: nn.Module = nn.Identity()
        if number:
            down = PatchEmbed(dims[number - 1], dim, 2, 2, norm=nn.LayerNorm(dim))
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale}
        if number < 2:
            local = [
                Block(dim, LocalAttention(dim), norm=BatchNorm, drop_path=rate, **options)
                for rate in rates[number]
            ]
            stages.append(Stage(down, local))
            continue
        heads = _heads(dim, head_dim)
        tokens = [
            TokenBlock(
                dim,
                heads,
                prune_ratio=None if (number, place) == (2, 0) else prune_ratio,
                trade_off=trade_off,
                drop_path=rate,
                **options,
            )
            for place, rate in enumerate(rates[number])
        ]
        stages.append(TokenStage(down, tokens, dim, dim_before=dims[2] if number == 3 else None))
    stem = ConvStem(in_channels, dims[0], nn.GELU)
    net = UniFormerLight(stem, stages, dims, num_classes=num_classes)
    net.apply(_initialise)
    return net


def set_prune_ratio(model: UniFormerLight, ratio: float) -> None:
    """Let another share of the tokens pass whole blocks: no weight depends on it."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} must lie above 0 and be at most 1, which keeps all.")
    for block in model.modules():
        if isinstance(block, TokenBlock) and block.prune_ratio is not None:
            block.prune_ratio = ratio


def _kinds(blocks: Sequence[str], dims: Sequence[int]) -> tuple[str, ...]:
    if len(blocks) != len(dims) or set(blocks) - set(KINDS):
        raise ValueError(
            f"blocks={tuple(blocks)}: give one of {', '.join(KINDS)} for each of {len(dims)} stages."
        )
    return tuple(blocks)


def _heads(dim: int, head_dim: int) -> int:
    if dim % head_dim:
        raise ValueError(f"head_dim={head_dim} does not divide the {dim} channels of a stage with attention.")
    return dim // head_dim


def _block(
    kind: str,
    place: int,
    dim: int,
    head_dim: int,
    window_size: int | tuple[int, ...],
    *,
    rank: int = 2,
    split: str | None = None,
    **options: Any,
) -> Block:
    """The block at a place of a stage of this kind."""
    if kind == "local":
        return Block(
            dim, LocalAttention(dim, rank=rank), norm=partial(BatchNorm, rank=rank), rank=rank, **options
        )
    heads = _heads(dim, head_dim)
    in_tiles = kind == "window" or (kind == "hybrid" and (place + 1) % EVERY)
    attention = WindowAttention(dim, heads, window_size) if in_tiles else Attention(dim, heads)
    if split is not None:
        return SplitBlock(dim, heads, attention, official=split == "official", **options)
    return Block(dim, attention, rank=rank, **options)


def _initialise(module: nn.Module) -> None:
    """Matrices of local blocks start as the convolutions that they are, attention through time as nothing."""
    if isinstance(module, SplitBlock):
        module.start_still()
    elif isinstance(module, Block) and isinstance(module.attn, LocalAttention):
        for matrix in (module.attn.value, module.attn.proj, module.mlp.fc1, module.mlp.fc2):
            matrix.reset_parameters()


SMALL, LARGE = (64, 128, 320, 512), (128, 192, 448, 640)
SMALL_DEPTHS, PLUS_DEPTHS, BASE_DEPTHS = (3, 4, 8, 3), (3, 5, 9, 3), (5, 8, 20, 7)

uniformer_small = partial(uniformer, SMALL, SMALL_DEPTHS)
uniformer_small_plus = partial(uniformer, SMALL, PLUS_DEPTHS, 32, conv_stem=True)
uniformer_small_plus_dim64 = partial(uniformer, SMALL, PLUS_DEPTHS, conv_stem=True)
uniformer_base = partial(uniformer, SMALL, BASE_DEPTHS, drop_path=0.3)
uniformer_base_ls = partial(uniformer_base, layer_scale=1e-6)
uniformer_large_ls = partial(uniformer, LARGE, (5, 10, 24, 7), drop_path=0.4, layer_scale=1e-6)
uniformer_xxs = partial(uniformer_light, (56, 112, 224, 448), (2, 5, 8, 2), 28)
uniformer_xs = partial(uniformer_light, (64, 128, 256, 512), (3, 5, 9, 3), 32, drop_path=0.1)
uniformer_video_small = partial(uniformer_video, SMALL, SMALL_DEPTHS)
uniformer_video_base = partial(uniformer_video, SMALL, BASE_DEPTHS, drop_path=0.3)
