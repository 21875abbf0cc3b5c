"""Attention to chosen blocks in plain torch: their keys are gathered, for some queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nearfield.ops.topk.geometry import count_blocks

AT_ONCE = 1 << 22  # gathered numbers, which queries in turn keep within: one query alone may need more


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, Dv]` and log-sum-exp `[B, N, H]`, of at least one key and one block."""
    (batch, num_queries, _, head_dim), num_keys = query.shape, key.shape[1]
    blocks = count_blocks(num_keys, block_size)
    tokens, known = _tokens(block_indices, blocks, block_size)  # [B, N or 1, Hkv, L]
    known = known & (tokens < num_keys)
    tokens = tokens.clamp(max=num_keys - 1)
    at = None
    if is_causal:
        at = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None, None]  # [N, 1, 1]
    tensors = (query, key, value)
    if tokens.shape[1] < num_queries:  # one list for all
        return _attend(*tensors, tokens, known, at, key_mask, scale)
    per_query = batch * key.shape[2] * tokens.shape[-1] * (head_dim + value.shape[-1])
    step = max(1, AT_ONCE // max(per_query, 1))
    if step >= num_queries:
        return _attend(*tensors, tokens, known, at, key_mask, scale)
    found = []
    for first in range(0, num_queries, step):
        here = slice(first, first + step)
        part = (query[:, here], key, value, tokens[:, here], known[:, here])
        rest = (None if at is None else at[here], key_mask, scale)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # else gathered keys would be kept
            found.append(checkpoint(_attend, *part, *rest, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(_attend(*part, *rest))
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _tokens(block_indices: Tensor, blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Keys of the blocks, and which are some: not of an index that is no block, nor of one named before."""
    index = block_indices.sort(-1).values
    is_new = torch.ones_like(index[..., :1], dtype=torch.bool)
    is_new = torch.cat([is_new, index[..., 1:] != index[..., :-1]], -1)[..., : index.shape[-1]]
    known = is_new & (index >= 0) & (index < blocks)
    within = torch.arange(block_size, device=index.device)
    tokens = (index.clamp(0, blocks - 1) * block_size)[..., None] + within
    return tokens.flatten(-2), known[..., None].expand(tokens.shape).flatten(-2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    known: Tensor,
    at: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Some queries; `tokens` and `known` are `[B, N or 1, Hkv, L]`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    num_kv_heads = key.shape[2]
    batch = torch.arange(len(key), device=key.device)[:, None, None, None]
    head = torch.arange(num_kv_heads, device=key.device)[:, None]
    seen = known if at is None else known & (tokens <= at)  # [B, N or 1, Hkv, L]
    if key_mask is not None:
        seen = seen & key_mask[batch, tokens]
    keys, values = key[batch, tokens, head], value[batch, tokens, head]  # [B, N or 1, Hkv, L, D]
    q = query.unflatten(2, (num_kv_heads, -1))  # [B, N, Hkv, G, D]
    shared = keys.shape[1] < query.shape[1]
    if shared:  # queries are rows of one product
        q = q.transpose(1, 2).flatten(2, 3)[:, None]  # [B, 1, Hkv, N G, D]
    scores = (q @ keys.transpose(-1, -2)).to(wide) * scale  # [B, N or 1, Hkv, G or N G, L]
    if shared:
        scores = scores[:, 0].unflatten(2, (query.shape[1], -1)).transpose(1, 2)  # [B, N, Hkv, G, L]
    scores = scores.masked_fill(~seen.unsqueeze(3), -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    lse = (top + total.masked_fill(nothing, 1).log()).masked_fill(nothing, -torch.inf).squeeze(-1)
    weights = (weights / total.masked_fill(nothing, 1)).to(value.dtype)
    if shared:
        weights = weights.transpose(1, 2).flatten(2, 3)[:, None]
    out = weights @ values
    if shared:
        out = out[:, 0].unflatten(2, (query.shape[1], -1)).transpose(1, 2)
    return out.flatten(2, 3), lse.flatten(2, 3)
