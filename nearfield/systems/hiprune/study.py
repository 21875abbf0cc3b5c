"""Which image tokens the layers of a vision tower attend to, and whether these lie on objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfield.hosts import seam
from nearfield.hosts.seam import Call
from nearfield.hosts.vision_language import VisionTower, vision_tower

WORKSPACE = 64 << 20  # bytes that a chunk of attention rows may take


@torch.no_grad()
def tower_scores(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layers: Sequence[int],
    *,
    tower: VisionTower | None = None,
    parity: bool = False,
) -> tuple[dict[int, list[Float[Tensor, " tokens"]]], list[Float[Tensor, "tokens dim"]]]:
    """The attention that each token of each image receives in some layers of the tower, and the features.

    The mean over heads and all queries, class tokens among them, then over the patches of a token. `parity`
    takes for merged patches the published sums over queries, of the whole image, windows or not.
    """
    host: Any = model
    tower = vision_tower(model, inputs) if tower is None else tower
    names = {tower.sites[layer]: layer for layer in layers}
    calls: dict[int, list[Call]] = {layer: [] for layer in layers}

    def note(call: Call) -> None:
        if call.site.name in names:
            calls[names[call.site.name]].append(call)

    is_merged = "image_grid_thw" in inputs
    given = {"pixel_values": inputs["pixel_values"]}
    if is_merged:
        given["image_grid_thw"] = inputs["image_grid_thw"]
    else:
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given[name] = getattr(host.config, name)
    if given.get("vision_feature_select_strategy") == "full":
        raise NotImplementedError(
            "vision_feature_select_strategy='full' gives the class token to the language model, and it has "
            "no place on the grid. Give a model with 'default'."
        )
    with seam.attention(model, note):
        features = host.get_image_features(**given, return_dict=True).pooler_output
    sizes = [prod(grid) for grid in tower.grids]
    found = {}
    for layer, seen in calls.items():
        as_published = parity and is_merged
        parts = [_whole(seen)] if as_published else seen
        received = torch.cat([_received(call, tower.num_prefix).flatten() for call in parts])
        received = received * parts[0].query.shape[1] if as_published else received
        total = received.new_zeros(tower.num_tokens).index_add_(0, tower.places, received)
        count = torch.bincount(tower.places, minlength=tower.num_tokens)
        found[layer] = list((total / count).split(sizes))
    return found, list(features)


def hit_rate(scores: Float[Tensor, " n"], objects: Bool[Tensor, " n"], share: float = 0.1) -> float:
    """Of the tokens with the largest scores, the share that lies on an object."""
    return float(objects[scores.topk(max(1, round(share * len(scores)))).indices].float().mean())


def prefill_flops(config: Any, tokens: int) -> int:
    """Floating point operations of a Llama-type decoder on a prompt: `2 n` a weight and `4 n^2 dim` a layer.

    The weights are those of projections and MLP; embeddings, norms and the head are left out.
    """
    dim, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or dim // heads
    rows = 2 * heads * head_dim + 2 * config.num_key_value_heads * head_dim
    parameters = dim * rows + 3 * dim * config.intermediate_size
    return config.num_hidden_layers * (2 * tokens * parameters + 4 * tokens**2 * heads * head_dim)


def draw_kept(
    axes: Any, pixels: Float[Tensor, "3 y x"], grid: tuple[int, int], groups: Mapping[str, Int[Tensor, " k"]]
) -> None:
    """The picture with the kept tokens over it, a colour a group."""
    axes.imshow(pixels.permute(1, 2, 0).clamp(0, 1).numpy(), alpha=0.6)
    down, right = pixels.shape[1] / grid[0], pixels.shape[2] / grid[1]
    for name, tokens in groups.items():
        y = [(token // grid[1] + 0.5) * down - 0.5 for token in tokens.tolist()]
        x = [(token % grid[1] + 0.5) * right - 0.5 for token in tokens.tolist()]
        axes.plot(x, y, "s", markersize=4, label=name)
    axes.set_axis_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _received(call: Call, num_prefix: int) -> Float[Tensor, "b positions"]:
    """What each position but the class tokens receives: the mean over heads and queries."""
    batch, number, heads, _ = call.query.shape
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key = (x.transpose(1, 2).to(dtype) for x in (call.query, call.key))
    step = max(1, WORKSPACE // (12 * batch * heads * number))
    total = query.new_zeros(batch, key.shape[2])
    for start in range(0, number, step):
        scores = query[:, :, start : start + step] @ key.transpose(2, 3) * call.scale
        total += scores.softmax(-1).mean(1).sum(1)
    return (total / number)[:, num_prefix:]


def _whole(calls: Sequence[Call]) -> Call:
    """The windows of a layer as one call in which all positions see one another."""
    names = ("query", "key", "value")
    joined: dict[str, Any] = {name: torch.cat([getattr(call, name) for call in calls], 1) for name in names}
    return replace(calls[0], mask=None, **joined)
