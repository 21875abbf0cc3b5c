"""Bench results as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from nearfield.bench.results import BenchResult, Comparison

UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))
STYLE: dict[str, Any] = {"box": SIMPLE, "title_justify": "left", "caption_justify": "left"}


def span(seconds: float | None, *, least: float | None = None, most: float | None = None) -> str:
    """Seconds in the unit that reads best, with the range of repeats in the same one: 17.9 (13.8–21.2) ms."""
    if seconds is None:
        return "–"
    factor, unit = next((each for each in UNITS if seconds * each[0] >= 1), UNITS[-1])
    numbers = [f"{value * factor:.3g}" for value in (seconds, least, most) if value is not None]
    return f"{numbers[0]} ({numbers[1]}–{numbers[2]}) {unit}" if len(numbers) == 3 else f"{numbers[0]} {unit}"


def result_table(result: BenchResult) -> Group:
    """One line a row: time, prediction, rate, share of GEMM; then how many times longer each rival takes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{result.op} on {result.machine or result.device}, {_threads(result.threads)}", **STYLE
    )
    _columns(table, "median (min–max)", "predicted", "GFLOP/s", "of GEMM", backend=True)
    for row in result.rows:
        table.add_row(
            *(row[name] for name in ("case", "direction", "dtype", "backend")),
            span(row["seconds"], least=row["min"], most=row["max"]),
            span(row["predicted_seconds"]),
            f"{row['useful_gflops']:.1f}",
            f"{100 * row['ratio_to_gemm']:.1f} %",
        )
    return Group(table, *_pictures(result), *_rivals(result), *(Text(note) for note in _reasons(result)))


def _pictures(result: BenchResult) -> list[Table]:
    """What a vision bench tells besides: pictures a second and the memory that a forward takes."""
    from rich.table import Table

    rows = [row for row in result.rows if "pictures_per_second" in row]
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row.get("rivals_peak_bytes", {})))
    table = Table(title="pictures a second, and peak of the forward's memory in MB", **STYLE)
    _columns(table, "pictures/s", "ours", *names)
    for row in rows:
        peaks = [row.get("peak_bytes"), *(row.get("rivals_peak_bytes", {}).get(name) for name in names)]
        table.add_row(
            *(row[name] for name in ("case", "direction", "dtype")),
            f"{row['pictures_per_second']:.3g}",
            *("–" if peak is None else f"{peak / 1e6:,.0f}" for peak in peaks),
        )
    return [table]


def _rivals(result: BenchResult) -> list[Table]:
    """The table of rivals, where any was timed."""
    from rich.table import Table

    names = list(dict.fromkeys(name for row in result.rows for name in row["rivals"]))
    if not names:
        return []
    table = Table(title="rivals: their time / ours", **STYLE)
    _columns(table, *names)
    notes = [row.get("rivals_notes", {}) for row in result.rows]
    digits = 2 if result.op == "vision" else 1  # whole models differ by little
    for row, note in zip(result.rows, notes, strict=True):
        cells = [
            f"{row['rivals'][name] / row['seconds']:.{digits}f}×{'*' if name in note else ''}"
            + (f" {row['rivals_variants'][name]}" if name in row.get("rivals_variants", {}) else "")
            if name in row["rivals"]
            else "–"
            for name in names
        ]
        table.add_row(*(row[name] for name in ("case", "direction", "dtype")), *cells)
    if any(notes):
        table.caption = "* timed on fewer heads and scaled"
    return [table]


def _reasons(result: BenchResult) -> list[str]:
    """Why rivals are missing: each kind of reason once, with its first figures."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result.rows:
        for name, reason in row.get("rivals_skipped", {}).items():
            found.setdefault((name, reason.partition(":")[0]), []).append(reason)
    rows = len(result.rows)
    left = [f"No time was left for {', '.join(result.left_out)}."] if result.left_out else []
    skipped = [f"{name} left out of {len(why)} of {rows} rows: {why[0]}" for (name, _), why in found.items()]
    return left + skipped


def comparison_table(comparison: Comparison) -> Group:
    """One line a pair: both times, b / a, and both shares of GEMM."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    a, b = comparison.a, comparison.b
    table = Table(title=f"{a.op}: a = {_origin(a)}, b = {_origin(b)}", **STYLE)
    _columns(table, "a", "b", "b / a", "a of GEMM", "b of GEMM", backend=True)
    for row in comparison.rows:
        is_same = row["backend_a"] == row["backend_b"]
        style = "" if not row["is_clear"] else "green" if row["ratio"] < 1 else "red"
        table.add_row(
            *(row[name] for name in ("case", "direction", "dtype")),
            row["backend_a"] if is_same else f"{row['backend_a']} → {row['backend_b']}",
            span(row["seconds_a"]),
            span(row["seconds_b"]),
            Text(f"{row['ratio']:.2f}", style=style),
            f"{100 * row['ratio_to_gemm_a']:.1f} %",
            f"{100 * row['ratio_to_gemm_b']:.1f} %",
        )
    notes = ["Below 1: b is faster. Coloured where the ranges of the repeats do not touch."]
    notes += [f"{name} differs: a {mine}, b {theirs}" for name, (mine, theirs) in comparison.differs.items()]
    notes += [f"only in a: {words}" for words in comparison.only_a]
    notes += [f"only in b: {words}" for words in comparison.only_b]
    return Group(table, *(Text(note) for note in notes))


def _columns(table: Table, *numbers: str, backend: bool = False) -> None:
    for heading in ("case", "direction", "dtype", *(["backend"] if backend else [])):
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _origin(result: BenchResult) -> str:
    return f"{result.commit or 'no commit'} of {result.date[:10] or 'no date'}"
