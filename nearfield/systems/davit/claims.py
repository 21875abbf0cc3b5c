"""What DaViT claims, tried here."""

from __future__ import annotations

import torch
from torch import nn

from nearfield.bench.resolution import against_resolution, draw_lines, equal_vit
from nearfield.bench.seeds import by_seed, draw_seeds, means
from nearfield.catalog import Result
from nearfield.data import images
from nearfield.measure.receptive import gradient_map, share_inside
from nearfield.nn.attention import WindowAttention
from nearfield.systems.davit.model import ChannelAttention, davit, davit_tiny
from nearfield.train.vision import learn

SEEDS = (0, 1, 2)


def linear_cost(*, full: bool = False) -> Result:
    """DaViT-T against a vision transformer of its third stage's width and of its cost at 224 px."""
    net = davit_tiny()
    rival = equal_vit(net)
    models = {"DaViT-T": net, f"ViT of width 384, {len(rival.blocks)} blocks": rival}
    sides = (224, 448, 672, 896) if full else (224, 448)
    costs = against_resolution(models, sides, budget=1.0 if full else 0.1, least=1)
    growth = [macs[sides.index(448)] / macs[0] for macs in costs.macs.values()]
    seconds = [[each or 0.0 for each in found] for found in costs.seconds.values()]  # all are timed
    slower = [found[-1] / found[0] for found in seconds]
    words = (
        f"FLOPs at 448 px / at 224 px: {growth[0]:.2f}, ViT {growth[1]:.2f}; "
        f"seconds at {sides[-1]} px / at 224 px: {slower[0]:.1f}, ViT {slower[1]:.1f}; "
        f"at {sides[-1]} px {seconds[0][-1]:.2f} and {seconds[1][-1]:.2f} s"
    )
    return Result(words, abs(growth[0] - 4) <= 0.1 < growth[1] - 4 and slower[0] < slower[1], costs.plot)


def both_attentions(*, full: bool = False) -> Result:
    """Three nets of equal size but for the kind of their attention, on handwritten digits."""
    data = images.digits(16)
    found: dict[str, list[float]] = {}
    for name, kinds in {
        "both": ("window", "channel"),
        "window": ("window", "window"),
        "channel": ("channel", "channel"),
    }.items():
        for seed in SEEDS if full else SEEDS[:1]:
            torch.manual_seed(seed)
            net = davit(
                (16, 32),
                (1, 1),
                (1, 2),
                num_classes=10,
                in_channels=1,
                window_size=2,
                drop_path=0.0,
                attentions=kinds,
            )
            share = learn(net, data, steps=600 if full else 60, seed=seed, batch_size=32)
            found.setdefault(name, []).append(share)
    both, *others = means(found)
    return Result(
        f"accuracy by seed: {by_seed(found)}",
        both > max(others),
        lambda axes: draw_seeds(axes, found, "accuracy"),
    )


def channels_see_everything(*, full: bool = False) -> Result:
    """Which positions of its input one position of a layer's output depends on."""
    side, window = (56, 7) if full else (28, 7)
    layers: dict[str, nn.Module] = {
        "channel": ChannelAttention(32, 1),
        "window": WindowAttention(32, 1, window),
    }
    outside: dict[str, list[float]] = {name: [] for name in layers}
    for name, layer in layers.items():
        for seed in SEEDS:
            draw = torch.Generator().manual_seed(seed)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.2, generator=draw)
            x = torch.randn(1, side, side, 32, generator=draw)
            seen = gradient_map(layer, x, (0, 0), channels_last=True)
            outside[name].append(1 - share_inside(seen, (0, 0, window, window)))
    holds = min(outside["channel"]) > 0 and max(map(abs, outside["window"])) < 1e-6
    return Result(
        f"share of the gradient from outside the window, by seed: {by_seed(outside)}",
        holds,
        lambda axes: draw_seeds(axes, outside, "share"),
    )


def sharpens_with_resolution(*, full: bool = False) -> Result:
    """Entropy of the softmax over channels, for random inputs and weights, against the map's side."""
    sides = (14, 28, 56, 112) if full else (14, 28, 56)
    found: dict[str, list[float]] = {}
    for name, scaled in {"as published": False, "scaled by tokens": True}.items():
        for side in sides:
            torch.manual_seed(0)
            layer = ChannelAttention(96, 3, scale_by_tokens=scaled)
            nn.init.normal_(
                layer.qkv.weight, std=96**-0.5
            )  # unit queries, keys and values, as after training begins
            with torch.no_grad():
                maps, _ = layer.maps(torch.randn(2, side, side, 96))
            entropy = -(maps * maps.clamp_min(1e-30).log()).sum(-1).mean()
            found.setdefault(name, []).append(float(entropy))
    changes = {name: each[-1] / each[0] - 1 for name, each in found.items()}
    words = "; ".join(f"{name} {', '.join(f'{e:.2f}' for e in each)}" for name, each in found.items())
    return Result(
        f"entropy at {', '.join(map(str, sides))} positions a side: {words} nats",
        changes["as published"] < changes["scaled by tokens"],
        lambda axes: draw_lines(
            axes,
            {name: list(zip(sides, each, strict=True)) for name, each in found.items()},
            "positions a side",
            "entropy, nats",
            scale="linear",
        ),
    )
