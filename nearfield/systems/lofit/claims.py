"""What LoFiT claims, tried here."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from nearfield.bench.seeds import by_seed, draw_seeds, means
from nearfield.catalog import Result
from nearfield.measure.flops import count_flops
from nearfield.systems.lofit.convert import Heads, completion, select, tune
from nearfield.systems.lofit.steer import HeadOffsets, fold, load, mass_mean
from nearfield.systems.lofit.study import Samples, World, accuracy, planted, pocket, task_loss, trained
from nearfield.train import Recipe, fit
from nearfield.train.lora import lora

SEEDS = (0, 1, 2)
STRENGTHS = (
    0.5,
    1.0,
    2.0,
    5.0,
    15.0,
)  # of directions without learning; the best on the training samples counts


def finds_planted_heads(*, full: bool = False) -> Result:
    """Where three of 32 heads have been made four times as strong: how many of them the scales put first."""
    found, shares = dict[str, list[float]](), dict[str, list[float]]()
    for seed in SEEDS:
        world = planted(seed, "gains")
        penalties = (0.0, 1e-3, 5e-3, 2e-2) if full else (0.0, 5e-3)
        for penalty in penalties:
            recipe = _recipe(world, full, True)
            draw = torch.Generator().manual_seed(seed)
            scored = select(world.model, world.train, recipe=recipe, penalty=penalty, generator=draw)
            _tell(shares, f"penalty {penalty:g}", scored.share(0.1))
            _tell(found, f"penalty {penalty:g}", _overlap(scored.top(3), world.planted))
        _tell(found, "random", _overlap(world.random_heads(3, seed + 100), world.planted))
    falls = means(shares)
    words = f"planted heads among the first three, by seed: {by_seed(found)}; "
    words += f"share of all norms in the first tenth of the heads: {by_seed(shares)}"
    grows = all(a < b for a, b in zip(falls, falls[1:], strict=False))
    holds = min(found["penalty 0.005"]) > max(found["random"]) and grows
    return Result(words, holds, lambda axes: draw_seeds(axes, shares, "share in the first tenth"))


def few_offsets(*, full: bool = False) -> Result:
    """Agreement with a model of which three heads are offset; tuned at those, at others, at all, by LoRA."""
    found, sizes = dict[str, list[float]](), dict[str, int]()
    for seed in SEEDS if full else SEEDS[:1]:
        world = planted(seed, "offsets")
        _tell(found, "untuned", accuracy(world.model, world.held_out))
        draw = torch.Generator().manual_seed(seed)
        recipe = _recipe(world, full, True)
        scored = select(world.model, world.train, recipe=recipe, penalty=1e-3, generator=draw)
        every = {site: tuple(range(8)) for site in (f"model.layers.{n}.self_attn" for n in range(4))}
        for name, heads in {
            "planted heads": world.planted,
            "random heads": world.random_heads(3, seed + 100),
            "heads by scales": scored.top(3),
            "all heads": every,
        }.items():
            offsets = _tuned(world, heads, full)
            sizes[name] = offsets.num_parameters
            with offsets(world.model):
                _tell(found, name, accuracy(world.model, world.held_out))
        torch.manual_seed(seed)
        model = lora(copy.deepcopy(world.model), ["q_proj", "v_proj"], rank=4)
        fit(model, world.train, completion, recipe=replace(_recipe(world, full, False), lr=1e-2))
        sizes["LoRA"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        _tell(found, "LoRA", accuracy(model, world.held_out))
    words = f"held-out agreement: {by_seed(found)}; parameters: {sizes}"
    mean = dict(zip(found, means(found), strict=True))
    holds = mean["planted heads"] > max(mean["random heads"], mean["untuned"])
    holds = holds and mean["planted heads"] >= mean["LoRA"] and sizes["LoRA"] >= 20 * sizes["planted heads"]
    return Result(words, holds, lambda axes: draw_seeds(axes, found, "agreement"))


def selected_beat_random(*, full: bool = False) -> Result:
    """A rule on kinship on a trained model: tuned at heads by scales, at random ones, not at all."""
    if not full and pocket() is None:
        return Result("", None, skipped="a run on SmolLM2 takes minutes: nearfield run lofit --full")
    world = trained(samples=128 if full else 32)
    number = world.setting.heads
    draw, penalty = torch.Generator().manual_seed(0), world.setting.penalty
    recipe = _recipe(world, full, True)
    scored = select(world.model, world.train, recipe=recipe, penalty=penalty, generator=draw)
    losses: dict[str, list[float]] = {"untuned": [task_loss(world.model, world.held_out)]}
    right: dict[str, list[float]] = {"untuned": [accuracy(world.model, world.held_out)]}
    choices = [("selected", scored.top(number))]
    choices += [("random", world.random_heads(number, seed)) for seed in (range(3) if full else range(1))]
    for name, heads in choices:
        offsets = _tuned(world, heads, full)
        with offsets(world.model):
            _tell(losses, name, task_loss(world.model, world.held_out))
            _tell(right, name, accuracy(world.model, world.held_out))
    words = f"{number} heads, {offsets.num_parameters} parameters; nats: {by_seed(losses)}; "
    words += f"right (guessing 0.5): {by_seed(right)}"
    holds = max(losses["selected"]) < min(losses["random"])
    return Result(words, holds, lambda axes: draw_seeds(axes, losses, "nats per answer"))


def learned_beats_mean(*, full: bool = False) -> Result:
    """Learned offsets against the best of five strengths of the mean direction, at the same heads."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS if full else SEEDS[:2]:
        world = planted(seed, "offsets")
        _tell(found, "untuned", accuracy(world.model, world.held_out))
        with _tuned(world, world.planted, full)(world.model):
            _tell(found, "learned", accuracy(world.model, world.held_out))
        direction = mass_mean(world.model, world.true, world.false, world.planted, strength=1.0)
        best: HeadOffsets = max(
            (HeadOffsets(direction.at, strength) for strength in STRENGTHS),
            key=lambda offsets: _within(offsets, world.model, world.train),
        )
        _tell(found, "mean direction", _within(best, world.model, world.held_out))
    holds = min(found["learned"]) > max(found["mean direction"])
    words = f"held-out agreement: {by_seed(found)}"
    return Result(words, holds, lambda axes: draw_seeds(axes, found, "agreement"))


