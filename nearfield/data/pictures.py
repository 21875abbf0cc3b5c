"""Real pictures that installed packages carry, as normalised pixels."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nearfield.core.errors import require

SHIPPED = (  # package, file: photographs, not drawings
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, which nearly all picture encoders assume


def shipped() -> list[Path]:
    """The picture files that installed packages carry.

    Raises `ValueError` where none does, with what to install.
    """
    found = []
    for package, inside in SHIPPED:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / inside).is_file():
                found.append(path)
    if not found:
        raise ValueError(
            "The model looks at pictures and no installed package carries one: pip install scikit-image. "
            "`nearfield measure` also takes --image FILE."
        )
    return found


def tensor(
    path: str | Path, size: int | tuple[int, int], *, corner: int | None = None
) -> Float[Tensor, "3 h w"]:
    """A picture scaled and cut to `size`, normalised for ImageNet.

    The cut is the middle of the whole; `corner` 0 to 3 takes that quarter of the picture instead.
    """
    Image = require("PIL.Image", package="pillow")
    numpy = require("numpy", package="numpy")
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with Image.open(path) as opened:
            found = opened.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}). Give a PNG or JPEG file.") from None
    if corner is not None:
        half = (found.width // 2, found.height // 2)
        left, top = half[0] * (corner % 2), half[1] * (corner // 2)
        found = found.crop((left, top, left + half[0], top + half[1]))
    scale = max(width / found.width, height / found.height)
    found = found.resize((max(width, round(found.width * scale)), max(height, round(found.height * scale))))
    left, top = (found.width - width) // 2, (found.height - height) // 2
    found = found.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(numpy.array(found)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def tensors(size: int | tuple[int, int], count: int) -> Float[Tensor, "count 3 h w"]:
    """`count` different cuts: whole pictures first, then quarters of them."""
    paths = shipped()
    cuts = [(path, corner) for corner in (None, 0, 3, 1, 2) for path in paths]
    if count > len(cuts):
        raise ValueError(
            f"{count} pictures were asked; installed packages give {len(cuts)} cuts. Install scikit-image."
        )
    return torch.stack([tensor(path, size, corner=corner) for path, corner in cuts[:count]])
