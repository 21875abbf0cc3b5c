"""HiLo attention as a layer: close looks inside tiny windows, beside a coarse look at everything."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.core.dims import per_dim
from nearfield.nn.convolution import pad_to
from nearfield.ops.hilo import average_pool, hilo_attention

NONE = (None, None, None)


class HiLo(nn.Module):
    """Some heads attend inside windows, the others from every token to the mean of each window.

    The low heads, `int(num_heads * alpha)` of them, see everything coarsely; the high ones see their window.
    Both read all channels, and their outputs stand side by side, the high ones first, with no projection
    across. Windows of 1 make all heads low: ordinary attention.

    No weight depends on `window_size`, so it may be set anew after training. A grid that it does not divide
    is padded behind its end by zeros, which are pooled and attended like tokens, as in the published
    detectors; with `pad=False` it is refused, as by the published classifiers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 2,
        alpha: float = 0.5,
        *,
        qkv_bias: bool = True,
        pad: bool = True,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim={dim} is no multiple of num_heads={num_heads}. Choose heads that divide it."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is the share of low heads: give 0 to 1.")
        if window_size < 1:
            raise ValueError(f"window_size={window_size} must be at least 1; 1 is ordinary attention.")
        self.window_size, self.pad = window_size, pad
        # cut off in floating point, as the published weights were: int(12 * 0.7) is 8
        self.low_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low, high = (heads * (dim // num_heads) for heads in (self.low_heads, self.high_heads))
        if self.high_heads:
            self.high_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias)
            self.high_proj = nn.Linear(high, high)
        if self.low_heads:
            self.low_q = nn.Linear(dim, low, bias=qkv_bias)
            self.low_kv = nn.Linear(dim, 2 * low, bias=qkv_bias)
            self.low_proj = nn.Linear(low, low)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        grid = x.shape[1:-1]
        if self.pad:
            x = pad_to(x, per_dim("window_size", self.window_size, len(grid)))
        out = [self.high(x)] if self.high_heads else []
        out += [self.low(x)] if self.low_heads else []
        return torch.cat(out, -1)[(slice(None), *map(slice, grid))]

    def high(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid high"]:
        """What the high heads give, on a grid that the window divides."""
        q, k, v = rearrange(
            self.high_qkv(x), "b ... (three h d) -> three b ... h d", three=3, h=self.high_heads
        )
        return self.high_proj(hilo_attention(q, k, v, *NONE, window_size=self.window_size).flatten(-2))

    def low(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid low"]:
        """What the low heads give, on a grid that the window divides."""
        pooled = average_pool(x, self.window_size) if self.window_size > 1 else x
        q = self.low_q(x).unflatten(-1, (self.low_heads, -1))
        k, v = rearrange(self.low_kv(pooled), "b ... (two h d) -> two b ... h d", two=2, h=self.low_heads)
        return self.low_proj(hilo_attention(*NONE, q, k, v, window_size=self.window_size).flatten(-2))
