"""Shifted windows, as in Swin: softmax inside tiles that move by half a tile from block to block."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.nn.convolution import pad_to
from nearfield.ops.dense import dense_attention

# Tiles stand beside the heads, so that one mask serves the whole batch.
TO_TILES = "b (ny y) (nx x) (three h d) -> three b (y x) (ny nx h) d"
TO_MAP = "b (y x) (ny nx h) d -> b (ny y) (nx x) (h d)"


class ShiftedWindowAttention(nn.Module):
    """Tokens attend within tiles of `window_size`, with a learned bias for each offset and head.

    The tiles start `shift` tokens late and go on around the edge of the map, where tokens from its two ends
    do not see each other. A side no longer than the window is one tile, which is not shifted. Other sides
    are padded behind their end by zeros, which are attended like tokens.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 7, *, shift: int = 0):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim={dim} is no multiple of num_heads={num_heads}. Choose heads that divide it."
            )
        if not 0 <= shift < window_size:
            raise ValueError(f"shift={shift} must be at least 0 and below window_size={window_size}.")
        self.num_heads, self.window_size, self.shift = num_heads, window_size, shift
        self.relative_bias = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        height, width = x.shape[1:3]
        window = min(self.window_size, height), min(self.window_size, width)
        shift = [self.shift if side > self.window_size else 0 for side in (height, width)]
        x = pad_to(x, window)
        padded = x.shape[1:3]
        if any(shift):
            x = x.roll([-by for by in shift], (1, 2))
        tiles = {"ny": padded[0] // window[0], "nx": padded[1] // window[1], "h": self.num_heads}
        q, k, v = rearrange(self.qkv(x), TO_TILES, three=3, **tiles)
        mask = self.offsets(window).expand(tiles["ny"] * tiles["nx"], -1, -1, -1)  # [tiles, heads, N, N]
        if any(shift):
            mask = mask.masked_fill(self._apart(padded, window, shift)[:, None], -torch.inf)
        out = rearrange(dense_attention(q, k, v, mask=mask.flatten(0, 1)), TO_MAP, y=window[0], **tiles)
        if any(shift):
            out = out.roll(shift, (1, 2))
        return self.proj(out[:, :height, :width])

    def offsets(self, window: tuple[int, int]) -> Float[Tensor, "heads n n"]:
        """What is added to the score of each pair in a tile, by the offset from key to query."""
        device, largest = self.relative_bias.device, self.window_size - 1
        y, x = (torch.arange(side, device=device) for side in window)
        dy = y[:, None, None, None] - y[:, None] + largest  # [query y, 1, key y, 1]
        dx = x[:, None, None] - x + largest  # [query x, 1, key x]
        number = (dy * (2 * largest + 1) + dx).flatten(2).flatten(0, 1)  # [N, N]
        return self.relative_bias[number].movedim(-1, 0)

    def _apart(self, sides: torch.Size, window: tuple[int, int], shift: list[int]) -> Tensor:
        """Which pairs `[tiles, N, N]` of a rolled map lie together only because it was rolled."""
        device = self.relative_bias.device
        came_around = [  # tokens that the roll took from the start of an axis to its end
            torch.arange(side, device=device) >= side - by for side, by in zip(sides, shift, strict=True)
        ]
        origin = 2 * came_around[0].long()[:, None] + came_around[1]
        origin = rearrange(origin, "(ny y) (nx x) -> (ny nx) (y x)", y=window[0], x=window[1])
        return origin[:, :, None] != origin[:, None]


class PatchMerging(nn.Module):
    """A quarter of the positions: the channels of 2 x 2 neighbours side by side, a norm, a matrix.

    An odd side gets zeros behind its end.
    """

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y2 x2 out"]:
        x = rearrange(pad_to(x, (2, 2)), "b (y p) (x q) c -> b y x (q p c)", p=2, q=2)
        return self.reduction(self.norm(x))
