"""The centroids of routing attention: started from data, moved by averages, never by gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from nearfield.ops.checks import no_autocast
from nearfield.ops.routing.members import similarity, unit, unit_dtype


class Centroids(NamedTuple):
    """Directions of clusters, and the running averages that they are made of."""

    means: Tensor  # [H, C, D]: sums / counts, brought to length one
    counts: Tensor  # [H, C]: running average of tokens per step
    sums: Tensor  # [H, C, D]: running average of the sum of their directions


@torch.no_grad()
def assign(
    x: Float[Tensor, "b n heads dim"], means: Float[Tensor, "heads clusters dim"]
) -> Int[Tensor, "b n heads"]:
    """The number of the centroid nearest in direction to each token, the first of equals."""
    return similarity(x, means).argmax(2).transpose(1, 2)


@torch.no_grad()
def kmeans_init(
    x: Float[Tensor, "b n heads dim"],
    num_clusters: int,
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    num_steps: int = 10,
    generator: Generator | None = None,
) -> Centroids:
    """Centroids of the directions in `x` by spherical k-means from tokens drawn at random."""
    batch, num_tokens, num_heads, _ = x.shape
    there = torch.ones(batch, num_tokens, dtype=torch.bool, device=x.device) if mask is None else mask
    if not 1 <= num_clusters <= int(there.sum()):
        raise ValueError(
            f"num_clusters={num_clusters} for {int(there.sum())} tokens. "
            "Give at least 1, and as many tokens as clusters."
        )
    device = x.device if generator is None else generator.device
    lots = torch.rand(num_heads, batch * num_tokens, generator=generator, device=device).to(x.device)
    drawn = lots.masked_fill(~there.flatten(), -1).topk(num_clusters).indices  # [H, C]
    means = unit(x).flatten(0, 1).transpose(0, 1).gather(1, drawn[..., None].expand(-1, -1, x.shape[-1]))
    state = Centroids(means, means.new_ones(means.shape[:-1]), means)
    for _ in range(num_steps):
        state = ema_update(state, x, decay=0.0, mask=mask)
    return state


@torch.no_grad()
def ema_update(
    state: Centroids,
    x: Float[Tensor, "b n heads dim"],
    *,
    decay: float = 0.999,
    mask: Bool[Tensor, "b n"] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    normalise: bool = True,
) -> Centroids:
    """Centroids after one more batch of tokens, as running averages of the tokens nearest to each.

        counts = decay * counts + (1 - decay) * n;   sums = decay * sums + (1 - decay) * sum of directions

    Start from `kmeans_init`, or from `Centroids(means, ones, means)`: a start at zero counts would let the
    first batch throw the means far off. A cluster that got no token keeps everything. Masked tokens do not
    count. `reduce` adds a tensor up over processes, and every process must call it:

        ema_update(state, key, reduce=lambda x: torch.distributed.nn.functional.all_reduce(x))
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must be at least 0 and below 1.")
    directions = unit(x)
    number = torch.arange(state.means.shape[1], device=x.device)
    hot = assign(x, state.means)[..., None] == number  # [B, N, H, C]
    if mask is not None:
        hot = hot & mask[..., None, None]
        directions = directions.masked_fill(~mask[..., None, None], 0)
    n = hot.sum((0, 1)).to(directions.dtype)
    with no_autocast(x):
        total = torch.einsum("bnhc,bnhd->hcd", hot.to(directions.dtype), directions)
    if reduce is not None:
        n, total = reduce(n), reduce(total)
    stays = n == 0
    counts = torch.where(stays, state.counts, decay * state.counts + (1 - decay) * n)
    sums = torch.where(stays[..., None], state.sums, decay * state.sums + (1 - decay) * total)
    means = sums / counts[..., None]
    if normalise:
        means = F.normalize(means, dim=-1)
    return Centroids(torch.where(stays[..., None], state.means, means), counts, sums)


def commitment_loss(
    x: Float[Tensor, "b n heads dim"],
    means: Float[Tensor, "heads clusters dim"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared distance of tokens, at length one, from their centroid: pulls tokens, not centroids.

    The paper adds 1e-4 of it to the loss.
    """
    index = assign(x, means).transpose(1, 2)  # [B, H, N]
    goal = means.detach().to(unit_dtype(x)).expand(x.shape[0], *means.shape)
    goal = goal.gather(2, index[..., None].expand(*index.shape, x.shape[-1])).transpose(1, 2)
    distance = (unit(x) - goal).square().sum(-1)  # [B, N, H]
    if mask is None:
        return distance.mean()
    total = distance.masked_fill(~mask[..., None], 0).sum()
    return total / (mask.sum() * x.shape[2]).clamp(min=1)
