"""A decoder's blocks, and the MLP of one of them stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfield.hosts import seam

STAGES = ("input", "gate", "up", "activation", "product", "output")


@torch.no_grad()
def mlp_stages(
    model: nn.Module, input_ids: Int[Tensor, "1 n"], layer: int, positions: Sequence[int]
) -> dict[str, Float[Tensor, "positions width"]]:
    """What the gated MLP of a layer makes of some tokens, stage by stage from its input to its output."""
    name, _, block = decoder_blocks(model)[layer]
    mlp = gated_mlp(block, name)
    found: dict[str, Tensor] = {}

    def keep(stage: str, x: Tensor) -> None:
        found[stage] = x[0, list(positions)].detach()

    with ExitStack() as stack:
        stack.callback(mlp.gate_proj.register_forward_hook(lambda _, args, out: keep("gate", out)).remove)
        stack.callback(mlp.up_proj.register_forward_hook(lambda _, args, out: keep("up", out)).remove)
        stack.callback(mlp.register_forward_pre_hook(lambda _, args: keep("input", args[0])).remove)
        stack.callback(mlp.down_proj.register_forward_pre_hook(lambda _, a: keep("product", a[0])).remove)
        stack.callback(mlp.register_forward_hook(lambda _, args, out: keep("output", out)).remove)
        model(input_ids=input_ids, use_cache=False)
    found["activation"] = mlp.act_fn(found["gate"])
    return {stage: found[stage] for stage in STAGES}


class Directions(NamedTuple):
    """Principal directions of an MLP's inputs, and what it answers to each at each scale."""

    components: Float[Tensor, "k dim"]
    cosines: Float[Tensor, "k scales"]  # with the target
    norms: Float[Tensor, "k scales"]

    def effective(self, cosine: float = 0.98) -> Tensor:
        """Which directions, at some scale, make the MLP write along the target."""
        return (self.cosines > cosine).any(-1)


@torch.no_grad()
def trigger_directions(
    mlp: nn.Module,
    sinks: Float[Tensor, "n dim"],
    others: Float[Tensor, "m dim"],
    target: Float[Tensor, " dim"],
    *,
    scales: Float[Tensor, " scales"] | None = None,
    count: int = 10,
    seed: int = 42,
) -> Directions:
    """The first `count` principal directions of an MLP's inputs, and what it makes of each.

    The inputs are those at sinks and at as many other tokens.
    """
    each = min(len(sinks), len(others))
    draw = torch.Generator().manual_seed(seed)
    chosen = [x[torch.randperm(len(x), generator=draw)[:each]] for x in (sinks, others)]
    inputs = torch.cat(chosen)
    components = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False).Vh[:count]
    scales = torch.arange(-20.0, 21.0).to(inputs) if scales is None else scales
    written = mlp(scales[:, None] * components[:, None])  # [K, S, dim]
    return Directions(components, F.cosine_similarity(written, target, dim=-1), written.norm(dim=-1))


def decoder_blocks(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """The blocks of a transformers decoder: name, name of the attention inside, module."""
    sites = [site for site in seam.listed_sites(model) or () if site.is_causal and site.role == "self"]
    if not sites:
        raise NotImplementedError(
            f"This {type(model).__name__} has no causal attention site that is known. Give a decoder of "
            "transformers, such as LlamaForCausalLM."
        )
    parts = [site.name.rpartition(".")[::2] for site in sites]
    return [(name, site, model.get_submodule(name)) for name, site in parts]


def gated_mlp(block: nn.Module, name: str) -> Any:
    """The MLP of a block, with gate_proj, up_proj and down_proj."""
    for module in block.children():
        if all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            return module
    raise NotImplementedError(
        f"The block {name!r} has no MLP with gate_proj, up_proj and down_proj, so its stages are not known. "
        "Llama-, Qwen-, Mistral- and Gemma-type blocks have one."
    )
