"""The systems, one folder a paper, and the runner of their claims."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nearfield import catalog
from nearfield.core.errors import BackendUnavailable, MissingPackage, require


@dataclass(frozen=True)
class Outcome:
    """One claim, tried here."""

    claim: catalog.Claim
    result: catalog.Result
    seconds: float

    def json(self) -> dict[str, Any]:
        """The claim as programs read it; a claim that was skipped has `holds: null`."""
        return {
            "id": self.claim.id,
            "expect": self.claim.expect,
            "found": self.result.found,
            "holds": self.result.holds,
            "skipped": self.result.skipped,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Report:
    """A system's claims, tried here."""

    card: catalog.Card
    mode: str
    outcomes: tuple[Outcome, ...]

    def json(self) -> dict[str, Any]:
        """The outcomes and nothing about the machine: that is in the file which `save` writes."""
        return {
            "system": self.card.slug,
            "mode": self.mode,
            "claims": [outcome.json() for outcome in self.outcomes],
        }

    def save(self, folder: Path) -> None:
        """Write `<slug>.json` with device, versions and commit, and a picture for each claim that has one."""
        import torch

        from nearfield.bench.results import provenance

        made = provenance("cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads())
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.json(), "made": made}, indent=2, ensure_ascii=False)
        (folder / f"{self.card.slug}.json").write_text(text + "\n", encoding="utf-8")
        for outcome in self.outcomes:
            if outcome.result.plot is not None:
                figure = require("matplotlib.figure", extra="plot").Figure(
                    figsize=(6, 3.6), layout="constrained"
                )
                outcome.result.plot(figure.subplots())
                figure.savefig(folder / f"{self.card.slug}-{outcome.claim.id}.svg", metadata={"Date": None})

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(
            title=f"{self.card.slug}: {self.card.title} ({self.mode})", title_justify="left", show_lines=True
        )
        for name in ("claim", "expected", "found", "holds", "seconds"):
            table.add_column(name, justify="right" if name == "seconds" else "left")
        for outcome in self.outcomes:
            result = outcome.result
            skipped = f"skipped: {result.skipped}" if result.skipped else ""
            found = "\n".join(part for part in (result.found, skipped) if part)
            holds = {True: "yes", False: "no", None: "–"}[result.holds]
            table.add_row(outcome.claim.id, outcome.claim.expect, found, holds, f"{outcome.seconds:.1f}")
        return table


def run(
    card: catalog.Card,
    *,
    claim: str | None = None,
    full: bool = False,
    progress: Callable[[str, float, float], None] | None = None,
) -> Report:
    """The experiments behind a system's claims, or behind one of them.

    What a claim needs and this machine lacks makes it skipped, with the reason. Raises `LookupError` with the
    nearest right ids for an unknown claim.
    """
    chosen: Sequence[catalog.Claim] = card.claims
    if claim is not None:
        chosen = [each for each in card.claims if each.id == claim]
        if not chosen:
            ids = [each.id for each in card.claims]
            raise LookupError(catalog.unknown("claim", claim, ids, f"{card.slug} claims {', '.join(ids)}."))
    outcomes = []
    for number, each in enumerate(chosen):
        if progress is not None:
            progress(card.slug, number, len(chosen))
        outcomes.append(attempt(each, full=full))
    if progress is not None:
        progress(card.slug, len(chosen), len(chosen))
    return Report(card, "full" if full else "smoke", tuple(outcomes))


def attempt(claim: catalog.Claim, *, full: bool = False) -> Outcome:
    """One claim's experiment and its seconds, imports aside."""
    reasons = [reason for reason in map(missing, claim.needs) if reason]
    if reasons:
        return Outcome(claim, catalog.Result("", None, skipped="; ".join(reasons)), 0.0)
    try:
        function = claim.function()
        begin = time.perf_counter()
        result = function(full=full)
    except (BackendUnavailable, MissingPackage) as error:
        return Outcome(claim, catalog.Result("", None, skipped=str(error)), 0.0)
    return Outcome(claim, result, time.perf_counter() - begin)


def missing(need: str) -> str | None:
    """Why a need of a claim is not met here; `None` if it is. Raises `ValueError` for an unknown need."""
    what, _, name = need.partition(":")
    if need == "cuda":
        import torch

        return None if torch.cuda.is_available() else "needs a CUDA device"
    if need == "native":
        from nearfield.core import library

        return library.unavailable()
    if what == "package" and name:
        return None if find_spec(name) else f"needs the package {name.replace('_', '-')} (`make` installs it)"
    if what == "data" and name:
        return None if find_spec(f"nearfield.data.{name}") else f"needs the data {name}, which is not here"
    raise ValueError(f"needs={need!r} is unknown. Write cuda, native, package:NAME or data:NAME.")
