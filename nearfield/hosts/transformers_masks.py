"""What the attention masks of transformers models say: padding, and whether they say more than that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from nearfield.ops.neighborhood import Neighborhood

MEMO = "_nearfield_readings"  # attribute of a mask tensor: all layers of a forward are given the same one


@dataclass(frozen=True)
class Reading:
    """What a complete mask says about the keys.

    `keys` [B or 1, M] is True where a key is no padding. `plain`: the mask is causality (or none), the host's
    own sliding window and padding, nothing more; packed sequences, prefixes or biases are more.
    """

    keys: Tensor
    plain: bool

    @cached_property
    def last_hidden(self) -> int:
        """The highest key that is padding in some row; -1 without padding."""
        hidden = (~self.keys).any(0).nonzero()
        return int(hidden[-1]) if len(hidden) else -1


def read_mask(
    mask: Shaped[Tensor, "b heads n m"],
    *,
    is_causal: bool,
    window: int | None = None,
) -> Reading:
    """The reading of a mask `[B, 1 or heads, queries, keys]`, bool (True may be seen) or additive.

    Queries are aligned with the last keys. `window` is the host's own sliding window, the token itself
    counted.
    """
    version = None if mask.is_inference() else mask._version
    memo = getattr(mask, MEMO, None)
    if memo is None and version is not None:
        memo = {}
        setattr(mask, MEMO, memo)
    known = None if memo is None else memo.get((is_causal, window))
    if known is not None and known[0] == version:
        return known[1]
    reading = _read(mask, is_causal, window)
    if memo is not None:
        memo[is_causal, window] = (version, reading)
    return reading


def mark(mask: Tensor | None) -> Tensor | None:
    """The mask, with room for its reading: for masks that nobody else can change."""
    if mask is not None:
        setattr(mask, MEMO, {})
    return mask


def visible(mask: Shaped[Tensor, "*sizes"]) -> Bool[Tensor, "*sizes"]:
    """Where a mask, bool or additive, lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def dense_mask(
    mask: Shaped[Tensor, "b heads n m"], keys: Bool[Tensor, "rows m"], pattern: Neighborhood
) -> Shaped[Tensor, "b heads n m"]:
    """`mask` narrowed to what a one-dimensional pattern shows, query by query."""
    num_queries, num_keys = mask.shape[-2:]
    bound = replace(pattern, num_sinks=0).on(num_keys, num_queries=num_queries)
    queries = torch.arange(num_queries, device=mask.device)[:, None]
    places = torch.arange(num_keys, device=mask.device)
    seen = bound.mask_mod(None, None, queries, places)
    if pattern.num_sinks:
        sinks = keys & (keys.cumsum(-1) <= pattern.num_sinks)
        reach = places <= queries + bound.offset if bound.axes[0].is_causal else torch.ones_like(seen)
        seen = seen | (sinks[:, None, None] & reach)
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _read(mask: Tensor, is_causal: bool, window: int | None) -> Reading:
    seen = visible(mask)
    num_queries, num_keys = mask.shape[-2:]
    # Without a window the last query sees every key that is no padding. A copy: a view would hold its mask,
    # and the mask its reading, for ever.
    keys = (seen[:, 0, -1] if window is None else seen[:, 0].any(-2)).clone()
    plain = mask.dtype == torch.bool or bool(((mask == 0) == seen).all())
    one_row = num_queries == 1 or mask.stride(-2) == 0
    if not plain or (one_row and mask.shape[1] == 1 and window is None):
        plain = plain and (num_queries == 1 or not is_causal)
        return Reading(keys if plain else seen.any(1).any(-2), plain)
    wanted = keys[:, None, None]
    if is_causal:
        queries = torch.arange(num_keys - num_queries, num_keys, device=mask.device)[:, None]
        places = torch.arange(num_keys, device=mask.device)
        reach = places <= queries
        if window is not None:
            reach &= places > queries - window
        wanted = wanted & reach
    same = seen == wanted
    if (
        num_queries <= num_keys
    ):  # a query that is padding may see everything: some hosts let it, nobody reads it
        same = same | (~keys[:, None, -num_queries:, None] & seen.all(-1, keepdim=True))
    plain = bool(same.all())
    return Reading(keys if plain else seen.any(1).any(-2), plain)
