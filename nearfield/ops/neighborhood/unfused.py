"""Neighborhood attention in two halves, for models that do something to the weights in between.

`scores` and `weigh` hold a number for each visible pair, `prod(kernel_size)` a query, where the fused
operator holds none: use `neighborhood_attention` wherever nothing comes between. Each walks over the places
of the window, so that no copy of the keys is made, and derivatives of any order exist: the two and the
scattering of weighted queries are one another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearfield.ops.neighborhood.geometry import Bound, Neighborhood
from nearfield.ops.neighborhood.operator import bind


def scores(
    query: Float[Tensor, "b *grid heads dim"],
    key: Float[Tensor, "b *grid heads dim"],
    geometry: Neighborhood,
    *,
    bias: Float[Tensor, "heads *offsets"] | None = None,
) -> Float[Tensor, "b *grid heads keys"]:
    """Products of each query with the keys of its window, first axis slowest; -inf where there is no key.

    Not scaled. `bias[h, key - query + kernel_size - 1, ...]` is added, as in `neighborhood_attention`.
    """
    _require_fitting(query, key, "key")
    grid = tuple(query.shape[1:-2])
    bound = bind(geometry, grid)
    index, visible, offsets = _windows(bound, query.device)
    found = _Scores.apply(query.flatten(1, -3), key.flatten(1, -3), index)  # [B, N, H, K]
    if bias is not None:
        shape = (query.shape[-2], *(2 * axis.kernel_size - 1 for axis in bound.axes))
        if bias.shape != shape:
            raise ValueError(f"bias has shape {list(bias.shape)}. It must be {list(shape)}.")
        found = found + bias.flatten(1)[:, offsets].transpose(0, 1)
    if visible is not None:
        found = found.masked_fill(~visible[:, None], -torch.inf)
    return found.unflatten(1, grid)


def weigh(
    weights: Float[Tensor, "b *grid heads keys"],
    value: Float[Tensor, "b *grid heads dim"],
    geometry: Neighborhood,
) -> Float[Tensor, "b *grid heads dim"]:
    """The sum of the values of each window, with weights in the order of `scores`."""
    _require_fitting(weights, value, "value")
    grid = tuple(value.shape[1:-2])
    index, visible, _ = _windows(bind(geometry, grid), value.device)
    if weights.shape[-1] != index.shape[1]:
        raise ValueError(
            f"weights have {weights.shape[-1]} entries a query. A window has {index.shape[1]} keys."
        )
    flat = weights.flatten(1, -3)
    if visible is not None:
        flat = flat.masked_fill(~visible[:, None], 0)
    return _Weigh.apply(flat, value.flatten(1, -3), index).unflatten(1, grid)


def _require_fitting(ours: Tensor, other: Tensor, name: str) -> None:
    if ours.dim() not in (4, 5, 6) or ours.shape[:-1] != other.shape[:-1]:
        raise ValueError(
            f"Given {list(ours.shape)} and a {name} of {list(other.shape)}. "
            "Both must be [batch, one to three grid sides, heads, ...] and agree in all but the last."
        )


def _windows(bound: Bound, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """`_list_windows`, kept where nothing is traced."""
    return _list_windows(bound, device) if torch.compiler.is_compiling() else _kept_windows(bound, device)


def _list_windows(bound: Bound, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """For each query and place of its window: the key's token, if it is seen (None: all are), its bias."""
    tokens = torch.zeros(1, 1, dtype=torch.long)
    visible = torch.ones(1, 1, dtype=torch.bool)
    offsets = torch.zeros(1, 1, dtype=torch.long)
    for axis in bound.axes:
        token = torch.arange(axis.size)
        group, position = token % axis.dilation, token // axis.dilation
        start, end = axis.interval(position, group)
        at = start.clamp(min=0)[:, None] + torch.arange(axis.kernel_size)  # [size, kernel_size]
        length = axis.group_size(group)[:, None]
        seen = (at < end[:, None]) & (at < length)
        entry = (at - position[:, None] + axis.kernel_size - 1).clamp(0, 2 * axis.kernel_size - 2)
        at = group[:, None] + at.minimum(length - 1) * axis.dilation
        pair = (tokens[:, None, :, None] * axis.size, at[None, :, None])
        tokens = (pair[0] + pair[1]).flatten(2).flatten(0, 1)
        visible = (visible[:, None, :, None] & seen[None, :, None]).flatten(2).flatten(0, 1)
        offsets = offsets[:, None, :, None] * (2 * axis.kernel_size - 1) + entry[None, :, None]
        offsets = offsets.flatten(2).flatten(0, 1)
    has_gaps = any(axis.is_causal or axis.border != "shift" for axis in bound.axes)
    return tokens.to(device), visible.to(device) if has_gaps else None, offsets.to(device)


_kept_windows = lru_cache(maxsize=64)(_list_windows)


def _places(index: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each place of the windows: its tokens, and what `others`, [B, N, H, K], hold there as [B, N, H, 1]."""
    for place in range(index.shape[1]):
        yield index[:, place], *(x[..., place, None] for x in others)


class _Scores(torch.autograd.Function):
    """[B, N, H, D] of queries and keys to [B, N, H, K]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, index)
        return torch.stack([(query * key[:, at]).sum(-1) for (at,) in _places(index)], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key, index = ctx.saved_tensors
        return _Weigh.apply(grad, key, index), _Scatter.apply(grad, query, index), None


class _Weigh(torch.autograd.Function):
    """[B, N, H, K] of weights and [B, N, H, D] of values to [B, N, H, D]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weights, value, index)
        out = torch.zeros_like(value)
        for at, weight in _places(index, weights):
            out.addcmul_(weight.to(out.dtype), value[:, at])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, value, index = ctx.saved_tensors
        return _Scores.apply(grad, value, index), _Scatter.apply(weights, grad, index), None


class _Scatter(torch.autograd.Function):
    """What queries [B, N, H, D] give their windows' tokens by weights [B, N, H, K]: [B, N, H, D]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, query: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weights, query, index)
        out = torch.zeros_like(query)
        for at, weight in _places(index, weights):
            out.index_add_(1, at, weight.to(out.dtype) * query)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, query, index = ctx.saved_tensors
        return _Scores.apply(query, grad, index), _Weigh.apply(weights, grad, index), None
