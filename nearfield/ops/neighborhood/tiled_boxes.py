"""Attention of tiles of queries on the boxes of keys around them: any pattern, grid and option.

A tile's keys are gathered once; what the box shows too much is masked. The keys that do not lie around the
query (sinks, additional keys) are a second piece, merged by log-sum-exp. Layout here: [B, tokens, heads, D].
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from nearfield.ops.neighborhood.geometry import Bound
from nearfield.ops.neighborhood.tiled_blocks import (
    Upstream,
    block_backward,
    block_forward,
    hidden_rows,
    merge_,
    sum_dtype,
)
from nearfield.ops.neighborhood.tiled_plan import Chunk, chunks, num_slots
from nearfield.ops.neighborhood.tiled_sides import best_sides

CHUNK_BYTES = 1 << 22  # what one chunk of tiles may gather: small enough to stay near the core
WIDE_ROWS = 1024  # queries at a time against sinks and additional keys


def boxes_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fills `out` and `lse` with the attention of every query on its window."""
    for chunk in _chunks_of(query, key, bound, bias, 1):
        q = _gather(query, chunk, key.shape[2])
        k, v = _box(key, chunk), _box(value, chunk)
        mask = _mask(chunk, bias, key_mask, q)
        o, statistics = block_forward(q, k, v, mask, scale)
        if key_mask is not None:
            statistics.masked_fill_(hidden_rows(mask).expand_as(statistics), -torch.inf)
        _put(out, chunk, unfold(o, chunk.tiles, query.shape[2]))
        _put(lse, chunk, unfold(statistics.unsqueeze(-1), chunk.tiles, query.shape[2]).squeeze(-1))


def boxes_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    up: Upstream,
    bound: Bound,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
    table: Tensor | None,
) -> None:
    """Adds to the gradients of query, key and value, and of the flat bias table if there is one."""
    for chunk in _chunks_of(query, key, bound, bias, 3):
        q, of_rows = _gather(query, chunk, key.shape[2]), up.each(_gather, chunk, key.shape[2])
        of_rows = of_rows._replace(
            grad=_real(of_rows.grad, chunk),
            grad_lse=None
            if of_rows.grad_lse is None
            else _real(of_rows.grad_lse.unsqueeze(-1), chunk).squeeze(-1),
        )
        k, v, mask = _box(key, chunk), _box(value, chunk), _mask(chunk, bias, key_mask, q)
        found = block_backward(q, k, v, of_rows, mask, scale, want_scores=table is not None)
        _put(grads[0], chunk, unfold(found.query, chunk.tiles, query.shape[2]))
        for total, part in zip(grads[1:], (found.key, found.value), strict=True):
            part = part.transpose(1, 2).unflatten(0, (-1, chunk.tiles))  # [B, tiles, slots, Hkv, D]
            if chunk.outside is not None:
                part = part.masked_fill(chunk.outside[..., None, None], 0)
            total.index_add_(1, chunk.key, part.flatten(1, 2).to(total.dtype))
        if table is not None and found.scores is not None and chunk.offsets is not None:
            _add_to_table(table, found.scores, chunk.offsets, chunk.tiles)


