"""How local attention is, head by head, from queries and keys alone and without a map of all pairs.

Rows of queries go through in chunks: scores, softmax, a few sums. Definitions, for attention `A` whose rows
sum to one over the keys a query may see, and prefix tokens (class, registers) before a grid of `N` tokens:

- distance: mean over queries of `sum_j A[i, j] |place_i - place_j|`: tokens, or Euclidean patches on grids
- inside: the share of mass on keys inside a window
- entropy: `-sum_j A[i, j] log A[i, j]` in nats, mean over queries
- sink mass: the share of mass on the prefix tokens; without a prefix, on the first `num_sinks` unmasked keys
- nmi: `I / sqrt(log N * H(k))`, with `p(k)` the mean of the rows and `I = H(k) - mean row entropy` the mutual
  information of query and key. 0: every query has the same map; 1: each query has one key of its own.

Prefix tokens are never rows. Distance, inside and nmi look at grid tokens only, rows renormalised to them;
entropy and sink mass see the whole row. Padded tokens are neither rows nor keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfield.ops.neighborhood.geometry import Neighborhood

Window = int | tuple[int, ...]
Rows = Literal["all", "last_half"] | int

WORKSPACE = 64 << 20  # bytes that the maps of one chunk may take together
MAPS_AT_ONCE = 3  # per head: scores, their exponentials, one temporary
EMPTY = -1e4  # a score below the row's largest whose exponential is exactly 0 and whose product with 0 is 0


class HeadStatistics(NamedTuple):
    """Per sequence and head, each `[B, H]` in float64; None where the quantity has no meaning.

    `num_rows` counts the query rows behind each mean; where it is 0 the others are NaN.
    """

    distance: Tensor | None
    inside: dict[str, Tensor]
    entropy: Tensor
    sink_mass: Tensor
    nmi: Tensor | None
    num_rows: Tensor


def label(window: Window) -> str:
    """The name of a window in reports: 7 is "7", (7, 9) is "7x9"."""
    return str(window) if isinstance(window, int) else "x".join(map(str, window))


def window_pattern(window: Window, grid: tuple[int, ...], is_causal: bool) -> Neighborhood:
    """The neighborhood that "inside a window" means on this grid, cut to the grid where it is larger.

    Causal: the last `window` tokens. One dimension: centred, cut at the ends. Several: centred, shifted
    inwards at the borders.
    """
    if is_causal or len(grid) == 1:
        return Neighborhood(window, is_causal=is_causal, border="shift" if is_causal else "truncate")
    sides = (window,) * len(grid) if isinstance(window, int) else window
    return Neighborhood(tuple(min(size, side) for size, side in zip(sides, grid, strict=True)))


def default_windows(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Windows worth asking about on this grid: 16, 64, 256 … tokens, or squares of 3, 7, 13 … patches."""
    sizes = (16, 64, 256, 1024, 4096) if len(grid) == 1 else (3, 7, 13, 25)
    return tuple(size for size in sizes if size < max(grid))


