"""The steps of a model from its input to its output: shapes, parameters and work, without computing any."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nearfield import catalog
from nearfield.build import create
from nearfield.measure.flops import flops_by_module


@dataclass(frozen=True)
class Step:
    """One module of the model: what it gives out, how many parameters it holds, what it multiplies."""

    module: str
    shape: tuple[int, ...]
    num_params: int
    macs: float


@dataclass(frozen=True)
class Outline:
    """The steps in the order in which they run, for one input."""

    model: str
    size: tuple[int, ...]
    steps: tuple[Step, ...]
    num_params: int
    macs: float

    def json(self) -> dict[str, Any]:
        """The outline for programs."""
        return asdict(self)

    def __rich__(self) -> Any:
        from rich.table import Table

        size = " × ".join(map(str, self.size))
        table = Table(title=f"{self.model} on {size}", box=None, pad_edge=False, title_justify="left")
        table.add_column("module")
        for heading in ("gives", "parameters", "million MACs"):
            table.add_column(heading, justify="right")
        for step in self.steps:
            shape = " × ".join(map(str, step.shape)) or "–"
            table.add_row(step.module, shape, f"{step.num_params:,}", f"{step.macs / 1e6:,.1f}")
        table.add_row("all", "", f"{self.num_params:,}", f"{self.macs / 1e6:,.1f}")
        return table


@dataclass(frozen=True)
class Shown:
    """A card with the outline of one of its models."""

    card: catalog.Card
    outline: Outline

    def json(self) -> dict[str, Any]:
        """The card with one field more."""
        return {**self.card.json(), "outline": self.outline.json()}

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(self.card, "", self.outline)


def shown(card: catalog.Card, model: str | None = None) -> Shown | catalog.Card:
    """A card with the outline of a model, by default of its first of pictures; the card if there is none."""
    name = model or next(iter(pictured(card)), None)
    return card if name is None else Shown(card, outline(name))


def outline(name: str, size: Sequence[int] | None = None) -> Outline:
    """The steps of a vision model of the cards; `size` is that of its input, without batch.

    By default the model's own, or 224 pixels. Steps are its direct modules, and the members of lists among
    them. Nothing is computed and no memory taken for weights. Raises `TypeError` for an entry that is no
    model of pictures.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    size = tuple(size) if size is not None else _size(name)
    with torch.device("meta"):
        model = create(name).eval()
    # run as if on the processor, whose operators may count otherwise than those that meta tensors get
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        return of_module(model.to_empty(device="cpu"), name, size)


def of_module(model: nn.Module, name: str, size: Sequence[int]) -> Outline:
    """The outline of a module, run on one input of zeros."""
    seen: dict[str, tuple[int, ...]] = {}
    names = dict(_steps(model))
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, step=step: seen.update({step: _shape(out)}))
        for step, module in names.items()
    ]
    try:
        found = flops_by_module(lambda: model(torch.zeros(1, *size)))
    finally:
        for hook in hooks:
            hook.remove()
    root = type(model).__name__
    steps = [
        Step(step, shape, _num_params([names[step]]), found.get(f"{root}.{step}", 0) / 2)
        for step, shape in seen.items()
    ]
    num_params, macs = _num_params([model]), found.get("Global", 0) / 2
    rest = num_params - _num_params([names[step] for step in seen])
    rest_macs = macs - sum(step.macs for step in steps)
    if rest or rest_macs:
        steps.append(Step("besides", (), rest, rest_macs))
    return Outline(name, tuple(size), tuple(steps), num_params, macs)


def pictured(card: catalog.Card) -> tuple[str, ...]:
    """The models of a card that take pictures, in its order."""
    if "vision" not in card.domain:
        return ()
    return tuple(name for name in card.params if "in_channels" in _parameters(name))


def _parameters(name: str) -> Any:
    return inspect.signature(catalog.find_entry(name)[1]).parameters


def _size(name: str) -> tuple[int, ...]:
    """Channels, frames of a model of videos, and sides."""
    allowed = _parameters(name)
    if "in_channels" not in allowed:
        raise TypeError(f"{name} takes no pictures; only models that do have an outline.")
    side = next((allowed[n].default for n in ("image_size", "side") if n in allowed), 224)
    frames = (allowed["frames"].default,) if "frames" in allowed else ()
    return (allowed["in_channels"].default, *frames, *(side if isinstance(side, tuple) else (side, side)))


def _steps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{member}", module) for member, module in child.named_children())
        else:
            yield name, child


def _shape(out: Any) -> tuple[int, ...]:
    """Of the first tensor among what came out, without the batch."""
    if isinstance(out, Tensor):
        return tuple(out.shape[1:])
    if isinstance(out, dict):
        out = tuple(out.values())
    return next((shape for shape in map(_shape, out) if shape), ()) if isinstance(out, (tuple, list)) else ()


def _num_params(modules: Sequence[nn.Module]) -> int:
    """Of all together, shared ones once."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())
