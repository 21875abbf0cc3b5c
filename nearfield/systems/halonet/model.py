"""HaloNet models: bottlenecks of a ResNet whose middle is halo attention, and hybrids with convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from nearfield.nn.convolution import convolve
from nearfield.nn.pyramid import Pyramid, Stage
from nearfield.nn.residual import DropPath, drop_path_rates
from nearfield.systems.halonet.layer import Conv, HaloAttention, NeighbourGate, SqueezeExcite

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True)
class Plan:
    """One stage: `depth` bottlenecks that give `dim` channels and have `inner` ones inside.

    `inner` may be two numbers, for the first block and for the others. The blocks `attends` have halo
    attention inside, all others a 3 x 3 convolution.
    """

    depth: int
    dim: int
    inner: int | tuple[int, int]
    attends: Sequence[int] = ()
    num_heads: int = 8
    block_size: int = 8
    halo_size: int = 3
    qk_ratio: float = 1.0  # channels of all heads' queries, as a share of those inside
    v_ratio: float = 1.0


@dataclass(frozen=True)
class Design:
    """A whole network. Defaults are the ResNet-T of timm's hybrids.

    The stem's convolutions give `stem` channels; the first has stride 2, and so has what `stem_pool` puts
    behind them, or without it the last. `group_size` is that of grouped 3 x 3 convolutions. `gate_ratio`
    belongs to the gate "squeeze". An inverted design goes from few channels to many inside, ends blocks
    without an activation, and has no shortcut where the shape changes.
    """

    stages: tuple[Plan, ...]
    stem: tuple[int, ...] = (24, 32, 64)
    stem_size: int = 3
    stem_pool: bool = True
    activation: str = "silu"
    group_size: int | None = None
    gate: Literal["squeeze", "neighbours"] | None = None
    gate_ratio: float = 1 / 16
    final: int | None = None  # channels of a last 1 x 1 convolution
    inverted: bool = False
    first_stride: int = 1  # of the first stage


class Normed(nn.Module):
    """A layer, a batch norm and an activation."""

    def __init__(self, layer: nn.Module, dim: int, activation: nn.Module | None = None):
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm2d(dim)
        self.activation = activation or nn.Identity()

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        return self.activation(convolve(self.norm, self.layer(x)))


class Stem(nn.Module):
    """Convolutions, the first of stride 2, and a pooling of stride 2, or in its place the last of them."""

    def __init__(self, in_channels: int, design: Design):
        super().__init__()
        act, size = ACTIVATIONS[design.activation], design.stem_size
        strides = [2, *(1 for _ in design.stem[1:])]
        if not design.stem_pool and len(strides) > 1:
            strides[-1] = 2
        pairs = zip((in_channels, *design.stem), design.stem, strides, strict=False)
        self.convs = nn.Sequential(
            *(
                Normed(Conv(dim_in, dim, size, stride, size // 2, bias=False), dim, act())
                for dim_in, dim, stride in pairs
            )
        )
        self.pool = nn.MaxPool2d(3, 2, 1) if design.stem_pool else nn.Identity()

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        return convolve(self.pool, self.convs(x))


class Block(nn.Module):
    """1 x 1 convolution, what mixes positions, gate, 1 x 1 convolution; added to what came in."""

    def __init__(
        self,
        dim_in: int,
        dim: int,
        mix: Normed,
        inner: tuple[int, int],
        *,
        stride: int = 1,
        gate: nn.Module | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        inverted: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.conv1 = Normed(Conv(dim_in, inner[0], 1, bias=False), inner[0], activation())
        self.mix = mix
        self.gate = gate or nn.Identity()
        self.conv2 = Normed(Conv(inner[1], dim, 1, bias=False), dim)
        self.shortcut: nn.Module | None = nn.Identity()
        if dim_in != dim or stride != 1:
            self.shortcut = None if inverted else Normed(Conv(dim_in, dim, 1, stride, bias=False), dim)
        # without a shortcut nothing would be left of a sample whose branch is dropped
        self.drop_path = DropPath(0.0 if self.shortcut is None else drop_path)
        self.activation = nn.Identity() if inverted else activation()

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        out = self.drop_path(self.conv2(self.gate(self.mix(self.conv1(x)))))
        return self.activation(out if self.shortcut is None else out + self.shortcut(x))


class HaloNet(Pyramid):
    """Stages of bottlenecks; a last 1 x 1 convolution, if there is one, is the final norm's place."""

    def __init__(self, stem: Stem, stages: Sequence[Stage], design: Design, num_classes: int):
        dims = [plan.dim for plan in design.stages]
        first = 2 * (2 if design.stem_pool or len(design.stem) > 1 else 1)
        strides = (first, design.first_stride, *(2 for _ in dims[1:]))
        final, act = design.final, ACTIVATIONS[design.activation]
        norm = Normed(Conv(dims[-1], final, 1, bias=False), final, act()) if final else None
        super().__init__(stem, stages, dims, num_classes=num_classes, strides=strides, norm=norm)
        if final:
            self.num_features = self.head_hidden_size = final
            self.head = self.make_head(num_classes)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what lies behind the last of `indices`; a new classifier where its input changes."""
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        channels = self.feature_info[max(wanted)]["num_chs"]
        if isinstance(self.norm, nn.Identity) and self.num_features != channels:
            self.num_features = self.head_hidden_size = channels
            self.reset_classifier(self.num_classes)
        return wanted

    def initialise(self) -> None:
        """Convolutions keep the variance of what goes backward, and each block begins as its shortcut."""
        super().initialise()
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, HaloAttention):
                module.reset_parameters()
            elif isinstance(module, Block) and module.shortcut is not None:
                nn.init.zeros_(module.conv2.norm.weight)


def halonet(
    design: Design,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    border: Literal["zero", "mask"] = "zero",
    rel_stride: Literal["exact", "timm"] = "exact",
    downsampling: Literal["stride", "pool"] = "stride",
    num_conv_stages: int = 0,
    activation: str | None = None,
) -> HaloNet:
    """A HaloNet of any design.

    `border`, `rel_stride` are those of `HaloAttention`. Attention halves a map by queries at every second
    position, or with `downsampling="pool"`, and always where the block is odd, by averages of its results.
    The first `num_conv_stages` stages convolve instead. `activation` is another one than the design's.
    """
    if downsampling not in ("stride", "pool"):
        raise ValueError(f"downsampling={downsampling!r} is unknown. Choose 'stride' or 'pool'.")
    if not 0 <= num_conv_stages <= len(design.stages):
        raise ValueError(
            f"num_conv_stages={num_conv_stages}: the model has {len(design.stages)} stages; give 0 to all."
        )
    design = replace(design, activation=activation or design.activation)
    if design.activation not in ACTIVATIONS:
        raise ValueError(f"activation={design.activation!r} is unknown. Choose {' or '.join(ACTIVATIONS)}.")
    act = ACTIVATIONS[design.activation]
    rates = drop_path_rates(drop_path, tuple(plan.depth for plan in design.stages))
    dim, stages = design.stem[-1], []
    for number, plan in enumerate(design.stages):
        blocks = []
        for place in range(plan.depth):
            inner = plan.inner if isinstance(plan.inner, int) else plan.inner[place > 0]
            stride = (2 if number else design.first_stride) if place == 0 else 1
            mix: nn.Module
            gate, mixed = None, inner
            if place in plan.attends and number >= num_conv_stages:
                mixed = round(plan.v_ratio * inner)
                mix = HaloAttention(
                    inner,
                    plan.num_heads,
                    block_size=plan.block_size,
                    halo_size=plan.halo_size,
                    qk_dim=_eights(plan.qk_ratio * inner),
                    v_dim=mixed,
                    stride=stride,
                    pool=stride > 1 and (downsampling == "pool" or plan.block_size % stride > 0),
                    border=border,
                    rel_stride=rel_stride,
                )
            else:
                groups = inner // design.group_size if design.group_size else 1
                mix = Conv(inner, inner, 3, stride, 1, groups=groups, bias=False)
                gate = _gate(design, inner)
            blocks.append(
                Block(
                    dim,
                    plan.dim,
                    Normed(mix, mixed, act()),
                    (inner, mixed),
                    stride=stride,
                    gate=gate,
                    activation=act,
                    inverted=design.inverted,
                    drop_path=rates[number][place],
                )
            )
            dim = plan.dim
        stages.append(Stage(nn.Identity(), blocks))
    return HaloNet(Stem(in_channels, design), stages, design, num_classes)


def _gate(design: Design, dim: int) -> nn.Module | None:
    if design.gate == "squeeze":
        return SqueezeExcite(dim, _eights(dim * design.gate_ratio))
    return NeighbourGate(dim) if design.gate == "neighbours" else None


def _eights(channels: float) -> int:
    """The nearest multiple of 8 above 0."""
    return max(8, int(channels + 4) // 8 * 8)


def _published(
    block: int, halo: int, v_ratio: float, ratio: float, depth: int, final: int | None = None
) -> Design:
    """A row of the paper's table."""
    stages = tuple(
        Plan(n, round(ratio * inner), inner, range(n), heads, block, halo, v_ratio=v_ratio)
        for n, inner, heads in zip((3, 3, depth, 3), (64, 128, 256, 512), (4, 8, 8, 8), strict=True)
    )
    return Design(stages, stem=(64,), stem_size=7, final=final)


