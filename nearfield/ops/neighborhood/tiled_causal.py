"""The sliding causal window over a text, the pattern that language models convert to.

The first `window + sinks` rows see all that is before them: plain causal attention. From there on runs of
SPAN queries share all keys of their windows but the two ragged ends, so the middle needs no mask and no copy
(a strided view), and the ends, with the sinks, are gathered for STEP queries at a time. Where the window is
too short for a middle, tiles of STEP queries under one mask do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from nearfield.ops.neighborhood.geometry import Bound
from nearfield.ops.neighborhood.tiled_blocks import (
    Upstream,
    block_backward,
    block_forward,
    merge_,
    sum_dtype,
)

SPAN = 256
STEP = 64
LONG = 2 * SPAN  # windows from here on have a middle worth a piece of its own
CHUNK_BYTES = 1 << 21  # query rows that are worked on together


@dataclass(frozen=True)
class Piece:
    """Equal tiles of queries, each with its keys; from tile to tile everything is a `step` further on."""

    tiles: int
    row: int  # first query of the first tile, as a token
    step: int
    rows: int
    segments: tuple[tuple[int, int, int], ...]  # (first key of the first tile, step, keys)
    is_first: bool  # no earlier piece has these rows
    is_causal: bool = False
    window: int | None = None  # None: no mask, each row sees all keys of its tile
    num_sinks: int = 0  # keys at the beginning of the segments that are sinks


def fits(bound: Bound, bias: Tensor | None, key_mask: Tensor | None) -> bool:
    """Whether this is a sliding causal window without a bias or padding."""
    axis = bound.axes[0]
    plain = axis.is_causal and axis.stride == 1 and axis.dilation == 1 and axis.border != "pad"
    return len(bound.axes) == 1 and plain and bias is None and key_mask is None


def causal_forward(
    query: Tensor, key: Tensor, value: Tensor, bound: Bound, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fills `out` and `lse` with the attention of every query on its window and the sinks."""
    num_kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    for b, piece in product(range(len(query)), _pieces(bound, query)):
        q = _fold(query, b, piece, bound, num_kv_heads)
        k, v = (_keys(x[b], piece, group) for x in (key, value))
        o, statistics = block_forward(q, k, v, _mask(piece, group, q), scale, piece.is_causal)
        o, statistics = _unfold(piece, o, group), _unfold(piece, statistics.unsqueeze(-1), group).squeeze(-1)
        target = _rows(out[b], piece, bound, num_kv_heads)
        target_lse = _rows(lse[b].unsqueeze(-1), piece, bound, num_kv_heads).squeeze(-1)
        if piece.is_first:
            target.copy_(o)
            target_lse.copy_(statistics)
        else:
            merge_(target, target_lse, o, statistics)


