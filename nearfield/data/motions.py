"""Small local motions of real faces, made by warping, and the optical flow between two pictures.

A stand-in for recordings of micro-expressions, which may not be shipped: the faces are real, their motion is
synthetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nearfield.core.errors import require

EXPRESSIONS = ("negative", "positive", "surprise")
# Eyes, nose and corners of the mouth, left ones first: x and y in the mean of the faces, of 25 pixels.
PLACES = ((6.4, 8.4), (16.3, 8.4), (11.4, 14.0), (7.9, 17.5), (14.8, 17.5))
# x and y by which each of them moves, 1 at most: brows lowered, a smile, brows raised and the jaw dropped.
MOVES = {
    "negative": ((0.3, 0.8), (-0.3, 0.8), (0, 0), (0, 0.7), (0, 0.7)),
    "positive": ((0, 0.2), (0, 0.2), (0, 0), (-0.7, -0.7), (0.7, -0.7)),
    "surprise": ((0, -0.9), (0, -0.9), (0, 0), (0.3, 0.9), (-0.3, 0.9)),
}


class Motions(NamedTuple):
    """Pairs of pictures: which expression moves between them, whose face it is, where its features are."""

    before: Float[Tensor, "n 1 side side"]
    after: Float[Tensor, "n 1 side side"]
    labels: Int[Tensor, " n"]
    subjects: Int[Tensor, " n"]
    landmarks: Float[Tensor, "n 5 2"]  # x and y: eyes, nose, corners of the mouth; left ones first


def faces_in_motion(
    subjects: int = 20, clips: int = 6, side: int = 28, *, strength: float = 1.0, seed: int = 0
) -> Motions:
    """scikit-image's faces of LFW, one a subject, each at a place and in a size of its own, moving slightly.

    `clips` a subject go through the expressions in turn. Their motion is `strength` times 0.4 to 1 pixels of
    28 at most; beside it the head moves by up to 0.3, some other place by up to 1, and the light and each
    pixel change a little.
    """
    held = require("skimage.data", package="scikit-image").lfw_subset()[:100]  # then come no faces
    if not 2 <= subjects <= len(held) or clips < 1 or side < 8:
        raise ValueError(
            f"subjects={subjects}, clips={clips}, side={side}: give 2 to {len(held)} subjects, at least a "
            "clip each and at least 8 pixels."
        )
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=draw)

    who = torch.arange(subjects).repeat_interleave(clips)
    labels = torch.arange(clips).repeat(subjects) % len(EXPRESSIONS)
    count, unit = len(who), side / 28
    photos = torch.tensor(held, dtype=torch.float32)[
        torch.randperm(len(held), generator=draw)[:subjects], None
    ]
    size = uniform(0.75, 1.0, subjects, 1, 1)
    shift = uniform(-1, 1, subjects, 1, 2) * (1.1 - size) * side / 2
    landmarks = ((torch.tensor(PLACES) + 0.5) / 25 - 0.5) * side * size + side / 2 + shift - 0.5

    axis = torch.arange(side, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # x and y of each pixel
    wanted = (grid + 0.5 - side / 2 - shift[:, None]) / (size[..., None] * side) * 2
    before = F.grid_sample(photos, wanted, padding_mode="border", align_corners=False)[who]

    moves = torch.tensor([MOVES[name] for name in EXPRESSIONS])[labels]
    moves = moves * uniform(0.4, 1, count, 1, 1) * uniform(0.5, 1, count, 5, 1)
    places = torch.cat([landmarks[who], uniform(0, side, count, 1, 2)], 1)
    moves = torch.cat([moves, uniform(-0.7, 0.7, count, 1, 2)], 1) * strength * unit
    near = ((grid[:, :, None] - places[:, None, None]) / (2.5 * unit)).square().sum(-1).mul(-0.5).exp()
    moved = torch.einsum("nyxp,npc->nyxc", near, moves) + uniform(-0.3, 0.3, count, 1, 1, 2) * unit
    after = warped(before, moved.movedim(-1, 1), back=True)
    after = after * uniform(0.98, 1.02, count, 1, 1, 1) + 0.004 * torch.randn(after.shape, generator=draw)
    return Motions(before, after, labels, who, landmarks[who])


def optical_flow(
    before: Float[Tensor, "n 1 y x"],
    after: Float[Tensor, "n 1 y x"],
    *,
    sigma: float = 2.0,
    iterations: int = 4,
) -> Float[Tensor, "n 2 y x"]:
    """How far along x and along y each pixel of `before` has moved in `after` (Lucas and Kanade).

    At each pixel the motion that explains best, by least squares with Gaussian weights of width `sigma`
    around it, how the picture changed; the second picture is warped by what is known and asked again. For
    motions of a pixel or two.
    """
    flow = torch.zeros_like(before).repeat(1, 2, 1, 1)
    ridge = 1e-3 * before.var((1, 2, 3), keepdim=True) + 1e-12
    for _ in range(iterations):
        there = warped(after, flow)
        dx, dy = gradients((before + there) / 2)
        change = there - before
        xx, xy, yy, xt, yt = blur(
            torch.cat([dx * dx, dx * dy, dy * dy, dx * change, dy * change], 1), sigma
        ).split(1, 1)
        xx, yy = xx + ridge, yy + ridge
        flow = flow + torch.cat([xy * yt - yy * xt, xy * xt - xx * yt], 1) / (xx * yy - xy * xy)
    return flow


def optical_strain(flow: Float[Tensor, "n 2 y x"]) -> Float[Tensor, "n 1 y x"]:
    """How much the motion deforms at each pixel: the norm of its symmetric gradient."""
    (ux, uy), (vx, vy) = (gradients(part) for part in flow.split(1, 1))
    return (ux.square() + vy.square() + (uy + vx).square() / 2).sqrt()


def warped(
    picture: Float[Tensor, "n 1 y x"], flow: Float[Tensor, "n 2 y x"], *, back: bool = False
) -> Float[Tensor, "n 1 y x"]:
    """What is seen at each pixel plus `flow`, or minus it: the picture moved by `flow`, nearly."""
    height, width = picture.shape[-2:]
    down, across = (
        torch.arange(side, dtype=picture.dtype, device=picture.device) for side in (height, width)
    )
    at = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1) + (-1 if back else 1) * flow.movedim(
        1, -1
    )
    scaled = (2 * at + 1) / torch.tensor([width, height], dtype=picture.dtype, device=picture.device) - 1
    return F.grid_sample(picture, scaled, mode="bicubic", padding_mode="border", align_corners=False)


def gradients(picture: Float[Tensor, "n 1 y x"]) -> tuple[Float[Tensor, "n 1 y x"], Float[Tensor, "n 1 y x"]]:
    """Along x and along y, by the difference of neighbours."""
    x = F.pad(picture, (1, 1, 0, 0), mode="replicate")
    y = F.pad(picture, (0, 0, 1, 1), mode="replicate")
    return (x[..., 2:] - x[..., :-2]) / 2, (y[..., 2:, :] - y[..., :-2, :]) / 2


def blur(maps: Float[Tensor, "n c y x"], sigma: float) -> Float[Tensor, "n c y x"]:
    """Gaussian means of width `sigma`."""
    reach = int(3 * sigma + 0.5)
    weights = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device).div(sigma).square()
    weights = weights.mul(-0.5).exp()
    weights = weights / weights.sum()
    channels = maps.shape[1]
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(across, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