def _hybrid(
    depths: tuple[int, ...],
    attends: tuple[Sequence[int], ...],
    halo: int,
    last: int = 2048,
    qk_ratios: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
) -> tuple[Plan, ...]:
    """Stages of a ResNet-T with some of its 3 x 3 convolutions replaced."""
    each = zip(depths, (256, 512, 1024, last), (64, 128, 256, 512), attends, qk_ratios, strict=True)
    return tuple(
        Plan(depth, dim, inner, blocks, halo_size=halo, qk_ratio=ratio)
        for depth, dim, inner, blocks, ratio in each
    )


halonet_h0 = partial(halonet, _published(8, 3, 1.0, 0.5, 7))
halonet_h1 = partial(halonet, _published(8, 3, 1.0, 1.0, 10))
halonet_h2 = partial(halonet, _published(8, 3, 1.0, 1.25, 11))
halonet_h3 = partial(halonet, _published(10, 3, 1.0, 1.5, 12, 1024))
halonet_h4 = partial(halonet, _published(12, 2, 1.0, 3.0, 12, 1280))
halonet_h5 = partial(halonet, _published(14, 2, 2.5, 2.0, 23, 1536))
halonet_h6 = partial(halonet, _published(8, 4, 3.0, 2.75, 24, 1536))
halonet_h7 = partial(halonet, _published(10, 3, 4.0, 3.5, 26, 2048))

