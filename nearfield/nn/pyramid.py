"""Vision models of several stages, each on a coarser map with more channels; what dense prediction takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from nearfield.nn.backbone import Backbone, initialise
from nearfield.nn.convolution import convolve, pad_to


class PatchEmbed(nn.Module):
    """A strided convolution on a map, with a norm before or behind it.

    `pad` lengthens sides that the stride does not divide by zeros behind their end.
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        kernel_size: int,
        stride: int,
        *,
        padding: int = 0,
        norm_before: nn.Module | None = None,
        norm: nn.Module | None = None,
        pad: bool = True,
    ):
        super().__init__()
        self.norm_before = norm_before or nn.Identity()
        self.proj = nn.Conv2d(dim_in, dim, kernel_size, stride, padding)
        self.norm = norm or nn.Identity()
        self.pad = pad

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        x = self.norm_before(x)
        if self.pad:
            x = pad_to(x, self.proj.stride)
        return self.norm(convolve(self.proj, x))


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2, each with a batch norm, an activation between them."""

    def __init__(self, dim_in: int, dim: int, activation: Callable[[], nn.Module]):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(dim_in, dim // 2, 3, 2, 1),
            nn.BatchNorm2d(dim // 2),
            activation(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        return convolve(self.proj, x)


class Stage(nn.Module):
    """A change of resolution, then blocks on the map."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *outer out"]:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class Pyramid(Backbone):
    """Stages on maps `[B, Y, X, C]`, of clips `[B, T, Y, X, C]`; the stem makes the first of the pictures.

    `norm_pooled` puts the final norm behind the pooling. `strides` are those of the stem and of each stage,
    4, 1 and then 2 if not given.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dims: Sequence[int],
        *,
        num_classes: int,
        strides: Sequence[int] | None = None,
        norm: nn.Module | None = None,
        norm_pooled: bool = False,
    ):
        super().__init__(dims[-1], num_classes)
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm: nn.Module = norm or nn.Identity()
        self.norm_pooled = norm_pooled
        self.head = self.make_head(num_classes)
        reduction, *others = strides or (4, 1, *(2,) * (len(dims) - 1))
        self.feature_info = []
        for number, (dim, stride) in enumerate(zip(dims, others, strict=True)):
            reduction *= stride
            info: dict[str, Any] = {"num_chs": dim, "reduction": reduction, "module": f"stages.{number}"}
            self.feature_info.append(info)
        self.initialise()

    def embed(self, images: Float[Tensor, "b channels *sides"]) -> Float[Tensor, "b *grid dim"]:
        return self.stem(images.movedim(1, -1))

    def finish(self, state: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        return state if self.norm_pooled else self.norm(state)

    def pool(self, features: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b dim"]:
        pooled = super().pool(features)
        return self.norm(pooled) if self.norm_pooled else pooled

    def unpooled(self, features: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        return self.norm(features) if self.norm_pooled else features


class FeaturePyramid(nn.Module):
    """The maps of a backbone's stages, `[B, C, Y, X]` each, for detection and segmentation.

    `norm` adds a layer norm for each map, as the published dense-prediction models have.
    """

    def __init__(
        self,
        backbone: Backbone,
        indices: Sequence[int] | None = None,
        *,
        norm: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.indices = backbone.prune_intermediate_layers(
            list(indices) if indices is not None else list(range(len(backbone.parts))), prune_norm=True
        )
        self.backbone = backbone
        self.channels = [backbone.feature_info[index]["num_chs"] for index in self.indices]
        self.reductions = [backbone.feature_info[index]["reduction"] for index in self.indices]
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=eps) if norm else nn.Identity() for c in self.channels)
        self.norms.apply(initialise)

    def forward(self, x: Float[Tensor, "b channels *sides"]) -> list[Tensor]:
        maps = self.backbone.forward_intermediates(
            x, self.indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        return [norm(shown).movedim(-1, 1) for norm, shown in zip(self.norms, maps, strict=True)]
