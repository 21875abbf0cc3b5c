"""Local linear attention in plain torch, a chunk of queries at a time: memory linear in the number of tokens.

With softmax weights p, their means m_k of the keys and m_v of the values, and the correction r:

    out = sum_j p_j (1 - c_j) v_j        c_j = r . (k_j - m_k)        (C + ridge) r = m_k - q

The backward recomputes p and solves once more. With g the gradient of the output and A_j = g . (v_j - m_v):

    (C + ridge) t = -sum_j p_j A_j k_j   E_j = A_j + t . (k_j - m_k)
    d score_j = p_j (E_j (1 - c_j) - mean)     d q = ... - t       d ridge = -t . r
    d k_j = ... + p_j (1 - c_j) t - p_j E_j r                      d v_j = p_j (1 - c_j) g
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearfield.ops.lla import operator
from nearfield.ops.lla.operator import BACKWARD, FORWARD, NUM_TENSORS, Options
from nearfield.ops.lla.solver import Settled, solve
from nearfield.ops.neighborhood.geometry import Bound

ROWS = 64  # queries of a chunk
BUDGET = {"cpu": 1 << 20}  # weights made at once: those of a processor should stay in its cache
LARGE_BUDGET = 1 << 25


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    *,
    ridge: Tensor | None = None,
    correction: Tensor | None = None,
    key_mask: Tensor | None = None,
    how: Settled,
    detached: bool = False,
    scale: float,
) -> Tensor:
    """Output `[B, N, H, Dv]`; a `ridge` is `[B, N, H]`, masked keys hold finite numbers."""
    given = (query, key, value, ridge, correction, key_mask)
    return _forward(*given, *operator.options(bound, how, detached, scale))[0]


@torch.library.custom_op("nearfield::tiled_local_linear", mutates_args=(), schema=FORWARD)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ridge: Tensor | None,
    correction: Tensor | None,
    key_mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    options = Options(*rest)
    how, kv_heads = options.settled(query), key.shape[2]
    q, k, v = _by_heads(query.to(how.dtype), kv_heads), *(_key_heads(x.to(how.dtype)) for x in (key, value))
    given, ridges = (None if x is None else _by_heads(x.to(how.dtype), kv_heads) for x in (correction, ridge))
    out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
    key_mean, value_mean = torch.empty_like(q), torch.empty_like(out)
    solved = None if ridges is None else torch.empty_like(q)
    for piece in _pieces(q, k, options.bound(query, key), key_mask):
        p, lse[piece.rows] = _weights(piece, q, k, options.scale)
        some, values = piece.keys(k), piece.keys(v)
        mean = p @ some
        if solved is None or ridges is None:
            r = piece.flat(given)
        else:
            r = solve(p, some, mean, mean - piece.flat(q), piece.flat(ridges)[..., None], how, piece.budget)
            solved[piece.rows] = piece.unflat(r)
        key_mean[piece.rows], value_mean[piece.rows] = piece.unflat(mean), piece.unflat(p @ values)
        p *= 1 - _centred(p, r @ some.mT)
        out[piece.rows] = piece.unflat(p @ values)
    nothing = query.new_empty(0)
    return (
        _by_rows(out, kv_heads).to(query.dtype),
        nothing if solved is None else _by_rows(solved, kv_heads),
        *(_by_rows(x, kv_heads) for x in (lse, key_mean, value_mean)),
    )


@torch.library.custom_op("nearfield::tiled_local_linear_backward", mutates_args=(), schema=BACKWARD)
def _backward(
    grad: Tensor, solved: Tensor, lse: Tensor, key_mean: Tensor, value_mean: Tensor, *problem: Any
) -> tuple[Tensor, ...]:
    query, key, value, ridge, correction, key_mask = problem[:NUM_TENSORS]
    options = Options(*problem[NUM_TENSORS:])
    how, kv_heads = options.settled(query), key.shape[2]
    r_all = solved if correction is None else correction
    q, g, r_all = (_by_heads(x.to(how.dtype), kv_heads) for x in (query, grad, r_all))
    k, v = (_key_heads(x.to(how.dtype)) for x in (key, value))
    key_mean, value_mean = (_by_heads(x, kv_heads) for x in (key_mean, value_mean))
    ridges = None if ridge is None else _by_heads(ridge.to(how.dtype), kv_heads)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_ridge = None if ridges is None else torch.empty_like(ridges)
    d_correction = None if correction is None else torch.empty_like(q)
    for piece in _pieces(q, k, options.bound(query, key), key_mask):
        p, _ = _weights(piece, q, k, options.scale)
        some, values = piece.keys(k), piece.keys(v)
        rows, upstream, r = piece.flat(q), piece.flat(g), piece.flat(r_all)
        c = _centred(p, r @ some.mT)
        e = upstream @ values.mT
        e -= (upstream * piece.flat(value_mean)).sum(-1, keepdim=True)
        e = _centred(p, e)
        rhs = -((p * e) @ some)
        if d_correction is not None:
            d_correction[piece.rows] = piece.unflat(rhs)
        if ridges is not None and d_ridge is not None:
            mean = piece.flat(key_mean)
            t = solve(p, some, mean, rhs, piece.flat(ridges)[..., None], how, piece.budget)
            d_ridge[piece.rows] = -piece.unflat((t * r).sum(-1))
            e += _centred(p, t @ some.mT)
        s = p * (1 - c)
        scores = s * e
        if not options.detached:  # the published gradient is exact but for this term
            scores -= scores.sum(-1, keepdim=True) * p
        scores *= options.scale
        p *= e
        dq_rows = scores @ some
        dk_some = scores.mT @ rows - p.mT @ r
        if ridges is not None:
            dq_rows -= t
            dk_some += s.mT @ t
        dq[piece.rows] = piece.unflat(dq_rows)
        piece.add(dk, dk_some)
        piece.add(dv, s.mT @ upstream)
    dk, dv = (x.unflatten(0, (-1, kv_heads)).transpose(1, 2).contiguous() for x in (dk, dv))
    of_rows = (None if x is None else _by_rows(x, kv_heads) for x in (d_ridge, d_correction))
    found = (_by_rows(dq, kv_heads), dk, dv, *of_rows)
    return tuple(
        grad.new_empty(0) if x is None else x.to(like.dtype) for x, like in zip(found, problem, strict=False)
    )


operator.register(_forward, _backward)


class Piece(NamedTuple):
    """Some batches and key heads together, a run of queries, and the keys that these see."""

    heads: slice
    queries: slice
    segments: tuple[slice, ...]
    visible: Tensor | None  # [batches or 1, group * queries, keys]; None where all see all
    budget: int

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        """Where the queries stand in `[X, G, N, ...]`."""
        return self.heads, slice(None), self.queries

    def flat(self, x: Any) -> Tensor:
        """[X, G, N, ...] -> [x, G * n, ...]: all heads of a group as rows of one problem."""
        return x[self.rows].flatten(1, 2)

    def unflat(self, x: Tensor) -> Tensor:
        """The way back."""
        return x.unflatten(1, (-1, self.queries.stop - self.queries.start))

    def keys(self, x: Tensor) -> Tensor:
        """[X, M, D] -> [x, m, D]: a view if the keys are one segment, else a copy."""
        parts = [x[self.heads, segment] for segment in self.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Adds to `[X, M, D]` at the places that `keys` takes."""
        at = 0
        for segment in self.segments:
            count = segment.stop - segment.start
            total[self.heads, segment] += part[:, at : at + count]
            at += count