def far_forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Sinks | None, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Merges into `out` and `lse` keys that all queries see, or, with `sinks`, those that see them."""
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    for low in range(0, query.shape[1], WIDE_ROWS):
        rows = slice(low, low + WIDE_ROWS)
        q = _slice(query, rows, key.shape[2])
        mask = None if sinks is None else sinks.mask(low, q, query.shape[2])
        o, statistics = block_forward(q, keys, values, mask, scale)
        if mask is not None:
            statistics.masked_fill_(hidden_rows(mask).expand_as(statistics), -torch.inf)
        statistics = unfold(statistics.unsqueeze(-1), 1, query.shape[2]).squeeze(-1)
        merge_(out[:, rows], lse[:, rows], unfold(o, 1, query.shape[2]), statistics)


def far_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    up: Upstream,
    sinks: Sinks | None,
    scale: float,
    grad_query: Tensor,
) -> tuple[Tensor, Tensor]:
    """Adds to `grad_query`; returns the gradients of the keys and values, [B, L, Hkv, D]."""
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    total_key, total_value = (torch.zeros_like(x, dtype=sum_dtype(x.dtype)) for x in (key, value))
    for low in range(0, query.shape[1], WIDE_ROWS):
        rows = slice(low, low + WIDE_ROWS)
        q = _slice(query, rows, key.shape[2])
        mask = None if sinks is None else sinks.mask(low, q, query.shape[2])
        of_rows = up.each(_slice, rows, key.shape[2])
        found = block_backward(q, keys, values, of_rows, mask, scale)
        grad_query[:, rows] += unfold(found.query, 1, query.shape[2])
        total_key += found.key.transpose(1, 2)
        total_value += found.value.transpose(1, 2)
    return total_key, total_value


class Sinks:
    """The first unmasked keys of each row that every query may see, apart from those in its window."""

    def __init__(self, bound: Bound, key_mask: Tensor | None, device: torch.device) -> None:
        self.bound = bound
        count = min(bound.pattern.num_sinks, bound.num_keys)
        if key_mask is None:
            self.position = torch.arange(count, device=device)[None]  # [B or 1, sinks]
            self.exists = torch.ones_like(self.position, dtype=torch.bool)
        else:
            first = key_mask & (key_mask.cumsum(1) <= count)
            self.position = torch.sort(first.to(torch.uint8), dim=1, descending=True, stable=True)[1][
                :, :count
            ]
            self.exists = first.gather(1, self.position)

    def gather(self, tensor: Tensor) -> Tensor:
        """[B, N, Hkv, D] -> [B, sinks, Hkv, D]."""
        index = self.position[:, :, None, None].expand(tensor.shape[0], -1, *tensor.shape[2:])
        return tensor.gather(1, index)

    def add_to(self, total: Tensor, part: Tensor) -> None:
        """The transpose of `gather`, summed into `total`."""
        index = self.position[:, :, None, None].expand(total.shape[0], -1, *total.shape[2:])
        total.scatter_add_(1, index, part.to(total.dtype))

    def mask(self, low: int, folded: Tensor, num_heads: int) -> Tensor:
        """Additive mask [B or 1, 1, heads of a group * rows, sinks] for the folded queries from `low` on."""
        group = num_heads // folded.shape[1]
        axis = self.bound.axes[0]
        rows = folded.shape[2] // group
        query = torch.arange(low, low + rows, device=folded.device)[:, None] + self.bound.offset
        key = self.position[:, None]
        start, end = axis.interval(query // axis.dilation, query % axis.dilation)
        at = key // axis.dilation
        near = (query % axis.dilation == key % axis.dilation) & (start <= at) & (at < end)
        seen = self.exists[:, None] & ~near
        if axis.is_causal:
            seen = seen & (key <= query)
        return _additive(seen, folded.dtype)[:, None].repeat(1, 1, group, 1)


def fold(rows: Tensor, tiles: int, num_kv_heads: int) -> Tensor:
    """[B, tiles * rows, H, D] -> [B * tiles, Hkv, heads of a group * rows, D]: they share the keys."""
    batch, _, num_heads, dim = rows.shape
    rows = rows.reshape(batch * tiles, -1, num_kv_heads, num_heads // num_kv_heads, dim)
    return rows.permute(0, 2, 3, 1, 4).flatten(2, 3)


def unfold(rows: Tensor, tiles: int, num_heads: int) -> Tensor:
    """The inverse of `fold`."""
    group = num_heads // rows.shape[1]
    return (
        rows.unflatten(2, (group, -1))
        .permute(0, 3, 1, 2, 4)
        .flatten(2, 3)
        .unflatten(0, (-1, tiles))
        .flatten(1, 2)
    )


def _chunks_of(query: Tensor, key: Tensor, bound: Bound, bias: Tensor | None, passes: int) -> Iterable[Chunk]:
    shape = tuple(side.queries for side in best_sides(bound, query.shape[2] // key.shape[2]))
    rows, slots = prod(shape), num_slots(bound, shape)
    gathered = (
        passes * 2 * (rows * query.shape[2] + slots * key.shape[2]) * query.shape[3] * query.element_size()
    )
    at_once = max(1, CHUNK_BYTES // (gathered * query.shape[0] + 4 * rows * slots))
    return chunks(bound, shape, at_once, bias is not None, query.device)


def _gather(tensor: Tensor, chunk: Chunk, num_kv_heads: int) -> Tensor:
    """The folded rows of a chunk's queries."""
    return fold(tensor.index_select(1, chunk.query), chunk.tiles, num_kv_heads)


