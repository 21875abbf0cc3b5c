"""Attention to chosen blocks by its definition: all scores, of which a query sees those of its blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from nearfield.ops.topk.geometry import count_blocks


def chosen_keys(block_indices: Tensor, num_keys: int, block_size: int) -> Tensor:
    """Which keys lie in a chosen block, `[B, N or 1, Hkv, M]`; an index that is no block chooses none."""
    blocks = count_blocks(num_keys, block_size)
    is_block = (block_indices >= 0) & (block_indices < blocks)
    place = torch.where(is_block, block_indices, blocks)
    chosen = torch.zeros((*block_indices.shape[:-1], blocks + 1), dtype=torch.bool, device=place.device)
    chosen = chosen.scatter(-1, place, torch.ones_like(is_block))
    return chosen[..., :blocks].repeat_interleave(block_size, -1)[..., :num_keys]


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
    """Output `[B, N, H, Dv]` and log-sum-exp `[B, N, H]`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    num_queries, (num_keys, num_kv_heads) = query.shape[1], key.shape[1:3]
    seen = chosen_keys(block_indices, num_keys, block_size)
    if is_causal:
        at = torch.arange(num_keys, device=key.device)
        seen = seen & (at <= at[num_keys - num_queries :, None, None])
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    grouped = query.unflatten(2, (num_kv_heads, -1)).to(wide)
    scores = torch.einsum("bnhgd,bmhd->bnhgm", grouped, key.to(wide)) * scale
    scores = scores.masked_fill(~seen.unsqueeze(3), -torch.inf)
    top = scores.detach().amax(-1, keepdim=True) if num_keys else scores.new_full((1,), -torch.inf)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    lse = (top + total.masked_fill(nothing, 1).log()).masked_fill(nothing, -torch.inf).squeeze(-1)
    weights = (weights / total.masked_fill(nothing, 1)).to(value.dtype).to(wide)
    out = torch.einsum("bnhgm,bmhd->bnhgd", weights, value.to(wide)).flatten(2, 3)
    return out.to(value.dtype), lse.flatten(2, 3)
