"""Small changes to a frozen model: low-rank updates by peft, and offsets of heads, which peft lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nearfield.core.errors import require

SCALE, OFFSET, CHOSEN = "head_scale", "head_offset", "head_chosen"


def lora(model: nn.Module, targets: Iterable[str], *, rank: int = 8, alpha: float = 16) -> Any:
    """The model frozen, with trainable low-rank updates of the linear layers whose names end in `targets`.

    A peft model: `lora(model, ["q_proj", "v_proj"])`; its `merge_and_unload()` folds the updates in.
    """
    peft = require("peft", extra="train")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    return peft.get_peft_model(model, config)


def add_head_offsets(
    model: nn.Module,
    targets: str,
    *,
    num_heads: int,
    train: Literal["scale", "offset"] = "offset",
    heads: Mapping[str, Iterable[int]] | None = None,
    std: float = 1e-3,
    generator: torch.Generator | None = None,
) -> dict[str, nn.Linear]:
    """The output projections, which now read (1 + scale) ⊙ z + offset of a head's z; all else is frozen.

    `targets` is a glob over names, such as `"*.o_proj"`. What `train` names starts as a normal draw of `std`,
    the other stays 0. `heads` limits both to some heads of some layers: `{"layers.3.o_proj": [0, 5]}`. Train
    without weight decay, which would pull towards the unchanged model.
    """
    if train not in ("scale", "offset"):
        raise ValueError(f"train={train!r} is unknown. Choose scale or offset.")
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and fnmatchcase(n, targets)}
    unknown = sorted(set(heads or {}) - found.keys())
    if not found or unknown:
        raise ValueError(
            f"No linear layer among {targets!r} is called {', '.join(unknown) or 'so'}. Give a glob over the "
            "names of output projections, such as '*.o_proj' or '*.proj'."
        )
    chosen = {name: sorted(set(range(num_heads) if heads is None else heads.get(name, ()))) for name in found}
    layers = {name: layer for name, layer in found.items() if chosen[name]}
    for name, layer in layers.items():
        if layer.in_features % num_heads or not 0 <= chosen[name][0] <= chosen[name][-1] < num_heads:
            raise ValueError(
                f"{name} reads {layer.in_features} features, which num_heads={num_heads} must divide; "
                f"heads={chosen[name]} must lie in 0 to {num_heads - 1}."
            )
        if hasattr(layer, SCALE):
            raise ValueError(f"{name} has head offsets already. Call fold or remove first.")
    model.requires_grad_(False)
    for name, layer in layers.items():
        shape, weight = (len(chosen[name]), layer.in_features // num_heads), layer.weight
        drawn = torch.empty(shape).normal_(0.0, std, generator=generator).to(weight)
        for each in (SCALE, OFFSET):
            trained = each == f"head_{train}"
            start = drawn if trained else torch.zeros_like(drawn)
            layer.register_parameter(each, nn.Parameter(start, requires_grad=trained))
        layer.register_buffer(CHOSEN, torch.tensor(chosen[name], device=weight.device))
        layer.register_forward_pre_hook(_read_offset)
    return layers


def head_scores(model: nn.Module) -> list[tuple[str, int, float]]:
    """(layer, head, ‖scale‖₂), the largest first: the heads that a task asked for."""
    scores = [
        (name, int(head), float(scale.norm()))
        for name, layer in _changed(model).items()
        for head, scale in zip(getattr(layer, CHOSEN), getattr(layer, SCALE).detach(), strict=True)
    ]
    return sorted(scores, key=lambda score: -score[2])


def head_penalty(model: nn.Module) -> Tensor:
    """Σ |θ| over the trainable scales and offsets, not divided by their number."""
    held = [getattr(layer, each) for layer in _changed(model).values() for each in (SCALE, OFFSET)]
    return torch.stack([p.abs().sum() for p in held if p.requires_grad]).sum()


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """The model with both worked into its weights: W · diag(1 + scale), and W · offset as a bias."""
    for layer in _changed(model).values():
        scale, offset = (_spread(layer, each).flatten() for each in (SCALE, OFFSET))
        if offset.any():
            shift = layer.weight @ offset
            had: Tensor | None = layer.bias
            layer.bias = nn.Parameter(shift if had is None else had + shift, requires_grad=False)
        layer.weight.mul_(1 + scale)
        _clear(layer)
    return model


def remove(model: nn.Module) -> nn.Module:
    """The model as it was before `add_head_offsets`, still frozen."""
    for layer in _changed(model).values():
        _clear(layer)
    return model


def _changed(model: nn.Module) -> dict[str, nn.Linear]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and hasattr(m, SCALE)}
    if not found:
        raise ValueError("The model has no head offsets. Call nearfield.train.lora.add_head_offsets first.")
    return found


def _clear(layer: nn.Linear) -> None:
    for each in (SCALE, OFFSET, CHOSEN):
        delattr(layer, each)
    hooks = layer._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if hook is _read_offset]:
        del hooks[number]


def _spread(layer: Any, each: str) -> Tensor:
    """[heads, head_dim], 0 where a head was not chosen."""
    values = getattr(layer, each)
    zeros = values.new_zeros(layer.in_features // values.shape[1], values.shape[1])
    return zeros.index_copy(0, getattr(layer, CHOSEN), values)


def _read_offset(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook without a state of its own, so that models with it can be copied and pickled."""
    scale, offset = _spread(layer, SCALE), _spread(layer, OFFSET)
    return (inputs[0] * (1 + scale.flatten()) + offset.flatten(), *inputs[1:])