# timm's hybrids, for whose published weights queries of a stride count as neighbours
hybrid = partial(halonet, rel_stride="timm")
SHORT = ((), (), (1,), (0, 1))
LONG = _hybrid((3, 4, 6, 3), ((), (3,), (1, 3, 5), (1,)), 3)
HALVES = _hybrid((3, 4, 6, 3), ((), (1, 3), (1, 3, 5), (1,)), 3)
REGNET = (
    Plan(2, 48, (96, 144)),
    Plan(6, 96, (144, 288)),
    Plan(12, 192, (288, 576), (3, 7, 11), block_size=7, halo_size=2, qk_ratio=0.33),
    Plan(2, 288, (576, 864), (0, 1), block_size=7, halo_size=2, qk_ratio=0.33),
)

halonet26t = partial(hybrid, Design(_hybrid((2, 2, 2, 2), SHORT, 2), activation="relu"))
sehalonet33ts = partial(
    hybrid,
    Design(
        _hybrid((2, 3, 3, 2), ((), (2,), (2,), (0, 1)), 3, last=1536),
        stem_pool=False,
        gate="squeeze",
        final=1280,
    ),
)
halonet50ts = partial(hybrid, Design((LONG[0], replace(LONG[1], num_heads=4), *LONG[2:])))
eca_halonext26ts = partial(
    hybrid,
    Design(
        _hybrid((2, 2, 2, 2), SHORT, 2, qk_ratios=(1.0, 1.0, 0.5, 0.25)), group_size=16, gate="neighbours"
    ),
)
haloregnetz_b = partial(
    hybrid,
    Design(
        REGNET,
        stem=(32,),
        stem_pool=False,
        group_size=16,
        gate="squeeze",
        gate_ratio=0.25,
        final=1536,
        inverted=True,
        first_stride=2,
    ),
)
# Its last attention is over all of an 8 x 8 map: one block without a halo.
halo2botnet50ts_256 = partial(
    hybrid,
    Design((*HALVES[:3], replace(HALVES[3], num_heads=4, halo_size=0)), stem_pool=False),
)
