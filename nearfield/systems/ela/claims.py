"""What ELA claims, tried here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import nn

from nearfield.bench.resolution import model_macs
from nearfield.catalog import Result
from nearfield.data import images
from nearfield.measure.receptive import Box, share_inside
from nearfield.systems.ela.layer import ELA, GATES, CoordinateAttention
from nearfield.systems.ela.model import ResidualBlock, ela_resnet8, ela_resnet50
from nearfield.train.vision import learn

SEEDS = (0, 1, 2, 3, 4)
RIVALS = ("se", "eca", "ca")
Found = Mapping[str, list[float]]


def better_than_rivals(*, full: bool = False) -> Result:
    """A ResNet-8 with each gate, from the same start and in the same order of samples, on digits."""
    found = _accuracies({name: GATES[name] for name in ("none", *RIVALS, "ela-b")}, full=full)
    sizes = {name: _added(name, ela_resnet8) for name in found}
    words = "; ".join(f"{name} (+{sizes[name]:,}) {_shares(each)}" for name, each in found.items())
    ahead = {name: _paired(found["ela-b"], found[name]) for name in ("none", *RIVALS)}
    return Result(
        f"accuracy by seed (parameters added): {words}. ELA-B minus {_differences(ahead)}",
        all(_is_ahead(ahead[name]) for name in RIVALS),
        partial(_dots, found, "accuracy"),
    )


def light(*, full: bool = False) -> Result:
    """What each gate adds to ResNet-50 in parameters, and in the long form in multiplications at 224 px."""
    with torch.device("meta"):
        plain = ela_resnet50(gate="none")
        nets = {name: ela_resnet50(gate=name) for name in (*RIVALS, "ela-t", "ela-b", "ela-s", "ela-l")}
    counted = sum(p.numel() for p in plain.parameters())
    grown = {name: sum(p.numel() for p in net.parameters()) / counted - 1 for name, net in nets.items()}
    macs: dict[str, float] = {}
    if full:
        base = model_macs(ela_resnet50(gate="none"))
        macs = {name: model_macs(ela_resnet50(gate=name)) / base - 1 for name in nets}
    words = ", ".join(f"{name} {share:.2%}" for name, share in grown.items())
    costs = ", ".join(f"{name} {share:.2%}" for name, share in macs.items())
    return Result(
        f"parameters more than ResNet-50's {counted:,}: {words}" + full * f"; multiplications more: {costs}",
        grown["ela-b"] < min(grown["se"], grown["ca"]),
        partial(_bars, {name: 100 * share for name, share in grown.items()}, "parameters added, %"),
    )


def small_batches(*, full: bool = False) -> Result:
    """ELA with group norm and with batch norm inside, with few and with many samples a step."""
    kinds = {norm: partial(ELA, norm=norm) for norm in ("group", "batch")}
    found: dict[str, list[float]] = {}
    ahead = {}
    for size in (8, 128) if full else (8, 32):
        each = _accuracies(kinds, full=full, batch_size=size)
        found |= {f"{norm}, {size}": shares for norm, shares in each.items()}
        ahead[f"batch norm at {size} samples"] = _paired(each["group"], each["batch"])
    words = "; ".join(f"{name} {_shares(each)}" for name, each in found.items())
    return Result(
        f"accuracy by seed: {words}. Group norm minus {_differences(ahead)}",
        _is_ahead(next(iter(ahead.values()))),
        partial(_dots, found, "accuracy"),
    )


def no_reduction(*, full: bool = False) -> Result:
    """ELA as it is and with its convolution between two that make the channels fewer and more again."""
    found = _accuracies({"as it is": ELA, "reduced": partial(ELA, reduction=32)}, full=full)
    words = "; ".join(f"{name} {_shares(each)}" for name, each in found.items())
    ahead = {"reduced": _paired(found["as it is"], found["reduced"])}
    return Result(
        f"accuracy by seed: {words}. As it is minus {_differences(ahead)}",
        _is_ahead(ahead["reduced"]),
        partial(_dots, found, "accuracy"),
    )


def localises(*, full: bool = False) -> Result:
    """After training on digits somewhere on an empty canvas: how much of the gates lies on the digit."""
    side, steps, seeds = (32, 400, SEEDS[:3]) if full else (16, 25, SEEDS[:1])
    data, _, boxes = images.canvas(side)
    found: dict[str, list[float]] = {}
    for name in ("ca", "ela-b"):
        for seed in seeds:
            torch.manual_seed(seed)
            net = ela_resnet8(in_channels=1, gate=name)
            learn(net, data, steps=steps, batch_size=32, seed=seed)
            found.setdefault(name, []).append(_on_the_object(net, data.test[:64], boxes[:64]))
    words = "; ".join(f"{name} {', '.join(f'{share:.2f}' for share in each)}" for name, each in found.items())
    return Result(
        f"mean gate in the digit's box over mean gate of the map, first block, by seed: {words}",
        min(found["ela-b"]) > 1 and mean(found["ela-b"]) > mean(found["ca"]),
        partial(_dots, found, "gate in the box / gate"),
    )


def _on_the_object(net: nn.Module, pictures: torch.Tensor, boxes: torch.Tensor) -> float:
    """The mean over pictures of the gates' share in the box, over the box's share of the map."""
    gate = next(module for module in net.modules() if isinstance(module, ELA | CoordinateAttention))
    given: list[torch.Tensor] = []
    handle = gate.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    try:
        with torch.no_grad():
            net.eval()(pictures)
            rows, columns = gate.gates(given[0])
    finally:
        handle.remove()
    maps = (rows[..., None] * columns[..., None, :]).mean(1)
    ratios = []
    for shown, corners in zip(maps, boxes.tolist(), strict=True):
        box: Box = tuple(corners)
        area = (box[2] - box[0]) * (box[3] - box[1]) / shown.numel()
        ratios.append(share_inside(shown, box) / area)
    return mean(ratios)


def _accuracies(
    gates: Mapping[str, Callable[[int], nn.Module]], *, full: bool, batch_size: int = 32
) -> dict[str, list[float]]:
    data = images.digits()
    found: dict[str, list[float]] = {}
    for name, gate in gates.items():
        found[name] = []
        for seed in SEEDS if full else SEEDS[:1]:
            torch.manual_seed(seed)
            net = ela_resnet8(in_channels=1, gate=nn.Identity)
            for block in net.modules():
                if isinstance(block, ResidualBlock):  # made last, so that all else begins the same
                    block.gate = gate(block.dim)
            found[name].append(learn(net, data, steps=300 if full else 20, batch_size=batch_size, seed=seed))
    return found


def _added(gate: str, build: Callable[..., nn.Module]) -> int:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in build(gate=name).parameters()) for name in (gate, "none")]
    return counts[0] - counts[1]


def _paired(ours: list[float], theirs: list[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def _is_ahead(differences: list[float]) -> bool:
    """On average and in four pairs of five: a mean alone may be one lucky seed's."""
    return mean(differences) > 0 and sum(each > 0 for each in differences) >= 0.8 * len(differences)


def _differences(ahead: Found) -> str:
    """Means of paired differences with their range."""
    return "; ".join(
        f"{name} {mean(each):+.3f} ({min(each):+.3f} to {max(each):+.3f})" for name, each in ahead.items()
    )


def _shares(each: list[float]) -> str:
    return ", ".join(f"{share:.3f}" for share in each)


def _dots(found: Found, label: str, axes: Any) -> None:
    for place, each in enumerate(found.values()):
        axes.plot([place] * len(each), each, "o", alpha=0.7)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(ylabel=label)


def _bars(found: Mapping[str, float], label: str, axes: Any) -> None:
    axes.bar(list(found), list(found.values()))
    axes.set(ylabel=label)
