"""Neighborhood attention by torch's compiled FlexAttention: the first call of a shape compiles for seconds.

On a CPU FlexAttention gives no log-sum-exp and no gradients. There one key more, of a known logit and with
its own value channel, is shown to every query: the share of the softmax that it takes tells the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood.geometry import Bound

BLOCK = 128


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    *,
    key_mask: Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why FlexAttention cannot run this, or None."""
    tensors = [query, key, value, *(x for x in options.values() if isinstance(x, Tensor))]
    if bound.pattern.border == "pad":
        return 'FlexAttention has no keys outside the grid, so border="pad" cannot run.'
    if bound.pattern.num_sinks and key_mask is not None:
        return "FlexAttention's mask is built once per geometry, but with key_mask the sinks differ by row."
    if query.dtype == torch.float64:
        return "FlexAttention has no float64."
    if min(query.shape[-1], value.shape[-1]) < 16:
        return f"FlexAttention needs 16 channels or more, given {query.shape[-1]} and {value.shape[-1]}."
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "FlexAttention has no gradients on a CPU. Use torch.no_grad(), or another backend."
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, *grid, H, Dv] and log-sum-exp [B, *grid, H], of checked arguments."""
    more = {"additional_keys": additional_keys, "additional_values": additional_values, "bias": bias}
    reason = supports(query, key, value, bound, key_mask=key_mask, sink_logits=sink_logits, **more)
    if reason is not None:
        raise BackendUnavailable(reason)
    places, batch = query.shape[1:-2], query.shape[0]
    q, k, v = (x.flatten(1, -3) for x in (query, key, value))
    known = None
    if query.device.type == "cpu":
        known = _known_logits(q, k, sink_logits, scale)
        v = F.pad(v, (0, 1))
    if additional_keys is not None and additional_values is not None:
        k = torch.cat([additional_keys, k], 1)
        v = torch.cat([F.pad(additional_values, (0, v.shape[-1] - additional_values.shape[-1])), v], 1)
    if known is not None:
        channel = F.one_hot(torch.tensor([v.shape[-1] - 1]), v.shape[-1]).to(v)
        k = F.pad(k, (0, 0, 0, 0, 1, 0))
        v = torch.cat([channel.expand(batch, 1, v.shape[2], -1), v], 1)
    extra = k.shape[1] - bound.num_keys
    run = _compiled(bound, extra, (known is None, bias is None, key_mask is None), query.device)
    mask = _block_mask(bound, extra, query.device)
    hidden = None if key_mask is None else F.pad(key_mask.flatten(1), (extra, 0), value=True)
    table = None if bias is None else bias.float().flatten(1)
    found, aux = run(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale, table, hidden, known)
    out = found.transpose(1, 2)
    if known is None:
        lse = aux.lse.transpose(1, 2)
        if sink_logits is not None:
            total = torch.logaddexp(lse, sink_logits.to(lse.dtype))
            out = (out * torch.exp(lse - total).unsqueeze(-1)).to(out.dtype)
            lse = total
    else:
        known, share = known.transpose(1, 2), out[..., -1].float()
        out, lse = out[..., :-1], known - share.log()
        if sink_logits is None:  # the known key is none of the caller's: take its share out again
            rest = 1 - share
            out = torch.where(rest.unsqueeze(-1) > 0, out / rest.unsqueeze(-1), 0).to(query.dtype)
            lse = lse + rest.log()
    return out.unflatten(1, places).contiguous(), lse.unflatten(1, places)


def _known_logits(query: Tensor, key: Tensor, sink_logits: Tensor | None, scale: float) -> Tensor:
    """[B, H, M]: the sink logits, or the score of each query with its own key, which is near the largest."""
    batch, rows, num_heads, _ = query.shape
    if sink_logits is not None:
        return sink_logits.float()[None, :, None].expand(batch, -1, rows).contiguous()
    own = key[:, -rows:].repeat_interleave(num_heads // key.shape[2], 2)
    return ((query.float() * own.float()).sum(-1) * scale).transpose(1, 2).contiguous()


@lru_cache(maxsize=64)
def _compiled(bound: Bound, extra: int, given: tuple[bool, ...], device: torch.device) -> Callable[..., Any]:
    """FlexAttention compiled for one geometry, as code of its own: torch caches only a few shapes of one."""
    axes, sinks = bound.axes, bound.pattern.num_sinks

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_mask: BlockMask,
        scale: float,
        table: Tensor | None,
        hidden: Tensor | None,
        known: Tensor | None,
    ) -> Any:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if table is not None:
                row, column = bound.coordinates(q + bound.offset), bound.coordinates(k - extra)
                index, near = torch.zeros_like(k), k >= extra
                for axis, i, j in zip(axes, row, column, strict=True):
                    span = 2 * axis.kernel_size - 1
                    offset = j // axis.dilation - i // axis.dilation + axis.kernel_size - 1
                    if sinks:
                        start, end = axis.interval(i // axis.dilation, i % axis.dilation)
                        at = j // axis.dilation
                        near = near & (i % axis.dilation == j % axis.dilation) & (start <= at) & (at < end)
                    index = index * span + offset.clamp(0, span - 1)
                score = score + torch.where(near, table[h, index], 0.0)
            if hidden is not None:
                score = torch.where(hidden[b, k], score, -float("inf"))
            if known is not None:
                score = torch.where(k == 0, known[b, h, q], score)
            return score

        plain = table is None and hidden is None and known is None
        return flex_attention(
            query,
            key,
            value,
            score_mod=None if plain else score_mod,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=known is None),
        )

    own = FunctionType(run.__code__.replace(), run.__globals__, "run", run.__defaults__, run.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


@lru_cache(maxsize=64)
def _block_mask(bound: Bound, extra: int, device: torch.device) -> BlockMask:
    """The mask of a geometry with `extra` always visible keys in front, built a row of blocks at a time."""
    window = bound.mask_mod
    keys = bound.num_keys + extra

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        return window(b, h, q, k - extra) | (k < extra) if extra else window(b, h, q, k)

    key = torch.arange(keys, device=device)
    rows: list[tuple[Tensor, Tensor]] = []
    for low in range(0, bound.num_queries, BLOCK):
        query = torch.arange(low, min(low + BLOCK, bound.num_queries), device=device)[:, None]
        seen = visible(None, None, query, key)
        rows.append((_blocks(seen.any(0)).any(-1), _blocks(seen.all(0)).all(-1) & (len(query) == BLOCK)))
    some, whole = (torch.stack(part) for part in zip(*rows, strict=True))
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(bound.num_queries, keys),
    )


def _blocks(row: Tensor) -> Tensor:
    return F.pad(row, (0, -len(row) % BLOCK), value=False).unflatten(0, (-1, BLOCK))


def _listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of blocks how many are wanted, and which: those first."""
    order = torch.sort(wanted.to(torch.int8), dim=-1, descending=True, stable=True)[1]
    return wanted.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
