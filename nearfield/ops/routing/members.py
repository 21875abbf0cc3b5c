"""Which tokens are in which cluster, and selections of a fixed number that break ties by position."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.ops.checks import no_autocast
from nearfield.ops.routing.geometry import Routing


class Members(NamedTuple):
    """Of each cluster, the tokens in it: booleans `[B, H, C, N]` for queries and `[B, H, C, M]` for keys."""

    query: Tensor
    key: Tensor


@torch.no_grad()
def members(
    query: Tensor,
    key: Tensor,
    centroids: Tensor,
    routing: Routing,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Members:
    """The clusters of checked arguments; masked tokens are in none."""
    towards_query = similarity(query, centroids)  # [B, H, C, N]
    towards_key = similarity(key, centroids)
    if routing.selection == "causal":
        total = towards_query + towards_key
        nearest = total.argmax(2, keepdim=True)
        inside = nearest == torch.arange(total.shape[2], device=total.device)[:, None]
        if query_mask is not None:
            inside = inside & query_mask[:, None, None]
        if key_mask is not None:
            inside = inside & key_mask[:, None, None]
        return Members(inside, inside)
    if query_mask is not None:
        towards_query = towards_query.masked_fill(~query_mask[:, None, None], -torch.inf)
    if key_mask is not None:
        towards_key = towards_key.masked_fill(~key_mask[:, None, None], -torch.inf)
    return Members(largest(towards_query, routing.window_size), largest(towards_key, routing.window_size))


def chains(inside: Tensor) -> tuple[Tensor, Tensor]:
    """The cluster of each token `[B, H, N]`, C for masked ones, and the tokens sorted by it."""
    cluster = inside.to(torch.uint8).argmax(2).masked_fill(~inside.any(2), inside.shape[2])
    return cluster, cluster.argsort(dim=-1, stable=True)


def similarity(x: Tensor, centroids: Tensor) -> Tensor:
    """Products of centroids `[H, C, D]` and tokens `[B, N, H or fewer, D]` of length one `[B, H, C, N]`."""
    with no_autocast(x):  # who goes where must not depend on it
        grouped = centroids.to(unit_dtype(x)).unflatten(0, (x.shape[2], -1))  # query heads of one key head
        return torch.einsum("bnhd,hgcd->bhgcn", unit(x), grouped).flatten(1, 2)


def unit(x: Tensor) -> Tensor:
    """The direction of each token, in at least float32."""
    return F.normalize(x.to(unit_dtype(x)), dim=-1)


def unit_dtype(x: Tensor) -> torch.dtype:
    """The dtype of directions of `x`."""
    return torch.promote_types(x.dtype, torch.float32)


def largest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest scores of each row, the earlier one of equals; never at -inf.

    torch.topk says nothing about ties, and a decision about tokens must be the same on every device.
    """
    length = scores.shape[-1]
    if count >= length:
        return scores > -torch.inf
    if count < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = scores.topk(count, dim=-1).values.amin(-1, keepdim=True)
    above, equal = scores > last, scores == last
    wanted = count - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= wanted))) & (scores > -torch.inf)


def positions(chosen: Tensor, count: int) -> Tensor:
    """Where the first `count` True entries of each row stand; past the last one the row's length."""
    return first_at_least(chosen.cumsum(-1), torch.arange(1, count + 1, device=chosen.device))


def first_at_least(rising: Tensor, numbers: Tensor) -> Tensor:
    """For each of `numbers`, where the rows of `rising [..., N]` first reach it; N if they never do."""
    wanted = torch.zeros_like(rising[..., :1]) + numbers  # a sum, because torch wants no expanded memory here
    return torch.searchsorted(rising.contiguous(), wanted)
