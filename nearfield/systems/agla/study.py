"""Where a picture matters for a prompt: attention times its gradient, and the pixels that are kept by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfield.core import require
from nearfield.hosts import seam
from nearfield.hosts.seam import Call
from nearfield.hosts.vision_language import image_tokens, vision_tower
from nearfield.steer.scores import hidden_of, scores_of

BLUR = 0.02  # deviation of the blur, of the longer side
MOST = 1 - 1e-5  # share of pixels that is kept at most, so that a threshold is among the values


class Matched(NamedTuple):
    """For each row the heat of its picture on the grid of tokens, and how well picture and prompt match."""

    heat: tuple[Float[Tensor, "y x"], ...]
    similarity: Float[Tensor, " b"]


def gradient_heat(
    attention: Float[Tensor, "b heads t keys"],
    gradient: Float[Tensor, "b heads t keys"],
    tokens: Bool[Tensor, "b t"],
) -> Float[Tensor, "b keys"]:
    """The mean over text tokens and heads of attention times its gradient where that is positive."""
    heat = (attention * gradient.clamp(min=0)).mean(1) * tokens[..., None]
    return heat.sum(1) / tokens.sum(-1, keepdim=True).clamp(min=1)


def matched_by_blip(model: Any, inputs: Mapping[str, Tensor], *, layer: int = 6) -> Matched:
    """The heat and similarity of a `BlipForImageTextRetrieval`, as in the paper.

    The gradient is that of the logit of a match, by the cross-attention of a layer; the first and last token
    of the text are left out. The similarity is the cosine of the projected picture and text.
    """
    if not hasattr(model, "itm_head"):
        raise TypeError(f"A {type(model).__name__} has no matching head. Give a BlipForImageTextRetrieval.")
    layers = model.text_encoder.encoder.layer
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer={layer} is none of the {len(layers)} layers of the text encoder.")
    maps: list[Tensor] = []
    hook = layers[layer].crossattention.self.register_forward_hook(lambda _m, _i, out: maps.append(out[1]))
    try:
        with torch.enable_grad():
            score = model(**inputs).itm_score[:, 1].sum()
            (gradient,) = torch.autograd.grad(score, maps[0])
    finally:
        hook.remove()
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    places = torch.arange(mask.shape[1], device=mask.device)
    words = (places > 0) & (places < mask.sum(-1, keepdim=True) - 1)
    heat = gradient_heat(maps[0].detach(), gradient, words)[:, 1:]  # the class token of the picture left out
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    with torch.no_grad():
        similarity = model(**inputs, use_itm_head=False).itm_score.diagonal()
    return Matched(tuple(heat.view(-1, side, heat.shape[1] // side)), similarity)


def matched_by_itself(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    target: int | None = None,
    layer: int | None = None,
    gradient: bool = True,
) -> Matched:
    """The heat of a vision-language model's own attention, where no matcher is given.

    The gradient is that of the log-probability of `target` as the next token, by default the likeliest one;
    the attention that of the tokens behind the picture to it, in `layer`, by default the middle one. The
    similarity is the probability of `target`. `gradient=False` gives the attention alone.
    """
    ranges = image_tokens(model, inputs)
    if any(len(row) != 1 for row in ranges):
        raise ValueError("Each row needs exactly one image. Give prompts with one image each.")
    tower = vision_tower(model, inputs)
    listed = seam.listed_sites(model) or []
    names = [site.name for site in listed if site.is_causal and not site.name.startswith(f"{tower.name}.")]
    layer = len(names) // 2 if layer is None else layer
    if not 0 <= layer < len(names):
        raise ValueError(f"layer={layer} is none of the {len(names)} layers of the language model.")
    begin = min(row[0].stop for row in ranges)
    maps: list[Tensor] = []

    def handler(call: Call) -> Tensor | None:
        if call.site.name != names[layer]:
            return None
        torch.set_grad_enabled(True)  # from here on, until no_grad below ends: nothing before needs a graph
        here = slice(begin, call.query.shape[1])
        scores = scores_of(call, call.query[:, here].detach(), call.key.detach(), here)
        hidden = hidden_of(call, here, call.key.shape[1], scores.device)
        scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
        maps.append(scores.softmax(-1).requires_grad_())
        heads = call.query.shape[2] // call.value.shape[2]
        value = call.value.repeat_interleave(heads, 2).transpose(1, 2)  # [B, H, M, Dv]
        out = (maps[0] @ value.to(scores.dtype)).transpose(1, 2).to(value.dtype)
        return torch.cat([call.host(call.query, call.key, call.value)[:, :begin].detach(), out], 1)

    with torch.no_grad(), seam.attention(model, handler):
        told = model(**inputs, use_cache=False).logits[:, -1].float().log_softmax(-1)
        chosen = told.argmax(-1) if target is None else torch.full_like(told[:, 0], target, dtype=torch.long)
        told = told.gather(-1, chosen[:, None])[:, 0]
        (slope,) = torch.autograd.grad(told.sum(), maps[0])
    ids, places = inputs["input_ids"], torch.arange(begin, inputs["input_ids"].shape[1])
    stops = torch.tensor([[row[0].stop] for row in ranges])
    words = (places >= stops).to(ids.device)
    if inputs.get("attention_mask") is not None:
        words &= inputs["attention_mask"][:, begin:] > 0
    heat = gradient_heat(maps[0].detach(), slope if gradient else torch.ones_like(slope), words)
    found = []
    for row, (where,), grid in zip(heat, ranges, tower.grids, strict=True):
        found.append(row[where.stop - prod(grid) : where.stop].view(grid))
    return Matched(tuple(found), told.detach().exp())


def keep_ratio(similarity: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The share of pixels to keep: the better picture and prompt match, the more is masked, half at most."""
    return (1 - similarity / 2).clamp(max=MOST)


