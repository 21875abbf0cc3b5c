"""Causal routing on the CPU kernels: each cluster is a text of its own under a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor

from nearfield.ops.checks import no_transform
from nearfield.ops.neighborhood import Neighborhood, native
from nearfield.ops.neighborhood.varlen import neighborhood_attention_varlen
from nearfield.ops.routing.geometry import Routing
from nearfield.ops.routing.members import Members, chains
from nearfield.ops.routing.slots import rows


def supports(query: Tensor, value: Tensor, routing: Routing, scale: float) -> str | None:
    """Why the CPU kernels cannot run this, or None."""
    if routing.selection != "causal" or not routing.sees_self:
        return "the CPU kernels route only with selection='causal' and sees_self=True."
    if torch.compiler.is_compiling() or torch._C._functorch.get_interpreter_stack():
        return "how many tokens each cluster has is read back to Python, which a trace or vmap cannot do."
    if not query.numel():
        return "there are no tokens."
    return no_transform() or native.unfit(query, value, scale) or native.missing()


def attend(
    query: Tensor, key: Tensor, value: Tensor, members: Members, routing: Routing, scale: float
) -> Tensor:
    """Output `[B, N, H, Dv]` of checked arguments."""
    inside = members.query
    cluster, order = chains(inside)
    sizes = torch.cat([inside.sum(-1), (cluster == inside.shape[2]).sum(-1, keepdim=True)], -1)
    ends = [0, *sizes.flatten().cumsum(0).tolist()]
    group = query.shape[2] // key.shape[2]
    q, k, v = (
        rows(x.transpose(1, 2).repeat_interleave(times, 1), order).flatten(0, 2)[:, None]  # [B * H * N, 1, D]
        for x, times in ((query, 1), (key, group), (value, group))
    )
    window = Neighborhood(routing.window_size, is_causal=True)
    out = neighborhood_attention_varlen(q, k, v, window, cu_seqlens=ends, scale=scale, backend="native")
    out = rows(out.reshape(*order.shape, -1), order.argsort(dim=-1))
    return out.masked_fill((cluster == inside.shape[2])[..., None], 0).transpose(1, 2)
