"""Routing attention by its definition: a dense attention for each cluster, averaged over the clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from nearfield.ops.dense.reference import softmax
from nearfield.ops.routing.geometry import Routing
from nearfield.ops.routing.members import Members


def attend(
    query: Tensor, key: Tensor, value: Tensor, members: Members, routing: Routing, scale: float
) -> Tensor:
    """Output `[B, N, H, Dv]` of checked arguments."""
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[2] // key.shape[2]
    q = query.transpose(1, 2).to(wide)  # [B, H, N, D]
    k, v = (x.transpose(1, 2).to(wide).repeat_interleave(group, 1) for x in (key, value))
    scores = q @ k.transpose(-1, -2) * scale

    total = v.new_zeros(*q.shape[:-1], v.shape[-1])
    count = q.new_zeros(q.shape[:-1])
    for cluster in range(members.query.shape[2]):
        seen = visible(members.query[:, :, cluster], members.key[:, :, cluster], routing)
        total = total + softmax(scores, seen) @ v
        count = count + seen.any(-1)
    divisor = count.masked_fill(count == 0, 1) + routing.smoothing
    return (total / divisor[..., None]).transpose(1, 2).to(value.dtype)


def visible(query: Tensor, key: Tensor, routing: Routing) -> Tensor:
    """Which keys a query sees inside one cluster `[B, H, N, M]`, from who is in it."""
    i = torch.arange(query.shape[-1], device=query.device)[:, None]
    j = torch.arange(key.shape[-1], device=query.device)
    seen = query[..., :, None] & key[..., None, :]
    if routing.is_causal:
        seen = seen & (j <= i)
    if routing.selection == "causal":
        rank = key.cumsum(-1)  # in the order of time
        seen = seen & (rank[..., :, None] - rank[..., None, :] < routing.window_size)
    if not routing.sees_self:
        others = seen & (i != j)
        seen = torch.where(others.any(-1, keepdim=True), others, seen)
    return seen
