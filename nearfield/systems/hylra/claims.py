"""What HyLRA claims, tried here."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from functools import partial
from math import exp, inf
from random import Random
from typing import Any

import torch
from torch import Tensor

from nearfield.bench.seeds import by_seed, interval, paired_interval
from nearfield.catalog import Result
from nearfield.measure.reuse import draw_sources
from nearfield.plan.reuse import Overlap, Reuse, ReusePolicy, Sources, best_reuse, follow
from nearfield.systems.hylra.study import MODERATE, Costs, cases, random_sources, uniform_sources


def neighbours_agree(*, full: bool = False) -> Result:
    """Overlap of neighbouring layers, against that of random blocks and of layers far apart."""
    found: dict[str, list[float]] = {}
    lows, shown = [], []
    for case in cases(full, texts=1):
        table = torch.tensor(case.profile.matrix("mean"))
        layers = [layer for layer in range(len(table) - 1) if {layer, layer + 1}.isdisjoint(case.wide)]
        near, far = [], []
        for i in layers:
            apart = [j for j in range(len(table)) if case.are_far(i, j) and j not in case.wide]
            if case.are_near(i) and apart:
                near.append(float(table[i, i + 1]))
                far.append(sum(float(table[min(i, j), max(i, j)]) for j in apart) / len(apart))
        chance = case.profile.chance
        for name, each in (("neighbours", near), ("far apart", far), ("chance", [chance])):
            found.setdefault(name, []).append(sum(each) / len(each))
        lows += [paired_interval(near, far)[0], interval(near)[0] - chance]
        shown.append(case.profile)
    return Result(f"mean overlap: {by_seed(found)}", min(lows) > 0, shown[0].draw)


def programme_beats_others(*, full: bool = False) -> Result:
    """Policies with the same full layers and as many that select: by the programme, evenly spaced, random."""
    told, strips, moderate = Costs(full), [], []
    for at, case in enumerate(cases(full)):
        layers, ours = len(case.profile.names), case.best(case.wide)
        number, draws = _selecting(ours), (10 if full else 6)
        randoms = [random_sources(layers, case.wide, number, Random(draws * at + n)) for n in range(draws)]
        told.add("programme", case.harm([ours]))
        told.add("evenly", case.harm([uniform_sources(layers, case.wide, number)]))
        told.add("random", case.harm(randoms))
        told.add("all select", case.harm([follow(layers, case.wide, range(layers))]))
        if full:
            moderate.append(100 * float(case.harm([ours], MODERATE).nats.mean().expm1()))
        strips.append(ours)
    low, words = told.gains("programme", ("evenly", "random"))
    if full:
        words += f"; programme with {MODERATE['num_tokens']} keys read, %: {by_seed({'': moderate}).strip()}"
    holds = low > 0 and sum(moderate) / max(1, len(moderate)) < 1
    return Result(words, holds, partial(draw_sources, sources=strips[0]))


def sensitive_layers(*, full: bool = False) -> Result:
    """The programme with dense layers kept full, with as many others, and with none."""
    told = Costs(full)
    for case in cases(full):
        layers, number = len(case.profile.names), _selecting(case.best(case.wide))
        rest = [layer for layer in range(layers) if layer not in case.wide]
        others = [Random(seed).sample(rest, len(case.wide)) for seed in range(5 if full else 3)]
        told.add("dense full", case.harm([case.best(case.wide)]))
        told.add("random full", case.harm([case.best(each) for each in others]))
        told.add("none full", case.harm([case.best((), selecting=number)]))
    low, words = told.gains("dense full", ("random full", "none full"))
    return Result(words, low > 0, told.draw)


def a_step_reads_less(*, full: bool = False) -> Result:
    """Bytes that a layer of SmolLM2's shape reads in a step behind 8192 keys, and the CPU time of it."""
    from nearfield.hosts.transformers_blocks import BlockLayer

    shape = {"kv_heads": 3, "key_dim": 64, "value_dim": 64, "itemsize": 4}
    kinds, lines, ratios = ("full", "selects", "reuses"), [], {}
    for tokens in (2048, 8192, 32768) if full else (8192,):
        policy = ReusePolicy((None, 1, 1), tokens // 4, num_recent=tokens // 16)
        draw = torch.Generator().manual_seed(0)
        query = torch.randn(1, 1, 9, 64, generator=draw)
        caches = [BlockLayer(tokens + 1) for _ in kinds]
        for cache in caches:
            cache.update(*(torch.randn(1, 3, tokens, 64, generator=draw) for _ in range(2)))
        new = torch.randn(1, 3, 1, 64, generator=draw)
        rounds = 200 if full else 100
        seconds = dict(zip(kinds, _step_seconds(policy, query, caches, new, rounds), strict=True))
        read = dict(zip(kinds, policy.bytes_read(tokens, **shape), strict=True))
        lines.append(
            f"{tokens} keys: "
            + ", ".join(f"{k} {read[k] / 1e6:.2f} MB {seconds[k] * 1e6:.0f} us" for k in kinds)
        )
        ratios[tokens] = [(read[k] / read["full"], seconds[k] / seconds["full"]) for k in kinds]
    at = ratios[8192]
    holds = at[2][0] < at[1][0] < 0.5 and at[2][1] < at[1][1] < 1
    words = "; ".join(lines) + f"; of a full layer's time: selects {at[1][1]:.2f}, reuses {at[2][1]:.2f}"
    skipped = "the same on a GPU: steps are timed on the CPU alone"
    if not torch.cuda.is_available():
        skipped = "the same on a GPU: needs a CUDA device"
    return Result(words, holds, partial(_bars, kinds, at), skipped)


def exact_programme(*, full: bool = False) -> Result:
    """The programme against all plans there are, where layers drift apart; the published one beside it."""
    wrong = dict.fromkeys(("ours", "published least", "published total"), 0)
    number, longer = (5000, 400) if full else (600, 20)
    for seed in range(number):
        draw = Random(seed)
        layers, changes = draw.randint(2, 7), draw.randint(0, 4)
        tables = [_drifting(draw, layers) for _ in range(draw.randint(1, 3))]
        best = max(
            _worth(tables, follow(layers, (), {0, *others}))
            for count in range(min(changes, layers - 1) + 1)
            for others in itertools.combinations(range(1, layers), count)
        )
        ours, theirs = (best_reuse(tables, max_changes=changes, parity=parity) for parity in (False, True))
        wrong["ours"] += _differ(ours, best)
        wrong["published least"] += theirs.least != best[0]
        wrong["published total"] += _differ(theirs, best)
    lost = []
    for seed in range(longer):
        table = _drifting(Random(seed), 30)
        ours, theirs = (best_reuse(table, max_changes=9, parity=parity) for parity in (False, True))
        wrong["published least"] += theirs.least != ours.least
        lost.append(ours.total - theirs.total)
    words = f"not the best of all, of {number} overlaps of at most 7 layers: "
    words += ", ".join(f"{name} {count}" for name, count in wrong.items())
    words += f"; of {longer} of 30 layers the published programme misses the best total in "
    words += f"{sum(each > 1e-9 for each in lost)}, by {max(lost):.2f} at most"
    holds = wrong["ours"] == wrong["published least"] == 0

    def bars(axes: Any) -> None:
        axes.bar(list(wrong), list(wrong.values()))
        axes.set(ylabel=f"overlaps, of {number}, where it is not the best")

    return Result(words, holds, bars)


def _step_seconds(
    policy: ReusePolicy, query: Tensor, caches: Sequence[Any], new: Tensor, rounds: int
) -> list[float]:
    """CPU seconds of a token's step, layer by layer: the least of some rounds on one thread."""
    from nearfield.hosts.transformers_blocks import BlockReuse

    reuse, threads = BlockReuse(policy), torch.get_num_threads()
    least = [inf] * len(caches)
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(rounds):  # in turns, so that other work on the machine meets all alike
                for layer, cache in enumerate(caches):
                    begin = time.thread_time()
                    key, value = (x.transpose(1, 2) for x in cache.update(new, new))
                    reuse.attend(layer, query, key, value, None, query.shape[-1] ** -0.5, cache)
                    least[layer] = min(least[layer], time.thread_time() - begin)
                    cache.crop(-1)
    finally:
        torch.set_num_threads(threads)
    return least


def _selecting(sources: Sources) -> int:
    return sum(source == layer for layer, source in enumerate(sources))


def _drifting(draw: Random, layers: int) -> Overlap:
    """Overlaps that fall with the distance of layers, in steps of any size."""
    place = list(itertools.accumulate(draw.expovariate(1) for _ in range(layers)))
    return [[exp(-0.3 * abs(a - b)) * draw.uniform(0.9, 1) for b in place] for a in place]


def _worth(tables: Sequence[Overlap], sources: Sources) -> tuple[float, float]:
    values = [1.0 if i is None or i == j else table[i][j] for j, i in enumerate(sources) for table in tables]
    return min(values), sum(values)


def _differ(found: Reuse, best: tuple[float, float]) -> bool:
    return found.least != best[0] or abs(found.total - best[1]) > 1e-9


def _bars(kinds: Sequence[str], ratios: Sequence[tuple[float, float]], axes: Any) -> None:
    for at, name in enumerate(("bytes", "CPU seconds")):
        places = [place + 0.4 * at for place in range(len(kinds))]
        axes.bar(places, [ratio[at] for ratio in ratios], width=0.4, label=name)
    axes.set_xticks([place + 0.2 for place in range(len(kinds))], list(kinds))
    axes.set(ylabel="share of a full layer's")
    axes.legend()
