"""Random numbers of a process: kept, put back, and a stretch of them that leaves no trace."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def kept() -> Iterator[None]:
    """Afterwards all random numbers go on as if nothing inside had drawn any."""
    before = randomness()
    try:
        yield
    finally:
        restore(before)


def seed(number: int) -> None:
    """Begin all random numbers anew."""
    import numpy

    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


def randomness() -> dict[str, Tensor]:
    """The state of all random numbers of this process: Python's, numpy's, torch's on every device."""
    import numpy

    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = numpy.random.get_state()
    if (version, name) != (3, "MT19937"):
        raise NotImplementedError(
            f"Random numbers of the kind {name} (Python's version {version}) in a checkpoint."
        )
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), int(place), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        found["mps"] = torch.mps.get_rng_state()
    return found


def restore(found: dict[str, Tensor]) -> None:
    """Put back what `randomness` gave."""
    import numpy

    gauss = float(found["python_gauss"])
    random.setstate((3, tuple(found["python"].tolist()), None if math.isnan(gauss) else gauss))
    *words, place, has_gauss = found["numpy"].tolist()
    keys = numpy.array(words, dtype=numpy.uint32)
    numpy.random.set_state(("MT19937", keys, place, has_gauss, float(found["numpy_gauss"])))
    torch.set_rng_state(found["torch"])
    if "cuda0" in found and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in found:
                torch.cuda.set_rng_state(found[f"cuda{i}"], i)
    if "mps" in found and torch.backends.mps.is_available():
        torch.mps.set_rng_state(found["mps"])
