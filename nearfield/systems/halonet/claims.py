"""What HaloNet claims, tried here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from nearfield.bench.resolution import draw_lines
from nearfield.bench.work import cpu_seconds
from nearfield.catalog import Result
from nearfield.core import library
from nearfield.data import images
from nearfield.measure.flops import count_flops
from nearfield.ops.halo import halo_attention
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.systems.halonet.layer import HaloAttention
from nearfield.systems.halonet.model import Design, HaloNet, Plan, halonet
from nearfield.train.vision import learn

SEEDS = (0, 1, 2)
Numbers = dict[str, list[float]]


def attention_for_parameters(*, full: bool = False) -> Result:
    """Three nets that differ in what their bottlenecks hold inside, on handwritten digits."""
    attention = _small(16)
    budget = _parameters(attention)
    inner = max(width for width in range(4, 17) if _parameters(_small(width, attends=())) <= budget)
    makes = {
        "attention": partial(_small, 16),
        "convolution of as many parameters": partial(_small, inner, attends=()),
        "convolution of as many channels": partial(_small, 16, attends=()),
    }
    found = _accuracies(makes, full)
    sizes = ", ".join(f"{_parameters(make()):,}" for make in makes.values())
    holds = _mean(found["attention"]) >= _mean(found["convolution of as many parameters"])
    return Result(f"accuracy by seed: {_words(found)}; {sizes} parameters", holds, partial(_dots, found))


def halo_beats_sliding(*, full: bool = False) -> Result:
    """Blocks of 8 x 8 with a halo of 3 against a sliding window, 14 x 14 keys for each query in both."""
    side = 112 if full else 56
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, side, side, 4, 32, generator=draw) for _ in range(3))
    seconds: dict[str, float] = {}
    wins = True
    with torch.no_grad():
        for backend in ("tiled", "native") if library.unavailable() is None else ("tiled",):
            halo: Callable[[], Any] = partial(
                halo_attention, q, k, v, block_size=8, halo_size=3, backend=backend
            )
            sliding = partial(neighborhood_attention, q, k, v, Neighborhood(14), backend=backend)
            both = [cpu_seconds(call, budget=2.0 if full else 0.2) for call in (halo, sliding)]
            wins &= both[0] < both[1]
            seconds |= {f"halo, {backend}": both[0], f"sliding, {backend}": both[1]}
    words = "; ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    return Result(f"{side} x {side} queries: {words}", wins, partial(_bars, seconds))


def larger_halos(*, full: bool = False) -> Result:
    """Accuracy on handwritten digits, and cost, of blocks of 4 x 4 with halos of some sizes."""
    sizes = (0, 1, 2, 3, 4) if full else (0, 1)
    found = _accuracies({f"{size}": partial(_small, 16, halo=size) for size in sizes}, full)
    picture = torch.zeros(1, 1, 16, 16)
    macs = [_macs(partial(_small(16, halo=size).eval(), picture)) for size in sizes]
    best = max(_mean(found[f"{size}"]) for size in sizes[1:])
    costs = ", ".join(f"{each / 1e6:.2f}" for each in macs)
    return Result(
        f"accuracy by seed: {_words(found, 'halo ')}; million MACs {costs}",
        best > _mean(found["0"]),
        partial(_dots, found),
    )


def strided_queries(*, full: bool = False) -> Result:
    """Attention of queries at every second position against averages of the attention of all."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 32, 128, generator=draw)
    q, k, v = (torch.randn(1, 32, 32, 4, 32, generator=draw) for _ in range(3))
    attend = partial(halo_attention, key=k, value=v, block_size=8, halo_size=3, backend="tiled")
    calls = {"stride": partial(attend, q[:, ::2, ::2], query_stride=2), "pool": partial(attend, q)}
    budget = 1.0 if full else 0.1
    with torch.no_grad():
        cost = {name: (count_flops(call), cpu_seconds(call, budget=budget)) for name, call in calls.items()}
        layers = [
            cpu_seconds(partial(HaloAttention(128, 4, stride=2, pool=name == "pool"), x), budget=budget)
            for name in calls
        ]
    found = _accuracies({name: partial(_small, 16, downsampling=name) for name in calls}, full)
    products, seconds = (pool / stride for stride, pool in zip(*cost.values(), strict=True))
    loss = _mean(found["pool"]) - _mean(found["stride"])
    words = (
        f"pool / stride: products {products:.1f}, seconds in torch {seconds:.1f}, in a layer, where CPU "
        f"kernels know no stride, {layers[1] / layers[0]:.1f}; accuracy by seed: {_words(found)}"
    )
    return Result(words, products >= 3.5 and loss <= 0.02, partial(_dots, found))