def attention_statistics(
    query: Float[Tensor, "b n heads d"],
    key: Float[Tensor, "b m kv_heads d"],
    *,
    grid: tuple[int, ...] | None = None,
    num_prefix: int = 0,
    is_causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    windows: Sequence[Window] = (),
    num_sinks: int = 4,
    rows: Rows = "all",
    generator: torch.Generator | None = None,
    workspace: int = WORKSPACE,
) -> HeadStatistics:
    """Locality of each head of one attention call; memory is linear in the tokens.

    `grid` is the grid of the keys after the first `num_prefix`; None (cross-attention) leaves distance and
    windows out. `mask` is True where a query may see a key, or is added to the scores; it broadcasts to
    `[B, H, N, M]`. Causal queries stand at the end of the keys; a mask with a row for each query is complete
    and causality is not added to it. `rows="last_half"` measures the later half of the queries, a number that
    many drawn at random; nmi is then that of the chosen rows. nmi is None for causal attention, where rows
    differ by construction.
    """
    batch, num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads = key.shape[1], key.shape[2]
    _check(num_queries, num_keys, num_heads, num_kv_heads, grid, num_prefix, is_causal)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_rows(num_queries - num_prefix, rows, generator).to(query.device) + num_prefix
    mask = mask if mask is None else mask[(None,) * (4 - mask.ndim)]
    add_causal = is_causal and (mask is None or mask.shape[-2] < num_queries)
    visible = _visible_keys(mask, batch, num_keys, key.device)
    features = _Features(grid, windows, is_causal, dtype, query.device) if grid else None
    per_row = dtype.itemsize * num_keys * (MAPS_AT_ONCE * num_heads + (features.count if features else 0) + 1)
    size = max(1, workspace // per_row)

    found = []
    for b in range(batch):
        mine = chosen
        if grid is not None:  # a padded query is a padded key of the same token
            mine = chosen[visible[b, chosen + num_keys - num_queries]]
        keys = key[b].to(dtype).transpose(0, 1)  # [Hkv, M, D]
        sinks = torch.arange(num_prefix, device=key.device)
        if not num_prefix:
            sinks = visible[b].nonzero()[:num_sinks, 0]
        sums = _Sums(num_heads, num_keys - num_prefix, features.count if features else 0, query.device)
        for part in mine.split(size):
            places = part + num_keys - num_queries
            seen = int(places[-1]) + 1 if add_causal else num_keys
            chunk = query[b, part].to(dtype).transpose(0, 1).reshape(num_kv_heads, -1, query.shape[-1])
            scores = torch.matmul(chunk, keys[:, :seen].transpose(1, 2)).mul_(scale)
            scores = scores.view(num_heads, len(part), seen)
            _hide(scores, mask, b, part, places, visible[b], add_causal)
            linear = features(places - num_prefix, seen) if features else None
            sums.add(scores, num_prefix, sinks[sinks < seen], linear)
        found.append(sums)
    means = [torch.stack(values) for values in zip(*(sums.means() for sums in found), strict=True)]
    linear, entropy, sink_mass, nmi, num_rows = means
    inside = {label(window): linear[..., 1 + c] for c, window in enumerate(windows)} if features else {}
    return HeadStatistics(
        linear[..., 0] if features else None, inside, entropy, sink_mass, None if is_causal else nmi, num_rows
    )


def choose_rows(num_rows: int, rows: Rows, generator: torch.Generator | None = None) -> Int[Tensor, " rows"]:
    """The query rows to measure, ascending: all, the later half, or so many drawn without replacement."""
    if rows == "all":
        return torch.arange(num_rows)
    if rows == "last_half":
        return torch.arange(num_rows // 2, num_rows)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows={rows!r} is unknown. Give 'all', 'last_half', or how many rows to draw.")
    return torch.randperm(num_rows, generator=generator)[:rows].sort().values


class _Features:
    """What a unit of mass on key j adds for query i: its distance, then 1 inside each window. `[C, R, M]`."""

    def __init__(
        self,
        grid: tuple[int, ...],
        windows: Sequence[Window],
        is_causal: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.bounds = [window_pattern(window, grid, is_causal).on(grid) for window in windows]
        self.origin = Neighborhood(1).on(grid)
        self.count, self.dtype = 1 + len(windows), dtype
        self.sides = [torch.arange(side, device=device) for side in grid]

    def __call__(self, places: Int[Tensor, " rows"], seen: int) -> Float[Tensor, "features rows keys"]:
        """For queries at these grid places, over the first `seen` keys."""
        coordinates = self.origin.coordinates(places)
        sides = self.sides if len(self.sides) > 1 else [self.sides[0][:seen]]
        gaps = [(i[:, None] - side).to(self.dtype) for i, side in zip(coordinates, sides, strict=True)]
        out = gaps[0].new_empty(self.count, len(places), prod(map(len, sides)))
        if len(gaps) == 1:
            out[0] = gaps[0].abs_()
        else:
            out[0] = _outer([gap.square_() for gap in gaps], torch.add).sqrt_()
        for c, bound in enumerate(self.bounds, start=1):
            shown = []
            for axis, i, side in zip(bound.axes, coordinates, sides, strict=True):
                start, end = axis.interval(i)
                shown.append((side >= start[:, None]) & (side < end[:, None]))
            out[c] = _outer(shown, torch.logical_and)
        return out


class _Sums:
    """Running sums over the rows of one sequence."""

    def __init__(self, num_heads: int, num_tokens: int, num_features: int, device: torch.device) -> None:
        fine = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.num_rows, self.entropy, self.sink_mass, self.grid_entropy = torch.zeros(
            4, num_heads, dtype=fine, device=device
        )
        self.linear = torch.zeros(num_heads, num_features, dtype=fine, device=device)
        self.received = torch.zeros(num_heads, num_tokens, dtype=fine, device=device)

    def add(
        self,
        scores: Float[Tensor, "heads rows keys"],
        num_prefix: int,
        sinks: Int[Tensor, " sinks"],
        features: Float[Tensor, "features rows grid_keys"] | None,
    ) -> None:
        """Adds a chunk of rows; `scores` (-inf where hidden) is used up."""
        peak = scores.amax(-1)
        live = peak > -math.inf  # a row may be hidden for one head and open for another
        scores.sub_(peak.masked_fill(~live, 0.0)[..., None]).clamp_(min=EMPTY)
        mass = scores.exp()
        surprise = scores.mul_(mass)
        tiny = torch.finfo(mass.dtype).tiny  # for rows that see nothing, or whose mass all lies on the prefix
        total, grid_mass = mass.sum(-1).clamp(min=tiny), mass[..., num_prefix:]
        on_grid = total if not num_prefix else grid_mass.sum(-1)
        on_grid = on_grid.clamp(min=tiny)
        entropy = total.log() - surprise.sum(-1) / total
        grid_entropy = on_grid.log() - surprise[..., num_prefix:].sum(-1) / on_grid if num_prefix else entropy
        self.num_rows += live.sum(-1)
        self.entropy += (entropy * live).sum(-1)
        self.grid_entropy += (grid_entropy * live).sum(-1)
        self.sink_mass += (mass[..., sinks].sum(-1) / total * live).sum(-1)
        share = live / on_grid
        self.received[:, : grid_mass.shape[-1]] += torch.einsum("hrm,hr->hm", grid_mass, share)
        if features is not None:
            found = torch.einsum("hrm,crm->hrc", grid_mass, features)
            self.linear += torch.einsum("hrc,hr->hc", found, share)

    def means(self) -> tuple[Tensor, ...]:
        """Linear features, entropy, sink mass, nmi and the number of rows, per head."""
        count = self.num_rows
        of_keys = self.received / count[:, None]
        of_keys = -torch.xlogy(of_keys, of_keys).sum(-1)
        shared = (of_keys - self.grid_entropy / count).clamp(min=0)
        scale = (count.log() * of_keys).sqrt()
        # one row, or all rows on one key: nothing that a query could tell about its key
        nmi = torch.where(scale > 1e-6, (shared / scale).clamp(max=1), 0 * shared)
        return self.linear / count[:, None], self.entropy / count, self.sink_mass / count, nmi, count


def _check(
    num_queries: int,
    num_keys: int,
    num_heads: int,
    num_kv_heads: int,
    grid: tuple[int, ...] | None,
    num_prefix: int,
    is_causal: bool,
) -> None:
    """Refuses head counts and grids that do not fit the tokens."""
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} key/value heads.")
    if grid is not None and prod(grid) + num_prefix != num_keys:
        raise ValueError(
            f"grid={grid} with {num_prefix} prefix tokens has {prod(grid) + num_prefix} tokens, "
            f"the keys {num_keys}. Give the grid of the tokens after the prefix, or grid=None."
        )
    if grid is not None and num_queries != num_keys and not (is_causal and num_queries < num_keys):
        raise ValueError(
            f"{num_queries} queries on a grid of {num_keys} keys. "
            "Fewer queries than keys are for causal attention; give grid=None for cross-attention."
        )


def _visible_keys(
    mask: Tensor | None, batch: int, num_keys: int, device: torch.device
) -> Bool[Tensor, "b m"]:
    """Which keys any query of any head may see: the rest is padding."""
    if mask is None:
        return torch.ones(batch, num_keys, dtype=torch.bool, device=device)
    if mask.dtype == torch.bool:
        shown = mask.any(dim=1).any(dim=1)
    else:
        shown = mask.amax((1, 2)) > _hidden_below(mask)
    return shown.expand(batch, num_keys)


def _hidden_below(mask: Tensor) -> float:
    """An added mask hides a key by the lowest number of its type, or -inf."""
    return torch.finfo(mask.dtype).min / 2


def _hide(
    scores: Tensor,
    mask: Tensor | None,
    b: int,
    part: Tensor,
    places: Tensor,
    visible: Tensor,
    add_causal: bool,
) -> None:
    """Applies mask, padding and causality to a chunk of scores `[H, R, M]`, in place."""
    seen = scores.shape[-1]
    if add_causal:
        scores.masked_fill_(torch.arange(seen, device=scores.device) > places[:, None], -math.inf)
    if mask is None:
        return
    mask = mask[b if mask.shape[0] > 1 else 0][..., :seen]
    mask = mask[:, part] if mask.shape[1] > 1 else mask
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -math.inf)
    else:
        scores.add_(mask.to(scores.dtype)).masked_fill_(mask <= _hidden_below(mask), -math.inf)
    scores.masked_fill_(~visible[:seen], -math.inf)


def _outer(parts: list[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`[R, side]` per axis combined to `[R, all places]`."""
    out = parts[0]
    for part in parts[1:]:
        out = combine(out[:, :, None], part[:, None, :]).flatten(1)
    return out
