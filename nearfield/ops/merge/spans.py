"""Merged tokens as spans: how many positions each stands for, and the way back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfield.ops.routing.members import first_at_least
from nearfield.ops.routing.slots import rows


def span_sources(spans: Int[Tensor, "b tokens"], length: int) -> Int[Tensor, "b length"]:
    """The token whose span covers each position; behind the last span the number of tokens.

    Spans 2, 1, 3 and length 6 give 0 0 1 2 2 2.
    """
    return first_at_least(spans.cumsum(-1), torch.arange(1, length + 1, device=spans.device))


def unmerge(
    x: Float[Tensor, "b tokens dim"], spans: Int[Tensor, "b tokens"], length: int
) -> Float[Tensor, "b length dim"]:
    """Each token repeated over its span; 0 behind the last one. Undoes `merge_adjacent`."""
    source = span_sources(spans, length)
    behind = (source == x.shape[1])[..., None]
    return rows(x, source.clamp(max=x.shape[1] - 1)).masked_fill(behind, 0)


def bipartite_unmerge(
    x: Float[Tensor, "b groups dim"], source: Int[Tensor, "b tokens"]
) -> Float[Tensor, "b tokens dim"]:
    """Each group's row at all its tokens. Undoes `bipartite_merge`."""
    return rows(x, source)


def span_mass(
    spans: Int[Tensor, "b tokens"], key_mask: Bool[Tensor, "b length"] | None = None
) -> Int[Tensor, "b tokens"]:
    """Positions that each token stands for, masked ones not counted."""
    if key_mask is None:
        return spans
    ends = spans.cumsum(-1)
    real = F.pad(key_mask.cumsum(-1), (1, 0))  # real positions before each one
    return (real.gather(-1, ends) - real.gather(-1, ends - spans)).to(spans.dtype)


def proportional_bias(
    sizes: Int[Tensor, "b tokens"] | Float[Tensor, "b tokens"],
) -> Float[Tensor, "b 1 1 tokens"]:
    """log(size), to add to scores: a token that stands for five then weighs what five tokens would.

        dense_attention(q, k, v, mask=proportional_bias(span_mass(spans)))

    A size of 0 hides the token.
    """
    wide = sizes if sizes.is_floating_point() else sizes.float()
    return wide.log()[:, None, None]
