"""What L2ViT claims, tried here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.bench.resolution import against_resolution, draw_lines, equal_vit, model_macs
from nearfield.bench.seeds import by_seed, draw_seeds, means
from nearfield.catalog import Result
from nearfield.data import images
from nearfield.measure.receptive import gradient_map, share_inside
from nearfield.nn.attention import Attention
from nearfield.nn.pyramid import Pyramid
from nearfield.systems.l2vit.model import LinearAttention, LinearBlock, l2vit, l2vit_tiny
from nearfield.train.loop import Diverged, fit
from nearfield.train.losses import cross_entropy
from nearfield.train.recipe import Recipe
from nearfield.train.vision import Labelled, learn

SEEDS = (0, 1, 2)


def concentration(*, full: bool = False) -> Result:
    """How much of what a block brings to a token from others comes from the 7 x 7 tokens around it."""
    data = images.digits(64)
    if not full:
        data = data._replace(test=data.test[:100], test_labels=data.test_labels[:100])
    found: dict[str, list[float]] = {}
    right: dict[str, list[float]] = {}
    for name in ("softmax", "linear", "linear and LCM"):
        for seed in SEEDS if full else SEEDS[:1]:
            net = _net(seed, ("linear",), concentrate=name == "linear and LCM")
            blocks = [block for block in net.modules() if isinstance(block, LinearBlock)]
            if name == "softmax":
                for block in blocks:
                    block.attn = Attention(32, 2)
            share = learn(net, data, steps=200 if full else 12, lr=1e-2, seed=seed, batch_size=16)
            right.setdefault(name, []).append(share)
            net.eval()
            x = net.stem(data.test[:8].movedim(1, -1)).detach()
            middle = x.shape[1] // 2
            seen = gradient_map(_adds(blocks[0]), x, (middle, middle), channels_last=True)
            seen[middle, middle] = 0  # the token itself, which queries see at any rate
            box = (middle - 3, middle - 3, middle + 4, middle + 4)
            found.setdefault(name, []).append(share_inside(seen, box))
    _, linear, with_lcm = means(found)
    _, without, better = means(right)
    return Result(
        f"share of other tokens' gradient from 7 x 7 of {x.shape[1]} x {x.shape[2]} tokens, by seed: "
        f"{by_seed(found)}; accuracy: {by_seed(right)}",
        with_lcm > linear and better > without,
        lambda axes: draw_seeds(axes, found, "share of the gradient"),
    )


def floor_and_resolution(*, full: bool = False) -> Result:
    """The share of rows, over heads, that the floor of 100 holds in a new L2ViT-T that sees noise."""
    sides = (112, 224, 448, 896) if full else (56, 112, 224)
    torch.manual_seed(0)
    net = l2vit_tiny().eval()
    layers = [module for module in net.modules() if isinstance(module, LinearAttention)]
    found: dict[str, list[tuple[float, float]]] = {}
    for side in sides:
        shares: list[float] = []

        def count(layer: LinearAttention, given: tuple[Tensor, ...], shares: list[float] = shares) -> None:
            shares.append(float((layer.sums(given[0]) < layer.min_denominator).float().mean()))

        hooks = [layer.register_forward_pre_hook(count) for layer in layers]
        try:
            with torch.no_grad():
                net.forward_features(torch.randn(1, 3, side, side))
        finally:
            for hook in hooks:
                hook.remove()
        for number, share in enumerate(shares, 1):
            found.setdefault(f"block {number}", []).append((side, share))
    words = "; ".join(
        f"{name} {', '.join(f'{share:.3f}' for _, share in each)}" for name, each in found.items()
    )
    totals = [sum(each[place][1] for each in found.values()) for place in range(len(sides))]
    return Result(
        f"share of rows held at {', '.join(map(str, sides))} px: {words}",
        totals == sorted(set(totals), reverse=True),
        lambda axes: draw_lines(axes, found, "side of the picture", "share of rows held", scale="linear"),
    )


def floor_and_training(*, full: bool = False) -> Result:
    """Jumps of the loss, and the largest gradient, of nets of linear attention with several floors."""
    data = images.digits(32)
    samples = Labelled(data.train, data.train_labels)
    steps = 200 if full else 25
    jumps: dict[str, list[float]] = {}
    largest: dict[str, list[float]] = {}
    lines: dict[str, list[tuple[float, float]]] = {}
    for precision in ("no", "bf16") if full else ("no",):
        for floor in (1e-6, 1.0, 100.0):
            name = f"floor {floor:g}{', bf16' if precision == 'bf16' else ''}"
            for seed in SEEDS if full else SEEDS[:1]:
                net = _net(seed, ("linear",), min_denominator=floor)
                recipe = Recipe(
                    steps=steps,
                    batch_size=32,
                    lr=3e-2,
                    warmup=0.05,
                    mixed_precision=precision,
                    clip=1e9,  # never reached: it makes the norm known
                    seed=seed,
                    log_every=1,
                    checkpoint_every=0,
                )
                jumps.setdefault(name, []).append(float("inf"))
                largest.setdefault(name, []).append(float("inf"))
                with suppress(Diverged):
                    records = fit(net, samples, _loss, recipe=recipe).records
                    losses = [record["loss"] for record in records]
                    usual = [median(losses[at - 10 : at]) for at in range(10, steps)]
                    jumps[name][-1] = sum(
                        loss > 1.5 * before + 0.1 for before, loss in zip(usual, losses[10:], strict=True)
                    )
                    largest[name][-1] = max(record["gradient_norm"] for record in records)
                    lines[name] = list(enumerate(losses, 1))
    free, _, kept = list(zip(means(jumps), means(largest), strict=True))[:3]
    words = "; ".join(
        f"{name} {', '.join(f'{n:g} ({norm:.1f})' for n, norm in zip(each, largest[name], strict=True))}"
        for name, each in jumps.items()
    )
    return Result(
        f"jumps in {steps} steps, and the largest gradient norm, by seed (inf: diverged): {words}",
        kept < free,
        lambda axes: draw_lines(axes, lines, "step", "loss", scale="linear"),
    )


def alternation(*, full: bool = False) -> Result:
    """Nets of equal depth whose blocks are all of one kind or take turns, on handwritten digits."""
    data = images.digits(32)
    kinds = {"both": ("window", "linear"), "window": ("window",), "linear": ("linear",)}
    found: dict[str, list[float]] = {}
    for name, blocks in kinds.items():
        for seed in SEEDS if full else SEEDS[:1]:
            net = _net(seed, blocks)
            share = learn(net, data, steps=300 if full else 35, lr=1e-2, seed=seed, batch_size=32)
            found.setdefault(name, []).append(share)
    both, *others = means(found)
    draw = partial(draw_seeds, found=found, label="accuracy")
    return Result(f"accuracy by seed: {by_seed(found)}", both > max(others), draw)


def linear_cost(*, full: bool = False) -> Result:
    """L2ViT-T against a vision transformer of its third stage's width and of its cost at 224 px."""
    net = l2vit_tiny()
    cost = model_macs(net)
    rival = equal_vit(net)
    names = ("L2ViT-T", f"ViT of width 384, {len(rival.blocks)} blocks")
    models = {names[0]: net, names[1]: rival}
    sides = (224, 448, 672, 896) if full else (112, 224)
    costs = against_resolution(models, sides, budget=1.0 if full else 0.05, least=1)
    ours, theirs = (costs.seconds[name] for name in names)
    growth, ratio = model_macs(net, (3, 448, 448)) / cost, theirs[-1] / ours[-1]  # type: ignore[operator]
    words = (
        f"MACs at 448 px / at 224 px: {growth:.2f}; "
        f"seconds at {', '.join(map(str, sides))} px: {', '.join(f'{s:.2f}' for s in ours)}, "
        f"ViT {', '.join(f'{s:.2f}' for s in theirs)}; {ratio:.1f} times as fast at {sides[-1]} px"
    )
    linear = abs(growth - 4) <= 0.1
    return Result(words, linear and ratio >= 3 if full else linear, costs.plot)


def _net(seed: int, blocks: tuple[str, ...], **options: Any) -> Pyramid:
    torch.manual_seed(seed)
    return l2vit(
        (32,),
        (2,),
        (2,),
        num_classes=10,
        in_channels=1,
        window_size=4,
        drop_path=0.0,
        blocks=blocks,
        **options,
    )


def _adds(block: LinearBlock) -> Callable[[Tensor], Tensor]:
    """What the block's attention, and what follows it, add to the tokens."""
    return lambda x: block.mix(x) - x


def _loss(model: nn.Module, batch: dict[str, Float[Tensor, "..."]]) -> Any:
    return cross_entropy(model(batch["images"]), batch["labels"])
