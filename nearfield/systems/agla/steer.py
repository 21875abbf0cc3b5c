"""Assembly of global and local attention: decoding from a picture and from what of it the prompt is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfield.hosts.generation import Branch, generate
from nearfield.systems.agla.study import Matched, keep_mask, keep_ratio, pixel_map

OFFICIAL = (384, 384)  # pixels that the official code squashes every picture to
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def assemble(alpha: float = 2.0, beta: float = 0.5) -> Callable[[list[Tensor]], Tensor]:
    """What `hosts.generation.generate` makes of two branches, whole and local: `whole + alpha * local`.

    Only of tokens that the whole picture gives `beta` times the probability of its likeliest at least.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must lie between 0 (every token) and 1 (the likeliest alone).")
    floor = math.log(beta) if beta else -math.inf

    def combine(logits: list[Tensor]) -> Tensor:
        whole, local = logits
        unlikely = whole < whole.amax(-1, keepdim=True) + floor
        return (whole + alpha * local).masked_fill(unlikely, -math.inf)

    return combine


def generate_assembled(
    model: nn.Module,
    inputs: Mapping[str, Any],
    local: Mapping[str, Any],
    *,
    alpha: float = 2.0,
    beta: float = 0.5,
    parity: bool = False,
    **options: Any,
) -> Int[Tensor, "b tokens"]:
    """Tokens of `model.generate` from the assembled logits of a prompt and of its `local_inputs`.

    Each has a cache of its own. `parity=True` decodes as the official code does, whose second branch goes on
    with the cache of the first: from the second token on both say the same, and alpha only sharpens.
    """
    combine, steps = assemble(alpha, beta), count()

    def official(logits: list[Tensor]) -> Tensor:
        return combine(logits if next(steps) == 0 else logits[:1] * 2)

    return generate(model, [Branch(inputs), Branch(local)], official if parity else combine, **options)


def local_inputs(
    inputs: Mapping[str, Any],
    matched: Matched,
    *,
    ratio: float | None = None,
    fill: float = 0.0,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    parity: bool = False,
) -> dict[str, Any]:
    """The inputs with the colder pixels of each picture set to `fill`, black, before they were normalised.

    The share `ratio` is kept, by default that of the similarity. `mean` and `std` are what the model's
    processor normalises with, by default CLIP's. Takes pixels `[B, 3, height, width]`, or the patches of
    Qwen-VL with `image_grid_thw`. `parity=True` is `pixel_map`'s.
    """
    pixels, thw = inputs["pixel_values"], inputs.get("image_grid_thw")
    ratios = keep_ratio(matched.similarity).tolist() if ratio is None else [ratio] * len(matched.heat)
    black = ((fill - torch.tensor(mean)) / torch.tensor(std)).to(pixels)
    if thw is None:
        sizes = [(int(pixels.shape[-2]), int(pixels.shape[-1]))] * len(pixels)
    else:
        side = math.isqrt(pixels.shape[-1] // len(mean) // 2)  # two frames of every still picture
        sizes = [(height * side, width * side) for _, height, width in thw.tolist()]
    if len(sizes) != len(matched.heat):
        raise ValueError(f"The inputs hold {len(sizes)} pictures and {len(matched.heat)} were matched.")
    kept = [
        keep_mask(pixel_map(heat, size, parity=parity), share)
        for heat, size, share in zip(matched.heat, sizes, ratios, strict=True)
    ]
    if thw is None:
        shown = torch.where(torch.stack(kept)[:, None], pixels, black[:, None, None])
    else:
        merged = [_patches(mask, side, grid) for mask, grid in zip(kept, matched.heat, strict=True)]
        shown = pixels.unflatten(1, (len(mean), -1, side * side))
        shown = torch.where(torch.cat(merged)[:, None, None], shown, black[:, None, None]).flatten(1)
    return {**inputs, "pixel_values": shown}


def local_picture(
    picture: Float[Tensor, "3 height width"],
    heat: Float[Tensor, "y x"],
    ratio: float,
    *,
    fill: float = 0.0,
    parity: bool = False,
) -> Float[Tensor, "3 out_height out_width"]:
    """A picture between 0 and 1 with its colder pixels filled, for the model's own processor.

    `parity=True` squashes it to 384 x 384 first, as the official code does, and is `pixel_map`'s.
    """
    if parity:
        picture = F.interpolate(picture[None], size=OFFICIAL, mode="bicubic", antialias=True)[0].clamp(0, 1)
    size = int(picture.shape[-2]), int(picture.shape[-1])
    return torch.where(keep_mask(pixel_map(heat, size, parity=parity), ratio), picture, fill)


def _patches(
    mask: Bool[Tensor, "height width"], side: int, heat: Float[Tensor, "y x"]
) -> Bool[Tensor, "patches pixels"]:
    """A mask in the order of Qwen-VL's patches: the squares that are merged to a token, one after another."""
    merge = mask.shape[0] // side // heat.shape[0]
    return rearrange(mask, "(y m p) (x n q) -> (y x m n) (p q)", m=merge, n=merge, p=side, q=side)
