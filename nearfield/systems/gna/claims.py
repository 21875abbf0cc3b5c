"""What Generalized Neighborhood Attention claims, tried here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain, product
from math import prod
from random import Random
from statistics import correlation, median
from typing import Any, NamedTuple

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
from nearfield.ops.neighborhood.triton_plan import Tiling, tiling
from nearfield.plan import cost, predict
from nearfield.plan.roofline import DEVICES
from nearfield.plan.tiles import flattened

DRAWS = 3
SETTINGS = 30  # of a draw
ROUNDS = 5
VARIANTS = 4  # of a GPU's kernel that its settings need: each is compiled for seconds
POOL = 200  # settings among which those of the commonest variants are


class Point(NamedTuple):
    """One setting: predicted and measured seconds, and the pairs that its FLOPs are proportional to."""

    predicted: float
    measured: float
    flops: float


def stride_is_time(*, full: bool = False) -> Result:
    """HunyuanVideo's grid in float16: aligned stride, stride 1 and full attention."""
    grid, window, heads = (30, 48, 80), (18, 24, 24), 24 if full else 4
    q, k, v = _on_gpu(1, grid, num_heads=heads)
    calls: dict[str, Callable[[], object]] = {
        "full": partial(F.scaled_dot_product_attention, _flat(q), _flat(k), _flat(v)),
        "stride 1": partial(neighborhood_attention, q, k, v, Neighborhood(window)),
        "stride 16 x 8 x 8": partial(
            neighborhood_attention, q, k, v, Neighborhood(window, stride=(16, 8, 8))
        ),
    }
    seconds = {name: timed(call, "cuda", budget=0.5).seconds for name, call in calls.items()}
    strided = seconds["stride 16 x 8 x 8"]
    to_sliding, to_full = seconds["stride 1"] / strided, seconds["full"] / strided
    words = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    words += f": the stride is {to_sliding:.1f} x faster than stride 1, {to_full:.1f} x than full"
    return Result(words, to_sliding >= 2.5 and to_full >= 9)


def simulator_predicts(*, full: bool = False) -> Result:
    """Predicted and measured seconds of random settings of much the same FLOPs, on this CPU.

    Several draws, so that no single lucky one decides: the worst of them does. Seconds are the least of
    rounds over all settings, so that a slow while of the machine falls on no setting alone.
    """
    grid, heads, head_dim = (64, 64), 4, 32
    q, k, v = _random(0, grid, num_heads=heads, head_dim=head_dim)
    matrix = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    gflops = 2 * 1024**3 / cpu_seconds(partial(torch.mm, matrix, matrix), budget=0.1) / 1e9
    draws = [_settings(Random(seed), grid, SETTINGS if full else 4) for seed in range(DRAWS if full else 1)]
    backends = ("tiled", "native")
    seconds: dict[tuple[str, Neighborhood], float] = {}
    for _, backend, pattern in product(range(ROUNDS if full else 1), backends, chain(*draws)):
        call = partial(neighborhood_attention, q, k, v, pattern, backend=backend)
        once = cpu_seconds(call, budget=0.1 if full else 0.05, least=2)
        seconds[backend, pattern] = min(once, seconds.get((backend, pattern), once))

    def point(backend: str, pattern: Neighborhood) -> Point:
        bound = pattern.on(grid)
        predicted = predict(bound, heads=heads, head_dim=head_dim, gemm_gflops=gflops, backend=backend)
        return Point(predicted, seconds[backend, pattern], bound.num_pairs)

    found = {backend: [[point(backend, each) for each in draw] for draw in draws] for backend in backends}
    words, holds = _judged(found, 0.9)
    return Result(words, holds, partial(_scatter, found))


def simulator_predicts_on_gpu(*, full: bool = False) -> Result:
    """The same for the Triton kernels in float16, on four grids of 128 x 128.

    So that few kernels are compiled, settings are those of a larger draw that need its commonest variants.
    """
    gpu = torch.cuda.get_device_name().lower()
    device = next((name for name in DEVICES if name in gpu), None)
    if device is None:
        known = ", ".join(name for name, machine in DEVICES.items() if machine.is_gpu)
        return Result("", None, skipped=f"seconds are predicted for {known}, not for {gpu!r}")
    grid, batch, heads = (128, 128), 4, 16
    q, k, v = _on_gpu(batch, grid, num_heads=heads)
    found: list[Point] = []
    for pattern in _settings_on_gpu(Random(0), grid, full=full):
        bound = pattern.on(grid)
        predicted = predict(
            bound, heads=heads, head_dim=128, dtype="float16", backend="triton", device=device, batch=batch
        )
        call = partial(neighborhood_attention, q, k, v, pattern, backend="triton")
        seconds = timed(call, "cuda", budget=0.05, least=5).seconds
        found.append(Point(predicted, seconds, bound.num_pairs))
    words, holds = _judged({"triton": [found]}, 0.95)
    return Result(words, holds, partial(_scatter, {"triton": [found]}))


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


