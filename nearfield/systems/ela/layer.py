"""Gates on the maps of convolutional networks: ELA, and the three that its paper compares it with.

All take maps with the channels in second place, as the networks that they go into have them; on maps with
channels last, use `nearfield.nn.convolution.convolve(gate, x)`. None changes the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log2
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Variant(NamedTuple):
    """Length of the convolution, how many channels it mixes, and the groups of the norm."""

    kernel_size: int
    mixed: int
    norm_groups: int


VARIANTS = {"T": Variant(5, 1, 32), "B": Variant(7, 1, 16), "S": Variant(5, 8, 16), "L": Variant(7, 8, 16)}


class ELA(nn.Module):
    """`x` times a gate for each of its rows and one for each of its columns, both between 0 and 1.

        rows, columns = mean of x over its columns, mean of x over its rows        # [B, C, Y], [B, C, X]
        x * sigmoid(norm(conv(rows)))[..., None] * sigmoid(norm(conv(columns)))[..., None, :]

    `variant` is T, B, S or L. Convolution and norm serve both axes, unless `share` is False. To compare with
    there are `norm="batch"` and a `reduction` of the channels around the convolution, as coordinate attention
    has.
    """

    def __init__(
        self, dim: int, variant: str = "B", *, norm: str = "group", reduction: int = 1, share: bool = True
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is unknown. Choose {', '.join(VARIANTS)}.")
        if norm not in ("group", "batch"):
            raise ValueError(f"norm={norm!r} is unknown. Choose group or batch.")
        kernel_size, mixed, groups = VARIANTS[variant]
        wrong = [size for size in (mixed, groups if norm == "group" else 1) if dim % size]
        if wrong:
            fitting = [
                name for name, (_, *sizes) in VARIANTS.items() if not any(dim % size for size in sizes)
            ]
            hint = f"{' and '.join(fitting)} would do" if fitting else "the sizes are multiples of 16 or 32"
            raise ValueError(
                f"ELA-{variant} needs channels in multiples of {max(wrong)}, given {dim}; {hint}."
            )
        if reduction < 1:
            raise ValueError(f"reduction={reduction} must be at least 1, which reduces nothing.")
        self.share = share

        def conv() -> nn.Module:
            if reduction == 1:
                return strip_conv(dim, kernel_size, dim // mixed)
            hidden = max(8, dim // reduction)
            inner = strip_conv(hidden, kernel_size, hidden)
            return nn.Sequential(nn.Conv1d(dim, hidden, 1), inner, nn.Conv1d(hidden, dim, 1))

        def normed() -> nn.Module:
            return nn.GroupNorm(groups, dim) if norm == "group" else nn.BatchNorm1d(dim)

        self.conv, self.norm = conv(), normed()
        if not share:
            self.conv_columns, self.norm_columns = conv(), normed()

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        rows, columns = self.gates(x)
        return x * rows[..., None] * columns[..., None, :]

    def gates(self, x: Float[Tensor, "b c y x"]) -> tuple[Float[Tensor, "b c y"], Float[Tensor, "b c x"]]:
        """What each row and what each column is multiplied by."""
        conv, norm = (self.conv, self.norm) if self.share else (self.conv_columns, self.norm_columns)
        rows, columns = self.conv(x.mean(-1)), conv(x.mean(-2))
        if self.share and isinstance(self.norm, nn.BatchNorm1d):
            # once for both, so that the running mean sees both
            rows, columns = self.norm(torch.cat([rows, columns], -1)).split(x.shape[-2:], -1)
        else:
            rows, columns = self.norm(rows), norm(columns)
        return rows.sigmoid().to(x.dtype), columns.sigmoid().to(x.dtype)


class SqueezeExcite(nn.Module):
    """`x` times a gate for each channel, by two layers on the channels' means (arXiv 1709.01507)."""

    def __init__(self, dim: int, reduction: int = 16):
        super().__init__()
        hidden = max(1, dim // reduction)
        self.reduce, self.expand = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        gate = self.expand(F.relu(self.reduce(x.mean((-2, -1))))).sigmoid()
        return x * gate.to(x.dtype)[..., None, None]


class EfficientChannelAttention(nn.Module):
    """`x` times a gate for each channel, by a convolution along the channels' means (arXiv 1910.03151)."""

    def __init__(self, dim: int):
        super().__init__()
        length = int(abs((log2(dim) + 1) / 2))
        length += 1 - length % 2  # odd
        self.conv = nn.Conv1d(1, 1, length, padding=length // 2, bias=False)

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        gate = self.conv(x.mean((-2, -1))[:, None])[:, 0].sigmoid()
        return x * gate.to(x.dtype)[..., None, None]


class CoordinateAttention(nn.Module):
    """`x` times a gate for each row and each column, with fewer channels on the way (arXiv 2103.02907)."""

    def __init__(self, dim: int, reduction: int = 32):
        super().__init__()
        hidden = max(8, dim // reduction)
        self.reduce, self.norm = nn.Conv1d(dim, hidden, 1), nn.BatchNorm1d(hidden)
        self.rows, self.columns = nn.Conv1d(hidden, dim, 1), nn.Conv1d(hidden, dim, 1)

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        rows, columns = self.gates(x)
        return x * rows[..., None] * columns[..., None, :]

    def gates(self, x: Float[Tensor, "b c y x"]) -> tuple[Float[Tensor, "b c y"], Float[Tensor, "b c x"]]:
        """What each row and what each column is multiplied by."""
        both = torch.cat([x.mean(-1), x.mean(-2)], -1)
        rows, columns = F.hardswish(self.norm(self.reduce(both))).split(x.shape[-2:], -1)
        return self.rows(rows).sigmoid().to(x.dtype), self.columns(columns).sigmoid().to(x.dtype)


GATES: dict[str, Callable[[int], nn.Module]] = {
    "none": nn.Identity,
    "se": SqueezeExcite,
    "eca": EfficientChannelAttention,
    "ca": CoordinateAttention,
    **{f"ela-{name.lower()}": partial(ELA, variant=name) for name in VARIANTS},
}


def gate_maker(gate: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """What makes a gate for a number of channels: by its name, or itself."""
    if callable(gate):
        return gate
    if gate.lower() not in GATES:
        raise ValueError(
            f"gate={gate!r} is unknown. Choose {', '.join(GATES)}, or give a function of channels."
        )
    return GATES[gate.lower()]


def strip_conv(dim: int, kernel_size: int, groups: int) -> nn.Conv1d:
    """A convolution along one axis that keeps its length."""
    return nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
