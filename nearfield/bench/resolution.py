"""What vision models cost against the side of the picture, and a plain vision transformer as the rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.bench.work import cpu_seconds
from nearfield.measure.flops import count_flops
from nearfield.nn.attention import Attention
from nearfield.nn.backbone import Backbone
from nearfield.nn.mlp import Mlp


@dataclass(frozen=True)
class Costs:
    """MACs and CPU seconds of one picture, by model, at each of `sides`; None where it was not timed."""

    sides: tuple[int, ...]
    macs: dict[str, list[float]]
    seconds: dict[str, list[float | None]]

    def slope(self, name: str, of: str = "macs") -> float:
        """The power of the number of pixels with which a cost grows: 1 is linear, 2 quadratic."""
        known = [
            (side**2, cost) for side, cost in zip(self.sides, getattr(self, of)[name], strict=True) if cost
        ]
        return slope([pixels for pixels, _ in known], [cost for _, cost in known])

    def plot(self, axes: Any, of: str = "seconds") -> None:
        """The costs as lines, both axes logarithmic."""
        known = {
            name: [(side, cost) for side, cost in zip(self.sides, costs, strict=True) if cost]
            for name, costs in getattr(self, of).items()
        }
        labels = {"seconds": "CPU seconds, one thread", "macs": "multiplications with addition"}
        draw_lines(axes, known, "side of the picture", labels[of])
        axes.set_xticks(self.sides, [f"{side}" for side in self.sides])
        axes.minorticks_off()


def against_resolution(
    models: Mapping[str, nn.Module],
    sides: Sequence[int],
    *,
    channels: int = 3,
    budget: float = 0.3,
    least: int = 2,
    most_macs: float = float("inf"),
) -> Costs:
    """What one picture of each side costs each model in evaluation.

    The models take turns at each side. `budget` is of seconds for the repeats of one figure, of which there
    are at least `least`; what needs more than `most_macs` is counted and not timed, and 0 times nothing.
    """
    costs = Costs(tuple(sides), {name: [] for name in models}, {name: [] for name in models})
    for side in sides:
        picture = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
        for name, model in models.items():
            was_training = model.training
            model.eval()
            try:
                macs = model_macs(model, (channels, side, side))
                costs.macs[name].append(macs)
                with torch.no_grad():
                    seconds = (
                        cpu_seconds(partial(model, picture), budget=budget, least=least)
                        if macs <= most_macs
                        else None
                    )
                    costs.seconds[name].append(seconds)
            finally:
                model.train(was_training)
    return costs


def model_macs(model: nn.Module, size: Sequence[int] = (3, 224, 224)) -> float:
    """Multiplications with addition for one input of `size` without its batch. Nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def call() -> None:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.empty(1, *size))

    return count_flops(call) / 2


def slope(sizes: Sequence[int | float], values: Sequence[int | float]) -> float:
    """Of the straight line through the logarithms of values over those of sizes."""
    x, y = [log(size) for size in sizes], [log(value) for value in values]
    if len(set(x)) < 2:
        raise ValueError(f"A slope needs values at two sizes at least, given {list(sizes)}.")
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)


def draw_lines(
    axes: Any,
    lines: Mapping[str, Sequence[tuple[int | float, int | float]]],
    x: str,
    y: str,
    *,
    scale: str = "log",
) -> None:
    """One line with its points for each name."""
    for name, points in lines.items():
        axes.plot([at for at, _ in points], [value for _, value in points], marker="o", label=name)
    axes.set(xlabel=x, ylabel=y, xscale=scale, yscale=scale)
    axes.legend()


class GlobalBlock(nn.Module):
    """Attention over all tokens, then the feed-forward network; each added to what came in."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GlobalViT(Backbone):
    """The vision transformer: patches of `patch` pixels, each block attends to all of them.

    Without a class token; a learned position for each patch of a picture of `side`, interpolated to others.
    """

    parts_name = "blocks"

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        patch: int = 16,
        side: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
    ):
        super().__init__(dim, num_classes)
        self.stem = nn.Conv2d(in_channels, dim, patch, patch)
        grid = max(1, side // patch)
        self.pos_embed = nn.Parameter(torch.empty(1, grid, grid, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(GlobalBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = self.make_head(num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch, "module": f"blocks.{number}"} for number in range(depth)
        ]
        self.initialise()

    def embed(self, images: Float[Tensor, "b channels y x"]) -> Float[Tensor, "b y2 x2 dim"]:
        patches = self.stem(images).movedim(1, -1)
        position: Tensor = self.pos_embed
        if patches.shape[1:3] != position.shape[1:3]:
            position = F.interpolate(
                position.movedim(-1, 1), size=patches.shape[1:3], mode="bicubic", align_corners=False
            ).movedim(1, -1)
        return patches + position

    def finish(self, state: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        return self.norm(state)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


def global_vit(dim: int = 192, depth: int = 12, num_heads: int = 3, **options: Any) -> GlobalViT:
    """A plain vision transformer, DeiT-Ti by default: what others are compared with.

    `options` are those of `GlobalViT`: patch, side, num_classes, in_channels.
    """
    return GlobalViT(dim, depth, num_heads, **options)


def equal_vit(model: Backbone) -> GlobalViT:
    """A vision transformer of the width of the model's third stage, and of its work on 224 pixels.

    The rival of pyramids: whatever they save, it must come from where attention looks.
    """
    width = model.feature_info[2]["num_chs"]
    made = partial(global_vit, width, num_heads=max(1, width // 64))
    one, two = (model_macs(made(depth=depth)) for depth in (1, 2))
    return made(depth=max(1, 1 + round((model_macs(model) - one) / (two - one))))
