"""Local attention for one site of a host: head groups with their own patterns, prefix tokens, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nearfield.core import per_dim
from nearfield.hosts.seam import Site
from nearfield.ops.dense import dense_attention
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention

if TYPE_CHECKING:
    from nearfield.plan.pattern import SitePlan


def attend(
    query: Float[Tensor, "b n heads d"],
    key: Float[Tensor, "b m kv_heads d"],
    value: Float[Tensor, "b m kv_heads dv"],
    site: Site,
    plan: SitePlan,
    *,
    key_mask: Bool[Tensor, "b m"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b n heads dv"]:
    """Attention in which every key/value-head group of `plan` sees what its pattern shows, the rest all.

    Of a ViT's class and register tokens (`site.num_prefix`) each sees all tokens and is seen by all; the
    patches behind them see their neighborhood on `site.grid`. Heads of one pattern run as one call. A causal
    site may have fewer queries than keys, aligned at the end. `key_mask`: True may be seen.
    """
    num_kv_heads = key.shape[2]
    chosen = _by_pattern(plan, site, num_kv_heads)
    if len(chosen) == 1:
        return _attend(query, key, value, site, next(iter(chosen)), key_mask, scale, backend)
    share = query.shape[2] // num_kv_heads
    found: dict[int, Tensor] = {}
    for pattern, kv_heads in chosen.items():
        runs = _runs(kv_heads)
        out = _attend(
            _take(query, runs, share),
            _take(key, runs),
            _take(value, runs),
            site,
            pattern,
            key_mask,
            scale,
            backend,
        )
        pieces = out.split([len(run) * share for run in runs], dim=2)
        found.update({run.start: piece for run, piece in zip(runs, pieces, strict=True)})
    return torch.cat([found[start] for start in sorted(found)], dim=2)


def key_mask_of(
    mask: Shaped[Tensor, "..."] | None, batch: int, num_keys: int, is_causal: bool
) -> Bool[Tensor, "b m"] | None:
    """The padding in a complete mask, as `[B, keys]` with True where a key may be seen; None where all may.

    Raises `ValueError` for a mask that says more than padding (and, on a causal site, causality).
    """
    if mask is None:
        return None
    given = tuple(mask.shape)
    if mask.dtype != torch.bool:
        seen = mask == 0
        if not (seen | (mask <= torch.finfo(mask.dtype).min) | mask.isneginf()).all():
            raise ValueError(f"The attention mask of shape {given} adds a bias to the scores. {_ONLY}")
        mask = seen
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask.expand(*mask.shape[:3], num_keys)
    for dim in (0, 1) if is_causal else (0, 1, 2):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    rows = mask.shape[2]
    # The last query sees every key that is no padding, causal or not; as padding it may itself see nothing.
    keys = mask[:, :1, -1:]
    blind = ~keys.any(-1, keepdim=True)
    if rows > 1 and blind.any():
        keys = keys | (blind & mask[:, :1].any(-2, keepdim=True))
    wanted = keys & _causal(rows, num_keys, mask.device) if is_causal and rows > 1 else keys
    wrong = ~(mask == wanted).all(-1)  # [B, H, rows]
    if wrong.any():
        # A query that is padding may see every key or none: hosts let it, nobody reads it.
        idle = torch.zeros_like(wrong)
        if rows == num_keys or (is_causal and rows < num_keys):
            idle |= ~keys[:, 0, :, -rows:]
        odd = mask[wrong]
        if (wrong & ~idle).any() or (odd.any(-1) & ~odd.all(-1)).any():
            raise ValueError(f"The attention mask of shape {given} is more than padding. {_ONLY}")
    return keys[:, 0, 0].expand(batch, num_keys)


_ONLY = "Local attention takes a mask of padded keys, and causality on a causal site. Leave such a site full."


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    site: Site,
    pattern: Neighborhood | None,
    key_mask: Tensor | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    if pattern is None:
        return dense(query, key, value, is_causal=site.is_causal, key_mask=key_mask, scale=scale)
    grid, prefix = _grid(site, pattern, query.shape[1], key.shape[1])
    options: dict[str, Any] = {"scale": scale, "backend": backend}
    if not prefix:
        queries = query if site.is_causal else query.unflatten(1, grid)
        seen = None if key_mask is None else key_mask.unflatten(1, grid)
        out = neighborhood_attention(
            queries, key.unflatten(1, grid), value.unflatten(1, grid), pattern, key_mask=seen, **options
        )
        return out.flatten(1, -3)
    if key_mask is not None:
        raise ValueError(
            f"Site {site.name!r} has {prefix} class tokens and a padding mask. Give one or the other."
        )
    out = neighborhood_attention(
        query[:, prefix:].unflatten(1, grid),
        key[:, prefix:].unflatten(1, grid),
        value[:, prefix:].unflatten(1, grid),
        pattern,
        additional_keys=key[:, :prefix],
        additional_values=value[:, :prefix],
        **options,
    )
    first = dense(query[:, :prefix], key, value, is_causal=False, scale=scale)
    return torch.cat([first, out.flatten(1, -3)], dim=1)


def dense(
    query: Float[Tensor, "b n heads d"],
    key: Float[Tensor, "b m kv_heads d"],
    value: Float[Tensor, "b m kv_heads dv"],
    *,
    is_causal: bool,
    key_mask: Bool[Tensor, "b m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b n heads dv"]:
    """Full attention, in the layout of the house; fewer queries than keys are aligned at the end."""
    mask = None if key_mask is None else key_mask[:, None, None]
    return dense_attention(query, key, value, mask=mask, is_causal=is_causal, scale=scale)


def _causal(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    shape = (num_queries, num_keys)
    return torch.ones(shape, dtype=torch.bool, device=device).tril_(num_keys - num_queries)


def _by_pattern(plan: SitePlan, site: Site, num_kv_heads: int) -> dict[Neighborhood | None, list[int]]:
    """Pattern -> its key/value heads, in order."""
    if plan.num_kv_heads != num_kv_heads:
        raise ValueError(
            f"The plan of site {site.name!r} is for {plan.num_kv_heads} key/value heads; the site has "
            f"{num_kv_heads}. Plan every head of the site once."
        )
    chosen: dict[Neighborhood | None, list[int]] = {}
    for group in plan.groups:
        chosen.setdefault(group.pattern, []).extend(group.kv_heads)
    return {pattern: sorted(heads) for pattern, heads in chosen.items()}


def _grid(site: Site, pattern: Neighborhood, num_queries: int, num_keys: int) -> tuple[tuple[int, ...], int]:
    """The grid of the keys and the number of prefix tokens, after checks that a pattern can be applied."""
    if site.role != "self" or site.grid is None:
        kind = "no grid that is known" if site.role == "self" else f"{site.role} attention"
        raise ValueError(
            f"Site {site.name!r} is {kind}: a local pattern needs self-attention on a grid. Leave it full."
        )
    tokens = site.num_prefix
    size = 1
    for side in site.grid:
        size *= side
    if tokens + size != num_keys or (num_queries != num_keys and not site.is_causal):
        raise ValueError(
            f"Site {site.name!r} got {num_queries} queries and {num_keys} keys for {tokens} prefix "
            f"tokens and a grid of {site.grid}. Give the grid that these tokens form."
        )
    causal = set(per_dim("is_causal", pattern.is_causal, len(site.grid)))
    if causal != {site.is_causal} or (site.is_causal and (tokens or len(site.grid) > 1)):
        allowed = "causal in its one dimension" if site.is_causal else "not causal"
        raise ValueError(f"Site {site.name!r} is {allowed}; its pattern {pattern} must be so too.")
    return site.grid, tokens


def _runs(heads: Sequence[int]) -> list[range]:
    """Ascending heads as runs of neighbours: slices, not copies."""
    runs: list[range] = []
    for head in heads:
        if runs and runs[-1].stop == head:
            runs[-1] = range(runs[-1].start, head + 1)
        else:
            runs.append(range(head, head + 1))
    return runs


def _take(heads: Tensor, runs: list[range], share: int = 1) -> Tensor:
    """The chosen runs of heads of `[B, N, H, D]`: a view where there is one run."""
    parts = [heads[:, :, run.start * share : run.stop * share] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
