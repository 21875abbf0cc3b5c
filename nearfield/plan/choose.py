"""The planner's choice: one option for every item, least seconds, total damage within a budget.

A multiple-choice knapsack. `greedy` walks the convex hull of every item (the Lagrangian solution) and gives a
bound from below; `choose` closes the gap by a dynamic programme over (damage, seconds) states that the bound
cannot rule out, and is never worse than `greedy`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isnan
from operator import itemgetter
from typing import Any

MAX_STATES = 300  # beyond, states are thinned; the answer then is near the best, and says so
SLACK = 1e-12  # relative; sums of the same numbers in another order must not count as over budget


@dataclass(frozen=True)
class Option:
    """One way to treat an item: `pattern` is handed through; an infinite damage or time rules it out."""

    pattern: Any
    damage: float
    seconds: float


@dataclass(frozen=True)
class Choice:
    """The option index of every item, and what they add up to.

    `lower_bound`: seconds that no choice within the budget can go below. `is_best`: proved to be the minimum.
    """

    picks: tuple[int, ...]
    damage: float
    seconds: float
    lower_bound: float
    is_best: bool

    def patterns(self, options: Sequence[Sequence[Option]]) -> list[Any]:
        """The chosen pattern of every item."""
        return [item[pick].pattern for item, pick in zip(options, self.picks, strict=True)]


def choose(options: Sequence[Sequence[Option]], budget: float) -> Choice:
    """The options, one an item, with the least total seconds at a total damage of at most `budget`.

    Raises `ValueError` when even the least damaging options exceed the budget; it names their total.
    """
    start = greedy(options, budget)
    if start.is_best:
        return start
    items, spare = _shifted(options, budget)
    price = _price(items, spare)
    least = sum(min(cost + price * harm for harm, cost, _ in item) for item in items)
    # Options are judged by reduced cost: what they add above the cheapest at this price of damage. A choice
    # faster than the greedy's has reduced costs that add up to less than the gap.
    gap = start.seconds - (least - price * spare)
    states: list[tuple[float, float, Any]] = [(0.0, 0.0, None)]  # damage, reduced cost, (previous link, pick)
    thinned = False
    for item in items:
        floor = min(cost + price * harm for harm, cost, _ in item)
        useful = [(harm, cost + price * harm - floor, pick) for harm, cost, pick in item]
        useful = [option for option in useful if option[1] <= gap]
        states, was_thinned = _step(states, useful, spare, gap, price)
        thinned = thinned or was_thinned
    found = [start]
    for _, _, link in states:
        picks: list[int] = []
        while link is not None:
            link, pick = link
            picks.append(pick)
        found.append(_total(options, tuple(reversed(picks))))
    best = min(
        (c for c in found if c.damage <= _limit(budget)), key=lambda choice: (choice.seconds, choice.damage)
    )
    if not thinned or best.seconds <= start.lower_bound:
        return replace(best, lower_bound=best.seconds, is_best=True)
    return replace(best, lower_bound=start.lower_bound, is_best=False)


def greedy(options: Sequence[Sequence[Option]], budget: float) -> Choice:
    """A good choice by one walk: best seconds per damage first, on every item's convex hull."""
    items, spare = _shifted(options, budget)
    picks = [item[0][2] for item in items]
    seconds = sum(item[0][1] for item in items)
    left, bound, closed = spare, None, set()
    for saved, harm, which, pick in _steps(items):
        if harm > left + _slack(spare) and bound is None:
            bound = seconds - saved * max(left, 0.0) / harm
        if which in closed or harm > left + _slack(spare):
            closed.add(which)
            continue
        picks[which], left, seconds = pick, left - harm, seconds - saved
    chosen = _total(options, tuple(picks))
    if bound is None or chosen.seconds <= bound:
        return chosen
    return replace(chosen, lower_bound=bound, is_best=False)


def frontier(options: Sequence[Sequence[Option]]) -> list[Choice]:
    """The choices on the convex hull of (damage, seconds), from the least damage to the least seconds.

    Each is the best possible at its own damage as budget.
    """
    items, _ = _shifted(options, inf)
    picks = [item[0][2] for item in items]
    found = [tuple(picks)]
    for _, _, which, pick in _steps(items):
        picks[which] = pick
        found.append(tuple(picks))
    return [_total(options, chosen) for chosen in found]


