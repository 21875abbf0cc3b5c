"""Position logits as further channels of queries and keys, so that a plain attention adds them.

The logit of a pair is a sum over the axes of a number that depends on the query and on the key's place in the
window. Gather these numbers in the query, one channel for each place, and let the key be 1 in the channel
of its place and 0 in the others: their product is the logit. Nothing of size queries x keys is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXIS_LOGITS = {1: ("bxhd,xmd->bxhm",), 2: ("byxhd,ymd->byxhm", "byxhd,xmd->byxhm")}


def axis_logits(query: Tensor, table: Tensor, index: Tensor, axis: int, scale: float) -> Tensor:
    """Logits `[B, *grid, H, window]` of one axis; `index [side, window]` says which entries of the table."""
    wide = torch.promote_types(table.dtype, torch.float32)
    entries = table.to(wide)[index] * scale  # the gradient of the table sums over its copies in this dtype
    return torch.einsum(AXIS_LOGITS[query.dim() - 3][axis], query, entries.to(query.dtype))


def one_hot(index: Tensor, width: int, like: Tensor) -> Tensor:
    """1 in the channel that `index` names, 0 in the other ones of `width`."""
    return (index.unsqueeze(-1) == torch.arange(width, device=like.device)).to(like.dtype)
