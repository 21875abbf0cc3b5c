"""What Generalized Neighborhood Attention claims, tried here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from random import Random
from statistics import correlation
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfield.bench.timing import timed
from nearfield.bench.work import cpu_seconds
from nearfield.catalog import Result
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.ops.neighborhood.geometry import Bound
from nearfield.ops.neighborhood.tiled_plan import tile_shape
from nearfield.plan import cost
from nearfield.plan.tiles import flattened

SEEDS = (0, 1, 2)


def stride_is_time(*, full: bool = False) -> Result:
    """HunyuanVideo's grid in float16: aligned stride, stride 1 and full attention."""
    grid, window, heads = (30, 48, 80), (18, 24, 24), 24 if full else 4
    q, k, v = (x.cuda().half() for x in _random(0, grid, num_heads=heads, head_dim=128))
    calls: dict[str, Callable[[], object]] = {
        "full": partial(F.scaled_dot_product_attention, _flat(q), _flat(k), _flat(v)),
        "stride 1": partial(neighborhood_attention, q, k, v, Neighborhood(window)),
        "stride 16 x 8 x 8": partial(
            neighborhood_attention, q, k, v, Neighborhood(window, stride=(16, 8, 8))
        ),
    }
    seconds = {name: timed(call, "cuda", budget=2.0).seconds for name, call in calls.items()}
    strided = seconds["stride 16 x 8 x 8"]
    words = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    return Result(words, seconds["stride 1"] >= 2.5 * strided and seconds["full"] >= 9 * strided)


def simulator_predicts(*, full: bool = False) -> Result:
    """Spearman's rank correlation of predicted and measured speed-up over random settings, on this CPU.

    Predicted: tile-wise, with the query tiles of the tiled backend and key boxes that start at the window.
    """
    grid = (64, 64)
    found: dict[int, list[tuple[float, float]]] = {}
    for seed in SEEDS:
        q, k, v = _random(seed, grid, num_heads=4, head_dim=32)
        dense = cpu_seconds(partial(F.scaled_dot_product_attention, _flat(q), _flat(k), _flat(v)))
        found[seed] = []
        for pattern in _settings(Random(seed), grid, 30 if full else 6):
            predicted = cost(
                grid,
                pattern.kernel_size,
                stride=pattern.stride,
                dilation=pattern.dilation,
                q_tile=tile_shape(pattern.on(grid), group=1),
                kv_tile=(1, 1),
            ).tile_wise_dynamic
            call = partial(neighborhood_attention, q, k, v, pattern, backend="tiled")
            found[seed].append((predicted, dense / cpu_seconds(call, budget=0.5 if full else 0.1, least=3)))
    alone = ", ".join(f"{_rank_correlation(points):.3f}" for points in found.values())
    together = [point for points in found.values() for point in points]
    overall = _rank_correlation(together)
    words = f"{overall:.3f} over {len(together)} settings (each of three seeds alone: {alone})"
    return Result(words, overall >= 0.95, partial(_scatter, found))


def tiles_not_lines(*, full: bool = False) -> Result:
    """Bounds of both tilings, and both timed by one and the same loop over query tiles on 128 x 128."""
    large, small = Neighborhood(13).on((128, 128)), Neighborhood(7).on((56, 56))
    large_cost = cost(large.grid, 13, q_tile=8, kv_tile=8)
    small_cost = cost(small.grid, 7, q_tile=8, kv_tile=8)
    bounds = {
        "128: 8 x 8": (large_cost.tile_wise_static, 31.0),
        "128: line of 64": (flattened(large, 64, 64), 9.8),
        "56: 8 x 8, lattice": (small_cost.tile_wise_static, 6.7),
        "56: line of 64": (flattened(small, 64, 64), 7.0),
        "56: 8 x 8, from the window": (small_cost.tile_wise_dynamic, 12.3),
    }
    q, k, v = (_flat(x) for x in _random(0, large.grid, num_heads=4, head_dim=64))
    some = torch.randperm(256, generator=torch.Generator().manual_seed(0))[: 256 if full else 12]
    seconds = {}
    for name, tokens in {
        "tiles": _tiles(large, 8),
        "lines": torch.arange(large.num_keys).view(-1, 64),
    }.items():
        visits = [_visit(large, tokens, int(number)) for number in some]
        seconds[name] = cpu_seconds(partial(_attend_visits, q, k, v, visits))
    as_said = all(abs(value - said) <= 0.1 for value, said in bounds.values())
    words = ", ".join(f"{name} {value:.1f}" for name, (value, _) in bounds.items())
    words += f"; {len(some)} query tiles of 128 x 128: {1e3 * seconds['tiles']:.0f} ms in tiles of 8 x 8, "
    words += f"{1e3 * seconds['lines']:.0f} ms in lines"
    return Result(words, as_said and seconds["tiles"] < seconds["lines"])


