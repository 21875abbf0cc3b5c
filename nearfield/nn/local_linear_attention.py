"""A layer of causal local linear attention, with a cache for decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.nn.rotary import rotate
from nearfield.ops.lla import Solver, local_linear_attention, local_linear_attention_decode
from nearfield.ops.neighborhood import Neighborhood
from nearfield.ops.neighborhood.decode import visible_slots
from nearfield.ops.neighborhood.geometry import LARGEST

FEW = 8  # new tokens up to which reading the cache is what takes time


@dataclass(frozen=True)
class KeyValueCache:
    """The keys, normalised and rotated, and values `[B, M, kv_heads, head_dim]` that later tokens may see.

    They are the last of `length` tokens.
    """

    key: Tensor
    value: Tensor
    length: int


class LocalLinearAttention(nn.Module):
    """Each token reads off a linear regression of the values before it, weighted towards keys like its query.

        layer = LocalLinearAttention(512, 8, kernel_size=256)
        y = layer(x)  # [B, T, 512]
        y, cache = layer.step(prompt)
        y, cache = layer.step(token, cache)

    Queries and keys are normalised for each head and rotated by position. The ridge of a head is
    `ridge_floor + softplus(ridge_logit)`, learned from `ridge_init` on; a large one is softmax attention, so
    a pretrained softmax model is converted from 30 downwards. In bfloat16 take a floor of 0.25: the keys are
    rounded too coarsely for less.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        kernel_size: int | None = None,
        qk_norm: bool = True,
        rope_base: float | None = 10000.0,
        ridge_init: float = 1.0,
        ridge_floor: float = 0.05,
        iterations: int = 16,
        qkv_bias: bool = False,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"dim={dim}, num_heads={num_heads}, num_kv_heads={num_kv_heads}: "
                "the heads must divide dim, and the key/value heads the heads."
            )
        if not 0 <= ridge_floor < ridge_init:
            raise ValueError(f"ridge_floor={ridge_floor} must be from 0 to below ridge_init={ridge_init}.")
        head_dim = dim // num_heads
        self.num_heads, self.num_kv_heads, self.rope_base = num_heads, num_kv_heads, rope_base
        self.geometry = Neighborhood(kernel_size or LARGEST, is_causal=True)
        self.solver = Solver("cg", max_iterations=iterations)
        self.ridge_init, self.ridge_floor = ridge_init, ridge_floor
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.ridge_logit = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The ridge as at the beginning; the other parameters belong to modules that reset themselves."""
        start = self.ridge_init - self.ridge_floor
        nn.init.constant_(self.ridge_logit, start + math.log(-math.expm1(-start)))  # softplus backwards

    @property
    def ridge(self) -> Float[Tensor, " heads"]:
        """The ridge of each head."""
        wide = torch.promote_types(self.ridge_logit.dtype, torch.float32)
        return self.ridge_floor + F.softplus(self.ridge_logit.to(wide))

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b t dim"]:
        return self.proj(self._attend(*self._project(x, 0)).flatten(-2))

    def step(
        self, x: Float[Tensor, "b t dim"], cache: KeyValueCache | None = None
    ) -> tuple[Float[Tensor, "b t dim"], KeyValueCache]:
        """The output for new tokens after those of the cache, and the cache with them in it."""
        before = 0 if cache is None else cache.length
        query, key, value = self._project(x, before)
        if cache is not None:
            key, value = torch.cat([cache.key, key], 1), torch.cat([cache.value, value], 1)
        if cache is not None and x.shape[1] <= FEW:
            slots = torch.arange(key.shape[1], device=x.device)[None]
            visible = visible_slots(self.geometry, slots[:, key.shape[1] - x.shape[1] :], slots)
            out = local_linear_attention_decode(
                query, key, value, visible=visible, ridge=self.ridge, solver=self.solver
            )
        else:
            out = self._attend(query, key, value)
        kept = min(key.shape[1], self._window - 1)  # what the next token sees beside itself
        key, value = (t[:, t.shape[1] - kept :] for t in (key, value))
        return self.proj(out.flatten(-2)), KeyValueCache(key, value, before + x.shape[1])

    @property
    def _window(self) -> int:
        size = self.geometry.kernel_size
        return size if isinstance(size, int) else size[0]

    def _project(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[B, T, heads, head_dim]` of tokens from position `first` on."""
        query = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, -1)))
        key = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1)))
        value = self.v_proj(x).unflatten(-1, (self.num_kv_heads, -1))
        if self.rope_base is not None:
            at = torch.arange(first, first + x.shape[1], device=x.device)[None]
            query, key = (rotate(t, at, base=self.rope_base) for t in (query, key))
        return query, key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local_linear_attention(query, key, value, self.geometry, ridge=self.ridge, solver=self.solver)
