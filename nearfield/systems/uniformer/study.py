"""Clips whose frames say nothing alone, and a picture model frame by frame."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfield.data import images
from nearfield.data.images import Images
from nearfield.nn.pyramid import Pyramid

TURNS = ("left, left", "left, right", "right, left", "right, right")


def turns(frames: int = 16, side: int = 24, *, seed: int = 0) -> Images:
    """Handwritten digits that move along x by a pixel a frame, `[N, 1, frames, side, side]`, around the edge.

    The class is which way they go in the first half and in the second half. Each digit starts at a random
    place, so that one frame does not show it.
    """
    data, _, _ = images.canvas(side, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    train, train_labels = _moved(data.train, frames, draw)
    test, test_labels = _moved(data.test, frames, draw)
    return Images(train, train_labels, test, test_labels, TURNS)


def _moved(
    pictures: Float[Tensor, "n 1 y x"], frames: int, draw: torch.Generator
) -> tuple[Float[Tensor, "n 1 t y x"], Int[Tensor, " n"]]:
    labels = torch.randperm(len(pictures), generator=draw) % len(TURNS)
    ways = torch.stack([labels // 2, labels % 2]) * 2 - 1  # -1 is left
    starts = torch.randint(0, pictures.shape[-1], (len(pictures), 1), generator=draw)
    places = starts + ways.T.repeat_interleave(frames // 2, 1).cumsum(1)  # [N, T]
    clips = [
        torch.stack([picture.roll(place, -1) for place in row], 1)
        for picture, row in zip(pictures, places.tolist(), strict=True)
    ]
    return torch.stack(clips), labels


class ByFrame(nn.Module):
    """The mean of what a picture model says of each frame."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, clips: Float[Tensor, "b channels t y x"]) -> Float[Tensor, "b classes"]:
        frames = clips.movedim(2, 1)
        return self.net(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(1)


def answers(net: nn.Module, pictures: Float[Tensor, "n channels y x"]) -> Int[Tensor, " n"]:
    """The class that the model, in evaluation, finds for each picture."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net(some).argmax(-1) for some in pictures.split(128)])


def features(net: Pyramid, pictures: Float[Tensor, "n channels y x"]) -> Float[Tensor, "n y2 x2 dim"]:
    """The last maps of each picture, in evaluation."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net.forward_features(some) for some in pictures.split(128)])
