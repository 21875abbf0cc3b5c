"""What Local Linear Attention claims, tried here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nearfield.bench.resolution import draw_lines, slope
from nearfield.bench.seeds import by_seed, draw_seeds, means
from nearfield.bench.work import peak_growth
from nearfield.catalog import Result
from nearfield.data import sequences
from nearfield.ops.lla import local_linear_attention
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.systems.lla.model import mqar, tracking
from nearfield.systems.lla.study import EXACT, average, error, recursive_ridge, regress
from nearfield.train import Recipe, Task, fit

SEEDS = (0, 1, 2)
SHARE = "share of right answers"


def non_stationary_regression(*, full: bool = False) -> Result:
    """Each value predicted from the pairs before it, by one layer without weights."""
    tokens, count = (512, 16) if full else (256, 4)
    found: dict[str, dict[str, float]] = {}
    for dim, segment in ((8, 128), (16, 128), (8, 64), (16, 64)):
        errors: dict[str, list[float]] = {"LLA": [], "softmax": [], "recursive ridge": []}
        for seed in SEEDS:
            draw = torch.Generator().manual_seed(seed)
            made = sequences.regression(count, tokens=tokens, dim=dim, segment=segment, generator=draw)
            bandwidths = (4.0, 8.0, 16.0, 32.0) if full else (8.0, 16.0)
            ridges = (0.003, 0.01, 0.03, 0.1, 0.3) if full else (0.01, 0.1)
            errors["LLA"].append(min(error(made, regress(made, h, r)) for h in bandwidths for r in ridges))
            errors["softmax"].append(min(error(made, average(made, h)) for h in (*bandwidths, 64.0)))
            errors["recursive ridge"].append(
                min(error(made, recursive_ridge(made, r)) for r in (0.01, 0.1, 1.0))
            )
        found[f"d {dim}, segment {segment}"] = {name: sum(e) / len(e) for name, e in errors.items()}
    holds = all(e["LLA"] < min(e["softmax"], e["recursive ridge"]) for e in found.values())
    words = "; ".join(
        f"{case}: {', '.join(f'{name} {e:.3f}' for name, e in errors.items())}"
        for case, errors in found.items()
    )
    return Result(words, holds, partial(_grouped_bars, found))


def boundary_bias(*, full: bool = False) -> Result:
    """A smooth function of an angle, known with noise on one side of the query only."""
    sizes = (64, 128, 256, 512, 1024, 2048) if full else (64, 256, 1024)
    draws = 2000 if full else 300
    bandwidths = [2.0**p for p in range(2, 15)]
    errors: dict[str, list[float]] = {"softmax": [], "LLA": []}
    for size in sizes:
        draw = torch.Generator().manual_seed(0)
        angles = torch.rand(draws, size, generator=draw, dtype=torch.float64)
        values = (
            torch.sin(2 * angles)
            + angles
            + 0.3 * torch.randn(angles.shape, generator=draw, dtype=torch.float64)
        )
        keys = torch.stack([angles.cos(), angles.sin()], -1).unsqueeze(2)  # [B, T, 1, 2]
        query = keys.new_tensor([1.0, 0.0]).expand(draws, 1, 1, 2)  # angle 0, where the function is 0
        values = values[..., None, None]
        found: dict[str, list[Tensor]] = {name: [] for name in errors}
        given = (query, keys, values, Neighborhood(size, is_causal=True))
        for bandwidth in bandwidths:
            found["softmax"].append(neighborhood_attention(*given, scale=bandwidth))
            line = local_linear_attention(
                *given, ridge=1e-9, solver=EXACT, scale=bandwidth, backend="reference"
            )
            found["LLA"].append(line)
        for name, estimates in found.items():
            errors[name].append(min(float(estimate.square().mean()) for estimate in estimates))
    slopes = {name: slope(sizes, e) for name, e in errors.items()}
    words = ", ".join(f"{name} {found:.2f}" for name, found in slopes.items())
    return Result(
        f"slopes: {words} (theory for one dimension: -0.67 and -0.80)",
        slopes["LLA"] <= slopes["softmax"] - 0.1,
        partial(_draw, sizes, errors, "keys", "squared error"),
    )


def recall(*, full: bool = False) -> Result:
    """Trained models of two layers: values of keys that stand earlier in the sequence."""
    setting = (
        {"tokens": 64, "pairs": 16, "vocabulary": 512}
        if full
        else {"tokens": 12, "pairs": 3, "vocabulary": 16}
    )
    found = _train(
        mqar,
        ("lla", "softmax", "gla"),
        full,
        steps=2000 if full else 120,
        lr=3e-3 if full else 1e-2,
        **setting,
    )
    lla, softmax, gla = means(found)
    return Result(
        f"{SHARE} by seed: {by_seed(found)}",
        lla >= softmax >= gla,
        partial(draw_seeds, found=found, label=SHARE),
    )


def state_tracking(*, full: bool = False) -> Result:
    """Trained models of two layers: which item stands first after each of a row of swaps."""
    setting = {"swaps": 12, "items": 4} if full else {"swaps": 6, "items": 3}
    found = _train(
        tracking, ("lla", "softmax"), full, steps=2000 if full else 150, lr=3e-3 if full else 1e-2, **setting
    )
    lla, softmax = means(found)
    return Result(
        f"{SHARE} by seed: {by_seed(found)}",
        abs(lla - softmax) <= 0.05,
        partial(draw_seeds, found=found, label=SHARE),
    )


def linear_memory(*, full: bool = False) -> Result:
    """Growth of the process's peak memory in one forward pass, blocked and by the definition."""
    sizes = (1024, 2048, 4096, 8192, 16384) if full else (1024, 4096)
    most_dense = 4096 if full else 1024  # the definition holds several square matrices
    found: dict[str, list[float]] = {"tiled": [], "reference": []}
    try:
        for name, lengths in found.items():
            for tokens in (256, *sizes):
                if name == "reference" and tokens > most_dense:
                    continue
                draw = torch.Generator().manual_seed(0)
                q, k, v = (torch.randn(1, tokens, 1, 32, generator=draw) for _ in range(3))
                call = partial(
                    local_linear_attention,
                    q,
                    k,
                    v,
                    Neighborhood(tokens, is_causal=True),
                    ridge=1.0,
                    backend=name,
                )
                growth = peak_growth(call)
                if tokens > 256:  # the first call loads what is loaded once
                    lengths.append(growth / 2**20)
    except OSError as error:
        return Result(
            "", None, skipped=f"peak memory is read from Linux's /proc, which is not here ({error})"
        )
    slopes = {name: slope(sizes[: len(each)], each) for name, each in found.items() if len(each) > 1}
    words = "; ".join(f"{name} {', '.join(f'{mib:.0f}' for mib in each)} MiB" for name, each in found.items())
    return Result(
        f"{', '.join(map(str, sizes))} tokens: {words}",
        slopes["tiled"] <= 1.2,
        partial(_draw, sizes, found, "tokens", "MiB"),
    )


