"""What InLine claims, tried here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from nearfield.bench.resolution import draw_lines, global_vit
from nearfield.bench.work import cpu_seconds
from nearfield.catalog import Result
from nearfield.data import images
from nearfield.measure.flops import count_flops
from nearfield.nn.attention import Attention
from nearfield.systems.inline.layer import InLineAttention
from nearfield.systems.inline.model import inline_cswin_tiny, inline_pvt_tiny, inline_swin_tiny
from nearfield.systems.inline.study import KINDS, Written, duplicates, hide, rows
from nearfield.train.vision import accuracy, learn

SEEDS = (0, 1, 2)
SIDE = 6  # patches along a side of the small pictures


@cache
def trained(kind: str, seed: int, full: bool) -> tuple[nn.Module, float]:
    """A small vision transformer with one kind of attention, trained on handwritten digits; its accuracy."""
    torch.manual_seed(seed)
    net = global_vit(32, 2 if full else 1, 2, patch=2, side=2 * SIDE, num_classes=10, in_channels=1)
    for block in net.blocks:
        block.attn = Written(kind, 32, 2)
    share = learn(net, images.digits(2 * SIDE), steps=600 if full else 60, lr=4e-3, seed=seed, batch_size=32)
    return net, share


def different_rows(*, full: bool = False) -> Result:
    """Rows of collinear queries, and how many rows of trained nets are nearly another's."""
    gaps: dict[str, list[float]] = {}
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        q, k = torch.randn(2, 1, 1, 64, 32, generator=draw, dtype=torch.float64).relu()
        for kind in KINDS[:3]:
            gap = (rows(kind, q, k) - rows(kind, 3 * q, k)).abs().amax(-1) * k.shape[2]
            gaps.setdefault(kind, []).append(float(gap.min()))  # over queries
    data = images.digits(2 * SIDE)
    shares: dict[str, list[float]] = {}
    for kind in ("softmax", "divided", "InLine"):
        for seed in SEEDS if full else SEEDS[:1]:
            net, _ = trained(kind, seed, full)
            shares.setdefault(kind, []).append(duplicates(net, data.test[:64]))
    collinear = "; ".join(f"{kind} {', '.join(f'{gap:.1e}' for gap in each)}" for kind, each in gaps.items())
    found = f"N times the least gap between rows of q and 3 q: {collinear}; " + _words(
        "share of rows that are nearly another's", shares
    )
    holds = max(gaps["divided"]) < 1e-6 < min(gaps["softmax"] + gaps["InLine, no residual"])
    return Result(found, holds, partial(_dots, shares, "share of near-duplicate rows"))


def beats_softmax(*, full: bool = False) -> Result:
    """Four nets that differ in their attention only."""
    found = {
        kind: [trained(kind, seed, full)[1] for seed in (SEEDS if full else SEEDS[:1])] for kind in KINDS
    }
    means = {kind: sum(each) / len(each) for kind, each in found.items()}
    return Result(
        _words("accuracy by seed", found),
        means["InLine"] >= means["softmax"],
        partial(_dots, found, "accuracy"),
    )


def locality(*, full: bool = False) -> Result:
    """What trained nets lose when no query sees the 3 x 3 places around it, or as many others."""
    data = images.digits(2 * SIDE)
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    near = (at[:, None] - at).abs().amax(-1) <= 1
    draw = torch.Generator().manual_seed(0)
    order = torch.rand(len(at), len(at), generator=draw).argsort(-1).argsort(-1)
    masks = {"near": near, "as many at random": order < near.sum(-1, keepdim=True)}
    lost: dict[str, list[float]] = {}
    for kind in KINDS:
        for seed in SEEDS if full else SEEDS[:1]:
            net, before = trained(kind, seed, full)
            for name, mask in masks.items():
                hide(net, mask)
                after = accuracy(net, data.test, data.test_labels)
                lost.setdefault(f"{kind}, {name}", []).append(before - after)
            hide(net, None)
    drop = {name: sum(each) / len(each) for name, each in lost.items()}
    return Result(
        _words("accuracy lost", lost),
        drop["softmax, near"] > drop["softmax, as many at random"]
        and drop["softmax, near"] > drop["InLine, near"],
        partial(_dots, lost, "accuracy lost"),
    )


def linear_speed(*, full: bool = False) -> Result:
    """Whole models at 896 px by their MACs, and one layer by its seconds, against softmax over all tokens."""
    hosts: dict[str, tuple[Callable[..., nn.Module], str]] = {
        "PVT": (inline_pvt_tiny, "IIII"),
        "Swin": (inline_swin_tiny, "IIIS"),
        "CSwin": (inline_cswin_tiny, "IISS"),
    }
    found = {}
    for name, (build, published) in hosts.items():
        ours, theirs = (_flops(build, pattern) for pattern in (published, published.replace("I", "G")))
        found[name] = theirs / ours
    sides = (14, 28, 56, 112, 128) if full else (14, 28, 56)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for name, layer in {"InLine": InLineAttention(64, 2), "softmax": Attention(64, 2)}.items():
        for side in sides:
            x = torch.randn(1, side, side, 64, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                spent = cpu_seconds(partial(layer, x), budget=0.5 if full else 0.05)
            seconds.setdefault(name, []).append((side**2, spent))
    ratio = [theirs / ours for (_, ours), (_, theirs) in zip(*seconds.values(), strict=True)]
    words = (
        f"MACs with softmax over all tokens / with InLine at 896 px: "
        f"{', '.join(f'{name} {times:.1f}' for name, times in found.items())}; seconds of a layer at "
        f"{', '.join(str(side**2) for side in sides)} tokens, softmax / InLine: "
        f"{', '.join(f'{times:.1f}' for times in ratio)}"
    )
    return Result(
        words,
        min(found.values()) >= 3 and ratio[-1] > max(1.0, ratio[0]),
        lambda axes: draw_lines(axes, seconds, "tokens", "CPU seconds of a layer, one thread"),
    )


def _flops(build: Callable[..., nn.Module], pattern: str) -> int:
    with torch.device("meta"), torch.no_grad():
        net = build(pattern=pattern).eval()
        return count_flops(lambda: net(torch.empty(1, 3, 896, 896)))


def _words(what: str, found: dict[str, list[float]]) -> str:
    each = (f"{name} {', '.join(f'{value:.3f}' for value in values)}" for name, values in found.items())
    return f"{what}: {'; '.join(each)}"


def _dots(found: dict[str, list[float]], label: str, axes: Any) -> None:
    for place, each in enumerate(found.values()):
        axes.plot([place] * len(each), each, "o", alpha=0.7)
    axes.set_xticks(range(len(found)), list(found), rotation=20, ha="right")
    axes.set(ylabel=label)
