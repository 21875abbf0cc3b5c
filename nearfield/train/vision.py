"""Classifiers of images: a short supervised run and its accuracy, and the task behind `nearfield train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfield.build import create
from nearfield.core.errors import require
from nearfield.data import images
from nearfield.data.images import Images
from nearfield.train.loop import fit
from nearfield.train.losses import Loss, cross_entropy
from nearfield.train.recipe import Recipe
from nearfield.train.result import Task

SETS = ("digits", "textures", "faces", "textile", "clips")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
PARTS = ("train", "val")  # folders of a set that is split already
# Of ImageNet's pixels, by which the published models standardise theirs.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGER = 256 / 224  # how much of a picture is read around what is cropped from it


class Labelled:
    """Images and classes as samples by number; while training moved by up to `shift` pixels and mirrored."""

    def __init__(self, pictures: Tensor, labels: Int[Tensor, " n"], *, shift: int = 0, mirror: bool = False):
        self.pictures, self.labels, self.shift, self.mirror = pictures, labels, shift, mirror

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        picture = self.pictures[number]
        if self.shift:
            move = torch.randint(-self.shift, self.shift + 1, (2,)).tolist()
            picture = picture.roll(move, (-2, -1))
        if self.mirror and torch.rand(()) < 0.5:
            picture = picture.flip(-1)
        return {"images": picture, "labels": self.labels[number]}


class Files:
    """Image files and classes as samples by number, in colour, read when asked for, `side` pixels wide.

    Cropped in the middle; while training at a random place, and mirrored half of the time if `mirror`.
    """

    def __init__(
        self, files: Sequence[tuple[Path, int]], side: int, *, is_training: bool = False, mirror: bool = False
    ):
        self.files, self.side, self.is_training, self.mirror = list(files), side, is_training, mirror
        self.image = require("PIL.Image", package="pillow")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        path, label = self.files[number]
        with self.image.open(path) as opened:
            picture = opened.convert("RGB")
        side = self.side
        scale = LARGER * side / min(picture.size)
        width, height = (max(side, round(length * scale)) for length in picture.size)
        x, y = (width - side) // 2, (height - side) // 2
        if self.is_training:
            x, y = (int(torch.randint(0, length - side + 1, ())) for length in (width, height))
        picture = picture.resize((width, height)).crop((x, y, x + side, y + side))
        raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = raw.view(side, side, 3).permute(2, 0, 1).float() / 255
        if self.is_training and self.mirror and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
        return {"images": pixels, "labels": torch.tensor(label)}


def accuracy(
    model: nn.Module, pictures: Float[Tensor, "n channels *sides"], labels: Int[Tensor, " n"]
) -> float:
    """The share of images that the model, as it is in evaluation, puts into their class."""
    return share_right(model, Labelled(pictures, labels))


def share_right(model: nn.Module, samples: Labelled | Files, batch_size: int = 128) -> float:
    """The same for samples by number."""
    was_training = model.training
    model.eval()
    device, right = next(model.parameters()).device, 0
    try:
        with torch.no_grad():
            for start in range(0, len(samples), batch_size):
                some = [samples[number] for number in range(start, min(start + batch_size, len(samples)))]
                images, labels = (torch.stack([each[name] for each in some]) for name in ("images", "labels"))
                right += int((model(images.to(device)).argmax(-1).cpu() == labels).sum())
    finally:
        model.train(was_training)
    return right / len(samples)


def learn(
    model: nn.Module,
    data: Images,
    *,
    steps: int,
    lr: float = 2e-3,
    batch_size: int = 64,
    weight_decay: float = 0.05,
    seed: int = 0,
) -> float:
    """Train a classifier for some steps, and its accuracy on the test part then."""
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=0.1,
        weight_decay=weight_decay,
        clip=1.0,
        seed=seed,
        log_every=steps,
        checkpoint_every=0,
    )
    fit(model, Labelled(data.train, data.train_labels), _loss(0.0), recipe=recipe)
    return accuracy(model, data.test, data.test_labels)


def classify(
    recipe: Recipe,
    *,
    model: str = "",
    side: int = 224,
    shift: int = 4,
    mirror: bool = True,
    data: str | None = None,
    **options: Any,
) -> Task:
    """A model of the cards, by name, on a packaged set or on a folder that has one folder of images a class.

    The folder may hold `train` and `val`, each with such folders; else every fourth image by name is for
    testing. Further options build the model.
    """
    name = data or "digits"
    train: Labelled | Files
    test: Labelled | Files
    if Path(name).is_dir():
        classes, train_files, test_files = _folder(Path(name))
        channels = 3
        train = Files(train_files, side, is_training=True, mirror=mirror)
        test = Files(test_files, side)
    else:
        made = _packaged(name, side)
        classes, channels = made.classes, made.train.shape[1]
        train = Labelled(made.train, made.train_labels, shift=shift, mirror=mirror)
        test = Labelled(made.test, made.test_labels)
    built = create(model, num_classes=len(classes), in_channels=channels, **options)
    return Task(
        built, train, _loss(recipe.label_smoothing), lambda model: {"accuracy": share_right(model, test)}
    )


def _loss(label_smoothing: float) -> Any:
    """Cross-entropy; of a model that has a second head for training, the mean of both heads'."""

    def loss(model: Any, batch: dict[str, Tensor]) -> Loss:
        heads = model.forward_both(batch["images"]) if hasattr(model, "forward_both") else ()
        logits = torch.cat(heads) if heads else model(batch["images"])
        labels = batch["labels"].repeat(len(heads) or 1)
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return loss


def _packaged(name: str, side: int) -> Images:
    if name not in SETS:
        raise ValueError(f"--data {name} is no folder and no packaged set. The sets are {', '.join(SETS)}.")
    return images.clips(side=side) if name == "clips" else getattr(images, name)(side)


def _folder(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Classes by name, then files and classes to train on and to test on."""
    is_split = all((folder / part).is_dir() for part in PARTS)
    homes = [folder / part for part in PARTS] if is_split else [folder]
    classes = tuple(sorted(path.name for path in homes[0].iterdir() if path.is_dir()))
    found = [
        [
            (path, label)
            for label, name in enumerate(classes)
            for path in (sorted((home / name).iterdir()) if (home / name).is_dir() else ())
            if path.suffix.lower() in SUFFIXES
        ]
        for home in homes
    ]
    if not is_split:
        found = [[each for n, each in enumerate(found[0]) if (n % 4 == 3) is last] for last in (False, True)]
    train, test = found
    if len(classes) < 2 or not train or not test:
        raise ValueError(
            f"{folder} holds {len(train) + len(test)} images in {len(classes)} class folders. "
            f"Give one with a folder of images ({', '.join(SUFFIXES)}) for each of at least two classes."
        )
    return classes, train, test