def _train(
    task: Callable[..., Task], mixers: tuple[str, ...], full: bool, *, steps: int, lr: float, **setting: int
) -> dict[str, list[float]]:
    """Shares of right answers after training, for each mixer and seed; the short form has one seed."""
    found: dict[str, list[float]] = {}
    for mixer in mixers:
        for seed in SEEDS if full else SEEDS[:1]:
            recipe = Recipe(
                steps=steps,
                batch_size=32,
                lr=lr,
                warmup=0.1,
                weight_decay=0.1,
                clip=1.0,
                seed=seed,
                log_every=steps,
            )
            torch.manual_seed(seed)
            made = task(recipe, mixer=mixer, dim=64 if full else 32, **setting)
            result = fit(made.model, made.data, made.loss, recipe=recipe, evaluate=made.evaluate)
            found.setdefault(mixer, []).append(result.evaluations[steps]["accuracy"])
    return found


def _grouped_bars(found: dict[str, dict[str, float]], axes: Any) -> None:
    names = list(next(iter(found.values())))
    for place, name in enumerate(names):
        at = [number + 0.25 * (place - 1) for number in range(len(found))]
        axes.bar(at, [errors[name] for errors in found.values()], width=0.25, label=name)
    axes.set_xticks(range(len(found)), list(found), fontsize="small")
    axes.set(ylabel="squared error / mean square")
    axes.legend()


def _draw(sizes: tuple[int, ...], found: dict[str, list[float]], x: str, y: str, axes: Any) -> None:
    draw_lines(axes, {name: list(zip(sizes, each, strict=False)) for name, each in found.items()}, x, y)
