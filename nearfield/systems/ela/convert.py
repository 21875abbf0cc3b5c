"""Gates put into a convolutional network that is there already, by names of modules, and out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from nearfield.systems.ela.layer import gate_maker

NAME = "inserted_gate"  # of the child that holds it


@dataclass(frozen=True)
class Inserted:
    """What `insert` put into a model: names of the modules and channels behind them."""

    model: nn.Module
    channels: Mapping[str, int]
    handles: tuple[Any, ...]

    @property
    def num_parameters(self) -> int:
        """How many parameters the gates have."""
        return sum(p.numel() for gate in self.gates().values() for p in gate.parameters())

    def gates(self) -> dict[str, nn.Module]:
        """The gates by the name of the module that they stand behind."""
        found = {name: self.model.get_submodule(name)._modules.get(NAME) for name in self.channels}
        return {name: gate for name, gate in found.items() if gate is not None}

    def remove(self) -> None:
        """The model as it was; a second call changes nothing."""
        for handle in self.handles:
            handle.remove()
        for name in self.gates():
            delattr(self.model.get_submodule(name), NAME)


def insert(
    model: nn.Module,
    where: str,
    *,
    gate: str | Callable[[int], nn.Module] = "ela-b",
    example: Sequence[Any] | None = None,
) -> Inserted:
    """A gate behind every module of `model` whose dotted name matches the glob `where`, in place.

        inserted = insert(timm.create_model("resnet50"), "layer?.*.bn3", gate="ela-s")

    Before the shortcut is added: `layer?.*.bn2` of torchvision's and timm's ResNet-18, `layer?.*.bn3` of
    ResNet-50; in timm's MobileNetV2 behind the depthwise convolution, `blocks.[1-6].*.bn2`. Channels are read
    from norms and convolutions; behind other modules they show in one forward of `example`. The model's own
    tensors keep their names; a gate's lie below those of its module. Raises `ValueError` and changes nothing
    where nothing matches or a gate does not fit.
    """
    chosen = {name: module for name, module in model.named_modules() if name and fnmatchcase(name, where)}
    if not chosen:
        named = [name for name, module in model.named_modules() if _channels(module) is not None]
        shown = ", ".join(named[:8]) + (", …" if len(named) > 8 else "")
        raise ValueError(f"where={where!r} matches no module. Norms and convolutions are: {shown or 'none'}.")
    taken = [name for name, module in chosen.items() if hasattr(module, NAME)]
    if taken:
        raise ValueError(f"{taken[0]} has a gate already. Call remove() of what inserted it first.")
    channels = _all_channels(model, chosen, example)
    make, gates = gate_maker(gate), {}
    for name, count in channels.items():
        try:
            gates[name] = make(count)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    handles = []
    for name, module in chosen.items():
        like = next((t for t in (*module.parameters(), *model.parameters()) if t.is_floating_point()), None)
        new = gates[name].train(module.training)
        module.add_module(NAME, new if like is None else new.to(like.device, like.dtype))
        if not isinstance(module, nn.Sequential):  # which runs its children itself
            handles.append(module.register_forward_hook(_behind))
    return Inserted(model, channels, tuple(handles))


def _behind(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    """Of this module and not of this gate, so that copies of the model run copies of the gate."""
    return getattr(module, NAME)(out)


def _all_channels(
    model: nn.Module, chosen: Mapping[str, nn.Module], example: Sequence[Any] | None
) -> dict[str, int]:
    known = {name: _channels(module) for name, module in chosen.items()}
    unknown = [name for name, count in known.items() if count is None]
    if unknown and example is None:
        raise ValueError(
            f"The channels behind {unknown[0]}, a {type(chosen[unknown[0]]).__name__}, show when it runs. "
            "Give example=, the arguments of one forward."
        )
    if unknown:
        known |= _watched(model, {name: chosen[name] for name in unknown}, example or ())
    return {name: count for name, count in known.items() if count is not None}


def _channels(module: nn.Module) -> int | None:
    for name in ("num_features", "out_channels"):
        count = getattr(module, name, None)
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Conv2d) and isinstance(count, int):
            return count
    return None


def _watched(model: nn.Module, modules: Mapping[str, nn.Module], example: Sequence[Any]) -> dict[str, int]:
    """Channels behind modules in one forward in evaluation."""
    found: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def seen(module: nn.Module, given: Any, out: Any) -> None:
            if not isinstance(out, Tensor) or out.dim() != 4:
                raise ValueError(f"{name} gives no map [B, C, Y, X], so it takes no gate. Narrow where=.")
            found[name] = out.shape[1]

        return seen

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in modes.items():
            module.training = was_training
    silent = [name for name in modules if name not in found]
    if silent:
        raise ValueError(f"{silent[0]} does not run in a forward of the example. Narrow where=.")
    return found