# An item inside this file: (damage above the item's least, seconds, index), damage rising, seconds falling.
_Item = list[tuple[float, float, int]]


def _shifted(options: Sequence[Sequence[Option]], budget: float) -> tuple[list[_Item], float]:
    """Every item's options that none beats in both ways, damages from 0; and what is left of the budget."""
    if isnan(budget):
        raise ValueError("budget is not a number. Give the damage that may be done in total.")
    items, least = [], 0.0
    for number, item in enumerate(options):
        if any(isnan(option.damage) or isnan(option.seconds) for option in item):
            raise ValueError(f"Item {number} has an option whose damage or seconds is not a number.")
        able = [
            (o.damage, o.seconds, i)
            for i, o in enumerate(item)
            if abs(o.damage) < inf and abs(o.seconds) < inf
        ]
        if not able:
            raise ValueError(
                f"Item {number} has no option of finite damage and seconds. Offer full attention."
            )
        able.sort()
        kept: _Item = []
        for harm, cost, pick in able:
            if not kept or cost < kept[-1][1]:
                kept.append((harm - able[0][0], cost, pick))
        items.append(kept)
        least += able[0][0]
    if least > _limit(budget):
        raise ValueError(
            f"The least damaging options add up to {least:.6g}, above the budget of {budget:.6g}. "
            "Raise the budget, or offer less damaging options."
        )
    return items, max(budget - least, 0.0)


def _steps(items: list[_Item]) -> list[tuple[float, float, int, int]]:
    """All steps along the items' lower hulls, best first: (seconds saved, damage added, item, option)."""
    steps = []
    for which, item in enumerate(items):
        hull: _Item = []
        for point in item:
            while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(point)
        for (harm, cost, _), (more, less, pick) in pairwise(hull):
            steps.append((cost - less, more - harm, which, pick))
    return sorted(steps, key=lambda step: -step[0] / step[1])


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    """Seconds saved per damage from `a` to `b`."""
    return (a[1] - b[1]) / (b[0] - a[0])


def _price(items: list[_Item], spare: float) -> float:
    """Seconds that a unit of damage is worth where the budget ends: the slope of the first step beyond it."""
    for saved, harm, _, _ in _steps(items):
        spare -= harm
        if spare < 0:
            return saved / harm
    return 0.0


def _step(
    states: list[tuple[float, float, Any]],
    item: _Item,
    spare: float,
    gap: float,
    price: float,
) -> tuple[list[tuple[float, float, Any]], bool]:
    """The states after one more item that could still beat the greedy, none worse than another in both ways.

    A state's completion costs at least its reduced cost; damage is compared at equal price, so a state stays
    unless another has no more damage and no higher seconds (reduced cost - price * damage).
    """
    grown = []
    limit, most = spare + _slack(spare), gap + SLACK * abs(gap)
    for harm, extra, pick in item:
        room, spent = limit - harm, most - extra
        grown += [(d + harm, r + extra, (link, pick)) for d, r, link in states if d <= room and r <= spent]
    grown.sort(key=itemgetter(0, 1))
    kept: list[tuple[float, float, Any]] = []
    fastest = inf
    for state in grown:
        seconds = state[1] - price * state[0]
        if seconds < fastest:
            fastest = seconds
            kept.append(state)
    if len(kept) <= MAX_STATES:
        return kept, False
    edges = [spare * i / MAX_STATES for i in range(1, MAX_STATES + 1)]
    thin: dict[int, tuple[float, float, Any]] = {}
    for state in kept:  # by rising damage and falling seconds: the last of a bin is its fastest
        thin[bisect_left(edges, state[0])] = state
    return list(thin.values()), True


def _total(options: Sequence[Sequence[Option]], picks: tuple[int, ...]) -> Choice:
    """The choice of these options, taken for the best one."""
    chosen = [item[pick] for item, pick in zip(options, picks, strict=True)]
    seconds = sum(option.seconds for option in chosen)
    return Choice(picks, sum(option.damage for option in chosen), seconds, seconds, True)


def _slack(amount: float) -> float:
    return SLACK * abs(amount) if amount < inf else 0.0


def _limit(budget: float) -> float:
    return budget + _slack(budget)
