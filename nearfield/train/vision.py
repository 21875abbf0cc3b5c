"""Classifiers of images: a short supervised run and its accuracy, and the task behind `nearfield train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfield.core.errors import require
from nearfield.data import images
from nearfield.data.images import Images
from nearfield.store import create
from nearfield.train.loop import fit
from nearfield.train.losses import Loss, cross_entropy
from nearfield.train.recipe import Recipe
from nearfield.train.result import Task

SETS = ("digits", "textures", "faces", "textile", "clips")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


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


def accuracy(
    model: nn.Module, pictures: Float[Tensor, "n channels *sides"], labels: Int[Tensor, " n"]
) -> float:
    """The share of images that the model, as it is in evaluation, puts into their class."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        found = torch.cat([model(part.to(device)).argmax(-1).cpu() for part in pictures.split(128)])
    model.train(was_training)
    return float((found == labels).float().mean())


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

    Every fourth image, by name, is for testing. Further options build the model.
    """
    name = data or "digits"
    made = _folder(Path(name), side) if Path(name).is_dir() else _packaged(name, side)
    built = create(model, num_classes=len(made.classes), in_channels=made.train.shape[1], **options)
    train = Labelled(made.train, made.train_labels, shift=shift, mirror=mirror)
    return Task(
        built,
        train,
        _loss(recipe.label_smoothing),
        lambda model: {"accuracy": accuracy(model, made.test, made.test_labels)},
    )


def _loss(label_smoothing: float) -> Any:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        return cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=label_smoothing)

    return loss


def _packaged(name: str, side: int) -> Images:
    if name not in SETS:
        raise ValueError(f"--data {name} is no folder and no packaged set. The sets are {', '.join(SETS)}.")
    return images.clips(side=side) if name == "clips" else getattr(images, name)(side)


def _folder(folder: Path, side: int) -> Images:
    """Colour images by class folder, their shorter side `side` pixels, cropped in the middle."""
    image = require("PIL.Image", package="pillow")
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    pictures, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES):
            with image.open(path) as opened:
                picture = opened.convert("RGB")
            scale = side / min(picture.size)
            width, height = (max(side, round(length * scale)) for length in picture.size)
            x, y = (width - side) // 2, (height - side) // 2
            picture = picture.resize((width, height)).crop((x, y, x + side, y + side))
            raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            pictures.append(raw.view(side, side, 3).permute(2, 0, 1).float() / 255)
            labels.append(label)
    if len(classes) < 2 or len(labels) < 4:
        raise ValueError(
            f"{folder} holds {len(labels)} images in {len(classes)} class folders. "
            f"Give one with a folder of images ({', '.join(SUFFIXES)}) for each of at least two classes."
        )
    return images.split(
        torch.stack(pictures), torch.tensor(labels), torch.arange(len(labels)) % 4 == 3, classes
    )
