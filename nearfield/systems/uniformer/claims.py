"""What UniFormer claims, tried here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from nearfield.bench.resolution import against_resolution, equal_vit, model_macs
from nearfield.bench.seeds import by_seed, draw_seeds, means
from nearfield.bench.work import cpu_seconds
from nearfield.catalog import Result
from nearfield.data import images
from nearfield.nn.pyramid import Pyramid
from nearfield.systems.uniformer.model import (
    set_prune_ratio,
    uniformer,
    uniformer_light,
    uniformer_small,
    uniformer_video,
    uniformer_xxs,
)
from nearfield.systems.uniformer.study import ByFrame, answers, features, turns
from nearfield.train.vision import accuracy, learn

SEEDS = (0, 1, 2)
SMALL: dict[str, Any] = {"in_channels": 1, "drop_path": 0.0}
LOCAL_GLOBAL = ("local", "global")


def local_then_global(*, full: bool = False) -> Result:
    """Nets of two stages with the same number of multiplications, on digits and on textures."""
    kinds = {  # dims that make the costs equal
        "local, global": ((16, 48), LOCAL_GLOBAL),
        "global, global": ((16, 40), ("global", "global")),
        "local, local": ((18, 50), ("local", "local")),
    }
    found: dict[str, list[float]] = {}
    macs = []
    for subject in ("digits", "textures") if full else ("digits",):
        data = getattr(images, subject)(32)
        for name, (dims, blocks) in kinds.items():
            for seed in SEEDS if full else SEEDS[:1]:
                torch.manual_seed(seed)
                net = uniformer(dims, (2, 2), 8, num_classes=len(data.classes), blocks=blocks, **SMALL)
                share = learn(net, data, steps=200 if full else 6, seed=seed, batch_size=32)
                found.setdefault(f"{name} on {subject}", []).append(share)
            macs.append(model_macs(net, (1, 32, 32)) / 1e6)
    each = means(found)
    return Result(
        f"accuracy by seed: {by_seed(found)}; {min(macs):.2f} to {max(macs):.2f} million MACs",
        all(each[at] > max(each[at + 1 : at + 3]) for at in range(0, len(each), 3)),
        partial(draw_seeds, found=_folded(found), label="accuracy"),
    )


def windows_instead(*, full: bool = False) -> Result:
    """Nets trained with attention over everything; their weights with windows of 4, trained on a little."""
    data = images.digits(64)
    if not full:
        data = data._replace(test=data.test[:64], test_labels=data.test_labels[:64])
    large = 512 if full else 256
    alike: dict[str, list[float]] = {}
    right: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for seed in SEEDS if full else SEEDS[:1]:
        nets = {kind: _windowed(kind, seed) for kind in ("global", "hybrid", "window")}
        learn(nets["global"], data, steps=200 if full else 2, lr=4e-3, seed=seed, batch_size=32)
        trained = {name: value.clone() for name, value in nets["global"].state_dict().items()}
        wanted = features(nets["global"], data.test)
        for kind, net in nets.items():
            net.load_state_dict(trained)
            cosine = torch.cosine_similarity(features(net, data.test), wanted, dim=-1)
            alike.setdefault(kind, []).append(float(cosine.mean()))
            right.setdefault(kind, []).append(accuracy(net, data.test, data.test_labels))
            share = learn(net, data, steps=40 if full else 1, lr=1e-3, seed=seed, batch_size=32)
            right.setdefault(f"{kind}, trained on", []).append(share)
            picture = torch.randn(1, 1, large, large, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                spent = cpu_seconds(partial(net.eval(), picture), budget=0.1, least=2)
            seconds[kind] = min(spent, seconds.get(kind, spent))
    _, hybrid, window = means(alike)
    shares = dict(zip(right, means(right), strict=True))
    lost = [shares["global, trained on"] - shares[f"{kind}, trained on"] for kind in ("hybrid", "window")]
    order = list(seconds.values())
    words = ", ".join(f"{kind} {spent:.3f}" for kind, spent in seconds.items())
    return Result(
        f"cosine to the features of global attention, by seed: {by_seed(alike)}; accuracy: {by_seed(right)}; "
        f"seconds at {large} px: {words}",
        hybrid > window and max(lost) <= 0.05 and order == sorted(order, reverse=True),
        partial(draw_seeds, found=_folded(right), label="accuracy"),
    )


def pruning(*, full: bool = False) -> Result:
    """Light nets that pay for half of their tokens or for all, with the same weights; the cost of XXS."""
    data = images.digits(64)
    if not full:
        data = data._replace(test=data.test[:64], test_labels=data.test_labels[:64])
    found: dict[str, list[float]] = {}
    for seed in SEEDS if full else SEEDS[:1]:
        torch.manual_seed(seed)
        net = uniformer_light((8, 16, 32, 48), (1, 1, 4, 2), 16, num_classes=10, **SMALL)
        learn(net, data, steps=200 if full else 3, lr=2e-3, seed=seed, batch_size=16)
        guesses = []
        for ratio in (0.5, 1.0):
            set_prune_ratio(net, ratio)
            guesses.append(answers(net, data.test))
            share = float((guesses[-1] == data.test_labels).float().mean())
            found.setdefault(f"accuracy with {'half' if ratio < 1 else 'all'}", []).append(share)
        found.setdefault("same answers", []).append(float((guesses[0] == guesses[1]).float().mean()))
    side = 448 if full else 224
    net = uniformer_xxs().eval()
    picture = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    costs = []
    for ratio in (0.5, 1.0):
        set_prune_ratio(net, ratio)
        with torch.no_grad():
            spent = cpu_seconds(partial(net, picture), budget=2.0 if full else 0.05, least=2)
        costs.append((model_macs(net, (3, side, side)) / 1e9, spent))
    (fewer, fast), (more, slow) = costs
    half, every, same = means(found)
    return Result(
        f"by seed: {by_seed(found)}; XXS at {side} px, half and all: {fewer:.2f} and {more:.2f} GMACs, "
        f"{fast:.3f} and {slow:.3f} s",
        same >= 0.9 and every - half <= 0.02 and fewer < more and fast < slow,
        partial(draw_seeds, found=found, label="share of the pictures"),
    )


def motion(*, full: bool = False) -> Result:
    """Which way digits move in each half of a clip, told frame by frame, by convolutions, by attention."""
    data = turns(16 if full else 8)
    if not full:
        data = data._replace(test=data.test[:64], test_labels=data.test_labels[:64])
    clip, picture = (
        partial(build, (16, 32), (1, 1), 16, num_classes=4, **SMALL) for build in (uniformer_video, uniformer)
    )
    make: dict[str, Callable[[], nn.Module]] = {
        "mean of frames": lambda: ByFrame(picture(blocks=LOCAL_GLOBAL)),
        # 3 x 3 is the whole frame
        "convolutions only": partial(clip, blocks=("local", "window"), window_size=(1, 3, 3)),
        "split attention": partial(clip, blocks=LOCAL_GLOBAL, split="sequential"),
        "joint attention": partial(clip, blocks=LOCAL_GLOBAL),
    }
    found: dict[str, list[float]] = {}
    for name, build in make.items():
        for seed in SEEDS if full else SEEDS[:1]:
            torch.manual_seed(seed)
            share = learn(build(), data, steps=100 if full else 6, seed=seed, batch_size=32)
            found.setdefault(name, []).append(share)
    frames, convolutions, _, joint = means(found)
    return Result(
        f"accuracy by seed, 0.25 is chance: {by_seed(found)}",
        joint > convolutions > frames,
        partial(draw_seeds, found=_folded(found), label="accuracy"),
    )


def cost(*, full: bool = False) -> Result:
    """UniFormer-S with windows of 14 in its third stage against a ViT of that stage's width and its cost."""
    rival = equal_vit(uniformer_small())
    models: dict[str, nn.Module] = {
        kind: uniformer_small(blocks=("local", "local", kind, "global"))
        for kind in (("window", "hybrid", "global") if full else ("window",))
    }
    models[f"ViT of width 320, {len(rival.blocks)} blocks"] = rival
    sides = (224, 448, 896) if full else (224, 448)
    most = float("inf") if full else 5e9  # the short form times the smallest side only
    costs = against_resolution(models, sides, budget=0.5 if full else 0.01, least=1, most_macs=most)
    found = []
    for name, each in costs.seconds.items():
        seconds = ", ".join(f"{spent:.2f}" for spent in each if spent is not None)
        macs = ", ".join(f"{count / 1e9:.1f}" for count in costs.macs[name])
        found.append(f"{name} {macs} GMACs, to the power {costs.slope(name):.2f} of the pixels, {seconds} s")
    slopes = [costs.slope(name) for name in models]
    last = [each[-1] or 0.0 for each in costs.seconds.values()]
    holds = slopes == sorted(slopes) and last == sorted(last)
    return Result(f"at {', '.join(map(str, sides))} px: {'; '.join(found)}", holds, costs.plot)


def _windowed(kind: str, seed: int) -> Pyramid:
    torch.manual_seed(seed)
    blocks = ("local", kind)
    return uniformer((16, 32), (1, 4), 16, num_classes=10, blocks=blocks, window_size=4, **SMALL)


def _folded(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Names in a line for each word, to stand side by side below a picture."""
    return {name.replace(" ", "\n"): each for name, each in found.items()}
