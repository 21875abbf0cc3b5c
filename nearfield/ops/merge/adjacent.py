"""Merging of neighbours in a sequence, where tokens stay contiguous spans."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import no_autocast
from nearfield.ops.merge import reference
from nearfield.ops.merge.geometry import num_pairs
from nearfield.ops.merge.pairs import SMALLEST, adjacent_likeness, checked
from nearfield.ops.routing.members import largest, positions
from nearfield.ops.routing.slots import rows

OP = "merge_adjacent"
Weight = Literal["norm", "span", "mean"]


class Merged(NamedTuple):
    """Tokens `[B, L, C]`, the positions each stands for `[B, L]`, and which hold anything real `[B, L]`."""

    tokens: Tensor
    spans: Tensor
    key_mask: Tensor | None


def merge_adjacent(
    x: Float[Tensor, "b n dim"],
    metric: Float[Tensor, "b n features"],
    num_merges: int,
    *,
    window_size: int | None = None,
    weight: Weight = "norm",
    parity: int = 0,
    spans: Int[Tensor, "b n"] | None = None,
    key_mask: Bool[Tensor, "b n"] | None = None,
    backend: str = "auto",
) -> Merged:
    """The sequence with its `num_merges` most alike pairs of neighbours made one token each.

        x, spans, _ = merge_adjacent(x, group(x), 512, window_size=16)                # [B, 4096, C] to 3584
        x, spans, _ = merge_adjacent(x, group(x), 512, window_size=16, parity=1, spans=spans)    # to 3072
        bases = unmerge(decode(x), spans, 4096)

    Alike means a large cosine of `metric`. Pairs are the tokens (parity, parity + 1), (parity + 2, ...) and
    lie within windows that tile the tokens as they are now; equal ones merge from the left. The merged token
    is `(w x + w' x') / (w + w')`. `weight="norm"` takes `w = |metric|`, the only way a gradient reaches the
    metric, since who merges is a hard choice; "span" takes the span, "mean" 1.

    Every row ends with `n - num_merges` tokens. Masked tokens weigh nothing and come out as 0; a pair with
    one merges only when a row has no real pairs left, two masked ones first.
    """
    num_tokens = checked(x, metric, "spans", spans, key_mask)
    if weight not in get_args(Weight):
        near = get_close_matches(str(weight), get_args(Weight), n=1) or ["norm"]
        raise ValueError(
            f"weight={weight!r} is unknown. Did you mean {near[0]!r}? "
            f"Give one of {', '.join(get_args(Weight))}."
        )
    if parity not in (0, 1):
        raise ValueError(f"parity={parity} must be 0 or 1: whether pairs begin at the first or second token.")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size={window_size} must be at least 1, or None for no windows.")
    most = num_pairs(num_tokens, window_size, parity)
    if not 0 <= num_merges <= most:
        raise ValueError(
            f"num_merges={num_merges}, but {num_tokens} tokens with window_size={window_size} and "
            f"parity={parity} have {most} pairs. Give between 0 and {most}, and merge the rest in a "
            "further call."
        )
    name = choose(OP, backend, {"tiled": Verdict, "reference": Verdict})

    if key_mask is not None:
        x, metric = (y.masked_fill(~key_mask[..., None], 0) for y in (x, metric))
    if spans is None:
        spans = torch.ones(x.shape[:2], dtype=torch.int32, device=x.device)
    with no_autocast(x):
        weights = _weights(metric, spans, weight, key_mask)
        likeness = adjacent_likeness(metric, parity, window_size, key_mask)
        if name == "reference":
            tokens, groups = reference.adjacent(x, weights, likeness, num_merges)
            wide = (groups * spans[:, None]).sum(-1)
            mask = None if key_mask is None else (groups & key_mask[:, None]).any(-1)
        else:
            chosen = largest(likeness, num_merges)
            tokens, wide, mask = _compact(x, weights, spans, key_mask, chosen, num_tokens - num_merges)
    return Merged(tokens.to(x.dtype), wide.to(spans.dtype), mask)


def _compact(
    x: Tensor, weights: Tensor, spans: Tensor, key_mask: Tensor | None, chosen: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Chosen tokens take in the next ones, which are then left out."""
    x = x.to(weights.dtype)
    mine, theirs = weights[..., None], weights.roll(-1, 1)[..., None]
    total = mine + theirs
    blend = (mine * x + theirs * x.roll(-1, 1)) / total.masked_fill(total == 0, 1)
    index = positions(~chosen.roll(1, 1), length)  # [B, L]; the last token is never chosen
    tokens = rows(torch.where(chosen[..., None], blend, x), index)
    spans = (spans + spans.roll(-1, 1) * chosen).gather(1, index)
    if key_mask is not None:
        key_mask = (key_mask | (key_mask.roll(-1, 1) & chosen)).gather(1, index)
    return tokens, spans, key_mask


def _weights(metric: Tensor, spans: Tensor, weight: str, key_mask: Tensor | None) -> Tensor:
    """What each token counts in an average `[B, N]`."""
    wide = torch.promote_types(metric.dtype, torch.float32)
    if weight == "norm":
        found = torch.linalg.vector_norm(metric.to(wide), dim=-1).clamp(min=SMALLEST)
    else:
        found = (spans if weight == "span" else torch.ones_like(spans)).to(wide)
    return found if key_mask is None else found.masked_fill(~key_mask, 0)