def _slice(tensor: Tensor, rows: slice, num_kv_heads: int) -> Tensor:
    """The folded rows of a run of queries."""
    return fold(tensor[:, rows], 1, num_kv_heads)


def _box(tensor: Tensor, chunk: Chunk) -> Tensor:
    """[B, N, Hkv, D] -> [B * tiles, Hkv, slots, D]; zero where a slot lies off the grid."""
    box = tensor.index_select(1, chunk.key).unflatten(1, (chunk.tiles, -1))
    if chunk.outside is not None:
        box = box.masked_fill(chunk.outside[..., None, None], 0)
    return box.flatten(0, 1).transpose(1, 2)


def _mask(chunk: Chunk, bias: Tensor | None, key_mask: Tensor | None, folded: Tensor) -> Tensor:
    """Additive mask that broadcasts over folded scores [B * tiles, Hkv, heads of a group * rows, slots]."""
    num_kv_heads, rows = folded.shape[1], chunk.visible.shape[1]
    group = folded.shape[2] // rows
    visible = chunk.visible  # [tiles or 1, rows, slots]
    batch = folded.shape[0] // chunk.tiles
    if key_mask is not None:
        seen = key_mask.index_select(1, chunk.key).unflatten(1, (chunk.tiles, -1))
        if chunk.outside is not None:
            seen = seen | chunk.outside
        visible = (visible & seen.unsqueeze(2)).flatten(0, 1)
    elif len(visible) > 1 and batch > 1:
        visible = visible.repeat(batch, 1, 1)
    mask = _additive(visible, folded.dtype)[:, None, None]
    if bias is not None:
        table = bias.flatten(1)[:, chunk.offsets].to(mask.dtype)  # [H, tiles or 1, rows, slots]
        table = table.unflatten(0, (num_kv_heads, group)).permute(2, 0, 1, 3, 4)
        if len(mask) > len(table) > 1:
            table = table.repeat(batch, 1, 1, 1, 1)
        mask = mask + table
    return mask.expand(-1, -1, group, -1, -1).flatten(2, 3)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(visible.shape, dtype=sum_dtype(dtype), device=visible.device)
    return zeros.masked_fill_(~visible, -torch.inf)


def _real(rows: Tensor, chunk: Chunk) -> Tensor:
    """Folded gradients, zero where a short tile repeats its last query."""
    if chunk.real is None:
        return rows
    group = rows.shape[2] // chunk.real.shape[1]
    repeated = ~chunk.real.repeat(rows.shape[0] // chunk.tiles, group)
    return rows.masked_fill(repeated[:, None, :, None], 0)


def _put(target: Tensor, chunk: Chunk, rows: Tensor) -> None:
    """Writes the rows of real queries to their places."""
    index = chunk.query
    if chunk.real is not None:
        kept = torch.nonzero(chunk.real.flatten()).flatten()
        index, rows = index[kept], rows.index_select(1, kept)
    target.index_copy_(1, index, rows)


def _add_to_table(total: Tensor, scores: Tensor, offsets: Tensor, tiles: int) -> None:
    """Sums score gradients [B * tiles, Hkv, heads of a group * rows, slots] by relative offset."""
    scores = scores.unflatten(2, (-1, offsets.shape[1])).flatten(1, 2).unflatten(0, (-1, tiles)).sum(0)
    if len(offsets) == 1:
        scores = scores.sum(0, keepdim=True)
    total.index_add_(1, offsets.flatten(), scores.transpose(0, 1).flatten(1).to(total.dtype))
