"""Routing attention of new tokens, one after the other, against the last members of each cluster."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.ops.checks import check, scale_or_default, under_autocast
from nearfield.ops.routing.attention import checked
from nearfield.ops.routing.geometry import Routing
from nearfield.ops.routing.members import members
from nearfield.ops.routing.slots import rows


class RoutingCache(NamedTuple):
    """The last `window_size` members of each cluster in a ring: member r stands at r % window_size."""

    key: Tensor  # [B, H, C, W, D]
    value: Tensor  # [B, H, C, W, Dv]
    counts: Tensor  # [B, H, C]: members so far


class Decoded(NamedTuple):
    """Output of new tokens, and the cache with them in it."""

    output: Tensor
    cache: RoutingCache


@torch.no_grad()
def routing_cache(
    query: Float[Tensor, "b n heads dim"],
    key: Float[Tensor, "b n kv_heads dim"],
    value: Float[Tensor, "b n kv_heads dv"],
    centroids: Float[Tensor, "heads clusters dim"],
    routing: Routing,
    *,
    key_mask: Bool[Tensor, "b n"] | None = None,
) -> RoutingCache:
    """What decoding needs to know of a prompt: `[B, H, C, W, D]` keys and values, however long it was.

    The prompt may have no tokens. Masked tokens leave no trace.
    """
    _refuse_others(routing)
    checked(query, key, value, centroids, routing, key_mask, key_mask)

    def build(query: Tensor, key: Tensor, value: Tensor) -> RoutingCache:
        inside = members(query, key, centroids, routing, key_mask, key_mask).key  # [B, H, C, N]
        count = inside.sum(-1)
        last = count[..., None] - 1
        place = torch.arange(routing.window_size, device=key.device)
        number = last - (last - place).remainder(routing.window_size)  # the member that stands there
        index = torch.searchsorted(inside.cumsum(-1).contiguous(), number + 1)
        index = index.masked_fill(number < 0, key.shape[1])  # [B, H, C, W]
        group = query.shape[2] // key.shape[2]

        def last_members(x: Tensor) -> Tensor:
            x = F.pad(
                x.transpose(1, 2).repeat_interleave(group, 1), (0, 0, 0, 1)
            )  # a row for places still empty
            return rows(x, index.flatten(2)).unflatten(2, index.shape[2:])

        return RoutingCache(last_members(key), last_members(value), count)

    return under_autocast(build, query, key, value)


@torch.no_grad()
def routing_attention_decode(
    query: Float[Tensor, "b n heads dim"],
    key: Float[Tensor, "b n kv_heads dim"],
    value: Float[Tensor, "b n kv_heads dv"],
    centroids: Float[Tensor, "heads clusters dim"],
    routing: Routing,
    cache: RoutingCache,
    *,
    scale: float | None = None,
) -> Decoded:
    """The rows of `routing_attention` that belong to new tokens, from the cache of those before.

        cache = routing_cache(q, k, v, means, Routing(256))                     # of the prompt
        out, cache = routing_attention_decode(q1, k1, v1, means, Routing(256), cache)

    A step reads `window_size` keys and as many centroids as there are, however long the text. Tokens run one
    after the other. The cache's memory is written to: clone what must stay. There are no gradients.
    """
    _refuse_others(routing)
    checked(query, key, value, centroids, routing, None, None)
    factor = scale_or_default(scale, query.shape[-1])

    def advance(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, num_tokens, num_heads, head_dim = query.shape
        shape = (batch, num_heads, centroids.shape[1], routing.window_size)
        check("cache.key", cache.key, (*shape, head_dim), query, key.dtype)
        check("cache.value", cache.value, (*shape, value.shape[-1]), query, value.dtype)
        clusters = members(query, key, centroids, routing).key.to(torch.uint8).argmax(2)  # [B, H, N]
        output = value.new_zeros(batch, num_tokens, num_heads, value.shape[-1])
        for t in range(num_tokens):
            output[:, t] = _step(
                query[:, t], key[:, t], value[:, t], clusters[..., t], routing, cache, factor
            )
        return output

    return Decoded(under_autocast(advance, query, key, value), cache)


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cluster: Tensor,
    routing: Routing,
    cache: RoutingCache,
    scale: float,
) -> Tensor:
    """Output `[B, H, Dv]` of one token `[B, H or fewer, D]` that joins `cluster [B, H]`."""
    batch, num_heads = query.shape[:2]
    group = num_heads // key.shape[1]
    at = (
        torch.arange(batch, device=query.device)[:, None],
        torch.arange(num_heads, device=query.device),
        cluster,
    )
    number = cache.counts[at]
    slot = number % routing.window_size
    cache.key[(*at, slot)] = key.repeat_interleave(group, 1)
    cache.value[(*at, slot)] = value.repeat_interleave(group, 1)
    cache.counts[at] = number + 1
    place = torch.arange(routing.window_size, device=query.device)
    seen = place <= number[..., None]  # [B, H, W]
    if not routing.sees_self:
        others = seen & (place != slot[..., None])
        seen = torch.where(others.any(-1, keepdim=True), others, seen)
    return F.scaled_dot_product_attention(
        query[:, :, None], cache.key[at], cache.value[at], attn_mask=seen[:, :, None], scale=scale
    )[:, :, 0]


def _refuse_others(routing: Routing) -> None:
    if isinstance(routing, Routing) and routing.selection != "causal":
        raise ValueError(
            f"selection={routing.selection!r} needs the whole text at once. "
            "Decode with selection='causal', which is what was trained to look back only."
        )