def causal_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    up: Upstream,
    bound: Bound,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Adds to the gradients of query, key and value."""
    num_kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    for b, piece in product(range(len(query)), _pieces(bound, query)):
        of_rows = up.each(_fold, b, piece, bound, num_kv_heads)
        q = _fold(query, b, piece, bound, num_kv_heads)
        k, v = (_keys(x[b], piece, group) for x in (key, value))
        found = block_backward(q, k, v, of_rows, _mask(piece, group, q), scale, piece.is_causal)
        _rows(grads[0][b], piece, bound, num_kv_heads).add_(_unfold(piece, found.query, group))
        for total, part in zip(grads[1:], (found.key, found.value), strict=True):
            _add_keys(total[b], piece, part.sum(1).unsqueeze(0) if piece.is_causal else part)


def _pieces(bound: Bound, query: Tensor) -> Iterator[Piece]:
    """Every query row once as first, with pieces that together show it its keys, each once."""
    window, length, first = bound.axes[0].kernel_size, bound.num_keys, bound.offset
    sinks = min(bound.pattern.num_sinks, length)
    whole = min(length, window + sinks)  # rows before this one see everything up to themselves
    for row in range(first, whole, SPAN if first else whole):
        rows = min(SPAN, whole - row) if first else whole
        if row:
            yield Piece(1, row, 0, rows, ((0, 0, row),), True)
        yield Piece(1, row, 0, rows, ((row, 0, rows),), not row, is_causal=True)
    at_once = max(SPAN, CHUNK_BYTES // (query.shape[2] * query.shape[3] * query.element_size()))
    row = max(first, whole)
    while row < length:
        left = min(length - row, at_once)
        if window >= LONG:
            span = min(SPAN, left)
            yield from _spans(row, left // span, span, window, sinks)
            row += left // span * span
        else:
            rows = min(STEP, left)
            around = (row - window + 1, rows, window + rows - 1)
            segments = ((0, 0, sinks), around) if sinks else (around,)
            yield Piece(left // rows, row, rows, rows, segments, True, window=window, num_sinks=sinks)
            row += left // rows * rows


def _spans(row: int, spans: int, span: int, window: int, sinks: int) -> Iterator[Piece]:
    yield Piece(spans, row, span, span, ((row + span - window, span, window - span),), True)
    for at in range(0, span, STEP):
        rows = min(STEP, span - at)
        ends = ((row + at - window + 1, span, span - at - 1), (row, span, at + rows))
        segments = ((0, 0, sinks), *ends) if sinks else ends
        yield Piece(spans, row + at, span, rows, segments, False, window=window, num_sinks=sinks)


def _rows(tensor: Tensor, piece: Piece, bound: Bound, num_kv_heads: int) -> Tensor:
    """[M, H, X] -> a view [tiles, rows, Hkv, heads of a group, X]."""
    row, head, entry = tensor.stride()
    size = (piece.tiles, piece.rows, num_kv_heads, tensor.shape[1] // num_kv_heads, tensor.shape[2])
    strides = (piece.step * row, row, size[3] * head, head, entry)
    return tensor.as_strided(size, strides, tensor.storage_offset() + (piece.row - bound.offset) * row)


def _keys(tensor: Tensor, piece: Piece, group: int) -> Tensor:
    """[N, Hkv, D] -> [tiles, Hkv, keys, D]: a view if the keys are one segment, else a copy."""
    parts = [_segment(tensor, piece, segment) for segment in piece.segments]
    keys = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)
    return keys[0].unsqueeze(1).expand(-1, group, -1, -1) if piece.is_causal else keys


def _segment(tensor: Tensor, piece: Piece, segment: tuple[int, int, int]) -> Tensor:
    first, step, keys = segment
    row, head, entry = tensor.stride()
    size = (piece.tiles, keys, *tensor.shape[1:])
    return tensor.as_strided(size, (step * row, row, head, entry), tensor.storage_offset() + first * row)


def _add_keys(total: Tensor, piece: Piece, part: Tensor) -> None:
    """Adds [tiles, Hkv, keys, D] to the places in [N, Hkv, D] that `_keys` took them from."""
    at = 0
    for first, step, keys in piece.segments:
        some = part[:, :, at : at + keys].transpose(1, 2)
        at += keys
        if step == 0:
            total[first : first + keys] += some.sum(0)
            continue
        for tile in range(piece.tiles):
            total[first + tile * step : first + tile * step + keys] += some[tile]


def _fold(tensor: Tensor, b: int, piece: Piece, bound: Bound, num_kv_heads: int) -> Tensor:
    """Rows for the kernel: the heads of a group stacked, or side by side if the piece is causal."""
    rows = _rows(tensor[b], piece, bound, num_kv_heads)
    return rows[0].permute(1, 2, 0, 3) if piece.is_causal else rows.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(piece: Piece, rows: Tensor, group: int) -> Tensor:
    """The inverse for rows: [tiles, rows, Hkv, heads of a group, X]."""
    if piece.is_causal:
        return rows.permute(2, 0, 1, 3).unsqueeze(0)
    return rows.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4)


def _mask(piece: Piece, group: int, like: Tensor) -> Tensor | None:
    if piece.window is None:
        return None
    segments = tuple((first - piece.row, keys) for first, _, keys in piece.segments[bool(piece.num_sinks) :])
    make = (
        _window_mask if piece.rows * sum(keys for _, keys in segments) < 1 << 17 else _window_mask.__wrapped__
    )
    return make(
        piece.rows, segments, piece.window, piece.num_sinks, group, sum_dtype(like.dtype), like.device
    )


@lru_cache(maxsize=64)
def _window_mask(
    rows: int,
    segments: tuple[tuple[int, int], ...],
    window: int,
    num_sinks: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Additive [group * rows, keys]; segments are (first key relative to the first row, keys)."""
    key = torch.cat([torch.arange(first, first + keys, device=device) for first, keys in segments])
    row = torch.arange(rows, device=device)[:, None]
    seen = (key <= row) & (key > row - window)
    seen = torch.cat([seen.new_ones(rows, num_sinks), seen], 1)
    return (
        torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf).repeat(group, 1)
    )
