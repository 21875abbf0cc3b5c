"""What a pattern would cost a model, before it is converted: one forward and one checkpointed backward.

Where a site's output would move by Δ, the loss moves to second order by ½ E[(g·Δ)²], g being the gradient of
the loss with respect to that output (the Fisher form of the Gauss-Newton term; the first-order term has mean
zero on a trained model). Δ is had exactly, for every candidate pattern and key/value-head group, on sampled
query rows; nothing of size N x N is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nearfield.hosts.seam import Call, Site, attention
from nearfield.ops.dense import dense_attention
from nearfield.ops.neighborhood import Neighborhood

BLOCK = 64  # neighbouring query rows that are sampled together: their windows overlap


@dataclass(frozen=True)
class SiteDamage:
    """Predicted loss added at one site: `damage[group, candidate]` on the sampled rows, scaled to all that
    count; `recall` the same on the rows that answer questions (zeros where none were named)."""

    site: Site
    head_dim: int
    candidates: tuple[Neighborhood, ...]
    damage: Float[Tensor, "kv_heads candidates"]
    recall: Float[Tensor, "kv_heads candidates"]
    needle_mass: Float[Tensor, " kv_heads"]
    distance: Float[Tensor, " heads"]  # mean |query - key| in tokens on the sampled rows, prefix tokens aside


def sensitivity(
    model: nn.Module,
    objective: Callable[[nn.Module], Tensor],
    candidates: Callable[[Site], Sequence[Neighborhood]],
    *,
    rows: range,
    answer_rows: Sequence[int] = (),
    needle: Sequence[int] = (),
    num_blocks: int = 16,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[SiteDamage]:
    """Per attention site and key/value-head group, the loss that each candidate pattern would add.

    `objective(model)` runs the model on one sequence and gives the *summed* loss; of the query rows `rows`
    that it depends on, `num_blocks` runs of 64 are sampled (all, if there are no more). `needle` names keys
    (tokens that an answer is read from): the largest share of attention that a query head of a group puts on
    them from one of the rows between the first and the last of `answer_rows` is reported.

    Raises `ValueError` where a gradient is not finite, naming the site.
    """
    watch = _Watch(candidates, rows, tuple(answer_rows), tuple(needle), num_blocks, generator, progress)
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:  # gradients of activations are asked, none of weights
        parameter.requires_grad_(False)
    try:
        with attention(model, watch), torch.enable_grad(), _checkpointed(model, watch):
            loss = objective(model)
            watch.backward = True
            loss.backward()
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    return [watch.found[name] for name in watch.order]


class _Watch:
    """The handler: full attention, and, once its gradient is known, the damage of each candidate."""

    def __init__(
        self,
        candidates: Callable[[Site], Sequence[Neighborhood]],
        rows: range,
        answer_rows: tuple[int, ...],
        needle: tuple[int, ...],
        num_blocks: int,
        generator: torch.Generator | None,
        progress: Callable[[int, int], None] | None,
    ):
        self.candidates, self.rows, self.answer_rows, self.needle = candidates, rows, answer_rows, needle
        self.progress = progress
        self.starts, self.share = _sample(rows, num_blocks, generator)
        self.backward, self.inside = False, 0  # inside so many checkpointed layers
        self.live: dict[str, tuple[Call, Tensor]] = {}
        self.order: list[str] = []
        self.views: dict[tuple[Site, tuple[Neighborhood, ...], range], _View] = {}
        self.found: dict[str, SiteDamage] = {}

    def __call__(self, call: Call) -> Tensor | None:
        if call.site.role != "self" or call.mask is not None:
            raise ValueError(
                f"Site {call.site.name}: sensitivity is measured on one unpadded sequence of self-attention."
            )
        out = dense_attention(
            call.query, call.key, call.value, is_causal=call.site.is_causal, scale=call.scale
        )
        name = call.site.name
        if self.backward or not self.inside:
            # a recomputation, or a site that none will reach: these tensors live until its gradient arrives
            self.live[name] = (call, out.detach())
        if not self.backward:
            self.order.append(name)
            out.requires_grad_()  # nothing before a first site outside any layer asks for gradients
            out.register_hook(lambda gradient: self.weigh(name, gradient))
        return out

    def weigh(self, name: str, gradient: Tensor) -> None:
        call, out = self.live.pop(name)
        if not gradient.isfinite().all():
            raise ValueError(
                f"Site {name}: the gradient of its output is not finite. Check the weights and the input."
            )
        with torch.no_grad():
            self.found[name] = self._damage(call, out, gradient)
        if self.progress:
            self.progress(len(self.found), len(self.order))

    def view(self, call: Call, patterns: tuple[Neighborhood, ...], rows: range) -> _View:
        site = replace(call.site, name="")
        if (site, patterns, rows) not in self.views:
            self.views[site, patterns, rows] = _view(
                site, patterns, call.key.shape[1], rows, call.query.device
            )
        return self.views[site, patterns, rows]

    def _damage(self, call: Call, out: Tensor, gradient: Tensor) -> SiteDamage:
        site = call.site
        patterns = tuple(self.candidates(site))
        text, recall = (torch.zeros(site.num_kv_heads, len(patterns)) for _ in range(2))
        mass, distance = torch.zeros(site.num_kv_heads), torch.zeros(site.num_heads)
        for start in self.starts:
            span = range(start, min(start + BLOCK, self.rows.stop))
            moved, _, far = _moved(call, out, gradient, self.view(call, patterns, span), span)
            text += moved * self.share
            distance += far / len(self.starts)
        if self.answer_rows:
            span = range(min(self.answer_rows), max(self.answer_rows) + 1)
            moved, mass, _ = _moved(call, out, gradient, self.view(call, patterns, span), span, self.needle)
            recall += moved
        return SiteDamage(site, call.query.shape[-1], patterns, text / 2, recall / 2, mass, distance)


def _moved(
    call: Call,
    out: Tensor,
    gradient: Tensor,
    view: _View,
    rows: range,
    needle: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ over `rows` of (g·Δ)² per (group, pattern), Δ a group's joint output; mass on the needle per group;
    mean distance per head."""
    site = call.site
    groups, num_keys = site.num_kv_heads, call.key.shape[1]
    stop = rows.stop if site.is_causal else num_keys
    span = slice(rows.start, rows.stop)

    def grouped(x: Tensor) -> Tensor:  # [B, n, H, D] -> [B, groups, heads of a group, n, D]
        return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)

    q, g, full = (grouped(x[:, span]).float() for x in (call.query, gradient, out))
    k = call.key[:, :stop].transpose(1, 2).unsqueeze(2).float()  # [B, groups, 1, keys, D]
    v = call.value[:, :stop].transpose(1, 2).unsqueeze(2).float()
    scores = (q @ k.transpose(-1, -2)).mul_(call.scale)
    if view.future is not None:
        scores.masked_fill_(view.future, float("-inf"))
    share = scores.softmax(-1)  # [B, groups, heads, rows, keys]
    found = torch.zeros(groups, len(view.rings))
    mass, moment = share.new_zeros((*share.shape[:-1], 1)), torch.zeros_like(full)
    for at, (is_nested, pieces) in enumerate(view.rings):
        if not is_nested:
            mass, moment = torch.zeros_like(mass), torch.zeros_like(moment)
        for part, ring in pieces:
            weight = share[..., part] * ring
            mass = mass + weight.sum(-1, keepdim=True)
            moment = moment + weight @ v[..., part, :]
        moved = moment / mass.clamp_min(1e-30) - full
        moved[..., : max(site.num_prefix - rows.start, 0), :] = 0  # prefix tokens keep full attention
        found[:, at] = (g * moved).sum((2, 4)).square().sum((0, 2)).cpu()
    on_needle = share[..., list(needle)].sum(-1).amax((0, 2, 3)).cpu() if needle else torch.zeros(groups)
    distance = (share * view.far).sum((0, 3, 4)) / (share * view.between).sum((0, 3, 4)).clamp_min(1e-30)
    return found, on_needle, distance.flatten().cpu()