def _pieces(q: Tensor, k: Tensor, bound: Bound, key_mask: Tensor | None) -> Iterator[Piece]:
    """Every query row once, with the keys from the first to the last that a run of queries sees."""
    problems, group, num_queries, _ = q.shape
    axis, first = bound.axes[0], bound.offset
    budget = BUDGET.get(q.device.type, LARGE_BUDGET)
    kv_heads = problems if key_mask is None else problems // len(key_mask)
    # Which keys are sinks differs from row to row where some are masked: their union is looked at.
    sinks = min(bound.pattern.num_sinks, bound.num_keys)
    if sinks and key_mask is not None:
        places = (key_mask & (key_mask.cumsum(1) <= sinks)).any(0).nonzero()
        sinks = int(places[-1]) + 1 if len(places) else 0
    for row in range(0, num_queries, ROWS):
        queries = slice(row, min(row + ROWS, num_queries))
        start, end = axis.span(first + row, first + queries.stop - 1)
        reach = min(sinks, first + queries.stop) if axis.is_causal else sinks
        segments: tuple[slice, ...] = (slice(start, end),)
        if reach >= start:
            segments = (slice(0 if reach else start, max(reach, end)),)
        elif reach:
            segments = (slice(0, reach), *segments)
        at = torch.cat([torch.arange(s.start, s.stop, device=q.device) for s in segments])
        visible = _visible(bound, queries, at, key_mask)
        by_batch = None if visible is None else visible.repeat(1, group, 1)
        together = max(1, budget // (group * (queries.stop - row) * len(at)))
        for low in range(0, problems, together):
            heads = slice(low, min(low + together, problems))
            seen = by_batch
            if by_batch is not None and len(by_batch) > 1:
                seen = by_batch[torch.arange(heads.start, heads.stop, device=q.device) // kv_heads]
            yield Piece(heads, queries, segments, seen, budget)


def _visible(bound: Bound, queries: slice, at: Tensor, key_mask: Tensor | None) -> Tensor | None:
    """[B or 1, queries, keys] for the keys `at`."""
    axis = bound.axes[0]
    i = torch.arange(queries.start, queries.stop, device=at.device)[:, None] + bound.offset
    start, end = axis.interval(i)
    seen = ((start <= at) & (at < end))[None]
    if bound.pattern.num_sinks:
        sink = (at < bound.pattern.num_sinks)[None, None]
        if key_mask is not None:
            sink = (key_mask.cumsum(1) <= bound.pattern.num_sinks)[:, None, at]
        seen = seen | (sink & (at <= i) if axis.is_causal else sink)
    if key_mask is not None:
        seen = seen & key_mask[:, None, at]
    return None if seen.all() else seen


def _weights(piece: Piece, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax weights `[x, G * n, m]` and log-sum-exp `[x, G, n]`.

    The backward does not start from the log-sum-exp: rounded, it would make the weights sum to less than one,
    and keys that share a large mean would then seem to vary.
    """
    scores = piece.flat(q) @ piece.keys(k).mT
    scores *= scale
    if piece.visible is not None:
        scores.masked_fill_(~piece.visible, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    scores -= top.masked_fill(top == -torch.inf, 0)
    weights = scores.exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + top).masked_fill(total == 0, -torch.inf)
    weights /= total.masked_fill_(total == 0, 1)
    return weights, piece.unflat(lse.squeeze(-1))


def _centred(p: Tensor, x: Tensor) -> Tensor:
    """x less its mean under the weights: what cancels in exact arithmetic then cancels in ours as well."""
    x -= (p * x).sum(-1, keepdim=True)
    return x


def _by_heads(x: Tensor, kv_heads: int) -> Tensor:
    """[B, N, H, ...] -> [B * Hkv, G, N, ...]."""
    return x.unflatten(2, (kv_heads, -1)).movedim(1, 3).flatten(0, 1)


def _by_rows(x: Tensor, kv_heads: int) -> Tensor:
    """The way back."""
    return x.unflatten(0, (-1, kv_heads)).movedim(3, 1).flatten(2, 3).contiguous()


def _key_heads(x: Tensor) -> Tensor:
    """[B, M, Hkv, D] -> [B * Hkv, M, D]."""
    return x.transpose(1, 2).flatten(0, 1)
