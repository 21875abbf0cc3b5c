"""What ConViT claims, tried here."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.bench.resolution import draw_lines
from nearfield.catalog import Result
from nearfield.data import images
from nearfield.data.images import Images
from nearfield.systems.convit.layer import GatedPositionalAttention
from nearfield.systems.convit.model import ConViT, convit, convit_tiny
from nearfield.train.vision import learn

SEEDS = (0, 1, 2)
FEW = 135  # of 1,348 digits


def locality_at_start(*, full: bool = False) -> Result:
    """The attention of a first layer, before training, on random tokens of the published 14 x 14 grid."""
    means, errors = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        (layer,) = _gated(convit_tiny(depth=2, local_depth=1))
        with torch.no_grad():
            means.append(float(mean_distance(layer.maps(torch.randn(4, 14, 14, 192))).mean()))
            errors.append(float((_local_half(layer) - _gaussians(layer)).abs().max()))
    words = ", ".join(f"{mean:.3f}" for mean in means)
    return Result(
        f"mean distance by seed: {words} patches; offset half and closed form differ by {max(errors):.0e}",
        max(abs(mean - 2.68) for mean in means) <= 0.05 and max(errors) < 1e-6,
        _draw_heads,
    )


def gates_move(*, full: bool = False) -> Result:
    """The gates of small ConViTs after training on handwritten digits, by layer."""
    starts, found = [], []
    for seed in SEEDS if full else SEEDS[:1]:
        net = _net(seed)
        starts.append(_gates(net))
        learn(net, _digits(), steps=900 if full else 6, lr=3e-3, batch_size=32, seed=seed)
        found.append(_gates(net))
    start, gates = torch.stack(starts), torch.stack(found)  # [seeds, layers, heads]
    means = gates.mean((0, 2))
    words = ", ".join(f"{mean:.3f}" for mean in means.tolist())
    return Result(
        f"mean gate by layer: {words}, all {float(start.mean()):.3f} at the start; "
        f"lowest of a head {float(gates.min()):.3f}, highest {float(gates.max()):.3f}",
        bool(means[-1] < means[0] and (gates < start).any()),
        lambda axes: _draw_gates(axes, gates),
    )


def few_samples(*, full: bool = False) -> Result:
    """ConViT and the same net with plain attention throughout, on a tenth of the digits and on all."""
    found: dict[str, list[float]] = {}
    for amount, data in {"a tenth": _digits(FEW), "all": _digits()}.items():
        for name, local_depth in {"local": 3, "plain": 0}.items():
            for seed in SEEDS if full else SEEDS[:1]:
                net = _net(seed, local_depth=local_depth)
                share = _learn(net, data, full=full, seed=seed)
                found.setdefault(f"{name}, {amount}", []).append(share)
    means = {name: sum(each) / len(each) for name, each in found.items()}
    gains = [means[f"local, {amount}"] - means[f"plain, {amount}"] for amount in ("a tenth", "all")]
    return Result(
        f"accuracy by seed: {_by_seed(found)}; gain {gains[0]:.3f} on a tenth, {gains[1]:.3f} on all",
        gains[0] > max(0.0, gains[1]),
        partial(_draw_dots, found),
    )


def strength(*, full: bool = False) -> Result:
    """Starts of several strengths, and none, on a tenth of the digits."""
    strengths = (None, 0.0, 0.5, 1.0, 2.0) if full else (None, 1.0)
    found: dict[str, list[float]] = {}
    for alpha in strengths:
        for seed in SEEDS if full else SEEDS[:1]:
            net = _net(seed, locality_strength=alpha)
            share = _learn(net, _digits(FEW), full=full, seed=seed)
            found.setdefault("none" if alpha is None else f"{alpha:g}", []).append(share)
    means = {name: sum(each) / len(each) for name, each in found.items()}
    others = [means[name] for name in ("none", "0") if name in means]
    return Result(
        f"accuracy by seed at each strength: {_by_seed(found)}",
        means["1"] > max(others),
        partial(_draw_dots, found),
    )


def mean_distance(maps: Float[Tensor, "b h n n"]) -> Float[Tensor, " h"]:
    """How far each head looks on a square grid, in patches: `Σ_ij A_ij |r_ij| / N`."""
    side = round(maps.shape[-1] ** 0.5)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(maps)
    return (maps * torch.cdist(place, place)).sum(-1).mean((0, 2))


def _gaussians(layer: GatedPositionalAttention, side: int = 14) -> Float[Tensor, "h n n"]:
    """`exp(-|r - Δ_h|²)`, each row divided by its sum, for the offsets Δ_h = (column, row) of a square."""
    heads = round(layer.num_heads**0.5)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()  # (row, column)
    centres = torch.cartesian_prod(torch.arange(heads), torch.arange(heads)).double() - (heads - 1) / 2
    offset = place - place[:, None] - centres.flip(-1)[:, None, None]  # the row changes fastest with the head
    return (-offset.square().sum(-1)).softmax(-1)


def _local_half(layer: GatedPositionalAttention, side: int = 14) -> Float[Tensor, "h n n"]:
    rows, columns = layer.offset_maps(side, side)
    return torch.einsum("hyi,hxj->hyxij", rows, columns).flatten(3).flatten(1, 2)


def _digits(count: int | None = None) -> Images:
    data = images.digits(12)
    return data._replace(train=data.train[:count], train_labels=data.train_labels[:count])


def _net(seed: int, *, local_depth: int = 3, **options: Any) -> ConViT:
    """Five blocks on a grid of 6 x 6 patches, with nine heads, which start at the offsets of 3 x 3."""
    torch.manual_seed(seed)
    options = {"num_classes": 10, "in_channels": 1, "image_size": 12, "patch_size": 2, **options}
    return convit(8, 9, 5, local_depth, drop_path=0.0, **options)


def _learn(net: nn.Module, data: Images, *, full: bool, seed: int) -> float:
    return learn(net, data, steps=480 if full else 3, lr=3e-3, batch_size=32, seed=seed)


def _gates(net: ConViT) -> Float[Tensor, "layers heads"]:
    return torch.stack([layer.gates.detach() for layer in _gated(net)])


def _gated(net: ConViT) -> list[GatedPositionalAttention]:
    return [module for module in net.modules() if isinstance(module, GatedPositionalAttention)]


def _by_seed(found: dict[str, list[float]]) -> str:
    return "; ".join(f"{name} {', '.join(f'{share:.3f}' for share in each)}" for name, each in found.items())


def _draw_heads(axes: Any) -> None:
    layer = GatedPositionalAttention(9, 9)
    with torch.no_grad():
        maps = _local_half(layer, 7)[:, 24].view(3, 3, 7, 7)  # of the token in the middle
    maps = nn.functional.pad(maps.transpose(0, 1), (0, 1, 0, 1), value=float("nan"))
    axes.imshow(maps.permute(0, 2, 1, 3).reshape(24, 24).numpy(), cmap="cividis")
    axes.set(xticks=[], yticks=[], title="where nine heads look at the start, from the middle of 7 x 7")


def _draw_gates(axes: Any, gates: Float[Tensor, "seeds layers heads"]) -> None:
    by_layer = gates.permute(1, 0, 2).flatten(1)
    for layer, each in enumerate(by_layer.tolist(), 1):
        axes.plot([layer] * len(each), each, "o", alpha=0.5, color="tab:blue")
    draw_lines(
        axes,
        {"mean": list(enumerate(by_layer.mean(1).tolist(), 1))},
        "layer",
        "gate: 1 local, 0 by content",
        scale="linear",
    )
    axes.set_xticks(range(1, len(by_layer) + 1))


def _draw_dots(found: dict[str, list[float]], axes: Any) -> None:
    for place, each in enumerate(found.values()):
        axes.plot([place] * len(each), each, "o", alpha=0.7)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(ylabel="accuracy")
