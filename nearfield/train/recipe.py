"""Recipes: every setting of a training run, in TOML or in code. A wrong name is refused with the nearest."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nearfield import catalog
from nearfield.train.schedules import ENDLESS, SCHEDULES

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
PRECISIONS = ("no", "bf16", "fp16")
# What may differ between a run and the one that goes on from its checkpoint without another loss coming out.
FREE = ("log_every", "eval_every", "checkpoint_every", "workers")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training run.

    `steps` are updates of the weights, each from `gradient_accumulation` batches of `batch_size` in each
    process. `warmup` below 1 is a share of all steps; `floor` is a share of `lr`. `ema` is the decay of
    averaged weights. `eval_every` and `checkpoint_every` of 0 mean at the end only. `label_smoothing` and
    `options` are for the task, which makes the loss.
    """

    task: str = ""
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    gradient_accumulation: int = 1
    shuffle: bool = True
    workers: int = 0
    optimizer: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.0
    floor: float = 0.0
    patience: int = 10
    clip: float | None = None
    mixed_precision: str = "no"
    ema: float | None = None
    ema_warmup: bool = False
    label_smoothing: float = 0.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 500
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps={self.steps} and epochs={self.epochs}: a recipe gives exactly one of them."
            )
        object.__setattr__(self, "betas", _betas(self.betas))
        for name, lowest in WHOLE.items():
            _whole(name, getattr(self, name), lowest)
        for name, (holds, words) in NUMBERS.items():
            _number(name, getattr(self, name), holds, words)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(catalog.unknown(name, getattr(self, name), allowed, _choose(allowed)))
        for name in ("shuffle", "ema_warmup"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false.")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup={self.warmup} must be whole steps, or a share below 1.")
        if not isinstance(self.task, str) or not isinstance(self.options, dict):
            raise ValueError("task must be 'module:function', and options a table.")
        if self.schedule == "exponential" and self.floor == 0:
            raise ValueError("schedule='exponential' falls to floor, which must lie above 0. Set floor=0.01.")

    def total(self, num_samples: int, num_processes: int = 1) -> int:
        """The number of steps over this many samples."""
        if self.steps is not None:
            return self.steps
        taken = self.batch_size * self.gradient_accumulation * num_processes
        return max(1, math.ceil((self.epochs or 0) * num_samples / taken))

    def warmup_steps(self, total: int) -> int:
        """Steps of the rise."""
        return round(self.warmup * total) if self.warmup < 1 else int(self.warmup)

    def json(self) -> dict[str, Any]:
        """All settings, as `recipe_from` takes them."""
        return {**asdict(self), "betas": list(self.betas)}

    def differs(self, other: Mapping[str, Any]) -> list[str]:
        """The settings that would make a run which goes on from a run with `other` another run."""
        free = set(FREE) | ({"steps", "epochs"} if self.schedule in ENDLESS else set())
        mine = self.json()
        return [name for name in mine if name not in free and mine[name] != other.get(name)]


WHOLE = {
    "batch_size": 1, "gradient_accumulation": 1, "workers": 0, "patience": 0, "seed": 0, "log_every": 1,
    "eval_every": 0, "checkpoint_every": 0, "steps": 1,
}  # fmt: skip
NUMBERS = {
    "epochs": (lambda x: x > 0, "above 0"),
    "lr": (lambda x: x > 0, "above 0"),
    "eps": (lambda x: x > 0, "above 0"),
    "clip": (lambda x: x > 0, "above 0"),
    "momentum": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "warmup": (lambda x: x >= 0, "at least 0"),
    "floor": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "ema": (lambda x: 0 < x < 1, "above 0 and below 1"),
    "label_smoothing": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
}
CHOICES = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "mixed_precision": PRECISIONS}
OPTIONAL = ("steps", "epochs", "clip", "ema")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a TOML file, with `overrides` such as `"lr=1e-3"` put over it."""
    path = Path(path)
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML ({error}).") from None
    return recipe_from(settings, overrides)


def recipe_from(settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of plain settings. `"clip=none"` leaves one out, `"options.dim=64"` is one of the task's."""
    merged = {**settings, "options": settings.get("options", {})}
    for override in overrides:
        name, value = _override(override)
        outer, dot, inner = name.partition(".")
        if dot:
            if outer != "options" or not inner:
                raise ValueError(
                    f"--set {override}: only options has settings of its own. Write options.NAME."
                )
            merged["options"] = {**merged["options"], inner: value}
            continue
        _known([name])
        if name in ("steps", "epochs"):  # the one asked for replaces the recipe's own
            merged.pop("steps", None)
            merged.pop("epochs", None)
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = value
    _known(merged)
    return Recipe(**merged)


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name or not value:
        raise ValueError(f"--set {text!r} says nothing. Write --set name=value, such as --set lr=1e-3.")
    if value.lower() == "none":
        if name not in OPTIONAL and not name.startswith("options."):
            raise ValueError(f"--set {text}: only {', '.join(OPTIONAL)} may be none.")
        return name, None
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value  # a word without quotes: --set schedule=linear


def _known(names: Mapping[str, Any] | Sequence[str]) -> None:
    allowed = [each.name for each in fields(Recipe)]
    for name in names:
        if name not in allowed:
            raise ValueError(catalog.unknown("setting", name, allowed, _choose(allowed)))


def _choose(allowed: Sequence[str]) -> str:
    return f"There are {', '.join(allowed)}."


def _betas(value: Any) -> tuple[float, float]:
    good = isinstance(value, (list, tuple)) and len(value) == 2
    if not good or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in value):
        raise ValueError(f"betas={value!r} must be two numbers, each at least 0 and below 1.")
    return float(value[0]), float(value[1])


def _whole(name: str, value: Any, lowest: int) -> None:
    if value is None and name in OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**31:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {lowest}.")


def _number(name: str, value: Any, holds: Any, words: str) -> None:
    if value is None and name in OPTIONAL:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not holds(value):
        raise ValueError(f"{name}={value!r} must be a number {words}.")
