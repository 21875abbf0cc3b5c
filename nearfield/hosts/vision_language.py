"""Vision-language models: which tokens are the image, which sites look at it, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nearfield.core import require


@dataclass(frozen=True)
class VisionTower:
    """A vision tower and the tokens that it makes of some images.

    `grids` are the images' sides in tokens of the language model. `places[p]` is the token, counted through
    all images row by row, that the tower's position p, class tokens aside, belongs to: patches may be merged,
    and windows may put them in an order of their own. `sites` are the tower's attention sites from the first
    layer on; where a site is called window by window, `Site.rows` tells the positions.
    """

    name: str
    sites: tuple[str, ...]
    num_prefix: int
    grids: tuple[tuple[int, int], ...]
    places: Int[Tensor, " positions"]

    @property
    def num_tokens(self) -> int:
        """Tokens of the language model, class tokens aside."""
        return sum(map(prod, self.grids))


def vision_tower(model: nn.Module, inputs: Mapping[str, Any]) -> VisionTower:
    """The vision tower of a LLaVA-type or Qwen-VL-type model, and the grids of the images in `inputs`."""
    name, tower, num_prefix, sites = _tower(model)
    grids, places = _layout(model, tower, inputs)
    return VisionTower(name, sites, num_prefix, grids, places)


def image_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> list[list[range]]:
    """For each row of `inputs["input_ids"]`, the places of the tokens of its images, one range an image.

    Padding counts, so that the places are those of `Site.rows` and `Site.keys`. Images that follow one
    another without a token between them are told apart by their sizes, which takes the pixels in `inputs`.
    """
    require("transformers", extra="hf")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(
            "The inputs hold no input_ids, by which image tokens are known. Give those of the prompt."
        )
    marks = ids == _image_token(model)
    sizes: list[int] | None = None
    if any(key in inputs for key in ("pixel_values", "image_grid_thw")):
        _, tower, num_prefix, _ = _tower(model)
        extra = num_prefix if getattr(model.config, "vision_feature_select_strategy", None) == "full" else 0
        sizes = [prod(grid) + extra for grid in _layout(model, tower, inputs)[0]]
        if sum(sizes) != int(marks.sum()):
            raise ValueError(
                f"The prompt has {int(marks.sum())} image tokens and its images make {sum(sizes)}. Give as "
                "many as the processor writes."
            )
    rows = [_runs(row) for row in marks]
    return rows if sizes is None else [_split(row, sizes) for row in rows]


def _split(runs: list[range], sizes: list[int]) -> list[range]:
    """Runs cut into images; takes the sizes that it uses from the front of the list."""
    found = []
    for run in runs:
        start = run.start
        while start < run.stop:
            size = sizes.pop(0)
            if start + size > run.stop:
                raise ValueError(
                    f"An image of {size} tokens begins at {start}, and its run of image tokens ends at "
                    f"{run.stop}. Give the images in the order of their places in the prompt."
                )
            found.append(range(start, start + size))
            start += size
    return found


def _runs(marks: Tensor) -> list[range]:
    edges = torch.diff(marks.int(), prepend=marks.new_zeros(1).int(), append=marks.new_zeros(1).int())
    starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [range(start, stop) for start, stop in zip(starts, stops, strict=True)]


def _image_token(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    raise NotImplementedError(
        f"The config of this {type(model).__name__} names no image token (image_token_id), so the place "
        "where images enter is not known. Give a LLaVA-type or Qwen-VL-type model."
    )


def _tower(model: nn.Module) -> tuple[str, Any, int, tuple[str, ...]]:
    """Name, module, class tokens and attention sites of the tower."""
    require("transformers", extra="hf")
    from nearfield.hosts import transformers

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("vision_tower", "visual"):
            mine = [site for site in transformers.sites(model) if site.name.startswith(f"{name}.")]
            if mine:
                return name, module, max(site.num_prefix for site in mine), tuple(site.name for site in mine)
    raise NotImplementedError(
        f"This {type(model).__name__} has no vision tower that is known (a module vision_tower or visual "
        "with attention in it). Give a LLaVA-type or Qwen-VL-type model."
    )


def _layout(
    model: nn.Module, tower: Any, inputs: Mapping[str, Any]
) -> tuple[tuple[tuple[int, int], ...], Tensor]:
    """Grids of the images and, for each position of the tower, the token that it belongs to."""
    config, pixels, thw = tower.config, inputs.get("pixel_values"), inputs.get("image_grid_thw")
    if isinstance(thw, Tensor):
        return _merged_layout(config, thw)
    if (
        isinstance(pixels, Tensor)
        and pixels.ndim == 4
        and isinstance(getattr(config, "patch_size", None), int)
    ):
        grid = pixels.shape[-2] // config.patch_size, pixels.shape[-1] // config.patch_size
        return (grid,) * len(pixels), torch.arange(len(pixels) * prod(grid), device=pixels.device)
    raise NotImplementedError(
        f"The grid of the images of this {type(model).__name__} is not known: it takes pixel_values [images, "
        f"3, height, width], or image_grid_thw; the inputs hold {', '.join(inputs)}. Images in crops are not "
        "offered."
    )


def _merged_layout(config: Any, thw: Tensor) -> tuple[tuple[tuple[int, int], ...], Tensor]:
    """Qwen-VL: patches in merged squares, the squares of a window one after the other."""
    merge = config.spatial_merge_size
    window = getattr(config, "window_size", None)
    side = None if window is None else window // merge // config.patch_size
    grids, places, first = [], [], 0
    for frames, height, width in thw.tolist():
        if frames != 1:
            raise NotImplementedError(f"image_grid_thw names {frames} frames. Only still images are offered.")
        grid = height // merge, width // merge
        token = torch.arange(prod(grid), device=thw.device)
        if side is not None:  # stable: inside a window row by row
            row, column = token // grid[1] // side, token % grid[1] // side
            token = token[(row * (-(-grid[1] // side)) + column).argsort(stable=True)]
        grids.append(grid)
        places.append((token + first).repeat_interleave(merge * merge))
        first += prod(grid)
    return tuple(grids), torch.cat(places)
