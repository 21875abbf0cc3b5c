"""Merging of tokens that are alike wherever they stand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import no_autocast, no_transform
from nearfield.ops.merge import reference
from nearfield.ops.merge.pairs import checked, crossed_likeness
from nearfield.ops.routing.members import largest
from nearfield.ops.routing.slots import add_up, slots

OP = "bipartite_merge"


class Groups(NamedTuple):
    """Tokens `[B, L, C]`, the group of each former token `[B, N]`, and what each stands for `[B, L]`."""

    tokens: Tensor
    source: Tensor
    sizes: Tensor


def bipartite_merge(
    x: Float[Tensor, "b n dim"],
    metric: Float[Tensor, "b n features"],
    num_merges: int,
    *,
    sizes: Int[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b n"] | None = None,
    backend: str = "auto",
) -> Groups:
    """The tokens with `num_merges` of those at even places merged into the odd ones most like them.

        groups = bipartite_merge(x, key.mean(2), 98)                  # [B, 196, C] -> [B, 98, C]
        dense_attention(q, k, v, mask=proportional_bias(groups.sizes))
        full = bipartite_unmerge(groups.tokens, groups.source)        # [B, 196, C]

    Alike means a large cosine of `metric`. A merged token is the average by `sizes`, which says how many each
    stands for already. Groups keep the order of the tokens they began with. Masked tokens count as nothing
    and are merged away only when no real ones are left. Who merges is a hard choice without a gradient.
    """
    num_tokens = checked(x, metric, "sizes", sizes, key_mask)
    most = (num_tokens + 1) // 2 if num_tokens > 1 else 0
    if not 0 <= num_merges <= most:
        raise ValueError(
            f"num_merges={num_merges} for {num_tokens} tokens. "
            f"Give between 0 and {most}, and merge the rest in a further call."
        )
    name = choose(OP, backend, {"tiled": lambda: Verdict(no_transform()), "reference": Verdict})

    if sizes is None:
        sizes = torch.ones(x.shape[:2], dtype=torch.int32, device=x.device)
    if key_mask is not None:
        x, metric = (y.masked_fill(~key_mask[..., None], 0) for y in (x, metric))
        sizes = sizes.masked_fill(~key_mask, 0)
    weights = sizes.to(torch.promote_types(x.dtype, torch.float32))
    if not num_merges:
        whole = torch.arange(num_tokens, device=x.device).expand(x.shape[:2])
        return Groups(x, whole, sizes)
    with no_autocast(x):
        likeness = crossed_likeness(metric, key_mask)
        if name == "reference":
            tokens, groups = reference.bipartite(x, weights, likeness, num_merges)
    if name == "reference":
        source = groups.to(torch.uint8).argmax(1)
        found = (groups * sizes[:, None]).sum(-1)
    else:
        source = _sources(likeness, num_tokens, num_merges)
        at = slots(source[:, None], num_tokens - num_merges, likeness.shape[1] + 1)
        total = add_up(weights[:, None, :, None], at)
        tokens = add_up(weights[:, None, :, None] * x[:, None], at) / total.masked_fill(total == 0, 1)
        tokens, found = tokens[:, 0], add_up(sizes[:, None, :, None], at)[:, 0, :, 0]
    return Groups(tokens.to(x.dtype), source, found.to(sizes.dtype))


def _sources(likeness: Tensor, num_tokens: int, num_merges: int) -> Tensor:
    """The group of each token `[B, N]`."""
    score, partner = likeness.max(-1)  # [B, even]
    place = torch.arange(num_tokens, device=likeness.device)
    half = (place // 2).expand(likeness.shape[0], num_tokens)
    gone = largest(score, num_merges).gather(1, half) & (place % 2 == 0)  # [B, N]
    rank = (~gone).cumsum(1) - 1
    return torch.where(gone, rank.gather(1, 2 * partner.gather(1, half) + 1), rank)
