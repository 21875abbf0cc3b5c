"""What HTNet claims, tried here, and what its attention does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor

from nearfield.catalog import Result
from nearfield.data.motions import Motions, faces_in_motion
from nearfield.systems.htnet.model import BlockAttention, HTNet, htnet, htnet_blocks4, htnet_official
from nearfield.systems.htnet.study import (
    Protocols,
    attention_maps,
    cross_subjects,
    motion_map,
    region_map,
    silent_parameters,
)

SEEDS = (0, 1, 2)
MADE = "Made motion of real faces"


def attention_in_blocks(*, full: bool = False) -> Result:
    """Queries and keys that no loss can move, and what the logits lose without queries."""
    torch.manual_seed(0)
    width = 256 if full else 32
    nets = {"published": htnet_official(dim=width), "4 tokens a block": htnet_blocks4(dim=width)}
    x = torch.randn(2, 3, 28, 28)
    found, silent, changed = [], {}, {}
    for name, net in nets.items():
        total = sum(p.numel() for p in net.parameters())
        matter = sum(2 * m.qkv.weight.numel() // 3 for m in net.modules() if isinstance(m, BlockAttention))
        silent[name] = silent_parameters(net, x) / matter
        spread, most = _entropy(net, x), log((net.tile // net.feature_info[-1]["reduction"]) ** 2)
        with torch.no_grad():
            before = net(x)
            _forget_queries(net)
            changed[name] = float((net(x) - before).norm() / before.norm())
        found.append(
            f"{name}: {silent[name]:.0%} of {matter:,} weights of queries and keys (of {total:,} in all) get "
            f"no gradient, entropy of attention {spread:.3f} nats of {most:.3f}, logits change by "
            f"{changed[name]:.1e} without queries"
        )
    holds = silent["published"] == 1 and changed["published"] == 0
    holds = holds and silent["4 tokens a block"] < 0.01 and changed["4 tokens a block"] > 0
    return Result(
        "; ".join(found), holds, partial(_bars, silent, "share of query and key weights that are dead")
    )


def regions_help(*, full: bool = False) -> Result:
    """The same net on maps of the whole face and on maps tiled from four regions, each subject left out."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS if full else SEEDS[:1]:
        for name, maps, made in _maps(seed, full=full):
            found.setdefault(name, []).append(_tried(maps, made, seed, full=full).chosen_inside.uf1)
    words = "; ".join(f"{name} {', '.join(f'{score:.3f}' for score in each)}" for name, each in found.items())
    ours, theirs = (sum(each) / len(each) for each in found.values())
    return Result(f"{MADE}, UF1 by seed: {words}", ours > theirs, partial(_dots, found, "UF1"))


def epoch_chosen_on_test(*, full: bool = False) -> Result:
    """Scores by which epoch counts: the best on the subject left out, the best on others, or the last."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS if full else SEEDS[:1]:
        _, maps, made = next(iter(_maps(seed, full=full)))
        for name, score in _tried(maps, made, seed, full=full)._asdict().items():
            found.setdefault(name.replace("_", " "), []).append(score.uf1)
    words = "; ".join(f"{name} {', '.join(f'{score:.3f}' for score in each)}" for name, each in found.items())
    published, inside, last = (sum(each) / len(each) for each in found.values())
    return Result(
        f"{MADE}, UF1 by seed: {words}. Gained by looking at the test: {published - inside:+.3f} over "
        f"an epoch chosen on other subjects, {published - last:+.3f} over the last",
        published > max(inside, last),
        partial(_dots, found, "UF1"),
    )


def _maps(seed: int, *, full: bool) -> list[tuple[str, Tensor, Motions]]:
    """Maps of regions, then of the whole, of the same clips; each channel standardised."""
    made = faces_in_motion(20 if full else 6, 6, strength=0.6, seed=seed)
    whole = motion_map(made.before, made.after)
    maps = {"regions": region_map(whole, made.landmarks), "whole": whole}
    return [(name, each / each.std((0, 2, 3), keepdim=True), made) for name, each in maps.items()]


def _tried(maps: Tensor, made: Motions, seed: int, *, full: bool) -> Protocols:
    make = partial(htnet, dim=24, depths=(1, 1))
    return cross_subjects(
        make, maps, made.labels, made.subjects, epochs=40 if full else 12, lr=2e-3, seed=seed
    )


def _entropy(net: HTNet, x: Tensor) -> float:
    """Of the attention maps of all blocks, in nats, on average."""
    seen: list[Tensor] = []

    def look(layer: BlockAttention, given: tuple[Tensor, ...]) -> None:
        maps = attention_maps(layer, given[0])
        seen.append(-(maps * maps.clamp_min(1e-30).log()).sum(-1).mean())

    layers = [module for module in net.modules() if isinstance(module, BlockAttention)]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.stack(seen).mean())


def _forget_queries(net: HTNet) -> None:
    for module in net.modules():
        if isinstance(module, BlockAttention):
            module.qkv.weight.chunk(3)[0].zero_()


def _dots(found: Mapping[str, list[float]], label: str, axes: Any) -> None:
    for place, each in enumerate(found.values()):
        axes.plot([place] * len(each), each, "o", alpha=0.7)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(ylabel=label)


def _bars(found: Mapping[str, float], label: str, axes: Any) -> None:
    axes.bar(list(found), list(found.values()))
    axes.set(ylabel=label)