def quality_is_smooth(*, full: bool = False) -> Result:
    """Relative error of DINOv2-S's features when all layers become local, against the window's side."""
    from nearfield.data import pictures
    from nearfield.systems.gna.study import features

    patches = 16 if full else 10
    images = pictures.tensors(14 * patches, 3 if full else 1)
    reference = features(images, None)
    windows = (3, 5, 7, 9, 11, 13, 15) if full else (3, 6, 9)
    errors: dict[str, list[float]] = {}
    for name, stride_of in {"1": lambda k: 1, "4": lambda k: min(4, k), "the window": lambda k: k}.items():
        errors[name] = []
        for window in windows:
            difference = features(images, Neighborhood(window, stride=stride_of(window))) - reference
            errors[name].append(float(difference.square().mean().sqrt() / reference.square().mean().sqrt()))
    falls = all(a > b for line in errors.values() for a, b in zip(line, line[1:], strict=False))
    sizes = ", ".join(map(str, windows))
    words = "; ".join(
        f"stride {name}: {', '.join(f'{e:.2f}' for e in line)}" for name, line in errors.items()
    )
    return Result(f"windows {sizes} of {patches}: {words}", falls, partial(_lines, windows, errors))


def _random(
    seed: int, grid: tuple[int, ...], *, num_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, *grid, num_heads, head_dim, generator=draw) for _ in range(3))
    return q, k, v


def _flat(x: Float[Tensor, "b *grid h d"]) -> Float[Tensor, "b h n d"]:
    return rearrange(x, "b ... h d -> b h (...) d")


def _settings(draw: Random, grid: tuple[int, int], count: int) -> list[Neighborhood]:
    """Random patterns whose windows span from a few keys to most of the grid."""
    found = []
    for _ in range(count):
        dilation = draw.choice((1, 1, 1, 2))
        size = tuple(draw.randint(3, side // (2 * dilation)) for side in grid)
        stride = tuple(draw.choice((1, 2, 4, 8, k)) for k in size)
        found.append(
            Neighborhood(size, tuple(min(s, k) for s, k in zip(stride, size, strict=True)), dilation)
        )
    return found


def _rank_correlation(points: list[tuple[float, float]]) -> float:
    """Spearman's; equal values share the mean of their places."""
    ranks = []
    for values in zip(*points, strict=True):
        order = sorted(values)
        ranks.append([order.index(value) + (order.count(value) - 1) / 2 for value in values])
    return correlation(*ranks)


def _tiles(bound: Bound, side: int) -> Int[Tensor, "tiles tokens"]:
    """Token numbers of each tile of a grid of two dimensions."""
    tokens = torch.arange(prod(bound.grid)).view(bound.grid)
    return rearrange(tokens, "(y a) (x b) -> (y x) (a b)", a=side, b=side)


def _visit(
    bound: Bound, tokens: Int[Tensor, "tiles n"], number: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"], Bool[Tensor, "n m"]]:
    """Queries of one tile, the keys of all tiles that some of them sees, and who sees whom."""
    queries = tokens[number]
    seen = bound.mask_mod(0, 0, queries[:, None, None], tokens[None])  # [n, tiles, n]
    visited = seen.any(2).any(0)
    return queries, tokens[visited].flatten(), seen[:, visited].flatten(1)


def _attend_visits(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], visits: list[Any]
) -> None:
    for queries, keys, seen in visits:
        F.scaled_dot_product_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=seen)


def _scatter(found: dict[int, list[tuple[float, float]]], axes: Any) -> None:
    for seed, points in found.items():
        axes.scatter(*zip(*points, strict=True), label=f"seed {seed}")
    axes.set(xlabel="predicted speed-up", ylabel="measured speed-up", xscale="log", yscale="log")
    axes.legend()


def _lines(windows: tuple[int, ...], errors: dict[str, list[float]], axes: Any) -> None:
    for name, line in errors.items():
        axes.plot(windows, line, marker="o", label=f"stride {name}")
    axes.set(xlabel="window's side in patches", ylabel="relative error of the features", ylim=(0, None))
    axes.legend()
