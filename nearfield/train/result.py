"""What goes into a training run, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nearfield.train.losses import Loss

Record = dict[str, Any]
LossFunction = Callable[[nn.Module, dict[str, Any]], Loss | Tensor]
Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What a recipe's `task` returns.

    `data[i]` is a dict of tensors or numbers; `data.collate`, if there is one, makes a batch of a list of
    them. `loss(model, batch)` is a `Loss`, or a scalar that is the mean over the batch. `evaluate(model)`
    gives figures by name; `plateau` follows the one called `loss`.
    """

    model: nn.Module
    data: Any
    loss: LossFunction
    evaluate: Evaluate | None = None


@dataclass(frozen=True)
class TrainResult:
    """How a run went. `records` are the lines of `log.jsonl`: losses, and figures of `evaluate`."""

    steps: int
    seconds: float
    records: tuple[Record, ...]
    num_parameters: int
    num_processes: int = 1
    is_main_process: bool = True
    resumed_from: int | None = None
    out: Path | None = None

    @property
    def losses(self) -> dict[int, float]:
        """The training loss by step, each a mean since the one before."""
        return {record["step"]: record["loss"] for record in self.records if "loss" in record}

    @property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Figures of `evaluate` by step."""
        return {record["step"]: record["evaluate"] for record in self.records if "evaluate" in record}

    def json(self) -> dict[str, Any]:
        """The run without its log."""
        losses, evaluations = list(self.losses.values()), list(self.evaluations.values())
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "first_loss": losses[0] if losses else None,
            "loss": losses[-1] if losses else None,
            "evaluate": evaluations[-1] if evaluations else None,
            "num_parameters": self.num_parameters,
            "num_processes": self.num_processes,
            "resumed_from": self.resumed_from,
            "out": None if self.out is None else str(self.out),
        }

    def __rich__(self) -> Any:
        from rich.table import Table

        found = self.json()
        table = Table.grid(padding=(0, 2))
        resumed = "" if self.resumed_from is None else f", from step {self.resumed_from:,} on"
        table.add_row("steps", f"{self.steps:,}{resumed}")
        table.add_row("trained", f"{self.num_parameters:,} parameters")
        if found["loss"] is not None:
            table.add_row("loss", f"{found['first_loss']:.4f} at first, {found['loss']:.4f} at last")
        for name, value in (found["evaluate"] or {}).items():
            table.add_row(name, f"{value:.4f}")
        many = f", {self.num_processes} processes" if self.num_processes > 1 else ""
        table.add_row("seconds", f"{self.seconds:,.1f}{many}")
        if self.out is not None:
            table.add_row("written", str(self.out))
        return table
