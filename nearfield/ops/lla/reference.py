"""Local linear attention by its definition: all weights, all covariances, one direct solve. Never optimised.

Everything is plain torch: any device, float64, double backward, forward-mode derivatives, vmap, tracing. Keys
that share a mean far larger than their spread cost it digits, which the other backends keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfield.ops.neighborhood.geometry import Bound


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    ridge: Tensor | None = None,
    correction: Tensor | None = None,
    detached: bool = False,
    dtype: torch.dtype,
    scale: float,
) -> Tensor:
    """Output `[B, N, H, Dv]` from `[B, N, H, D]` and who sees whom `[B or 1, N, M]`, computed in `dtype`.

    Each query's `correction` is given `[B, N, H, D]`, or solved for with its `ridge` `[B, N, H]`.
    """
    q, k, v = _by_heads(query, key, value, dtype)
    w, total, log_total = _kernel(q, k, visible, scale)
    p = w / total  # [B, H, N, M]
    if ridge is not None:
        factor = ridge.to(dtype).transpose(1, 2)
        if detached:  # the published code differentiates ridge * total as if total were a constant
            factor = factor * (log_total.detach() - log_total).exp().squeeze(-1)
        mean = p @ k
        products = (k.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)  # [B, H, M, D * D]
        covariance = (p @ products).unflatten(-1, (k.shape[-1], -1)) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        unit = torch.eye(k.shape[-1], dtype=dtype, device=k.device)
        r = torch.linalg.solve_ex(covariance + factor[..., None, None] * unit, mean - q).result
    elif correction is not None:
        r = correction.to(dtype).transpose(1, 2)
    along = r @ k.mT  # [B, H, N, M]
    along = along - (p * along).sum(-1, keepdim=True)
    return ((p * (1 - along)) @ v).transpose(1, 2).to(value.dtype)


def published(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    ridge: Tensor,
    detached: bool = False,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, rho `[B, N, H, D]` and delta `[B, N, H]` as the paper writes them; every query sees a key.

    Equal to `attend` in exact arithmetic; delta nearly vanishes for the first queries and a small ridge.
    """
    q, k, v = _by_heads(query, key, value, torch.promote_types(query.dtype, torch.float32))
    w, total, _ = _kernel(q, k, visible, scale)
    z = k.unsqueeze(2) - q.unsqueeze(3)  # [B, H, N, M, D]
    mu = torch.einsum("bhnm,bhnmd->bhnd", w, z)
    sigma = torch.einsum("bhnm,bhnmd,bhnme->bhnde", w, z, z)
    factor = ridge.to(q.dtype).transpose(1, 2)[..., None] * (total.detach() if detached else total)
    unit = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    rho = torch.linalg.solve(sigma + factor[..., None] * unit, mu)
    delta = total.squeeze(-1) - (mu * rho).sum(-1)
    s = w * (1 - torch.einsum("bhnmd,bhnd->bhnm", z, rho)) / delta[..., None]
    return (s @ v).transpose(1, 2).to(value.dtype), rho.transpose(1, 2), delta.transpose(1, 2)


def visible(bound: Bound, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees `[B or 1, N, M]`; sinks are the first keys of a row that are not masked."""
    i = torch.arange(bound.num_queries, device=device)[:, None] + bound.offset
    j = torch.arange(bound.num_keys, device=device)
    window = torch.ones((), dtype=torch.bool, device=device)
    for axis, query, key in zip(bound.axes, bound.coordinates(i), bound.coordinates(j), strict=True):
        start, end = axis.interval(query // axis.dilation, query % axis.dilation)
        at = key // axis.dilation
        window = window & (query % axis.dilation == key % axis.dilation) & (start <= at) & (at < end)
    if key_mask is None:
        key_mask = torch.ones((1, bound.num_keys), dtype=torch.bool, device=device)
    key_mask = key_mask.flatten(1)
    sink = (key_mask.cumsum(1) <= bound.pattern.num_sinks)[:, None]
    if bound.axes[0].is_causal:
        sink = sink & (j <= i)
    return (window | sink) & key_mask[:, None]


def _by_heads(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[B, N, H, D] each, the keys and values repeated for the heads that share them, as [B, H, N, D]."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, 2) for x in (key, value))
    return [x.to(dtype).transpose(1, 2) for x in (query, key, value)]


def _kernel(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights exp(score - max) `[B, H, N, M]`, their sum `[B, H, N, 1]` (1 if nothing is seen), its log."""
    scores = (query @ key.mT * scale).masked_fill(~visible[:, None], -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    w = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
    total = w.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    return w, total, total.log()
