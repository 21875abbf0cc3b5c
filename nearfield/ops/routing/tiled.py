"""Routing attention on the tokens of each cluster gathered side by side: pure torch, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.ops.routing.geometry import Routing
from nearfield.ops.routing.members import Members, chains, positions
from nearfield.ops.routing.slots import add_up, rows, slots, take


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    members: Members,
    routing: Routing,
    scale: float,
    *,
    all_there: bool,
) -> Tensor:
    """Output `[B, N, H, Dv]` of checked arguments; `all_there`: no token is masked."""
    group = query.shape[2] // key.shape[2]
    q = query.transpose(1, 2)  # [B, H, N, D]
    k, v = (x.transpose(1, 2) for x in (key, value))
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    if routing.selection == "causal":
        out = _in_chains(q, k, v, members.query, routing, scale)
    else:
        out = _in_clusters(q, k, v, members, routing, scale, all_there=all_there)
    return out.transpose(1, 2).to(value.dtype)


def _in_chains(q: Tensor, k: Tensor, v: Tensor, inside: Tensor, routing: Routing, scale: float) -> Tensor:
    """Each token is in one cluster and sees its last members: a band along the tokens sorted by cluster."""
    num_tokens, num_clusters = q.shape[2], inside.shape[2]
    window = routing.window_size
    if window > num_tokens:  # a branch: in a trace min() would make a symbol that nothing divides
        window = num_tokens
    count = (num_tokens + window - 1) // window
    cluster, order = chains(inside)
    label = cluster.gather(-1, order)
    reach = window if num_tokens > window else 0  # keys of the block before that a block sees

    def blocks(x: Tensor) -> Tensor:
        """[B, H, blocks, window, ...]"""
        return F.pad(x, (0, 0, 0, count * window - num_tokens)).unflatten(2, (count, window))

    def with_those_before(x: Tensor) -> Tensor:
        x = blocks(x)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], 3) if reach else x

    i = torch.arange(window, device=q.device)[:, None] + reach
    j = torch.arange(window + reach, device=q.device)
    mine = blocks(label[..., None] + 1)  # 0 for what fills up the last block, and the one before the first
    theirs = with_those_before(label[..., None] + 1)
    seen = (mine == theirs.transpose(-1, -2)) & (j <= i) & (i - j < window)
    if not routing.sees_self:
        others = seen & (i != j)
        seen = torch.where(others.any(-1, keepdim=True), others, seen)

    q, k, v = (rows(x, order) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        blocks(q).flatten(0, 1),
        with_those_before(k).flatten(0, 1),
        with_those_before(v).flatten(0, 1),
        attn_mask=seen.flatten(0, 1),
        scale=scale,
    )
    out = out.flatten(1, 2).unflatten(0, q.shape[:2])  # [B, H, blocks * window, Dv]
    return rows(out, order.argsort(dim=-1)).masked_fill((cluster == num_clusters)[..., None], 0)


def _in_clusters(
    q: Tensor, k: Tensor, v: Tensor, members: Members, routing: Routing, scale: float, *, all_there: bool
) -> Tensor:
    """Each cluster has a fixed number of slots; a token may stand in several, of different clusters."""
    num_queries, num_keys, num_clusters = q.shape[2], k.shape[2], members.query.shape[2]
    token = positions(members.query, min(routing.window_size, num_queries))  # [B, H, C, W]
    other = positions(members.key, min(routing.window_size, num_keys))
    at = slots(token.flatten(2), num_queries, num_clusters)
    keys_at = slots(other.flatten(2), num_keys, num_clusters)

    def by_cluster(x: Tensor) -> Tensor:
        return x.unflatten(2, (num_clusters, -1)).flatten(0, 1)

    seen = unseeing = None
    if not all_there or routing.is_causal or not routing.sees_self:
        i, j = token[..., :, None], other[..., None, :]
        seen = (i < num_queries) & (j < num_keys)
        if routing.is_causal:
            seen = seen & (j <= i)
        if not routing.sees_self:
            others = seen & (i != j)
            seen = torch.where(others.any(-1, keepdim=True), others, seen)
        unseeing = ~seen.any(-1, keepdim=True)  # [B, H, C, W, 1]
        seen = (seen | unseeing).flatten(0, 1)  # not every kernel of torch gives 0 where nothing is seen

    out = F.scaled_dot_product_attention(
        by_cluster(take(q, at)),
        by_cluster(take(k, keys_at)),
        by_cluster(take(v, keys_at)),
        attn_mask=seen,
        scale=scale,
    ).unflatten(0, q.shape[:2])  # [B, H, C, W, Dv]
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    if unseeing is None:
        count = at.counts[..., None].to(out.dtype)
    else:
        out = out.masked_fill(unseeing, 0)
        count = add_up((~unseeing).to(out.dtype).flatten(2, 3), at)
    return add_up(out.flatten(2, 3), at) / (count.masked_fill(count == 0, 1) + routing.smoothing)