def pixel_map(
    heat: Float[Tensor, "y x"], size: tuple[int, int], *, parity: bool = False
) -> Float[Tensor, "height width"]:
    """Heat on pixels, between 0 and 1: bicubic, then blurred; equal everywhere where the heat is.

    `parity=True` interpolates as scikit-image does, by splines that see zeros outside the picture.
    """
    grid = _unit(heat.detach().float())
    sigma = BLUR * max(size)
    if parity:
        transform = require("skimage.transform", package="scikit-image")
        ndimage = require("scipy.ndimage", package="scipy")
        fine = transform.resize(grid.cpu().numpy(), size, order=3, mode="constant")
        return _unit(torch.as_tensor(ndimage.gaussian_filter(fine, sigma), device=heat.device))
    fine = F.interpolate(grid[None, None], size=size, mode="bicubic", align_corners=False)
    reach = int(4 * sigma + 0.5)
    weights = (
        torch.arange(-reach, reach + 1, device=heat.device).div(max(sigma, 1e-6)).square().mul(-0.5).exp()
    )
    weights = weights / weights.sum()
    padded = F.pad(fine, (reach,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, weights[None, None, None]), weights[None, None, :, None])
    return _unit(blurred[0, 0])


def keep_mask(heat: Float[Tensor, "height width"], ratio: float) -> Bool[Tensor, "height width"]:
    """The hottest pixels, as many as the share `ratio`; all that are as hot as the last of them."""
    ranked = heat.flatten().sort(descending=True).values
    return heat >= ranked[int(len(ranked) * min(ratio, MOST))]


def _unit(values: Tensor) -> Tensor:
    """Between 0 and 1; where all are equal, 0."""
    values = values - values.min()
    return values / values.max().clamp_min(torch.finfo(values.dtype).tiny)


def draw_heat(
    axes: Any, picture: Float[Tensor, "3 height width"], heat: Float[Tensor, "y x"], ratio: float
) -> None:
    """A picture with its heat over it, and a line around what is kept."""
    pixels = pixel_map(heat, (int(picture.shape[-2]), int(picture.shape[-1])))
    axes.imshow(picture.permute(1, 2, 0).numpy())
    axes.imshow(pixels.numpy(), cmap="inferno", alpha=0.5)
    axes.contour(keep_mask(pixels, ratio).numpy(), levels=[0.5], colors="white")
    axes.set_axis_off()