@dataclass(frozen=True)
class _View:
    """What some query rows see, the same for every layer: made once.

    `rings[i]` is what candidate i shows beyond the one before, as (columns, mask) pieces, and whether it
    shows all that the one before did: nested windows are then summed outwards, each key once.
    """

    future: Tensor | None
    rings: list[tuple[bool, list[tuple[slice, Tensor]]]]
    far: Tensor  # Euclidean distance of row and key on the grid, 0 where either is a prefix token
    between: Tensor  # where neither is


def _view(
    site: Site, patterns: tuple[Neighborhood, ...], num_keys: int, rows: range, device: torch.device
) -> _View:
    stop = rows.stop if site.is_causal else num_keys
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    key = torch.arange(stop, device=device)[None]
    before = torch.zeros(len(rows), stop, dtype=torch.bool, device=device)
    rings = []
    for pattern in patterns:
        seen = _visible(pattern, site, num_keys, row, key)
        is_nested = not bool((before & ~seen).any())
        ring = seen & ~before if is_nested else seen
        rings.append((is_nested, [(part, ring[:, part].float()) for part in _runs(ring)]))
        before = seen
    prefix, sides = site.num_prefix, site.grid or ()
    a, b = (row - prefix).clamp(min=0), (key - prefix).clamp(min=0)
    squares = torch.zeros(1, device=device)
    for side in reversed(sides[1:]):
        squares = squares + (a % side - b % side).square()
        a, b = a // side, b // side
    between = (row >= prefix) & (key >= prefix)
    far = (squares + (a - b).square()).sqrt() * between
    return _View(key > row if site.is_causal else None, rings, far, between.float())


