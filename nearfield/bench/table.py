"""Bench results as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

    from nearfield.bench.results import BenchResult, Comparison


def span(seconds: float | None) -> str:
    """Seconds in the unit that reads best."""
    if seconds is None:
        return "–"
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.{3 if seconds * factor < 1000 else 4}g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def result_table(result: BenchResult) -> Group:
    """One line a row: time, prediction, rate, share of GEMM, and how many times longer each rival takes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in result.rows for name in row["rivals"]))
    table = Table(title=f"{result.op} on {result.machine or result.device}, {_threads(result.threads)}")
    for heading in ("case", "direction", "dtype", "backend"):
        table.add_column(heading, no_wrap=heading == "case")
    for heading in ("median", "min – max", "predicted", "GFLOP/s", "of GEMM", *names):
        table.add_column(heading, justify="right")
    has_scaled = False
    for row in result.rows:
        cells = []
        for name in names:
            is_scaled = name in row.get("rivals_notes", {})
            has_scaled = has_scaled or is_scaled
            times = f"{row['rivals'][name] / row['seconds']:.1f}×" if name in row["rivals"] else "–"
            cells.append(times + "*" * is_scaled)
        table.add_row(
            row["case"], row["direction"], row["dtype"], row["backend"], span(row["seconds"]),
            f"{span(row['min'])} – {span(row['max'])}", span(row["predicted_seconds"]),
            f"{row['useful_gflops']:.1f}", f"{100 * row['ratio_to_gemm']:.1f} %", *cells,
        )  # fmt: skip
    notes = ["Rivals: their time / ours."] if names else []
    if has_scaled:
        notes.append("* timed on fewer heads and scaled.")
    reasons: dict[tuple[str, str], int] = {}
    for row in result.rows:
        for name, reason in row.get("rivals_skipped", {}).items():
            reasons[name, reason] = reasons.get((name, reason), 0) + 1
    for (name, reason), count in reasons.items():
        notes.append(f"{name} left out of {count} of {len(result.rows)} rows: {reason}")
    return Group(table, *(Text(note) for note in notes))


def comparison_table(comparison: Comparison) -> Group:
    """One line a pair: both times, b / a, and both shares of GEMM."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    a, b = comparison.a, comparison.b
    table = Table(title=f"{a.op}: a = {_origin(a)}, b = {_origin(b)}")
    for heading in ("case", "direction", "dtype", "backend"):
        table.add_column(heading, no_wrap=heading == "case")
    for heading in ("a", "b", "b / a", "a of GEMM", "b of GEMM"):
        table.add_column(heading, justify="right")
    for row in comparison.rows:
        same = row["backend_a"] == row["backend_b"]
        style = "" if not row["is_clear"] else "green" if row["ratio"] < 1 else "red"
        table.add_row(
            row["case"], row["direction"], row["dtype"],
            row["backend_a"] if same else f"{row['backend_a']} → {row['backend_b']}",
            span(row["seconds_a"]), span(row["seconds_b"]), Text(f"{row['ratio']:.2f}", style=style),
            f"{100 * row['ratio_to_gemm_a']:.1f} %", f"{100 * row['ratio_to_gemm_b']:.1f} %",
        )  # fmt: skip
    notes = ["Below 1: b is faster. Coloured where the ranges of the repeats do not touch."]
    notes += [f"{name} differs: a {mine}, b {theirs}" for name, (mine, theirs) in comparison.differs.items()]
    notes += [f"only in a: {words}" for words in comparison.only_a]
    notes += [f"only in b: {words}" for words in comparison.only_b]
    return Group(table, *(Text(note) for note in notes))


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _origin(result: BenchResult) -> str:
    return f"{result.commit or 'no commit'} of {result.date[:10] or 'no date'}"
