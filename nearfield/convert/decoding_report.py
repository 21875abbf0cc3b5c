"""What decoding by blocks changed and what that cost, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from math import expm1
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from nearfield.bench.results import provenance
from nearfield.convert.page import document, picture, table
from nearfield.convert.report import Report, policy_words, saved_words
from nearfield.core.errors import require
from nearfield.plan.reuse import ReusePolicy

if TYPE_CHECKING:
    from nearfield.convert.decoder import Judgement, Trial
    from nearfield.measure.reuse import ReuseProfile


@dataclass(frozen=True)
class Steps:
    """Seconds of decoding steps, taken in turn on one cache that copies nothing, and the bytes they read."""

    torch: Sequence[float]  # dense, on torch's own attention
    native: Sequence[float]  # dense, on the kernels here
    sparse: Sequence[float]
    weight_bytes: int
    dense_bytes: int  # that a dense step reads, weights and cache
    sparse_bytes: int
    held_bytes: int  # of the cache, its room and the summaries of its blocks included

    @property
    def dense(self) -> Sequence[float]:
        """The faster of the two dense forms."""
        return min(self.torch, self.native, key=median)

    @property
    def speedup(self) -> float:
        return median(self.dense) / median(self.sparse)

    @property
    def predicted(self) -> float:
        """The speed-up if reading were all that takes time."""
        return self.dense_bytes / self.sparse_bytes

    def json(self) -> dict[str, Any]:
        ways = {"torch": self.torch, "native": self.native, "after": self.sparse}
        return {
            "tokens_per_second": {way: 1 / median(seconds) for way, seconds in ways.items()},
            "seconds": {way: _spread(seconds) for way, seconds in ways.items()},
            "speedup": self.speedup,
            "predicted_speedup": self.predicted,
            "bytes_per_step": {
                "weights": self.weight_bytes,
                "before": self.dense_bytes,
                "after": self.sparse_bytes,
            },
            "cache_bytes": self.held_bytes,
        }


@dataclass(frozen=True)
class Tried:
    """A policy that was run on the calibration passage."""

    policy: ReusePolicy
    trial: Trial
    bytes: int

    def json(self) -> dict[str, Any]:
        return {
            "policy": self.policy.to_json(),
            "change": expm1(self.trial.added),
            "added_to_passkeys": self.trial.added_to_answers,
            "passkeys": self.trial.answered,
            "bytes_per_step": self.bytes,
        }


@dataclass(frozen=True)
class DecodePoint:
    """One way to decode, run on the calibration passage."""

    name: str
    kind: str  # full, policy, uniform, unprotected, every, window
    added: float  # loss per token, nats
    added_to_answers: float  # loss per token of the pass keys, nats
    answered: int  # pass keys found to the last digit
    bytes: int  # that a step reads, weights and cache

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "change": expm1(self.added),
            "added_to_passkeys": self.added_to_answers,
            "passkeys": self.answered,
            "bytes_per_step": self.bytes,
        }


@dataclass
class DecodeConversion:
    """The result of the job for decoding."""

    model: str
    text: str
    tokens: int
    tail: int  # tokens that were read in steps at the end of each text
    budget: float
    quick: bool
    policy: ReusePolicy
    profile: ReuseProfile | None
    judgements: list[Judgement]  # the last one is of the policy that was taken
    trials: list[Tried]
    points: list[DecodePoint]
    passkeys: int  # hidden in the calibration passage
    steps: Steps
    report: Report
    folder: Path | None = None
    machine: dict[str, Any] = field(default_factory=lambda: provenance("cpu", torch.get_num_threads()))

    @property
    def holds(self) -> bool:
        return self.judgements[-1].holds(self.budget)

    @property
    def figures(self) -> list[tuple[str, str, str, str]]:
        """The rows that people read: what, before, after, change."""
        judged, steps = self.judgements[-1], self.steps
        ppl, recall = judged.perplexity, judged.recall
        before, after = (median(x) for x in (steps.dense, steps.sparse))
        rows = [
            (
                f"perplexity, last {self.tail:,} tokens of {len(ppl.slices)} held-out slices",
                f"{ppl.before:.3f}",
                f"{ppl.after:.3f}",
                f"{ppl.mean:+.2%}",
            ),
            (
                "  95 % interval, worst slice",
                "",
                "",
                f"{ppl.low:+.2%} … {ppl.high:+.2%}, {ppl.worst:+.2%}",
            ),
        ]
        if recall is not None:
            rows.append(
                (
                    f"retrieval, {recall.count} four-key questions",
                    f"{recall.before:.1%}",
                    f"{recall.after:.1%}",
                    f"{recall.after - recall.before:+.1%} ({recall.low:+.1%} … {recall.high:+.1%})",
                )
            )
        return [
            *rows,
            ("decoding, tokens a second", f"{1 / before:.1f}", f"{1 / after:.1f}", f"{steps.speedup:.2f} ×"),
            ("  a step, ms (least … most)", _words(steps.dense), _words(steps.sparse), ""),
            (
                "bytes that a step reads, MB",
                f"{steps.dense_bytes / 1e6:.0f}",
                f"{steps.sparse_bytes / 1e6:.0f}",
                f"{steps.predicted:.2f} × if reading were all",
            ),
            (
                "  of them the cache, MB",
                f"{(steps.dense_bytes - steps.weight_bytes) / 1e6:.0f}",
                f"{(steps.sparse_bytes - steps.weight_bytes) / 1e6:.0f}",
                "",
            ),
            ("cache held, MB", f"{steps.held_bytes / 1e6:.0f}", f"{steps.held_bytes / 1e6:.0f}", ""),
        ]

    def json(self) -> dict[str, Any]:
        judged = self.judgements[-1]
        ppl, recall = judged.perplexity, judged.recall
        profile = self.profile
        return {
            "model": self.model,
            "for": "decode",
            "tokens": self.tokens,
            "text": self.text,
            "quick": self.quick,
            "budget": self.budget,
            "holds": self.holds,
            "quality": {
                "metric": f"perplexity of the last {self.tail} tokens, read in steps",
                "before": ppl.before,
                "after": ppl.after,
                "change": ppl.mean,
                "worst": ppl.worst,
                "interval": [ppl.low, ppl.high],
                "slices": list(ppl.slices),
                "passkey": None if recall is None else recall.json(),
            },
            "decode": self.steps.json(),
            "policy": self.policy.to_json(),
            "density": None if profile is None else _numbers(profile.density.mean(-1)),
            "overlap": None if profile is None else _numbers(profile.overlap.mean(-1)),
            "judgements": [judgement.json() for judgement in self.judgements],
            "trials": [tried.json() for tried in self.trials],
            "controls": [point.json() for point in self.points],
            "machine": self.machine,
        }

    def text_json(self) -> str:
        """The JSON document, as `report.json` holds it."""
        return json.dumps(self.json(), indent=1, allow_nan=False) + "\n"

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        shown = Table(title=f"{self.model} decoding by blocks at {self.tokens:,} tokens")
        shown.add_column("")
        for name in ("before", "after", "change"):
            shown.add_column(name, justify="right")
        for figure in self.figures:
            shown.add_row(*figure)
        parts: list[Any] = [shown, _verdict(self), policy_words(self.policy)]
        if self.points:
            controls = Table(title="Other policies, on the calibration passage")
            for at, name in enumerate(CONTROLS):
                controls.add_column(name, justify="right" if at else "left")
            for row in _control_rows(self):
                controls.add_row(*row)
            parts.append(controls)
        if self.folder is not None:
            parts.append(saved_words(self.folder))
        return Group(*parts)


CONTROLS = ("policy", "MB a step", "perplexity", "pass keys, nats", "found")


def decode_page(found: DecodeConversion) -> str:
    """The report as one HTML document. Without matplotlib its pictures are left out, and it says so."""
    machine = found.machine
    where = (
        f"{machine['machine']}, {machine['threads']} threads, torch {machine['versions']['torch']}, float32"
    )
    verdict = _verdict(found).replace("[green]", "").replace("[/green]", "")
    verdict = verdict.replace("[red]", "").replace("[/red]", "")
    parts = [
        f"<h1>{escape(found.model)} decoding by blocks</h1>",
        f'<p class="note">{found.tokens:,} tokens of {escape(found.text)} text; {escape(where)}</p>',
        f'<p class="{"good" if found.holds else "bad"}">{escape(verdict)}</p>',
        table(("", "before", "after", "change (95 % interval)"), found.figures),
        "<h2>What each layer does in a step</h2>",
        f'<p class="note">{escape(policy_words(found.policy))}</p>',
    ]
    try:
        parts += [picture("Layers", strip(found)), *_overlap(found)]
    except ImportError as error:
        parts.append(f'<p class="note">Pictures are left out. {escape(str(error))}</p>')
    if found.points:
        parts += [
            "<h2>Other policies, on the calibration passage</h2>",
            table(CONTROLS, _control_rows(found)),
        ]
    return document(f"{found.model} decoding by blocks", parts)


def strip(found: DecodeConversion) -> Any:
    """A matplotlib figure: a field for each layer, coloured by what it does."""
    figure_module = require("matplotlib.figure", extra="plot")
    from nearfield.measure.reuse import draw_sources

    figure = figure_module.Figure(figsize=(9.5, 1.6), layout="constrained")
    draw_sources(figure.subplots(), found.policy.sources)
    return figure


def _overlap(found: DecodeConversion) -> list[str]:
    if found.profile is None:
        return []
    figure_module = require("matplotlib.figure", extra="plot")
    figure = figure_module.Figure(figsize=(7, 5.4), layout="constrained")
    found.profile.draw(figure.subplots())
    words = (
        "Share of the blocks that a layer would choose which an earlier layer chose too, mean over heads; by "
        f"chance about {found.profile.chance:.2f}."
    )
    return [
        "<h2>How alike layers choose</h2>",
        picture("Overlap", figure),
        f'<p class="note">{words}</p>',
    ]


def _verdict(found: DecodeConversion) -> str:
    if found.holds:
        words = f"[green]Within the budget of {found.budget:.1%}[/green]: the interval's upper end counts."
    else:
        words = f"[red]Not within the budget of {found.budget:.1%}[/red]."
    judged = found.judgements
    if len(judged) > 1:
        words += f" Judged {len(judged)} times, more careful each time."
    recall = judged[-1].recall
    if recall is not None and not recall.kept:
        words += " Retrieval was lost."
    if not found.policy.selecting:
        words += " No policy was worth taking here: every layer attends to everything."
    if found.quick:
        words += (
            f" This is the quick form at {found.tokens:,} tokens: what is saved grows with the cache. Next, "
            "nearfield convert --for decode."
        )
    return words


def _control_rows(found: DecodeConversion) -> list[tuple[str, ...]]:
    return [
        (
            point.name,
            f"{point.bytes / 1e6:.0f}",
            f"{expm1(point.added):+.2%}",
            f"{point.added_to_answers:+.2f}",
            f"{point.answered} of {found.passkeys}",
        )
        for point in found.points
    ]


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds), "count": len(seconds)}


def _words(seconds: Sequence[float]) -> str:
    return f"{1e3 * median(seconds):.1f} ({1e3 * min(seconds):.1f} … {1e3 * max(seconds):.1f})"


def _numbers(tensor: torch.Tensor) -> list[Any]:
    """Nested lists with None where there is no number."""
    return [
        [_number(value) for value in row] if isinstance(row, list) else _number(row)
        for row in tensor.tolist()
    ]


def _number(value: float) -> float | None:
    return round(value, 4) if value == value else None