def _runs(ring: Tensor) -> Iterator[slice]:
    """The column ranges of `ring` that hold anything: sinks stand far from the window and are taken apart."""
    used = ring.any(0).nonzero().flatten()
    if len(used):
        cuts = ((used[1:] - used[:-1]) > BLOCK).nonzero().flatten().tolist()
        first = 0
        for cut in [*cuts, len(used) - 1]:
            yield slice(int(used[first]), int(used[cut]) + 1)
            first = cut + 1


def _visible(pattern: Neighborhood, site: Site, num_keys: int, rows: Tensor, keys: Tensor) -> Tensor:
    prefix = site.num_prefix
    bound = pattern.on(site.grid if site.grid is not None else (num_keys,))
    seen = bound.mask_mod(None, None, (rows - prefix).clamp(min=0), (keys - prefix).clamp(min=0))
    if prefix:
        seen = seen & (keys >= prefix) | (keys < prefix) | (rows < prefix)
    return seen & (keys <= rows) if site.is_causal else seen


def _sample(rows: range, num_blocks: int, generator: torch.Generator | None) -> tuple[list[int], float]:
    """First rows of the sampled blocks, one drawn in each of `num_blocks` strata; the scale to all rows."""
    length = len(rows)
    if length <= num_blocks * BLOCK:
        return list(range(rows.start, rows.stop, BLOCK)), 1.0
    stratum = length / num_blocks
    drawn = torch.rand(num_blocks, generator=generator).tolist()
    starts = [rows.start + int(i * stratum + u * (stratum - BLOCK)) for i, u in enumerate(drawn)]
    return starts, length / (num_blocks * BLOCK)


@contextmanager
def _checkpointed(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Each entry of the host's stacks of layers recomputes its inside in the backward pass."""
    blocks = list(_layers(model))
    before = [vars(block).get("forward") for block in blocks]  # a host's own entry may lie there

    def recomputed(forward: Callable[..., object]) -> Callable[..., object]:
        def run(hidden: Tensor, *args: object, **kwargs: object) -> object:
            if not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
            watch.inside += 1
            try:
                return checkpoint(lambda h: forward(h, *args, **kwargs), hidden, use_reentrant=False)
            finally:
                watch.inside -= 1

        return run

    for block in blocks:
        block.forward = recomputed(block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost module lists: the layers of every stack."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            yield from module
        else:
            yield from _layers(module)
