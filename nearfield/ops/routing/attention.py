"""Routing attention: validate, choose a backend, call it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import check, check_heads, no_transform, scale_or_default, under_autocast
from nearfield.ops.routing import native, reference, tiled
from nearfield.ops.routing.geometry import Routing
from nearfield.ops.routing.members import members

OP = "routing_attention"
LAYOUT = "[batch, tokens, heads, head_dim]"


def routing_attention(
    query: Float[Tensor, "b n heads dim"],
    key: Float[Tensor, "b m kv_heads dim"],
    value: Float[Tensor, "b m kv_heads dv"],
    centroids: Float[Tensor, "heads clusters dim"],
    routing: Routing,
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b n heads dv"]:
    """Attention of tokens to those of their own cluster, averaged over the clusters that a token is in.

        means = kmeans_init(key, num_clusters=32).means              # [H, 32, D]
        routing_attention(query, key, value, means, Routing(256))    # N * (32 + 256) products, not N * N

    Tokens are compared with centroids by direction: queries and keys are brought to length one for that (and
    only for that). Query head h has centroids of its own and the key head `h // (heads // kv_heads)`. Masked
    tokens are in no cluster, whatever they hold; `query_mask` is `key_mask` where it is not given and there
    are as many queries as keys. A query in no cluster gets 0 (`unrouted_fraction`). Centroids receive no
    gradient: `ema_update` moves them. Equal distances are settled by position, the earlier token first.
    """
    query_mask, key_mask = checked(query, key, value, centroids, routing, query_mask, key_mask)
    factor = scale_or_default(scale, query.shape[-1])
    if not query.shape[1] or not key.shape[1]:
        return value.new_zeros(*query.shape[:-1], value.shape[-1])

    def ask_tiled() -> Verdict:
        return Verdict(None if routing.selection == "causal" else no_transform())

    def ask_native() -> Verdict:
        return Verdict(native.supports(query, value, routing, factor))

    name = choose(OP, backend, {"native": ask_native, "tiled": ask_tiled, "reference": Verdict})

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query_mask is not None:
            query = query.masked_fill(~query_mask[..., None, None], 0)
        if key_mask is not None:  # NaN in a masked key must not reach a product
            key, value = (x.masked_fill(~key_mask[..., None, None], 0) for x in (key, value))
        chosen = members(query, key, centroids, routing, query_mask, key_mask)
        if name == "reference":
            return reference.attend(query, key, value, chosen, routing, factor)
        if name == "native":
            return native.attend(query, key, value, chosen, routing, factor)
        all_there = query_mask is None and key_mask is None
        return tiled.attend(query, key, value, chosen, routing, factor, all_there=all_there)

    return under_autocast(attend, query, key, value)


@torch.no_grad()
def unrouted_fraction(
    query: Float[Tensor, "b n heads dim"],
    key: Float[Tensor, "b m kv_heads dim"],
    centroids: Float[Tensor, "heads clusters dim"],
    routing: Routing,
    *,
    query_mask: Bool[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b heads"]:
    """The share of queries that no cluster took, which get 0: it rises when clusters collapse."""
    query_mask, key_mask = checked(query, key, key, centroids, routing, query_mask, key_mask)
    taken = members(query, key, centroids, routing, query_mask, key_mask).query.any(2)  # [B, H, N]
    if query_mask is None:
        return 1 - taken.float().mean(-1)
    there = query_mask.sum(-1).clamp(min=1)[:, None]
    return (query_mask[:, None] & ~taken).sum(-1) / there


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    routing: Routing,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of queries and keys, once all shapes, dtypes and devices fit."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is a {type(routing).__name__}. Give a Routing, such as Routing(256).")
    check_heads(query, key, value, rank=(4,), layout=LAYOUT)
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys = key.shape[1]
    count: int | str = "clusters"
    if isinstance(centroids, Tensor) and centroids.dim() == 3:
        count = centroids.shape[1]
    check("centroids", centroids, (num_heads, count, head_dim), query)
    if count == 0:
        raise ValueError(f"centroids has shape {list(centroids.shape)}. Give at least one to each head.")
    if query_mask is not None:
        check("query_mask", query_mask, (batch, num_queries), query, torch.bool)
    if key_mask is not None:
        check("key_mask", key_mask, (batch, num_keys), query, torch.bool)
    if num_queries != num_keys:
        if routing.is_causal or not routing.sees_self:
            raise ValueError(
                f"{num_queries} queries for {num_keys} keys. Causal routing and sees_self=False need "
                "the same tokens as both; decode with routing_attention_decode."
            )
    elif query_mask is None:
        query_mask = key_mask
    return query_mask, key_mask
