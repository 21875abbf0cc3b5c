"""From predicted damage to a plan that holds: options with seconds, the choice, trials, and the controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter

import torch
from torch import Tensor

from nearfield.hosts.local import attend
from nearfield.hosts.seam import Site
from nearfield.measure.sensitivity import SiteDamage
from nearfield.ops.neighborhood import Neighborhood
from nearfield.plan.choose import Choice, Option, choose
from nearfield.plan.pattern import GroupPlan, SitePlan

Clock = Callable[[Neighborhood | None], float]


def clock(site: Site, tokens: int, head_dim: int, *, repeats: int = 4) -> Clock:
    """Seconds of attention of one key/value-head group of a site, by pattern, measured here."""
    heads = site.num_heads // site.num_kv_heads
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, tokens, heads, head_dim, generator=generator)
    key = torch.randn(1, tokens, 1, head_dim, generator=generator)
    one = Site(site.name, site.role, site.grid, site.num_prefix, site.is_causal, heads, 1)
    known: dict[Neighborhood | None, float] = {}

    def seconds(pattern: Neighborhood | None) -> float:
        if pattern not in known:
            plan = SitePlan.uniform(site.name, 1, pattern)
            found = []
            with torch.no_grad():
                for _ in range(repeats + 1):  # the first builds what is cached
                    began = perf_counter()
                    attend(query, key, key, one, plan)
                    found.append(perf_counter() - began)
            known[pattern] = min(found[1:])  # other work on the machine only ever adds
        return known[pattern]

    return seconds


def planner_of(
    damages: Sequence[SiteDamage],
    tokens: int,
    tell: Callable[[str, float, float], None],
    recall_weight: float = 0.0,
) -> Planner:
    """A planner for measured damages, with the seconds of every candidate measured here."""
    clocks, known = [], {}
    for damage in damages:
        site = damage.site
        shape = (site.num_heads // site.num_kv_heads, damage.head_dim, site.grid, site.num_prefix)
        if shape not in known:
            known[shape] = clock(site, tokens, damage.head_dim)
            for at, pattern in enumerate([None, *damage.candidates]):
                known[shape](pattern)
                tell("time the patterns", at + 1, len(damage.candidates) + 1)
        clocks.append(known[shape])
    return Planner(damages, clocks, recall_weight)


@dataclass
class Planner:
    """Chooses a pattern per site and key/value-head group out of `damages`.

    `recall_weight` is how many nats of text loss one nat of answer loss counts for. `scale` multiplies what
    is predicted of a site, by name: trials show where the second order says too much (early layers, whose
    errors later ones undo) and where too little (late ones, whose tokens are too sure to have a gradient).
    """

    damages: Sequence[SiteDamage]
    clocks: Sequence[Clock]
    recall_weight: float = 0.0
    scale: dict[str, float] = field(default_factory=dict)

    def options(self) -> list[list[Option]]:
        """Per (site, group): every candidate, and full attention at no damage."""
        found = []
        for site, seconds in zip(self.damages, self.clocks, strict=True):
            total = self.weighed(site)
            full = Option(None, 0.0, seconds(None))
            for group in range(site.site.num_kv_heads):
                local = [
                    Option(pattern, float(total[group, at]), seconds(pattern))
                    for at, pattern in enumerate(site.candidates)
                ]
                found.append([full, *(option for option in local if option.seconds < full.seconds)])
        return found

    def weighed(self, site: SiteDamage) -> Tensor:
        """Damage `[group, candidate]` as the choice weighs it."""
        return self.scale.get(site.site.name, 1.0) * site.damage + self.recall_weight * site.recall

    def choose(self, budget: float) -> tuple[dict[str, SitePlan], Choice]:
        """The fastest plan whose predicted damage is within `budget` (nats per token)."""
        options = self.options()
        choice = choose(options, budget)
        return self.plan(choice.patterns(options)), choice

    def plan(self, patterns: Sequence[Neighborhood | None]) -> dict[str, SitePlan]:
        """Site plans from patterns in the order of the (site, group) items."""
        found, at = {}, 0
        for damage in self.damages:
            site = damage.site
            mine = patterns[at : at + site.num_kv_heads]
            at += site.num_kv_heads
            heads: dict[Neighborhood | None, list[int]] = {}
            for head, pattern in enumerate(mine):
                heads.setdefault(pattern, []).append(head)
            groups = tuple(GroupPlan(tuple(members), pattern) for pattern, members in heads.items())
            found[site.name] = SitePlan(site.name, groups)
        return found

    def predicted(self, plan: Mapping[str, SitePlan]) -> tuple[float, float]:
        """Text loss added per token, and seconds of attention, that are predicted for a plan."""
        added = seconds = 0.0
        for site, clock_ in zip(self.damages, self.clocks, strict=True):
            for group in range(site.site.num_kv_heads):
                pattern = plan[site.site.name].pattern_of(group) if site.site.name in plan else None
                seconds += clock_(pattern)
                if pattern in site.candidates:
                    at = site.candidates.index(pattern)
                    added += self.scale.get(site.site.name, 1.0) * float(site.damage[group, at])
        return added, seconds

    def uniform(self, pattern: Neighborhood) -> dict[str, SitePlan]:
        """Every group on one pattern."""
        return self.plan([pattern] * self.num_items)

    def keeping(self, kept: Sequence[int], pattern: Neighborhood) -> dict[str, SitePlan]:
        """The items `kept` on full attention, all others on one pattern."""
        full = set(kept)
        return self.plan([None if item in full else pattern for item in range(self.num_items)])

    @property
    def num_items(self) -> int:
        """Key/value-head groups of all sites."""
        return sum(site.site.num_kv_heads for site in self.damages)

    def ranked(self, by: str, pattern: Neighborhood, *, seed: int = 0) -> list[int]:
        """Items, most in need of full attention first: by "needle" mass, by "sensitivity" at `pattern`, or at
        "random"."""
        if by == "random":
            items = list(range(self.num_items))
            Random(seed).shuffle(items)
            return items
        score = torch.cat(
            [
                site.needle_mass if by == "needle" else self.weighed(site)[:, site.candidates.index(pattern)]
                for site in self.damages
            ]
        )
        return score.argsort(descending=True).tolist()
