"""Attention whose scores a method may change: explicit, in chunks of rows, so memory is linear."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.hosts.seam import Call

if TYPE_CHECKING:
    from nearfield.steer.base import Steer

WORKSPACE = 64 << 20  # bytes that the scores of one chunk may take, with their copies
COPIES = 4  # scores as given, as changed, their exponentials, one temporary


class Weighed(NamedTuple):
    """The output of some rows `[B, R, H, Dv]`, and the log of what their weights were divided by."""

    output: Tensor
    lse: Tensor


def attend_scores(
    call: Call,
    query: Float[Tensor, "b n heads d"],
    key: Float[Tensor, "b m kv_heads d"],
    value: Float[Tensor, "b m kv_heads dv"],
    scoring: Sequence[tuple[Steer, range]],
) -> Float[Tensor, "b n heads dv"] | None:
    """The call's attention with the scores that the steers make of some rows; None if they change none.

    Rows in chunks that come back as they were are the host's, so that a setting which changes nothing keeps
    the host's bits. Without gradients no more than a chunk of scores is held at a time.
    """
    first = call.site.rows.start
    pieces: list[tuple[range, Tensor | None]] = []
    keys = call.site.keys if len(call.site.keys) == key.shape[1] else range(key.shape[1])
    for rows, steers in _chunks(call, query, key, scoring):
        here = slice(rows.start - first, rows.stop - first)
        piece = None
        if steers:
            with torch.autocast(query.device.type, enabled=False):  # sums in float32 at least
                scores = scores_of(call, query[:, here], key, here)
                changed = _changed(call, scores, rows, keys, steers)
                if changed is not None:
                    hidden = hidden_of(call, here, key.shape[1], key.device)
                    piece = weigh(changed, value, hidden, dropout=call.dropout).output
        pieces.append((rows, piece))
    if all(piece is None for _, piece in pieces):
        return None
    if any(piece is None for _, piece in pieces):
        whole = call.host(query, key, value)
        parts = [
            whole[:, rows.start - first : rows.stop - first] if piece is None else piece.to(whole.dtype)
            for rows, piece in pieces
        ]
    else:
        parts = [piece.to(query.dtype) for _, piece in pieces if piece is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _changed(call: Call, scores: Tensor, rows: range, keys: range, steers: Sequence[Steer]) -> Tensor | None:
    """What the steers make of a chunk of scores; None where that is what they were given."""
    before, changed = scores.detach().clone(), scores
    for steer in steers:
        changed = steer.score(call.site, changed, rows, keys)
        if changed.shape != before.shape:
            raise ValueError(
                f"{type(steer).__name__}.score gave {list(changed.shape)} at site {call.site.name!r}. "
                f"Give {list(before.shape)}, as it was given."
            )
    learning = torch.is_grad_enabled() and changed.requires_grad and changed is not scores
    return None if not learning and torch.equal(changed, before) else changed


def scores_of(
    call: Call, query: Float[Tensor, "b r heads d"], key: Float[Tensor, "b m kv_heads d"], here: slice
) -> Float[Tensor, "b heads r m"]:
    """Scores of some rows before the softmax, scaled, capped and biased as the host does, nothing hidden.

    In float32 at least. `here` are these rows in the call.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, num_rows, num_heads, dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    q = (
        query.to(dtype).transpose(1, 2).reshape(batch, kv_heads, -1, dim) * call.scale
    )  # [B, Hkv, share * R, D]
    scores = torch.matmul(q, key.to(dtype).permute(0, 2, 3, 1))
    scores = scores.view(batch, num_heads, num_rows, num_keys)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    mask = _mask_rows(call.mask, here)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(dtype).masked_fill(_is_low(mask), 0.0)
    return scores


def hidden_of(
    call: Call, here: slice, num_keys: int, device: torch.device
) -> Bool[Tensor, "b_or_1 heads_or_1 r_or_1 m"] | None:
    """What the rows `here` of a call may not see; None if they see all."""
    mask = _mask_rows(call.mask, here)
    if mask is not None:
        return ~mask if mask.dtype == torch.bool else _is_low(mask)
    if not call.site.is_causal:
        return None
    last = torch.arange(here.start, here.stop, device=device) + num_keys - call.query.shape[1]
    return (torch.arange(num_keys, device=device) > last[:, None])[None, None]


def weigh(
    scores: Float[Tensor, "b heads r m"],
    value: Float[Tensor, "b m kv_heads dv"],
    hidden: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Weighed:
    """Values weighed by the softmax of scores; a row that sees nothing gives 0, and -inf as its `lse`."""
    batch, num_heads, num_rows, num_keys = scores.shape
    scores = scores.clone() if hidden is None else scores.masked_fill(hidden, -math.inf)
    peak = scores.detach().amax(-1, keepdim=True)
    weights = scores.sub_(peak.masked_fill(peak == -math.inf, 0.0)).exp_()
    total = weights.sum(-1).clamp_min(torch.finfo(weights.dtype).tiny)  # [B, H, R]
    lse = peak[..., 0] + total.log()
    weights = F.dropout(weights, dropout) if dropout else weights
    weights = weights.reshape(batch, value.shape[2], -1, num_keys)
    out = torch.matmul(weights, value.to(weights.dtype).transpose(1, 2))  # [B, Hkv, share * R, Dv]
    out = out.view(batch, num_heads, num_rows, -1) / total[..., None]
    return Weighed(out.transpose(1, 2), lse)


def _chunks(
    call: Call, query: Tensor, key: Tensor, scoring: Sequence[tuple[Steer, range]]
) -> Iterator[tuple[range, list[Steer]]]:
    """All rows of a call in order, cut where a steer begins or ends and where a chunk is large enough."""
    rows = call.site.rows
    batch, _, num_heads, _ = query.shape
    itemsize = torch.promote_types(query.dtype, torch.float32).itemsize
    size = max(1, WORKSPACE // (batch * num_heads * key.shape[1] * itemsize * COPIES))
    cuts = sorted({rows.start, rows.stop, *(at for _, mine in scoring for at in (mine.start, mine.stop))})
    for start, stop in zip(cuts, cuts[1:], strict=False):
        steers = [steer for steer, mine in scoring if start in mine]
        step = size if steers else stop - start
        for at in range(start, stop, step):
            yield range(at, min(at + step, stop)), steers


def _mask_rows(mask: Tensor | None, here: slice) -> Tensor | None:
    """The rows of a mask, with four dimensions."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.ndim)]
    return mask[..., here, :] if mask.shape[-2] > 1 else mask


def _is_low(mask: Tensor) -> Tensor:
    """An added mask hides by the lowest number of its type, or -inf."""
    return mask <= torch.finfo(mask.dtype).min / 2