def folds_for_free(*, full: bool = False) -> Result:
    """Logits, arithmetic and size of a model with offsets worked into biases, against the steered one."""
    world = planted(0, "offsets")
    offsets = _tuned(world, world.planted, False)
    with tempfile.TemporaryDirectory() as folder:
        path = offsets.save(Path(folder) / "offsets.safetensors")
        kept, size = load(path), path.stat().st_size
    folded = fold(copy.deepcopy(world.model), kept)
    differences: dict[int, float] = {}
    for tokens in (1, 16, 256) if full else (1, 16):
        ids = torch.randint(64, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            with offsets(world.model):
                steered = world.model(ids, use_cache=False).logits
            differences[tokens] = float((folded(ids, use_cache=False).logits - steered).abs().max())
    ids = torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        work = [count_flops(partial(model, ids, use_cache=False)) for model in (world.model, folded)]
    words = f"largest difference of logits by tokens: {differences}; {size / 1024:.1f} kB; "
    words += f"FLOPs {work[0]}, {work[1]}"
    holds = max(differences.values()) < 1e-4 and size < 4096 and work[0] == work[1]
    return Result(
        words, holds, lambda axes: axes.bar([str(n) for n in differences], list(differences.values()))
    )


def _recipe(world: World, full: bool, selecting: bool) -> Recipe:
    lr = world.setting.select_lr if selecting else world.setting.lr
    steps, batch = (60 if full else 25), (16 if world.planted else 4)
    return world.setting.recipe(lr, steps=steps, batch_size=batch)


def _tuned(world: World, heads: Heads, full: bool) -> HeadOffsets:
    draw = torch.Generator().manual_seed(0)
    return tune(world.model, world.train, heads, recipe=_recipe(world, full, False), generator=draw)


def _within(offsets: HeadOffsets, model: nn.Module, data: Samples) -> float:
    with offsets(model):
        return accuracy(model, data)


def _overlap(found: Heads, planted: Heads) -> float:
    """The share of planted heads that are among those found."""
    pairs = [{(site, head) for site, heads in each.items() for head in heads} for each in (found, planted)]
    return len(pairs[0] & pairs[1]) / len(pairs[1])


def _tell(found: dict[str, list[float]], name: str, value: float) -> None:
    found.setdefault(name, []).append(value)
