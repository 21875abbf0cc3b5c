"""Prompts with fewer image tokens: those that two layers of the vision tower attend to most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfield.hosts.vision_language import VisionTower, image_tokens, vision_tower
from nearfield.systems.hiprune.study import tower_scores

Neighbors = Literal["grid", "clamp-flat"]
Exclude = Literal["mask", "subtract"]


class Selection(NamedTuple):
    """Tokens of one image, counted row by row: those kept, in order, and what each was kept for."""

    kept: Int[Tensor, " kept"]
    anchors: Int[Tensor, " anchors"]
    buffers: Int[Tensor, " buffers"]
    registers: Int[Tensor, " registers"]


class Pruned(NamedTuple):
    """What the model, or its `generate`, is given instead, and the tokens kept of each image."""

    inputs: dict[str, Any]
    kept: list[Int[Tensor, " kept"]]


def select(
    objects: Float[Tensor, " n"],
    deep: Float[Tensor, " n"],
    grid: tuple[int, int],
    keep: int,
    *,
    alpha: float = 0.1,
    buffers: bool = True,
    neighbors: Neighbors = "grid",
    exclude: Exclude = "mask",
    stride: int | None = None,
) -> Selection:
    """`keep` tokens of an image: anchors, the four neighbours of each (buffers), and registers.

    Anchors have the largest scores in the object layer: `keep * alpha / 5` of them, rounded, or
    `keep * alpha` without buffers. Registers have the largest in the deep layer among the rest.

    neighbors="clamp-flat" is published: numbers one and a row apart, so that a row's first token has the last
    of the row above, and what leaves the image is its first or last token; `stride` is the row's length if
    not the grid's. exclude="subtract" is published too: it takes 1 from the scores of anchors and buffers.
    Where scores exceed 1 they may be chosen again, and fewer are kept.
    """
    height, width = grid
    number = len(objects)
    if number != height * width or deep.shape != objects.shape or not 0 < keep <= number:
        raise ValueError(
            f"{number} and {len(deep)} scores, grid={grid}, keep={keep}. Give a score for each token of the "
            "grid and keep at least one and at most all."
        )
    anchors = objects.topk(min(keep, round(keep * alpha / (5 if buffers else 1)))).indices.sort().values
    if not buffers:
        around = anchors[:0]
    elif neighbors == "grid":
        around = _on_grid(anchors, height, width)
    else:
        steps = torch.tensor([-1, 1, -(stride or width), stride or width], device=anchors.device)
        around = (anchors[:, None] + steps).clamp(0, number - 1).flatten()
    chosen = torch.cat([anchors, around]).unique()
    if len(chosen) > keep:  # the published code asks for a negative number of registers
        chosen = chosen[objects[chosen].topk(keep).indices]
    rest = deep.clone()
    rest[chosen] = -torch.inf if exclude == "mask" else rest[chosen] - 1
    registers = rest.topk(keep - len(chosen)).indices.sort().values
    kept = torch.cat([chosen, registers]).unique()
    around = around.unique()
    around = around[~torch.isin(around, anchors)]
    return Selection(kept, anchors, around[torch.isin(around, kept)], registers)


@dataclass
class HiPrune:
    """Keeps `keep` tokens of every image, or that share of them, whatever the prompt asks.

        pruned = HiPrune(192).prune(model, inputs)
        model.generate(**pruned.inputs, max_new_tokens=20)

    Layers count from 1, as published (9 of 24 and 23 of 24 for LLaVA-1.5, 16 and 32 of 32 for Qwen2.5-VL);
    None takes the same depths of any tower, of Qwen-type towers layers that see the whole image.

    `parity=True` is the published code: neighbours by flat numbers, and for Qwen-type towers scores that are
    sums, over the whole image also where a layer sees windows, from which 1 is subtracted.
    """

    keep: int | float
    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int | None = None
    buffers: bool = True
    parity: bool = False

    def choose(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Selection]:
        """The tokens kept of each image; the tower runs once."""
        return self._seen(model, inputs)[0]

    def prune(self, model: nn.Module, inputs: Mapping[str, Any]) -> Pruned:
        """The prompt with the chosen tokens of its images; the tower runs once."""
        chosen, features = self._seen(model, inputs)
        return shorten(model, inputs, [each.kept for each in chosen], features=features)

    def _seen(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[Selection], Any]:
        tower = vision_tower(model, inputs)
        first, last = self.layers(model, tower)
        scores, features = tower_scores(model, inputs, (first, last), tower=tower, parity=self.parity)
        rules: dict[str, Any] = {"alpha": self.alpha, "buffers": self.buffers}
        if self.parity:  # the published code takes the width of the first image for all
            rules |= {"neighbors": "clamp-flat", "stride": tower.grids[0][1]}
            rules["exclude"] = "subtract"
        chosen = []
        for grid, objects, deep in zip(tower.grids, scores[first], scores[last], strict=True):
            keep = self.keep if isinstance(self.keep, int) else max(1, int(self.keep * prod(grid)))
            chosen.append(select(objects, deep, grid, keep, **rules))
        return chosen, features

    def layers(self, model: Any, tower: VisionTower) -> tuple[int, int]:
        """The object and the deep layer, counted from 0."""
        number = len(tower.sites)
        config = model.get_submodule(tower.name).config
        whole = getattr(config, "fullatt_block_indexes", None)
        if whole:
            first = min(whole, key=lambda layer: abs(layer + 1 - number / 2))
            last = number - 1
        else:
            taken = getattr(model.config, "vision_feature_layer", -1)
            taken = taken if isinstance(taken, int) else taken[-1]
            # state -2 of L + 1 is behind layer L - 1: the last that the language model sees
            first, last = round(number * 9 / 24) - 1, (taken if taken < 0 else taken - 1) % number
        found = []
        for given, usual in ((self.object_layer, max(first, 0)), (self.deep_layer, last)):
            if given is not None and not 1 <= given <= number:
                raise ValueError(f"Layer {given} is none of the {number} of this tower, counted from 1.")
            found.append(usual if given is None else given - 1)
        return found[0], found[1]


def shorten(
    model: nn.Module,
    inputs: Mapping[str, Any],
    kept: Sequence[Int[Tensor, " kept"]],
    *,
    features: Sequence[Tensor] | None = None,
) -> Pruned:
    """The prompt with some tokens of each image, by their numbers in it, in order.

    LLaVA-type models number the shorter prompt anew; Qwen-type models keep the place that each token has in
    the picture. `features` are the images' as the projector makes them; without them the tower runs.
    """
    host: Any = model
    where = [image for row in image_tokens(model, inputs) for image in row]
    rows = [at for at, row in enumerate(image_tokens(model, inputs)) for _ in row]
    if len(where) != len(kept):
        raise ValueError(
            f"{len(kept)} selections for {len(where)} images. Give one for each, in their order."
        )
    if features is None:
        _, features = tower_scores(model, inputs, ())
    ids = inputs["input_ids"]
    stays = torch.ones_like(ids, dtype=torch.bool)
    for row, image, mine in zip(rows, where, kept, strict=True):
        stays[row, image.start : image.stop] = False
        stays[row, image.start + mine] = True
    lengths = stays.sum(1)
    if lengths.unique().numel() > 1:
        raise ValueError(
            f"The rows of the batch would have {lengths.tolist()} tokens. Give rows whose images keep as "
            "many tokens, or one at a time."
        )

    def cut(x: Tensor) -> Tensor:
        return torch.stack([row[..., mine] for row, mine in zip(x.unbind(-2), stays, strict=True)], -2)

    shorter: dict[str, Any] = {"input_ids": cut(ids)}
    if inputs.get("attention_mask") is not None:
        shorter["attention_mask"] = cut(inputs["attention_mask"])
    if "image_grid_thw" in inputs:
        core = host.model
        places, deltas = core.get_rope_index(
            ids,
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs.get("attention_mask"),
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
        shorter["position_ids"] = cut(places)
        core.rope_deltas = deltas + ids.shape[1] - lengths[0]  # steps count on from the last place
    elif inputs.get("position_ids") is not None:
        shorter["position_ids"] = cut(inputs["position_ids"])
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    some = [each[mine] for each, mine in zip(features, kept, strict=True)]
    shorter["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=some)}
    return Pruned(shorter, list(kept))


def _on_grid(anchors: Tensor, height: int, width: int) -> Tensor:
    """The neighbours of some tokens, as far as the grid goes."""
    y, x = anchors // width, anchors % width
    found = []
    for down, right in ((0, -1), (0, 1), (-1, 0), (1, 0)):
        inside = (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
        found.append((anchors + down * width + right)[inside])
    return torch.cat(found)
