"""Rotary position embedding: pairs of channels turned by angles that grow with the position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "b n heads dim"], positions: Int[Tensor, "#b n"], *, base: float = 10000.0
) -> Float[Tensor, "b n heads dim"]:
    """`x` with channels i and i + dim / 2 turned by position / base^(2 i / dim), as in Llama.

    The product of a rotated query and a rotated key depends on their distance only. Angles are in float32 at
    least, whatever the dtype of `x`.
    """
    half = x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(
            f"x has {x.shape[-1]} channels for each head. Give an even number: pairs are turned."
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(half, dtype=wide, device=x.device) / half
    angle = (positions.to(wide)[..., None] * base**-steps)[..., None, :]  # [B or 1, N, 1, dim / 2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(wide).split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
