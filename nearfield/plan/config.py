"""What local attention can gain on a model, from its config.json alone: attention's share of the FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfield.ops.neighborhood.geometry import Neighborhood
from nearfield.plan.flops import Kind, Model, read_model
from nearfield.plan.pattern import read_json

NUM_SINKS = 4
WINDOWS: dict[Kind, tuple[int, ...]] = {
    "decoder": (512, 1024, 2048),
    "encoder": (65, 129, 257),
    "vision": (7, 13, 25),
}
LARGEST_FILE = 1 << 24  # bytes; a config is a few thousand


@dataclass(frozen=True)
class Ceiling:
    """How much faster a model can get, in FLOPs, at some lengths, whatever the local plan."""

    file: str
    model: Model
    lengths: tuple[int, ...]

    @property
    def windows(self) -> dict[str, Neighborhood]:
        """The uniform windows that are compared, by the name they are shown with."""
        kind = self.model.kind
        if kind == "decoder":
            found = [Neighborhood(size, is_causal=True, num_sinks=NUM_SINKS) for size in WINDOWS[kind]]
            return {f"{pattern.kernel_size}+{NUM_SINKS}": pattern for pattern in found}
        sizes = WINDOWS[kind]
        name = "{0}×{0}" if kind == "vision" else "{0}"
        return {name.format(size): Neighborhood(size, border="truncate") for size in sizes}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Per length: FLOPs by part, attention's share, and the ceilings."""
        rows = []
        for tokens in self.lengths:
            flops = self.model.flops(tokens)
            rest = flops["total"] - flops["attention"]
            local = {
                n: flops["total"] / (rest + self.model.attention(tokens, w)) for n, w in self.windows.items()
            }
            rows.append(
                {
                    "tokens": tokens,
                    "flops": flops,
                    "attention_share": flops["attention"] / flops["total"],
                    "ceiling": flops["total"] / rest,
                    "windows": local,
                }
            )
        return rows

    def json(self) -> dict[str, Any]:
        """The machine-readable answer."""
        notes = [*self.model.notes, *self._beyond()]
        return {"config": self.file, "model_type": self.model.name, "rows": self.rows, "notes": notes}

    def __rich__(self) -> Any:
        """A table for people."""
        from rich.console import Group
        from rich.table import Table

        title = f"{self.model.name}, {len(self.model.layers)} layers: FLOPs of one pass"
        table = Table(title=title, title_justify="left")
        parts = ("projections", "mlp", "head", "attention")
        for heading in ("tokens", *parts, "attention's share", "ceiling", *self.windows):
            table.add_column(heading, justify="right")
        for row in self.rows:
            speedups = [row["ceiling"], *row["windows"].values()]
            table.add_row(
                f"{row['tokens']:,}",
                *(_flops(row["flops"][part]) for part in parts),
                f"{row['attention_share']:.1%}",
                *(f"{speedup:.2f}×" for speedup in speedups),
            )
        sinks = " + sinks" if self.model.kind == "decoder" else ""
        notes = [
            "Ceiling: attention costing nothing, which no local plan can beat. "
            f"Last columns: that window{sinks} in every layer. FLOPs, not seconds.",
            *self.model.notes,
            *self._beyond(),
        ]
        return Group(table, *notes)

    def _beyond(self) -> list[str]:
        most = self.model.positions
        if most is None or max(self.lengths) <= most:
            return []
        return [f"The model is made for {most:,} positions; longer rows are arithmetic only."]


def ceiling(config: str | Path, lengths: Sequence[int]) -> Ceiling:
    """What any local plan can gain for the model of a config.json, at some numbers of tokens.

    No weights and no model library are needed. `config` may be the file or the folder that holds it. Raises
    `ValueError` for a damaged or unknown config, `NotImplementedError` for parts that are not counted yet.
    """
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if not lengths or any(
        isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 10**9 for n in lengths
    ):
        raise ValueError(f"lengths={tuple(lengths)} must be whole numbers of tokens from 1 to {10**9:,}.")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes: too large for a model config.")
    try:
        values = read_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read. {error}") from None
    return Ceiling(str(path), read_model(values, path.name), tuple(lengths))


def _flops(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} P"
