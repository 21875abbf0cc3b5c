"""Which image tokens are informed, by the vision tower's own attention, and how much attention images get."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.hosts import seam
from nearfield.hosts.seam import Call
from nearfield.hosts.vision_language import VisionTower, image_tokens, vision_tower
from nearfield.steer import Steer
from nearfield.steer.scores import hidden_of, scores_of

CHUNK = 128  # rows of a map that are held at a time


class Informed(NamedTuple):
    """Places of image tokens in a prompt: those of details, and those that sum the picture up."""

    local: tuple[int, ...]
    summary: tuple[int, ...]


def informed_tokens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    share: float = 0.25,
    spatial: float = 0.0,
    parity: bool = False,
) -> list[Informed]:
    """The informed tokens of each row of a prompt, by the attention of its vision tower.

    Local: the share `share` of an image's tokens that the class token looks at most in the first layer, and
    the share `spatial` that all patches look at most there. Summary: those that the class token of the last
    layer but one looks at beyond the upper fence of a box plot. A token of both is one of summary. A tower
    without a class token is asked what all its patches look at. `parity=True` sums the wrong axis for
    `spatial`, counts the class token as a place, and may lose a summary token by rounding, as the official
    code does.
    """
    tower, seen = vision_tower(model, inputs), {}
    looked = _watch(model, inputs, tower, every=spatial > 0, parity=parity)
    sizes = [prod(grid) for grid in tower.grids]
    for name, values in looked.items():
        seen[name] = values.split([size + tower.num_prefix for size in sizes] if name == "rows" else sizes)
    rows, image = [], 0
    for ranges in image_tokens(model, inputs):
        local: set[int] = set()
        summary: set[int] = set()
        for where in ranges:
            given = {name: values[image] for name, values in seen.items()}
            more = given.get("rows" if parity else "received", given.get("received"))
            mine = choose(given["first"], given["late"], more, share=share, spatial=spatial, parity=parity)
            begin = where.start + len(where) - sizes[image]  # behind class tokens that are passed on
            local |= {begin + place for place in mine.local}
            summary |= {begin + place for place in mine.summary}
            image += 1
        rows.append(Informed(tuple(sorted(local)), tuple(sorted(summary))))
    return rows


def choose(
    first: Float[Tensor, " n"],
    late: Float[Tensor, " n"],
    received: Float[Tensor, " m"] | None = None,
    *,
    share: float = 0.25,
    spatial: float = 0.0,
    parity: bool = False,
) -> Informed:
    """The local and summary tokens of one image, by what the first and a late layer look at."""
    n = len(late)
    low, high = late.quantile(0.25), late.quantile(0.75)
    count = int((late > high + 1.5 * (high - low)).sum())
    count = int(n * (count / n)) if parity else count
    summary = set(late.topk(count).indices.tolist())
    local = set(first.topk(int(share * n)).indices.tolist())
    if spatial and received is not None:
        local |= set(received.topk(int(spatial * n)).indices.tolist())
    return Informed(tuple(sorted(local - summary)), tuple(sorted(summary)))


class Chair(NamedTuple):
    """Hallucination in captions (arXiv 1809.02156): the share of named things that are not there, the
    share of captions with such, and the share of things there that are named."""

    instances: Tensor
    sentences: Tensor
    recall: Tensor


def chair_counts(
    named: Sequence[Collection[str]], there: Sequence[Collection[str]]
) -> Float[Tensor, "captions 3"]:
    """For each caption how many things are named wrongly, named rightly, and there."""
    pairs = [(set(said), set(real)) for said, real in zip(named, there, strict=True)]
    return torch.tensor([[len(said - real), len(said & real), len(real)] for said, real in pairs]).double()


def chair(counts: Float[Tensor, "*b captions 3"]) -> Chair:
    """CHAIR of captions that were counted."""
    wrong, right, real = counts.sum(-2).unbind(-1)
    with_wrong = (counts[..., 0] > 0).double().mean(-1)
    return Chair(wrong / (wrong + right).clamp_min(1), with_wrong, right / real.clamp_min(1))


def image_shares(
    model: nn.Module, inputs: Mapping[str, Any], *, boost: Steer | None = None
) -> Float[Tensor, "b layers heads"]:
    """How much of the newest token's attention goes to image tokens, by layer and head, boosted or not."""
    places = image_tokens(model, inputs)
    found: list[Tensor] = []

    def note(call: Call) -> None:
        if not call.site.is_causal:
            return
        here = slice(call.query.shape[1] - 1, call.query.shape[1])
        scores = scores_of(call, call.query[:, here], call.key, here)
        if boost is not None and boost.takes(call.site):
            scores = boost.score(call.site, scores, call.site.rows[-1:], call.site.keys)
        hidden = hidden_of(call, here, call.key.shape[1], scores.device)
        weights = (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(-1)[:, :, 0]
        shares = weights.new_zeros(weights.shape[:2])
        for b, row in enumerate(places):
            for where in row:
                shares[b] += weights[b, :, where.start : where.stop].sum(-1)
        found.append(shares)

    with torch.no_grad(), nullcontext() if boost is None else boost(model), seam.attention(model, note):
        model(**inputs)
    return torch.stack(found, 1)


def head_factors(
    shares: Float[Tensor, "*b layers heads"],
    *,
    mode: Literal["proportional", "top"] = "proportional",
    quantile: float = 0.75,
) -> Float[Tensor, "layers heads"]:
    """Factors for `InformedBoost.heads`: heads that look at images count for more.

    By their share beside the largest of the layer, or 1 from a quantile of the layer on and 0 below.
    """
    mean = shares.flatten(0, -3).mean(0) if shares.ndim > 2 else shares
    if mode == "top":
        return (mean >= mean.quantile(quantile, -1, keepdim=True)).to(mean.dtype)
    return mean / mean.amax(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)


def _watch(
    model: Any, inputs: Mapping[str, Any], tower: VisionTower, *, every: bool, parity: bool
) -> dict[str, Tensor]:
    """Attention that tokens of the language model get in the tower: `first`, `late` from the class token,
    `received` from all patches in the first layer; for parity `rows`, sums over what each position sees."""
    prefix, every = tower.num_prefix, every or not tower.num_prefix
    positions, device = len(tower.places), tower.places.device
    late_site = tower.sites[-2 if len(tower.sites) > 1 else -1]
    watched = {tower.sites[0], late_site}
    from_class = {name: torch.zeros(positions, device=device) for name in watched}
    received = {name: torch.zeros(positions, device=device) for name in watched}
    sums: list[Tensor] = []

    def note(call: Call) -> None:
        name = call.site.name
        if name not in watched:
            return
        count = call.query.shape[1]
        begin = 0 if prefix else call.site.rows.start  # towers with a class token see an image a row
        stop = count if every and (name == tower.sites[0] or not prefix) else 1
        per_row: list[Tensor] = []
        for start in range(0, stop, CHUNK):
            here = slice(start, min(start + CHUNK, stop))
            scores = scores_of(call, call.query[:, here], call.key, here)
            hidden = hidden_of(call, here, call.key.shape[1], scores.device)
            weights = (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(-1)
            if start == 0 and prefix:
                from_class[name] += weights[:, :, 0, prefix:].sum(1).flatten()
            patches = weights.mean(1)[:, max(prefix - start, 0) :, prefix:].sum(1)  # [B, N]
            received[name][begin : begin + patches.numel()] += patches.flatten()
            per_row.append(weights.mean(1).sum(-1))
        if parity and name == tower.sites[0]:
            sums.append(torch.cat(per_row, 1).flatten())

    features = getattr(model, "get_image_features", None) or model.model.get_image_features
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    with torch.no_grad(), seam.attention(model, note):
        features(**given)

    def by_token(values: Tensor) -> Tensor:
        """The mean over the positions that are merged to a token."""
        size = torch.zeros(tower.num_tokens, device=device).index_add_(
            0, tower.places, torch.ones_like(values)
        )
        return torch.zeros_like(size).index_add_(0, tower.places, values) / size

    asked = from_class if prefix else received
    found = {"first": by_token(asked[tower.sites[0]]), "late": by_token(asked[late_site])}
    if every:
        found["received"] = by_token(received[tower.sites[0]])
        if parity and prefix:
            found["rows"] = torch.cat(sums)
    return found
