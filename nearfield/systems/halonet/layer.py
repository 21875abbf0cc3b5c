"""Halo attention in place of a convolution, and the gates on channels of the hybrids."""

from __future__ import annotations

from math import log2
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.nn.convolution import convolve, pad_to
from nearfield.ops.halo import halo_attention

HIDDEN = -1e4  # the logit of a hidden key: its weight is exactly 0, and half precision holds the number


class Conv(nn.Conv2d):
    """A convolution on maps whose channels come last."""

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        return convolve(super().forward, x)


class HaloAttention(nn.Module):
    """Blocks of queries attend to the keys of their block and of a halo around it, with learned positions.

    There is no output projection: the convolution that follows in a bottleneck is one. With `stride` 2 the
    result has half the side: queries are made at every second position, or with `pool` at all, whose results
    are averaged 2 by 2. A map that the block does not divide is padded by zeros behind its end and the result
    cropped. These zeros and those of the halo are attended with the logits of their positions, unless
    `border="mask"`. `rel_stride="timm"` counts the queries of a stride as neighbours, as timm's weights want.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block_size: int = 8,
        halo_size: int = 3,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        stride: int = 1,
        pool: bool = False,
        border: Literal["zero", "mask"] = "zero",
        rel_stride: Literal["exact", "timm"] = "exact",
    ):
        super().__init__()
        qk_dim, v_dim = qk_dim or dim, v_dim or dim
        if num_heads < 1 or qk_dim % num_heads or v_dim % num_heads:
            raise ValueError(
                f"qk_dim={qk_dim} or v_dim={v_dim} is no multiple of num_heads={num_heads}. "
                "Choose heads that divide both."
            )
        if not pool and block_size % stride:
            raise ValueError(
                f"stride={stride} does not divide block_size={block_size}. Choose another, or pool=True."
            )
        self.num_heads, self.block_size, self.halo_size = num_heads, block_size, halo_size
        self.stride, self.query_stride = stride, 1 if pool else stride
        self.border, self.rel_stride = border, rel_stride
        self.head_dims = (qk_dim // num_heads, v_dim // num_heads)
        self.q = Conv(dim, qk_dim, 1, self.query_stride, bias=False)
        self.kv = Conv(dim, qk_dim + v_dim, 1, bias=False)  # keys, then values, head by head
        entries = 2 * (block_size + 2 * halo_size) - 1
        self.height_rel = nn.Parameter(torch.empty(entries, self.head_dims[0]))
        self.width_rel = nn.Parameter(torch.empty(entries, self.head_dims[0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights, cut off at two deviations, that keep the size of inputs."""
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=self.head_dims[0] ** -0.5)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        padded = pad_to(x, (self.block_size, self.block_size))
        query = rearrange(self.q(padded), "b y x (h d) -> b y x h d", h=self.num_heads)
        keys = rearrange(self.kv(padded), "b y x (h d) -> b y x h d", h=self.num_heads)
        key, value = keys.split(self.head_dims, -1)
        tables: tuple[Tensor, Tensor] = (self.height_rel, self.width_rel)
        if self.border == "mask" and padded.shape != x.shape:
            query, key, tables = self._hide(query, key, x.shape[1:3])
        out = halo_attention(
            query,
            key,
            value,
            block_size=self.block_size,
            halo_size=self.halo_size,
            height_rel=tables[0],
            width_rel=tables[1],
            query_stride=self.query_stride,
            border=self.border,
            rel_stride=self.rel_stride,
            scale=self.head_dims[0] ** -0.5,
        ).flatten(-2)
        height, width = (-(-side // self.query_stride) for side in x.shape[1:3])
        out = out[:, :height, :width]
        if self.query_stride == self.stride:
            return out
        return convolve(nn.AvgPool2d(self.stride, ceil_mode=True), out)

    def _hide(
        self, query: Tensor, key: Tensor, sides: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The padding behind the map's end as keys that no query sees: by a channel that positions ignore."""
        inside = F.pad(
            key.new_zeros(sides), (0, key.shape[2] - sides[1], 0, key.shape[1] - sides[0]), value=1
        )
        channel = (inside * HIDDEN)[None, :, :, None, None].expand(*key.shape[:-1], 1)
        ones = query.new_full((*query.shape[:-1], 1), self.head_dims[0] ** 0.5)
        height, width = (F.pad(table, (0, 1)) for table in (self.height_rel, self.width_rel))
        return torch.cat([query, ones], -1), torch.cat([key, channel], -1), (height, width)


class SqueezeExcite(nn.Module):
    """`x` with each channel multiplied by a gate that the means of all channels decide."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        means = x.mean((1, 2), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(means))).sigmoid()


class NeighbourGate(nn.Module):
    """`x` with each channel multiplied by a gate that the means of a few channels beside it decide (ECA)."""

    def __init__(self, dim: int):
        super().__init__()
        size = int((log2(dim) + 1) / 2)
        size = max(3, size + 1 - size % 2)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        gate = self.conv(x.mean((1, 2)).unsqueeze(1)).sigmoid()  # [B, 1, C]
        return x * gate.unsqueeze(1)
