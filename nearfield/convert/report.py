"""What a conversion changed and what that cost, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import expm1
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from nearfield.bench.results import provenance
from nearfield.ops.neighborhood.geometry import Neighborhood
from nearfield.plan.pattern import SitePlan, pattern_to_json
from nearfield.plan.reuse import ReusePolicy

if TYPE_CHECKING:
    from nearfield.convert.decoder import Judgement
    from nearfield.convert.quality import FeatureChange
    from nearfield.convert.search import Planner
    from nearfield.plan.choose import Choice


@dataclass(frozen=True)
class Report:
    """What `convert` changed. `restore()` puts the model back exactly; a second call does nothing."""

    sites: tuple[SitePlan, ...]
    skipped: Mapping[str, str]  # site name -> why it was left alone
    restore: Callable[[], None]
    policy: ReusePolicy | None = None  # of a decoder whose steps read blocks; there are no sites then

    def json(self) -> dict[str, Any]:
        if self.policy is not None:
            return {"policy": self.policy.to_json()}
        return {"sites": [site.to_json() for site in self.sites], "skipped": dict(self.skipped)}

    def __rich__(self) -> Any:
        from rich.table import Table

        if self.policy is not None:
            return policy_words(self.policy)
        table = Table(title="Converted sites")
        table.add_column("site")
        table.add_column("pattern by key/value head")
        for site in self.sites:
            table.add_row(site.name, words_of(site))
        for name, reason in self.skipped.items():
            table.add_row(name, f"[dim]left alone: {reason}[/dim]")
        return table


@dataclass(frozen=True)
class Point:
    """One way to convert, run on the calibration passage."""

    name: str
    kind: str  # full, plan, uniform, narrow (uniform too), random, needle, sensitivity
    added: float  # loss per token, nats
    added_to_answers: float  # loss per token of the pass keys, nats
    answered: int  # pass keys found to the last digit
    seconds: float  # of one prefill

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "change": expm1(self.added),
            "added_to_passkeys": self.added_to_answers,
            "passkeys": self.answered,
            "seconds": self.seconds,
        }


@dataclass
class Conversion:
    """The main job's result for a language model."""

    model: str
    kind: str
    text: str
    tokens: int
    budget: float
    judgements: list[Judgement]  # the last one is of the plan that was taken
    plan: dict[str, SitePlan]
    planner: Planner | None
    points: list[Point]
    passkeys: int  # hidden in the calibration passage
    quick: bool
    report: Report
    folder: Path | None = None
    machine: dict[str, Any] = field(default_factory=lambda: provenance("cpu", torch.get_num_threads()))

    @property
    def seconds(self) -> tuple[float, float]:
        """Median seconds of a prefill before and after."""
        states = self.judgements[-1].before, self.judgements[-1].after
        before, after = (median(reading.seconds for reading in state.readings) for state in states)
        return before, after

    @property
    def holds(self) -> bool:
        return self.judgements[-1].holds(self.budget)

    @property
    def figures(self) -> list[tuple[str, str, str, str]]:
        """The rows that people read: what, before, after, change."""
        judged = self.judgements[-1]
        before, after = self.seconds
        ppl, recall = judged.perplexity, judged.recall
        rows = [
            (
                f"perplexity, last half of {len(ppl.slices)} held-out slices",
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
            first, last = judged.before.asked[-1], judged.after.asked[-1]
            rows += [
                (
                    f"retrieval, {recall.count} four-key questions",
                    f"{recall.before:.1%}",
                    f"{recall.after:.1%}",
                    f"{recall.after - recall.before:+.1%} ({recall.low:+.1%} … {recall.high:+.1%})",
                ),
                ("prefill, seconds", f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f} × faster"),
                (
                    "KV cache, MB",
                    f"{first.cache_bytes / 1e6:.0f}",
                    f"{last.cache_bytes / 1e6:.0f}",
                    f"{first.cache_bytes / max(last.cache_bytes, 1):.2f} × smaller",
                ),
                (
                    "decoding, tokens a second",
                    f"{first.tokens_per_second:.1f}",
                    f"{last.tokens_per_second:.1f}",
                    f"{last.tokens_per_second / first.tokens_per_second:.2f} ×",
                ),
            ]
        return rows

    def json(self) -> dict[str, Any]:
        judged = self.judgements[-1]
        before, after = self.seconds
        ppl, recall = judged.perplexity, judged.recall
        found = {
            "model": self.model,
            "tokens": self.tokens,
            "text": self.text,
            "quick": self.quick,
            "budget": self.budget,
            "holds": self.holds,
            "quality": {
                "metric": "perplexity of the last half",
                "before": ppl.before,
                "after": ppl.after,
                "change": ppl.mean,
                "worst": ppl.worst,
                "interval": [ppl.low, ppl.high],
                "slices": list(ppl.slices),
                "passkey": None if recall is None else recall.json(),
            },
            "seconds": {
                "before": before,
                "after": after,
                "speedup": before / after,
                "all_before": [reading.seconds for reading in judged.before.readings],
                "all_after": [reading.seconds for reading in judged.after.readings],
            },
            "judgements": [judgement.json() for judgement in self.judgements],
            "controls": [point.json() for point in self.points],
            "sites": [site_json(site, self.tokens) for site in self.plan.values()],
            "machine": self.machine,
        }
        if recall is not None:
            last = judged.before.asked[-1], judged.after.asked[-1]
            for name, kept in (
                ("cache_bytes", "cache_bytes"),
                ("decode_tokens_per_second", "tokens_per_second"),
            ):
                found[name] = {"before": getattr(last[0], kept), "after": getattr(last[1], kept)}
        return found

    def text_json(self) -> str:
        """The JSON document, as `report.json` holds it."""
        return json.dumps(self.json(), indent=1, allow_nan=False) + "\n"

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"{self.model} made local at {self.tokens:,} tokens")
        table.add_column("")
        for name in ("before", "after", "change"):
            table.add_column(name, justify="right")
        for row in self.figures:
            table.add_row(*row)
        parts: list[Any] = [table, _verdict(self)]
        if self.points:
            parts.append(_controls(self))
        parts.append(_patterns(self.plan, self.tokens))
        if self.folder is not None:
            parts.append(
                f"Saved in {self.folder}: open report.html; nearfield.load({str(self.folder)!r}) loads it."
            )
        return Group(*parts)


@dataclass
class EncoderConversion:
    """The main job's result for an encoder."""

    model: str
    kind: str
    inputs: str
    tokens: int
    grid: tuple[int, ...] | None
    budget: float
    change: FeatureChange
    seconds_before: list[float]
    seconds_after: list[float]
    judgements: int
    plan: dict[str, SitePlan]
    report: Report
    folder: Path | None = None
    machine: dict[str, Any] = field(default_factory=lambda: provenance("cpu", torch.get_num_threads()))

    @property
    def holds(self) -> bool:
        return self.change.high <= self.budget

    @property
    def seconds(self) -> tuple[float, float]:
        """Median seconds of a forward before and after."""
        return median(self.seconds_before), median(self.seconds_after)

    def json(self) -> dict[str, Any]:
        before, after = self.seconds
        return {
            "model": self.model,
            "tokens": self.tokens,
            "inputs": self.inputs,
            "budget": self.budget,
            "holds": self.holds,
            "judgements": self.judgements,
            "quality": {
                "metric": "feature cosine",
                "before": 1.0,
                "after": 1 - self.change.mean,
                "change": self.change.mean,
                "worst": self.change.worst,
                "interval": [self.change.low, self.change.high],
                "same_neighbour": self.change.same_neighbour,
                "passkey": None,
            },
            "seconds": {
                "before": before,
                "after": after,
                "speedup": before / after,
                "all_before": self.seconds_before,
                "all_after": self.seconds_after,
            },
            "sites": [site_json(site, self.grid or (self.tokens,), False) for site in self.plan.values()],
            "machine": self.machine,
        }

    def text_json(self) -> str:
        """The JSON document, as `report.json` holds it."""
        return json.dumps(self.json(), indent=1, allow_nan=False) + "\n"

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        before, after = self.seconds
        change = self.change
        table = Table(title=f"{self.model} made local at {self.tokens:,} tokens of {self.inputs}")
        table.add_column("")
        table.add_column("found", justify="right")
        table.add_row("features turned, 1 - cosine", f"{change.mean:.4%}")
        table.add_row(
            "  95 % interval, worst input", f"{change.low:.4%} … {change.high:.4%}, {change.worst:.4%}"
        )
        table.add_row("tokens whose nearest neighbour stayed", f"{change.same_neighbour:.1%}")
        table.add_row("forward, seconds", f"{before:.3f} → {after:.3f} ({before / after:.2f} x)")
        parts: list[Any] = [
            table,
            verdict_words(self.holds, self.budget, self.judgements, is_local(self.plan)),
        ]
        parts.append(_patterns(self.plan, self.grid or (self.tokens,), False))
        if self.folder is not None:
            parts.append(saved_words(self.folder))
        return Group(*parts)


@dataclass(frozen=True)
class Planned:
    """The plan that convert would take, from predictions alone."""

    model: str
    tokens: int
    budget: float
    plan: dict[str, SitePlan]
    planner: Planner
    choice: Choice

    def json(self) -> dict[str, Any]:
        full = sum(
            c(None) * d.site.num_kv_heads
            for d, c in zip(self.planner.damages, self.planner.clocks, strict=True)
        )
        return {
            "model": self.model,
            "tokens": self.tokens,
            "budget": self.budget,
            "predicted": {
                "added_loss": self.choice.damage,
                "attention_seconds": {"before": full, "after": self.choice.seconds},
            },
            "plan": [site.to_json() for site in self.plan.values()],
            "sites": [site_json(site, self.tokens) for site in self.plan.values()],
        }

    def __rich__(self) -> Any:
        from rich.console import Group

        seconds = self.json()["predicted"]["attention_seconds"]
        words = (
            f"{self.model} at {self.tokens:,} tokens, budget {self.budget:.1%}: predicted are "
            f"{seconds['before']:.2f} s → {seconds['after']:.2f} s of attention and an added loss of "
            f"{self.choice.damage:.4f} nats per token (nothing was converted)"
        )
        return Group(words, _patterns(self.plan, self.tokens))


def site_json(site: SitePlan, grid: int | tuple[int, ...], is_causal: bool = True) -> dict[str, Any]:
    """A site in the machine contract: `{name, groups: [{kv_heads, pattern, kept}]}`."""
    return {
        "name": site.name,
        "groups": [
            {
                "kv_heads": list(group.kv_heads),
                "pattern": pattern_to_json(group.pattern),
                "kept": group.kept(grid, is_causal=is_causal),
            }
            for group in site.groups
        ],
    }


def words_of(site: SitePlan) -> str:
    """The patterns of a site, a word each: `1024+4` is a window of 1024 and four sinks."""
    return "  ".join(word_of(site.pattern_of(head)) for head in range(site.num_kv_heads))


def word_of(pattern: Neighborhood | None) -> str:
    """A pattern in a word."""
    if pattern is None:
        return "full"
    size = pattern.kernel_size
    text = "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
    return f"{text}+{pattern.num_sinks}" if pattern.num_sinks else text


def policy_words(policy: ReusePolicy) -> str:
    """A policy in a sentence, and its layers as a strip of letters."""
    if not policy.selecting:
        return "Every layer attends to everything."
    letters = "".join(
        "F" if source is None else "S" if source == layer else "."
        for layer, source in enumerate(policy.sources)
    )
    return (
        f"Layers {letters}: {len(policy.full)} full (F), {len(policy.selecting)} select (S), "
        f"{len(policy.reusing)} reuse. A sparse layer reads {policy.num_tokens:,} keys in blocks of "
        f"{policy.block_size}, of them the first {policy.num_sinks} and the newest {policy.num_recent}; "
        f"score: {policy.score}. Below {policy.least_tokens:,} keys every step is dense."
    )


def verdict_words(holds: bool, budget: float, judgements: int, any_local: bool) -> str:
    """Whether the budget holds, in rich's markup."""
    if holds:
        words = f"[green]Within the budget of {budget:.1%}[/green]: the interval's upper end counts."
    else:
        words = f"[red]Not within the budget of {budget:.1%}[/red]."
    if judgements > 1:
        words += f" Judged {judgements} times, more careful each time."
    if not any_local:
        words += " No local pattern was worth taking here: attention is as it was. Longer input gains more."
    return words


def is_local(plan: Mapping[str, SitePlan]) -> bool:
    """Whether any group of any site has a pattern."""
    return any(not site.is_full for site in plan.values())


def saved_words(folder: Path) -> str:
    """Where the converted model lies, and how to have it back."""
    return f"Saved in {folder}: open report.html; nearfield.load({str(folder)!r}) loads it."


def _verdict(found: Conversion) -> str:
    words = verdict_words(found.holds, found.budget, len(found.judgements), is_local(found.plan))
    recall = found.judgements[-1].recall
    if recall is not None and not recall.kept:
        words += " Retrieval was lost."
    if found.quick:
        words += (
            f"\nThis is the quick form at {found.tokens:,} tokens. The gain grows with length and differs by "
            "model:\nnext, nearfield convert (8,192 tokens); nearfield plan config.json tells the ceiling."
        )
    return words


def _controls(found: Conversion) -> Any:
    from rich.table import Table

    table = Table(title="Other plans, one run each on the calibration passage")
    table.add_column("plan")
    for name in ("prefill, s", "perplexity", "pass keys, nats"):
        table.add_column(name, justify="right")
    for point in found.points:
        table.add_row(
            point.name,
            f"{point.seconds:.2f}",
            f"{expm1(point.added):+.2%}",
            f"{point.added_to_answers:+.2f}",
        )
    return table


def _patterns(plan: Mapping[str, SitePlan], grid: int | tuple[int, ...], is_causal: bool = True) -> Any:
    from rich.table import Table

    table = Table(title="Pattern by site and key/value head (window + sinks)")
    table.add_column("site")
    table.add_column("patterns")
    table.add_column("pairs kept", justify="right")
    for site in plan.values():
        full = SitePlan.uniform(site.name, site.num_kv_heads, None).kept(grid, is_causal=is_causal)
        kept = site.kept(grid, is_causal=is_causal) / full
        table.add_row(site.name, words_of(site), f"{kept:.0%}")
    return table