def _on_gpu(batch: int, grid: tuple[int, ...], *, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in float16 with 128 channels, drawn where they are used."""
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, *grid, num_heads, 128, generator=draw, device="cuda", dtype=torch.float16)
        for _ in range(3)
    )
    return q, k, v


def _settings(draw: Random, grid: tuple[int, int], count: int) -> list[Neighborhood]:
    """Random patterns in which a query sees 128 to 512 keys: their FLOPs differ by no more."""
    found: list[Neighborhood] = []
    while len(found) < count:
        dilation = draw.choice((1, 1, 1, 2))
        size = tuple(draw.randint(3, side // dilation) for side in grid)
        stride = tuple(min(draw.choice((1, 2, 4, 8, k)), k) for k in size)
        if 128 <= prod(size) <= 512:
            found.append(Neighborhood(size, stride, dilation))
    return found


def _settings_on_gpu(draw: Random, grid: tuple[int, int], *, full: bool) -> list[Neighborhood]:
    """Random patterns of 512 to 2,048 keys for a query and sides within 4 x, sliding or strided on both axes.

    Kernels are compiled for their boxes, and anew where a stride is 1.
    """
    pool: dict[tuple[Tiling, bool], list[Neighborhood]] = {}
    for _ in range(POOL if full else POOL // 4):
        size = (0, 0)
        while not (512 <= prod(size) <= 2048 and max(size) <= 4 * min(size)):
            size = (draw.randint(3, grid[0]), draw.randint(3, grid[1]))
        is_sliding = draw.random() < 0.5
        stride = tuple(1 if is_sliding else min(draw.choice((2, 4, 8, 16)), k) for k in size)
        pattern = Neighborhood(size, stride)
        variant = tiling((pattern.on(grid),), "forward", 2, 128, 90, "groups"), is_sliding
        pool.setdefault(variant, []).append(pattern)
    commonest = sorted(pool.values(), key=len, reverse=True)[: VARIANTS if full else 1]
    every = [pattern for patterns in commonest for pattern in patterns]
    return draw.sample(every, min(SETTINGS if full else 4, len(every)))


def _judged(found: dict[str, list[list[Point]]], least: float) -> tuple[str, bool]:
    """Rank correlations of measured seconds with predicted ones and with FLOPs alone, draw by draw.

    The verdict is that of the worst draw. A prediction is clearly above FLOPs if at most half as much is
    missing to 1.
    """
    words, holds = [], True
    for backend, draws in found.items():
        pairs = [(_rank_correlation(draw, "predicted"), _rank_correlation(draw, "flops")) for draw in draws]
        holds &= all(ours >= least and 1 - ours <= (1 - control) / 2 for ours, control in pairs)
        predicted, measured, flops = zip(*chain(*draws), strict=True)
        ours, control = (", ".join(f"{value:.3f}" for value in values) for values in zip(*pairs, strict=True))
        ratio = median(p / m for p, m in zip(predicted, measured, strict=True))
        words.append(
            f"{backend}: {ours} over {len(draws[0])} settings, FLOPs alone {control} (they span "
            f"{max(flops) / min(flops):.1f} x, seconds {max(measured) / min(measured):.1f} x; "
            f"predicted / measured {ratio:.2f})"
        )
    return "; ".join(words), holds


def _rank_correlation(draw: list[Point], column: str) -> float:
    """Spearman's, of a column with measured seconds; equal values share the mean of their places.

    0 where all values of a kind are equal.
    """
    ranks = []
    for values in ([getattr(point, column) for point in draw], [point.measured for point in draw]):
        order = sorted(values)
        ranks.append([order.index(value) + (order.count(value) - 1) / 2 for value in values])
    return correlation(*ranks) if all(len(set(rank)) > 1 for rank in ranks) else 0.0


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


def _scatter(found: dict[str, list[list[Point]]], axes: Any) -> None:
    for backend, draws in found.items():
        predicted, measured, _ = zip(*chain(*draws), strict=True)
        axes.scatter([1e3 * p for p in predicted], [1e3 * m for m in measured], label=backend)
    axes.set(xlabel="predicted milliseconds", ylabel="measured milliseconds", xlim=(0, None), ylim=(0, None))
    axes.legend()


def _lines(windows: tuple[int, ...], errors: dict[str, list[float]], axes: Any) -> None:
    for name, line in errors.items():
        axes.plot(windows, line, marker="o", label=f"stride {name}")
    axes.set(xlabel="window's side in patches", ylabel="relative error of the features", ylim=(0, None))
    axes.legend()
