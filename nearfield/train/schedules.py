"""Learning-rate schedules: a share of the recipe's `lr` for each step.

All but `plateau` are functions of the step alone, so a run that goes on after a break needs nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

SHAPES: dict[str, Callable[[float, float], float]] = {  # (share of the way done, floor) -> share of lr
    "constant": lambda done, floor: 1.0,
    "linear": lambda done, floor: 1.0 + (floor - 1.0) * done,
    "cosine": lambda done, floor: floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)),
    "exponential": lambda done, floor: floor**done,
}
SCHEDULES = (*SHAPES, "inverse_sqrt", "plateau")
ENDLESS = ("constant", "inverse_sqrt", "plateau")  # the same whatever the number of steps


class Schedule:
    """A named schedule: a linear rise over `warmup` steps, then its shape down to `floor`.

    >>> Schedule("cosine", steps=100, warmup=10, floor=0.1).factor(100)
    0.1

    `inverse_sqrt` is sqrt(warmup / step). `plateau` multiplies by 0.1 whenever `patience` losses shown to
    `observe` have passed without a better one, and the next is no better either.
    """

    def __init__(self, name: str, *, steps: int, warmup: int = 0, floor: float = 0.0, patience: int = 10):
        if name not in SCHEDULES:
            raise ValueError(f"schedule={name!r} is unknown. Choose {', '.join(SCHEDULES)}.")
        if name == "exponential" and floor <= 0:
            raise ValueError("schedule='exponential' falls to floor, which must lie above 0. Set floor=0.01.")
        self.name, self.steps, self.warmup = name, steps, warmup
        self.floor, self.patience = floor, patience
        self.reduced, self.best, self.waited = 1.0, math.inf, 0

    def factor(self, step: int) -> float:
        """The share of `lr` that step number `step` takes, the first being 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "plateau":
            return self.reduced
        if self.name == "inverse_sqrt":
            return max(self.floor, math.sqrt(max(self.warmup, 1) / (step + 1)))
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return SHAPES[self.name](min(done, 1.0), self.floor)

    def observe(self, loss: float) -> None:
        """Tell `plateau` how it went; the others do not listen."""
        if loss < self.best * (1 - 1e-4):  # less than that is noise: torch's default threshold
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.reduced, self.waited = max(self.floor, self.reduced * 0.1), 0

    def state(self) -> dict[str, Any]:
        """What `observe` has gathered, fit for JSON."""
        best = None if math.isinf(self.best) else self.best
        return {"reduced": self.reduced, "best": best, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.reduced, self.waited = float(state["reduced"]), int(state["waited"])
        self.best = math.inf if state["best"] is None else float(state["best"])
