"""Plain attention turned into gated positional attention, with the weights that it has."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from nearfield.systems.convit.layer import GatedPositionalAttention


def to_gated(
    attention: Any, *, gate: float = 0.1, locality_strength: float = 1.0
) -> GatedPositionalAttention:
    """Gated positional attention with queries, keys, values and projection of `attention`.

    `attention` has `qkv`, `proj` and `num_heads`, as `nearfield.nn.attention.Attention` does. All heads start
    with the same `gate`, the share that goes by offset; towards 0 the layer becomes the attention it was.
    """
    if not 0 < gate < 1:
        raise ValueError(f"gate={gate} must lie between 0 and 1; a gate at either end could not move.")
    missing = [name for name in ("qkv", "proj", "num_heads") if not hasattr(attention, name)]
    if missing:
        raise TypeError(
            f"A {type(attention).__name__} has no {' and no '.join(missing)}. "
            "Give attention with one qkv projection, proj and num_heads."
        )
    weight, bias = attention.qkv.weight, attention.qkv.bias
    layer = GatedPositionalAttention(
        attention.proj.in_features,
        attention.num_heads,
        qkv_bias=bias is not None,
        locality_strength=locality_strength,
    ).to(weight.device, weight.dtype)
    layer.qkv.load_state_dict(attention.qkv.state_dict())
    layer.proj.load_state_dict(attention.proj.state_dict())
    with torch.no_grad():
        layer.gating_param.fill_(math.log(gate / (1 - gate)))
    return layer.train(attention.training)


def localise(model: nn.Module, where: str, *, gate: float = 0.1, locality_strength: float = 1.0) -> list[str]:
    """Names of the modules that match the glob `where`, each replaced in place by `to_gated` of itself.

        localise(global_vit(), "blocks.?.attn")     # the first ten of its twelve layers, as in ConViT

    The modules must be given maps `[B, Y, X, C]`. Raises `ValueError` where nothing matches.
    """
    found = [name for name, _ in model.named_modules() if fnmatchcase(name, where)]
    if not found:
        raise ValueError(f"No module matches {where!r}. `model.named_modules()` lists their names.")
    new = {
        name: to_gated(model.get_submodule(name), gate=gate, locality_strength=locality_strength)
        for name in found
    }  # all of them before the first is put in, so that a wrong one leaves the model as it was
    for name, layer in new.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return found
