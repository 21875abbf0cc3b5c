"""Timed cost of the operators: `nearfield bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nearfield.bench.cases import CASES, DIRECTIONS, Case, Direction
from nearfield.bench.results import BenchResult, Comparison, compare

__all__ = ["CASES", "OPS", "BenchResult", "Case", "Comparison", "compare", "run"]

OPS = ("neighborhood", "linear", "lla", "scan", "vision")


def run(
    op: str = "neighborhood",
    *,
    device: str = "cpu",
    cases: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
    backend: str = "auto",
    rivals: bool | Sequence[str] = False,
    threads: int = 1,
    seconds: float | None = None,
    minutes: float | None = None,
    out: str | Path | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> BenchResult:
    """The op's cases timed, forward and backward apart, each beside a GEMM of its dtype and thread count.

    `cases` are ids, `dtypes` names (all that fit the device if None); `rivals`: those usual on the device,
    none, or those that are named; `seconds` bounds the repeats of one timing and, on a CPU, the expected
    length of a rival's call; no row and no rival begins after `minutes`; the file `out` holds after every row
    what was measured by then; `progress(what, done, total)` is told before each row and at the end.
    """
    if op not in OPS:
        raise ValueError(f"No bench is called {op!r}. There is: {', '.join(OPS)}.")
    from nearfield.bench.runner import run_op

    return run_op(
        op,
        device=device,
        cases=cases,
        dtypes=dtypes,
        directions=directions,
        backend=backend,
        rivals=rivals,
        threads=threads,
        seconds=seconds,
        minutes=minutes,
        out=out,
        progress=progress,
    )
