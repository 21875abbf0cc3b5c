"""Gated positional self-attention (GPSA): maps of content and of offset, mixed by a gate for each head."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.nn.attention import HEADS
from nearfield.ops.dense import dense_attention


class GatedPositionalAttention(nn.Module):
    """Every token of a map attends by content and by offset: `A = (1 - g) content + g offset`.

    The offset half of head h is `softmax_j(w_h · (dx, dy, dx² + dy²))`. It does not depend on the tokens and
    is a product of one softmax along x and one along y, so that a grid of any sides needs two small matrices
    a head and no map of all pairs. The gate of a head is `g = sigmoid(λ)`.

    `locality_strength` α starts each head as a Gaussian `exp(-α |r - Δ_h|²)` around one offset Δ_h of a
    square neighbourhood, with values passed on as they are; None leaves both as linear layers start.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = False, locality_strength: float | None = 1.0
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim={dim} is no multiple of num_heads={num_heads}. Choose heads that divide it."
            )
        self.num_heads, self.locality_strength = num_heads, locality_strength
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.make_local()

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        q, k, v = self._heads(x)
        content = dense_attention(*(each.flatten(1, 2) for each in (q, k, v))).view(v.shape)
        rows, columns = (each.to(v.dtype) for each in self.offset_maps(*x.shape[1:3]))
        local = torch.einsum("hxj,byjhd->byxhd", columns, v)
        local = torch.einsum("hyi,bixhd->byxhd", rows, local)
        gate = self.gates.to(v.dtype)[:, None]
        return self.proj(((1 - gate) * content + gate * local).flatten(-2))

    @property
    def gates(self) -> Float[Tensor, " heads"]:
        """The share of the offset half in each head: 1 is local, 0 is plain attention."""
        return self.gating_param.sigmoid()

    def offset_maps(self, height: int, width: int) -> tuple[Float[Tensor, "h y y"], Float[Tensor, "h x x"]]:
        """The offset half along y and along x; the weight of a pair is the product of its two."""
        weight = self.pos_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)  # squared offsets of a large grid need it
        dx, dy, squared = weight.to(wide).unbind(1)
        # The bias moves all scores of a head alike and the softmax forgets it; it is read, as published, so
        # that every parameter takes part in training.
        return self._along(dy, squared, height), self._along(dx, squared, width, self.pos_proj.bias)

    def maps(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b h n n"]:
        """The mixed attention maps, to look at; `forward` does not make them."""
        q, k, _ = (each.flatten(1, 2) for each in self._heads(x))
        content = torch.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k).softmax(-1)
        rows, columns = self.offset_maps(*x.shape[1:3])
        local = torch.einsum("hyi,hxj->hyxij", rows, columns).flatten(3).flatten(1, 2)
        gate = self.gates[:, None, None]
        return (1 - gate) * content + gate * local

    @torch.no_grad()
    def make_local(self) -> None:
        """Heads look at the offsets of a square neighbourhood, and values are their tokens.

        Of heads that make no square the last ones stay as they are.
        """
        if self.locality_strength is None:
            return
        dim = self.proj.in_features
        nn.init.eye_(self.qkv.weight[2 * dim :])
        side = math.isqrt(self.num_heads)
        centre = (side - 1) / 2  # of an even side it lies between four tokens
        for head in range(side**2):
            offset = head // side - centre, head % side - centre
            weights = [2 * offset[0], 2 * offset[1], -1.0]
            self.pos_proj.weight[head] = self.locality_strength * torch.tensor(weights).to(
                self.pos_proj.weight
            )

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(self.qkv(x), HEADS, three=3, h=self.num_heads)

    def _along(self, linear: Tensor, squared: Tensor, side: int, bias: Tensor | None = None) -> Tensor:
        place = torch.arange(side, device=linear.device, dtype=linear.dtype)
        offset = place - place[:, None]  # [query, key]
        scores = linear[:, None, None] * offset + squared[:, None, None] * offset.square()
        if bias is not None:
            scores = scores + bias.to(scores.dtype)[:, None, None]
        return scores.softmax(-1)