def moves_by_blocks(*, full: bool = False) -> Result:
    """How far the inner part of a layer's output is from moving along when its input is moved."""
    shifts = range(9)
    found: Numbers = {}
    for name, attention in {
        "halo, blocks of 4": _layer(4, 1),
        "sliding, blocks of 1": _layer(1, 2),
    }.items():
        errors = []
        for seed in SEEDS:
            x = torch.randn(1, 24, 24, 16, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                still = attention(x)
                moved = [attention(x.roll(shift, 2)) for shift in shifts]
            inner = (slice(None), slice(12, 20), slice(12, 20))  # far from where the roll wraps around
            pairs = [
                (out[inner], still.roll(shift, 2)[inner]) for shift, out in zip(shifts, moved, strict=True)
            ]
            errors.append([float((a - b).norm() / b.norm()) for a, b in pairs])
        found[name] = [max(each) for each in zip(*errors, strict=True)]
    blocked, sliding = found.values()
    whole = max(blocked[0], blocked[4], blocked[8])
    between = min(error for shift, error in zip(shifts, blocked, strict=True) if shift % 4)
    words = (
        f"relative error: shifts by blocks {whole:.0e}, others at least {between:.2f}; "
        f"sliding windows {max(sliding):.0e}"
    )
    lines = {name: list(zip(shifts, each, strict=True)) for name, each in found.items()}
    return Result(
        words,
        whole < 1e-5 and max(sliding) < 1e-5 and between > 0.01,
        lambda axes: draw_lines(axes, lines, "shift, positions", "relative error", scale="linear"),
    )


def _small(
    inner: int, *, attends: Sequence[int] = (0,), halo: int = 1, downsampling: Any = "stride"
) -> HaloNet:
    """Two bottlenecks, on maps of 8 x 8 and 4 x 4 for pictures of 16 x 16."""
    plans = (Plan(1, 32, inner, attends, 2, 4, halo), Plan(1, 64, 2 * inner, attends, 4, 4, halo))
    design = Design(plans, stem=(16,), stem_pool=False)
    return halonet(design, num_classes=10, in_channels=1, downsampling=downsampling)


def _accuracies(makes: Mapping[str, Callable[[], nn.Module]], full: bool) -> Numbers:
    data = images.digits(16)
    found: Numbers = {name: [] for name in makes}
    for name, make in makes.items():
        for seed in SEEDS if full else SEEDS[:1]:
            torch.manual_seed(seed)
            steps = 300 if full else 30
            found[name].append(learn(make(), data, steps=steps, lr=5e-3, seed=seed, batch_size=32))
    return found


def _layer(block: int, halo: int) -> HaloAttention:
    torch.manual_seed(0)
    return HaloAttention(16, 2, block_size=block, halo_size=halo)


def _macs(call: Callable[[], object]) -> float:
    with torch.no_grad():
        return count_flops(call) / 2


def _parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _words(found: Numbers, label: str = "") -> str:
    return "; ".join(
        f"{label}{name} {', '.join(f'{share:.3f}' for share in each)}" for name, each in found.items()
    )


def _dots(found: Numbers, axes: Any) -> None:
    for place, each in enumerate(found.values()):
        axes.plot([place] * len(each), each, "o", alpha=0.7)
    axes.set_xticks(range(len(found)), [name.replace(" of ", "\nof ") for name in found])
    axes.set(ylabel="accuracy")


def _bars(seconds: dict[str, float], axes: Any) -> None:
    axes.barh(list(seconds), [1e3 * value for value in seconds.values()])
    axes.set(xlabel="milliseconds, one thread")
    axes.invert_yaxis()
