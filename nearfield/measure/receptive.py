"""Which inputs reach one output of a network, and how strongly: maps of gradients, and boxes on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Box = tuple[int, ...]  # where it starts on each side, then where it ends: y, x, y end, x end


def gradient_map(
    function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "b *rest"],
    position: Sequence[int],
    *,
    draws: int = 4,
    channels_last: bool = False,
    seed: int = 0,
) -> Float[Tensor, "*sides"]:
    """How strongly each place of `inputs` moves the output at `position`: `|d output / d input|`.

    `function` gives `[B, *grid, C]`, as layers and `forward_features` here do; `position` is a place on that
    grid. The root of the mean square over the batch, channels, and `draws` random mixtures of the output's
    channels, whose plain sum a norm may hold constant. Inputs are `[B, C, *sides]`, or `[B, *sides, C]` with
    `channels_last`. A place that is not seen at all has exactly 0.
    """
    module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    was_training = isinstance(module, nn.Module) and module.training
    if isinstance(module, nn.Module):
        module.eval()
    try:
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            out = function(inputs)
            at = _checked(position, out)
            seen = out.movedim(0, len(at))[at]  # [B, C]
            draw = torch.Generator().manual_seed(seed)
            total = torch.zeros_like(inputs, dtype=torch.float64)
            for number in range(draws):
                mixture = torch.randn(seen.shape, generator=draw).to(seen)
                (grad,) = torch.autograd.grad(
                    seen, inputs, mixture, retain_graph=number + 1 < draws, materialize_grads=True
                )
                total += grad.double().square()
    finally:
        if isinstance(module, nn.Module):
            module.train(was_training)
    return (total / draws).mean((0, -1 if channels_last else 1)).sqrt()


def share_inside(map_: Float[Tensor, "*sides"], box: Box) -> float:
    """The share of a map that lies inside a box (y, x, y end, x end); NaN for a map of zeros."""
    rank = map_.dim()
    if len(box) != 2 * rank:
        raise ValueError(f"box={box} has {len(box)} numbers. A map of {rank} sides needs {2 * rank}.")
    inside = map_[tuple(slice(max(0, box[side]), max(0, box[side + rank])) for side in range(rank))]
    return float(inside.sum() / map_.sum())


def reached(map_: Float[Tensor, "*sides"]) -> Box:
    """The smallest box around all that is not exactly zero."""
    places = (map_ != 0).nonzero()
    if not len(places):
        raise ValueError("The map is zero everywhere: nothing reaches this output.")
    return (*places.amin(0).tolist(), *(places.amax(0) + 1).tolist())


def extent(map_: Float[Tensor, "*sides"], share: float = 0.9) -> Box:
    """The smallest box of equal sides, cut off at the map's, that holds at least a share of the map.

    Of several such boxes the one that holds most.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie above 0 and be at most 1.")
    total = float(map_.sum())
    if not total > 0:
        raise ValueError("The map is zero everywhere: no box holds a share of it.")
    summed = map_.double()
    for side in range(map_.dim()):
        summed = summed.cumsum(side)
    summed = F.pad(summed, (1, 0) * map_.dim())  # sums over all that lies before a corner
    low, high = 1, max(map_.shape)
    while low < high:  # what the best box holds does not fall with its side
        middle = (low + high) // 2
        if float(_sums(summed, middle, map_.shape).max()) >= share * total * (1 - 1e-12):
            high = middle
        else:
            low = middle + 1
    sums = _sums(summed, low, map_.shape)
    start = torch.unravel_index(sums.argmax(), sums.shape)
    starts = [int(each) for each in start]
    return (*starts, *(at + min(low, side) for at, side in zip(starts, map_.shape, strict=True)))


def draw_map(axes: Any, map_: Float[Tensor, "y x"], boxes: Sequence[Box] = ()) -> None:
    """The map as a picture, its logarithm where it is not zero, with boxes drawn around."""
    shown = map_.float().clamp(min=float(map_.max()) * 1e-6).log10()
    axes.imshow(shown.cpu().numpy(), cmap="cividis", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for y, x, y_end, x_end in boxes:
        axes.plot(
            [x - 0.5, x_end - 0.5, x_end - 0.5, x - 0.5, x - 0.5],
            [y - 0.5, y - 0.5, y_end - 0.5, y_end - 0.5, y - 0.5],
            color="white",
            linewidth=1,
        )


def _sums(summed: Tensor, size: int, sides: Sequence[int]) -> Tensor:
    """What every box of this size holds, by where it starts."""
    rank, found = len(sides), torch.zeros((), dtype=summed.dtype, device=summed.device)
    sizes = [min(size, side) for side in sides]
    for corner in product((0, 1), repeat=rank):
        part = summed[
            tuple(
                slice(length, None) if end else slice(None, side + 1 - length)
                for end, length, side in zip(corner, sizes, sides, strict=True)
            )
        ]
        found = found + (-1) ** (rank - sum(corner)) * part
    return found


def _checked(position: Sequence[int], out: Tensor) -> tuple[int, ...]:
    grid = tuple(out.shape[1:-1])
    at = tuple(position)
    inside = len(at) == len(grid) and all(
        -side <= place < side for place, side in zip(at, grid, strict=False)
    )
    if not inside:
        raise ValueError(f"position={at} is no place of an output [B, {', '.join(map(str, grid))}, C].")
    return at
