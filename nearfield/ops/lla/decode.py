"""Local linear attention of a few new queries against a cache, in splits of the keys that are merged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import check, check_heads, scale_or_default, under_autocast
from nearfield.ops.lla import reference
from nearfield.ops.lla.attention import DEFAULT, ridge_of_rows
from nearfield.ops.lla.solver import Settled, Solver, conjugate_gradients, covariance

OP = "local_linear_attention_decode"
SPLIT = 1024  # keys of a split by default
WIDEST_FACTORED = 128  # channels up to which "auto" factors: the covariance comes with the first pass


class Part(NamedTuple):
    """What one split of the keys, or all of them, knows of each query."""

    lse: Tensor  # [X, R]
    key_mean: Tensor  # [X, R, D]
    value_mean: Tensor  # [X, R, Dv]
    covariance: Tensor | None  # [X, R, D, D]


def local_linear_attention_decode(
    query: Float[Tensor, "b n heads dim"],
    key: Float[Tensor, "b m kv_heads dim"],
    value: Float[Tensor, "b m kv_heads dv"],
    *,
    visible: Bool[Tensor, "#b n m"] | None = None,
    ridge: float | Tensor = 10.0,
    solver: Solver = DEFAULT,
    scale: float | None = None,
    num_splits: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b n heads dv"]:
    """The last rows of a causal `local_linear_attention`, against keys in any order.

    Keys, cached and new ones together, are seen where `visible` says so: the table of `visible_slots` in
    `nearfield.ops.neighborhood`, for a cache of sinks and a rolling window. Without it the keys are whole
    rows and the queries their last tokens. Hidden slots must hold finite numbers. A `Solver` of method
    "auto" takes Cholesky up to 128 channels. `num_splits` parts of the keys are looked at one after the other
    and merged.
    """
    check_heads(query, key, value, rank=(4,), layout="[batch, tokens, heads, head_dim]")
    batch, num_queries, _, head_dim = query.shape
    num_keys = key.shape[1]
    if visible is None:
        if num_queries > num_keys:
            raise ValueError(
                f"{num_queries} queries for {num_keys} keys. The new tokens belong to the keys as well."
            )
        at = torch.arange(num_keys, device=query.device)
        visible = (at <= at[num_keys - num_queries :, None])[None]
    check("visible", visible, (1 if len(visible) == 1 else batch, num_queries, num_keys), query, torch.bool)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits={num_splits} must be at least 1, or None.")
    splits = max(1, min(num_splits or -(-num_keys // SPLIT), num_keys))  # none is empty
    factor = scale_or_default(scale, head_dim)
    how = solver.settle(ridge, query)
    if solver.method == "auto":
        how = how._replace(method="cholesky" if head_dim <= WIDEST_FACTORED else "cg")
    ridges = ridge_of_rows(ridge, query, how.dtype)
    name = choose(OP, backend, {"tiled": Verdict, "reference": Verdict})

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name == "reference":
            return reference.attend(query, key, value, visible, ridge=ridges, dtype=how.dtype, scale=factor)
        return _split(query, key, value, visible, ridges, how, factor, splits)

    return under_autocast(attend, query, key, value)


def merge(parts: list[Part]) -> tuple[Part, Tensor]:
    """All splits as one, and their shares `[splits, X, R, 1]` of its softmax.

    The covariance of the whole is that inside the splits and that between their means.
    """
    each = torch.stack([part.lse for part in parts])
    lse = each.logsumexp(0)
    shares = _softmax(each, 0).unsqueeze(-1)
    means = torch.stack([part.key_mean for part in parts])
    key_mean = (shares * means).sum(0)
    value_mean = (shares * torch.stack([part.value_mean for part in parts])).sum(0)
    total = None
    for share, mean, part in zip(shares, means, parts, strict=True):
        if part.covariance is None:
            continue
        apart = mean - key_mean
        spread = share.unsqueeze(-1) * (part.covariance + apart.unsqueeze(-1) * apart.unsqueeze(-2))
        total = spread if total is None else total + spread
    return Part(lse, key_mean, value_mean, total), shares


def _split(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    ridge: Tensor,
    how: Settled,
    scale: float,
    splits: int,
) -> Tensor:
    kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    q, ridges = (
        x.to(how.dtype).unflatten(2, (kv_heads, group)).movedim(1, 3).flatten(0, 1).flatten(1, 2)
        for x in (query, ridge)
    )  # [B * Hkv, G * N, ...]: all heads of a group read the cache once
    seen = visible.repeat(1, group, 1)
    if len(seen) > 1:
        seen = seen.repeat_interleave(kv_heads, 0)
    keys, values = (
        [x.transpose(1, 2).flatten(0, 1) for x in tensor.to(how.dtype).tensor_split(splits, 1)]
        for tensor in (key, value)
    )
    scores = [
        (q @ k.mT * scale).masked_fill(~s, -torch.inf)
        for k, s in zip(keys, seen.tensor_split(splits, 2), strict=True)
    ]
    factored = how.method == "cholesky"
    weights = [_softmax(x, -1) for x in scores]
    parts = (_part(*some, factored) for some in zip(scores, weights, keys, values, strict=True))
    whole, shares = merge(list(parts))
    weights = [p * share for p, share in zip(weights, shares, strict=True)]
    pairs = list(zip(weights, keys, strict=True))

    def times(x: Tensor) -> Tensor:
        mean = (x * whole.key_mean).sum(-1, keepdim=True)
        along = [w * (x @ k.mT - mean) for w, k in pairs]
        rest = sum(y.sum(-1, keepdim=True) for y in along)  # 0 but for rounding
        return sum(y @ k for y, k in zip(along, keys, strict=True)) - rest * whole.key_mean

    rhs = whole.key_mean - q
    if whole.covariance is not None:
        unit = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        r = torch.linalg.solve_ex(whole.covariance + ridges[..., None, None] * unit, rhs).result
    else:
        r = conjugate_gradients(
            times,
            rhs,
            ridges.unsqueeze(-1),
            how.max_iterations,
            how.tolerance,
            stop_early=not torch.compiler.is_compiling(),
        )
    mean = (r * whole.key_mean).sum(-1, keepdim=True)
    along = [w * (r @ k.mT - mean) for w, k in pairs]
    rest = sum(x.sum(-1, keepdim=True) for x in along)  # 0 but for rounding
    out = whole.value_mean * (1 + rest) - sum(x @ v for x, v in zip(along, values, strict=True))
    out = out.unflatten(1, (group, -1)).unflatten(0, (-1, kv_heads))  # [B, Hkv, G, N, Dv]
    return out.movedim(3, 1).flatten(2, 3).to(value.dtype)


def _part(scores: Tensor, weights: Tensor, key: Tensor, value: Tensor, factored: bool) -> Part:
    mean = weights @ key
    spread = covariance(weights, key, mean) if factored else None
    return Part(scores.logsumexp(-1), mean, weights @ value, spread)


def _softmax(x: Tensor, dim: int) -> Tensor:
    """Shares that sum to one; none where everything is -inf."""
    hidden = x == -torch.inf
    return x.masked_fill(hidden.all(dim, keepdim=True), 0).softmax(dim).masked_fill(hidden, 0)
