"""What LITv2 claims, tried here."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.bench.resolution import against_resolution, draw_lines, equal_vit, model_macs
from nearfield.bench.seeds import by_seed, draw_seeds, means
from nearfield.bench.work import cpu_seconds
from nearfield.catalog import Result
from nearfield.data import images
from nearfield.nn.attention import Attention, WindowAttention
from nearfield.nn.convolution import convolve
from nearfield.nn.hilo import HiLo
from nearfield.nn.pyramid import Pyramid
from nearfield.ops.dense import dense_attention
from nearfield.systems.litv2.model import litv2, litv2_small
from nearfield.train.vision import accuracy, learn

SEEDS = (0, 1, 2)


class SpatialReduction(nn.Module):
    """PVT's attention: keys and values from a strided convolution of the map, here HiLo's rival."""

    def __init__(self, dim: int, num_heads: int, reduction: int):
        super().__init__()
        self.num_heads = num_heads
        self.reduce, self.norm = nn.Conv2d(dim, dim, reduction, reduction), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b y x dim"]) -> Float[Tensor, "b y x dim"]:
        fewer = self.norm(convolve(self.reduce, x)).flatten(1, 2)
        k, v = self.kv(fewer).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        return self.proj(dense_attention(q, k, v).flatten(-2)).view(x.shape)


def hilo_is_fast(*, full: bool = False) -> Result:
    """One attention layer of 384 channels and 12 heads in place of another, forward only."""
    layers: dict[str, nn.Module] = {
        "everything": Attention(384, 12),
        "reduced by 2": SpatialReduction(384, 12, 2),
        "windows of 7": WindowAttention(384, 12, 7),
        "HiLo, half low": HiLo(384, 12, 2, 0.5),
        "HiLo, 0.9 low": HiLo(384, 12, 2, 0.9),
        "HiLo, 0.9 low, windows of 4": HiLo(384, 12, 4, 0.9),
    }
    batch, budget = (8, 3.0) if full else (1, 0.05)
    found: dict[str, list[tuple[float, float]]] = {}
    for side in (14, 28, 56) if full else (14, 56):
        x = torch.randn(batch, side, side, 384, generator=torch.Generator().manual_seed(0))
        for name, layer in layers.items():
            with torch.no_grad():
                seconds = cpu_seconds(partial(layer, x), budget=budget, least=3 if full else 1)
            found.setdefault(name, []).append((side, seconds / batch * 1e3))
    words = "; ".join(f"{name} {', '.join(f'{ms:.2f}' for _, ms in each)}" for name, each in found.items())
    ours = found["HiLo, 0.9 low"]
    holds = all(
        mine < theirs
        for name in ("reduced by 2", "windows of 7")
        for (_, mine), (_, theirs) in zip(ours, found[name], strict=True)
    )
    sides = ", ".join(f"{side:.0f}" for side, _ in ours)
    return Result(
        f"milliseconds of a map with sides {sides} in turn: {words}",
        holds,
        lambda axes: draw_lines(axes, found, "side of the map", "CPU milliseconds, one thread"),
    )


def mixed_heads(*, full: bool = False) -> Result:
    """Small nets on handwritten digits that differ in the share of low heads only."""
    data = images.digits(32)
    found: dict[str, list[float]] = {}
    for alpha in (0.0, 0.5, 0.9, 1.0) if full else (0.0, 0.5, 1.0):
        for seed in SEEDS if full else SEEDS[:1]:
            net = _net(seed, alpha)
            share = learn(net, data, steps=300 if full else 40, seed=seed, batch_size=32)
            found.setdefault(f"{alpha:g} low", []).append(share)
    none, *mixed, every = means(found)
    return Result(
        f"accuracy by seed: {by_seed(found)}",
        max(mixed) > max(none, every),
        lambda axes: draw_seeds(axes, found, "accuracy"),
    )


def windows_may_grow(*, full: bool = False) -> Result:
    """Nets trained with windows of 2 and tried with larger ones, without training further."""
    data = images.digits(32)
    sizes = (2, 4)
    found: dict[str, list[float]] = {f"windows of {size}": [] for size in sizes}
    for seed in SEEDS if full else SEEDS[:1]:
        net = _net(seed)
        learn(net, data, steps=300 if full else 50, seed=seed, batch_size=32)
        for size in sizes:
            for layer in _layers(net):
                layer.window_size = size
            found[f"windows of {size}"].append(accuracy(net, data.test, data.test_labels))
    net = litv2_small()
    costs = []
    for size in sizes:
        for layer in _layers(net.stages[2]):
            layer.window_size = size
        costs.append(model_macs(net, (3, 896, 896)) / 1e9)
    first, second = means(found)
    return Result(
        f"accuracy by seed: {by_seed(found)}; GMACs of LITv2-S at 896 px: {costs[0]:.1f}, {costs[1]:.1f}",
        first - second <= 0.05 and costs[1] < costs[0],
        lambda axes: draw_seeds(axes, found, "accuracy"),
    )


def frequencies_split(*, full: bool = False) -> Result:
    """How much of what each group of heads gives changes faster than a quarter of a wave a token."""
    data = images.digits(64)
    found: dict[str, list[float]] = {"high heads": [], "low heads": []}
    alone: dict[str, list[float]] = {name: [] for name in found}
    for seed in SEEDS if full else SEEDS[:1]:
        net = _net(seed)
        learn(net, data, steps=300 if full else 30, seed=seed, batch_size=16)
        seen: dict[str, list[Tensor]] = {name: [] for name in found}
        hooks = []
        for layer in _layers(net):
            hooks += [_keep(layer.high_proj, seen["high heads"]), _keep(layer.low_proj, seen["low heads"])]
        try:
            accuracy(net, data.test[:64], data.test_labels[:64])
        finally:
            for hook in hooks:
                hook.remove()
        for name, maps in seen.items():
            found[name].append(sum(_fast_share(out) for out in maps) / len(maps))
            changes = [out - out.mean((1, 2), keepdim=True) for out in maps]
            alone[name].append(sum(map(_fast_share, changes)) / len(maps))
    return Result(
        f"share of the energy at high frequencies, by seed: {by_seed(found)}; "
        f"of the energy about the mean: {by_seed(alone)}",
        all(high > low for high, low in zip(*found.values(), strict=True)),
        lambda axes: draw_seeds(axes, found, "share"),
    )


def cheap_when_large(*, full: bool = False) -> Result:
    """LITv2-S against a vision transformer of its third stage's width and of its cost at 224 px."""
    net = litv2_small()
    rival = equal_vit(net)
    names = ("LITv2-S", f"ViT of width 384, {len(rival.blocks)} blocks")
    models = {names[0]: net, names[1]: rival}
    sides = (224, 448, 672, 896) if full else (112, 224)
    costs = against_resolution(models, sides, budget=1.0 if full else 0.05, least=1)
    ours, theirs = (costs.seconds[name] for name in names)
    ratio = theirs[-1] / ours[-1]  # type: ignore[operator]
    words = (
        f"seconds at {', '.join(map(str, sides))} px: {', '.join(f'{s:.2f}' for s in ours)}, "
        f"ViT {', '.join(f'{s:.2f}' for s in theirs)}; {ratio:.1f} times as fast at {sides[-1]} px"
    )
    if not full:
        return Result(f"{words}; 896 px are tried with --full", None, costs.plot, skipped="only small sides")
    return Result(words, ratio >= 3, costs.plot)


def _net(seed: int, alpha: float = 0.5) -> Pyramid:
    torch.manual_seed(seed)
    return litv2(
        (16, 32),
        (1, 1),
        (4, 8),
        num_classes=10,
        in_channels=1,
        drop_path=0.0,
        alpha=alpha,
        window_sizes=(2, 2),
    )


def _layers(net: nn.Module) -> list[HiLo]:
    return [module for module in net.modules() if isinstance(module, HiLo)]


def _keep(module: nn.Module, seen: list[Tensor]) -> Any:
    """A hook that notes what the module gives."""
    return module.register_forward_hook(lambda module, given, out: seen.append(out))


def _fast_share(maps: Float[Tensor, "b y x dim"]) -> float:
    """The share of the energy with more than a quarter of a wave a token along a side."""
    energy = torch.fft.fft2(maps, dim=(1, 2)).abs().square().sum((0, -1))
    y, x = (torch.fft.fftfreq(side).abs() for side in energy.shape)
    return float(energy[torch.maximum(y[:, None], x) > 0.25].sum() / energy.sum())
