"""What sites of transformers models need beside SDPA: capped scores, and places in a sequence."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    options: dict[str, Any],
) -> Tensor:
    """The library's own eager attention of a module, `[B, heads, N, D]` in and `[B, N, heads, Dv]` out."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and num_queries > 1:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril_(num_keys - num_queries)[None, None]
    if mask is not None and mask.dtype == torch.bool:  # that function adds its mask
        lowest = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
        mask = torch.where(mask, torch.zeros_like(lowest), lowest)
    function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    out: Tensor = function(module, query, key, value, mask, **options)[0]
    return out


def seen_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens the cache that an attention module is called with has seen at its layer."""
    if "past_key_values" in kwargs:
        cache = kwargs["past_key_values"]
    else:
        cache = next((given for given in (*kwargs.values(), *args) if hasattr(given, "get_seq_length")), None)
    if cache is None or getattr(module, "is_cross_attention", False):
        return 0
    return int(cache.get_seq_length(getattr(module, "layer_idx", 0) or 0))
