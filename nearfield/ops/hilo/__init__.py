"""HiLo attention: some heads look closely at small windows, the others at everything, coarsely."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearfield.core.dims import per_dim
from nearfield.ops.checks import check_heads
from nearfield.ops.dense import dense_attention
from nearfield.ops.window import window_attention

__all__ = ["average_pool", "hilo_attention"]

LAYOUT = "[batch, one to three grid sides, heads, head_dim]"


def hilo_attention(
    high_query: Float[Tensor, "b *grid high dim"] | None,
    high_key: Float[Tensor, "b *grid high dim"] | None,
    high_value: Float[Tensor, "b *grid high dv"] | None,
    low_query: Float[Tensor, "b *grid low dim"] | None,
    low_key: Float[Tensor, "b *pooled low dim"] | None,
    low_value: Float[Tensor, "b *pooled low dv"] | None,
    *,
    window_size: int | tuple[int, ...],
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b *grid heads dv"]:
    """The high heads, each token seeing its own window, then the low heads, each seeing one key per window.

        pooled = average_pool(x, 2)  # [B, 28, 28, C] of [B, 56, 56, C]; low keys and values are made from it
        hilo_attention(hq, hk, hv, lq, lk, lv, window_size=2)  # [B, 56, 56, high + low heads, D]

    Either group may be None, all three of it. For N tokens and windows of w tokens the multiplications are
    `2 N w` for each channel of the high heads and `2 N N / w` for each of the low ones. "auto" picks a
    backend for each group; one asked for by name runs both.
    """
    high = _group("high", high_query, high_key, high_value)
    low = _group("low", low_query, low_key, low_value)
    if high is None and low is None:
        raise ValueError("Both groups of heads are None. Give the query, key and value of at least one.")
    if low is not None:
        _check_low(low, window_size)
        if high is not None:
            _check_both(high, low)
    out = []
    if high is not None:
        out.append(window_attention(*high, window_size=window_size, scale=scale, backend=backend))
    if low is not None:
        query, key, value = (x.flatten(1, -3) for x in low)
        found = dense_attention(query, key, value, scale=scale, backend=backend)
        out.append(found.unflatten(1, low[0].shape[1:-2]))
    return out[0] if len(out) == 1 else torch.cat(out, -2)


def average_pool(
    x: Float[Tensor, "b *grid dim"], window_size: int | tuple[int, ...], *, partial: bool = False
) -> Float[Tensor, "b *pooled dim"]:
    """The mean of each window of the grid, `[B, 28, 28, C]` of `[B, 56, 56, C]` with `window_size=2`.

    With `partial` the last windows of an axis may be cut off by its end: their mean is that of the tokens
    they hold.
    """
    if x.dim() not in (3, 4, 5):
        raise ValueError(
            f"x has shape {list(x.shape)}. It must be [batch, one to three grid sides, channels]; "
            "flatten heads into the channels."
        )
    grid = tuple(x.shape[1:-1])
    sizes, counts = _windows(grid, window_size)
    missing = [n * size - side for n, size, side in zip(counts, sizes, grid, strict=True)]
    if any(missing) and not partial:
        padded = tuple(n * size for n, size in zip(counts, sizes, strict=True))
        raise ValueError(
            f"window_size={sizes} does not divide the grid {grid}. Pad the tokens to {padded}, or give "
            "partial=True, which averages over the tokens that are there."
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    total = F.pad(x, [0, 0, *(n for gap in reversed(missing) for n in (0, gap))]) if any(missing) else x
    for axis, (n, size) in enumerate(zip(counts, sizes, strict=True)):
        # one axis at a time: torch sums several at once ten times as slowly
        total = total.unflatten(1 + axis, (n, size)).sum(2 + axis, dtype=wide)
    if not any(missing):
        return (total / prod(sizes)).to(x.dtype)
    for axis, (n, size) in enumerate(zip(counts, sizes, strict=True)):
        start = torch.arange(n, device=x.device) * size
        held = (grid[axis] - start).clamp(max=size)
        total = total / held.reshape(n, *(1,) * (len(grid) - axis))
    return total.to(x.dtype)


def _group(name: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    query, key, value = tensors
    if query is None and key is None and value is None:
        return None
    if query is None or key is None or value is None:
        raise ValueError(
            f"{name}_query, {name}_key and {name}_value belong together. Give all three or none of them."
        )
    return query, key, value


def _windows(
    grid: tuple[int, ...], window_size: int | tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sides of a window, and how many it takes to cover each axis."""
    sizes = per_dim("window_size", window_size, len(grid))
    if any(size < 1 for size in sizes):
        raise ValueError(f"window_size={window_size} must hold whole numbers of at least 1.")
    return sizes, tuple(-(-side // size) for side, size in zip(grid, sizes, strict=True))


def _check_low(low: tuple[Tensor, Tensor, Tensor], window_size: int | tuple[int, ...]) -> None:
    query, key, value = low
    check_heads(query, key, value, rank=(4, 5, 6), layout=LAYOUT)
    grid, given = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    sizes, wanted = _windows(grid, window_size)
    if given != wanted:
        raise ValueError(
            f"The grid of low_key is {given}, of low_query {grid}. With window_size={sizes} give keys and "
            f"values on a grid of {wanted}, such as those made from average_pool(x, window_size)."
        )


def _check_both(high: tuple[Tensor, Tensor, Tensor], low: tuple[Tensor, Tensor, Tensor]) -> None:
    """Refuse groups whose outputs cannot stand side by side."""
    (query, _, value), (low_query, _, low_value) = high, low
    ours, theirs = (
        (*q.shape[:-2], v.shape[-1], q.dtype, q.device) for q, v in ((query, value), (low_query, low_value))
    )
    if ours != theirs:
        raise ValueError(
            f"The high heads give [batch, *grid, channels] {list(ours[:-2])} in {ours[-2]} on {ours[-1]}, "
            f"the low heads {list(theirs[:-2])} in {theirs[-2]} on {theirs[-1]}. These must agree."
        )
