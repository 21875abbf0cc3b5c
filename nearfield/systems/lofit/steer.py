"""Offsets of heads: z + v in the place of the outputs z of some heads: in a `with`, in a file, for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.core.errors import require
from nearfield.hosts.transformers_sites import sites
from nearfield.steer import Site, Steer

PROJECTION = "o_proj"  # what reads the outputs of all heads, side by side, in transformers' decoders


class Change(NamedTuple):
    """The heads of a site that are changed, and what is added to each: `[heads, head_dim]`."""

    heads: tuple[int, ...]
    offsets: Float[Tensor, "heads d"]


@dataclass(eq=False)
class HeadOffsets(Steer):
    """Adds a vector to the outputs of some query heads, at every token.

    `at` tells them by site: `HeadOffsets({"model.layers.3.self_attn": Change((0, 5), offsets)})`.
    """

    at: Mapping[str, Change]
    strength: float = 1.0

    @property
    def num_parameters(self) -> int:
        return sum(change.offsets.numel() for change in self.at.values())

    def takes(self, site: Site) -> bool:
        return site.name in self.at

    def output(self, site: Site, heads: Float[Tensor, "b n heads d"]) -> Float[Tensor, "b n heads d"]:
        change = self.at[site.name]
        places = torch.tensor(change.heads, device=heads.device)
        added = (self.strength * change.offsets).to(heads).expand(*heads.shape[:-2], -1, -1)
        return heads.index_add(-2, places, added)

    def save(self, path: str | Path) -> Path:
        """A safetensors file of a few kB."""
        tensors = {}
        for name, change in self.at.items():
            tensors[f"{name}.heads"] = torch.tensor(change.heads)
            tensors[f"{name}.offsets"] = self.strength * change.offsets.detach().cpu().contiguous()
        require("safetensors.torch", package="safetensors").save_file(tensors, str(path))
        return Path(path)


def load(path: str | Path) -> HeadOffsets:
    """The offsets of a file that `HeadOffsets.save` wrote."""
    tensors = require("safetensors.torch", package="safetensors").load_file(str(path))
    names = [name.removesuffix(".heads") for name in tensors if name.endswith(".heads")]
    if not names or {f"{n}.{part}" for n in names for part in ("heads", "offsets")} != set(tensors):
        raise ValueError(f"{path} holds no offsets of heads. Give a file that HeadOffsets.save wrote.")
    return HeadOffsets(
        {n: Change(tuple(tensors[f"{n}.heads"].tolist()), tensors[f"{n}.offsets"]) for n in names}
    )


@torch.no_grad()
def fold(model: nn.Module, offsets: HeadOffsets) -> nn.Module:
    """The model with the offsets worked into biases for good: `o_proj(z + v) = o_proj(z) + W v`.

    Where the config has `attention_bias` it is set and the other projections get biases of zero, so that
    `save_pretrained` keeps the change. Other classes (Qwen2, Mistral) forget it: keep the offsets' file.
    """
    projections = {name: projection_of(model, name) for name in offsets.at}
    for module in model.modules():  # a config that has the switch builds all of the biases or none
        config = getattr(module, "config", None)
        if hasattr(module, PROJECTION) and getattr(config, "attention_bias", None) is False:
            for part in ("q_proj", "k_proj", "v_proj", PROJECTION):
                linear = getattr(module, part)
                if linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    for config in {
        id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None
    }.values():
        for each in (config, getattr(config, "text_config", None)):
            if each is not None and getattr(each, "attention_bias", None) is False:
                each.attention_bias = True
    for name, (heads, added) in offsets.at.items():
        linear, dim = projections[name], added.shape[1]
        columns = linear.weight.unflatten(1, (-1, dim))[:, list(heads)]  # [dim, heads, head_dim]
        shift = offsets.strength * torch.einsum("ohd,hd->o", columns, added.to(columns))
        had: Tensor | None = linear.bias
        wanted = had is None or had.requires_grad
        linear.bias = nn.Parameter(shift if had is None else had + shift, requires_grad=wanted)
    return model


def heads_of(model: nn.Module) -> dict[str, int]:
    """Site -> its query heads, for every site whose heads an `o_proj` reads: a decoder's, not a tower's."""
    modules = dict(model.named_modules())
    return {site.name: site.num_heads for site in sites(model) if f"{site.name}.{PROJECTION}" in modules}


def projection_of(model: nn.Module, site: str) -> nn.Linear:
    """The layer that reads a site's heads."""
    found = dict(model.named_modules()).get(f"{site}.{PROJECTION}")
    if not isinstance(found, nn.Linear):
        raise ValueError(
            f"The model has no linear layer {site}.{PROJECTION}. Its sites: {', '.join(heads_of(model))}."
        )
    return found


@torch.no_grad()
def mass_mean(
    model: nn.Module,
    true: Sequence[Mapping[str, Any]],
    false: Sequence[Mapping[str, Any]],
    heads: Mapping[str, Sequence[int]],
    *,
    strength: float = 5.0,
) -> HeadOffsets:
    """Offsets without learning, to compare with: v = strength · σ · d at each head (ITI).

    `d` is the unit vector from the mean output over the last tokens of `false` inputs to that of `true` ones;
    `σ` the deviation of all outputs along it. An input is what the model is called with, unpadded.
    """
    seen = {kind: _Last(heads) for kind in ("true", "false")}
    for kind, inputs in (("true", true), ("false", false)):
        with seen[kind](model):
            for each in inputs:
                model(**each)
    found = {}
    for name, numbers in heads.items():
        good, bad = (torch.cat(seen[kind].found[name])[:, list(numbers)] for kind in ("true", "false"))
        direction = torch.nn.functional.normalize(good.mean(0) - bad.mean(0), dim=-1)  # [heads, head_dim]
        deviation = (torch.cat([good, bad]) * direction).sum(-1).std(0)
        found[name] = Change(tuple(numbers), strength * deviation[:, None] * direction)
    return HeadOffsets(found)


class _Last(Steer):
    """Looks at the heads' outputs at the last token, and changes nothing."""

    def __init__(self, names: Mapping[str, Any]):
        self.found: dict[str, list[Tensor]] = {name: [] for name in names}

    def takes(self, site: Site) -> bool:
        return site.name in self.found

    def output(self, site: Site, heads: Float[Tensor, "b n heads d"]) -> Float[Tensor, "b n heads d"]:
        self.found[site.name].append(heads[:, -1].detach())
        return heads
