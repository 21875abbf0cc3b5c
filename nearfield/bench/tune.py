"""Boxes of kernels and executors measured on this GPU: `nearfield bench neighborhood --tune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from nearfield.bench.cases import CASES, DIRECTIONS, Case, Direction, find, for_device
from nearfield.bench.results import provenance
from nearfield.bench.rivals import step
from nearfield.bench.timing import timed
from nearfield.core.errors import BackendUnavailable
from nearfield.core.tolerance import tolerance
from nearfield.ops.neighborhood import neighborhood_attention, triton, triton_plan, tuned
from nearfield.ops.neighborhood.triton_plan import Tiling
from nearfield.testing import relative_error

Timer = Callable[[Callable[[], object]], float]
KINDS: dict[Direction, tuple[str, ...]] = {"forward": ("forward",), "backward": ("queries", "keys")}
EXECUTORS = ("triton", "natten", "flash")
PAIRS = 2**24  # of queries and keys, up to which one head is computed by the reference
CALL_SECONDS = 0.2  # of repeats of one candidate


@dataclass(frozen=True)
class TuneResult:
    """What was measured, a row for each candidate and executor; where it is stored; what time ran out for.

    A row without `seconds` was dropped for the reason that it names.
    """

    rows: tuple[dict[str, Any], ...]
    path: str
    left: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """One document: provenance, the file, the rows."""
        return {**self.origin, "path": self.path, "left": list(self.left), "rows": list(self.rows)}

    def __rich__(self) -> Any:
        """A table for people."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"measured on {self.origin.get('machine', 'this GPU')}", title_justify="left")
        for name in ("case", "dtype", "what", "candidate", "time", ""):
            table.add_column(name, justify="right" if name == "time" else "left")
        for row in self.rows:
            time = "–" if row["seconds"] is None else f"{1e3 * row['seconds']:.4g} ms"
            said = "taken" if row["taken"] else row["dropped"] or ""
            table.add_row(row["case"], row["dtype"], row["what"], row["candidate"], time, said)
        notes = [f"Stored in {self.path}."]
        if self.left:
            notes.append(f"No time was left for {', '.join(self.left)}; give more by --tune-seconds.")
        return Group(table, *map(Text, notes))


def tune(
    *,
    device: str = "cuda",
    cases: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("bfloat16",),
    directions: Sequence[Direction] = DIRECTIONS,
    seconds: float = 120.0,
    timer: Timer | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> TuneResult:
    """Measures the candidates of each case and stores the fastest, which later calls of this device take.

    A candidate is at most one of eight a kernel, chosen by computed area. It is dropped, and named, if it
    does not compile or if its results are off: on small grids off the reference, on large ones off the first
    candidate, which is what an untuned call takes. Nothing new begins after `seconds`; what was measured by
    then is stored.
    """
    cannot = triton.missing(device)
    if cannot is None and device == "cuda" and not torch.cuda.is_available():
        cannot = "torch sees no CUDA device."
    if cannot is not None:
        raise BackendUnavailable(f"Nothing to tune on device={device!r}: {cannot}")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} must be above 0.")
    chosen = [find(id, CASES) for id in cases] if cases is not None else list(for_device(device, CASES))
    run = _Run(device, monotonic() + seconds, timer or (lambda call: _median(call, device)))
    path = tuned.store(run.name, run.found)  # what cannot be written is known before anything is measured
    jobs = [(case, dtype) for case in chosen for dtype in dtypes]
    for done, (case, dtype) in enumerate(jobs):
        if progress is not None:
            progress("tune", done, len(jobs))
        run.case(case, dtype, directions)
        tuned.store(run.name, run.found)
    if progress is not None:
        progress("tune", len(jobs), len(jobs))
    return TuneResult(tuple(run.rows), str(path), tuple(run.left), provenance(device, 1))


def _median(call: Callable[[], object], device: str) -> float:
    return timed(call, device, budget=CALL_SECONDS).seconds


class _Run:
    """One tuning: what is found so far, and until when."""

    def __init__(self, device: str, deadline: float, timer: Timer) -> None:
        self.device, self.deadline, self.timer = device, deadline, timer
        self.name = tuned.device_name(torch.device(device))
        self.found = tuned.Measured()
        self.rows: list[dict[str, Any]] = []
        self.left: list[str] = []

    def case(self, case: Case, dtype: str, directions: Sequence[Direction]) -> None:
        if monotonic() >= self.deadline:
            self.left.append(f"{case.id} {dtype}")
            return
        tensors = _inputs(case, dtype, self.device)
        best: dict[str, Tiling] = {}
        for direction in directions:
            for kind in KINDS[direction]:
                taken = self.kernel(case, dtype, direction, kind, tensors, best)
                if taken is not None:
                    best[kind] = taken
        with tuned.trying(best):
            self.executors(case, dtype, directions, tensors)

    def kernel(
        self, case: Case, dtype: str, direction: Direction, kind: str, tensors: list[Tensor],
        best: dict[str, Tiling],
    ) -> Tiling | None:  # fmt: skip
        """The fastest boxes of one kernel, the others being the best so far; None if none was measured."""
        arch = triton.arch(torch.device(self.device))
        problem = (case.bound, kind, tensors[0].element_size(), case.head_dim)
        rows: list[tuple[dict[str, Any], Tiling]] = []
        expected: list[Tensor] | None = None
        for tiles in triton_plan.candidates(*problem, arch):
            if monotonic() >= self.deadline:
                self.left.append(f"{case.id} {dtype} {kind}")
                break
            row = self.row(case, dtype, kind, _words(tiles))
            try:
                with tuned.trying({**best, kind: tiles}):
                    found = _results(tensors, case, direction, "triton")
                    if expected is None:
                        expected = _expected(tensors, case, direction, found)
                    row["dropped"] = _off(found, expected, direction)
                    if row["dropped"] is None:
                        row["seconds"] = self.timer(step(_attend(case, "triton"), tensors, direction))
                        rows.append((row, tiles))
            except Exception as error:  # whatever a compiler or a driver raises, the next one may do better
                row["dropped"] = _reason(error)
        if not rows:
            return None
        row, tiles = min(rows, key=lambda found: found[0]["seconds"])
        row["taken"] = True
        self.found.tiles[tuned.case_key(*problem)] = tiles
        return tiles

    def executors(
        self, case: Case, dtype: str, directions: Sequence[Direction], tensors: list[Tensor]
    ) -> None:
        """Times every executor that can run the case; "backward" is a call with its gradients."""
        names = {direction: dict[str, float]() for direction in directions}
        for name in EXECUTORS:
            total = 0.0
            for direction in directions:
                if monotonic() >= self.deadline:
                    self.left.append(f"{case.id} {dtype} {direction} by {name}")
                    break
                row = self.row(case, dtype, direction, name)
                try:
                    if name != "triton":
                        found, ours = (_results(tensors, case, direction, each) for each in (name, "triton"))
                        row["dropped"] = _off(found, ours, direction)
                    if row["dropped"] is None:
                        row["seconds"] = self.timer(step(_attend(case, name), tensors, direction))
                except Exception as error:  # an absent package is one of many reasons
                    row["dropped"] = _reason(error)
                if row["dropped"] is not None:
                    break
                total += row["seconds"]
                names[direction][name] = total
        if len(directions) < len(DIRECTIONS):  # a call with gradients is both
            names.pop("backward", None)
        for direction, seconds in names.items():
            if seconds:
                key = tuned.case_key(case.bound, direction, tensors[0].element_size(), case.head_dim)
                self.found.executors[key] = seconds
                fastest = min(seconds, key=seconds.__getitem__)
                for row in self.rows:
                    given = (row["case"], row["dtype"], row["what"], row["candidate"])
                    row["taken"] |= given == (case.id, dtype, direction, fastest)

    def row(self, case: Case, dtype: str, what: str, candidate: str) -> dict[str, Any]:
        found = {
            "case": case.id, "dtype": dtype, "what": what, "candidate": candidate, "seconds": None,
            "dropped": None, "taken": False,
        }  # fmt: skip
        self.rows.append(found)
        return found


def _attend(case: Case, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: neighborhood_attention(q, k, v, case.pattern, backend=backend)


def _results(tensors: list[Tensor], case: Case, direction: Direction, backend: str) -> list[Tensor]:
    """The output of the last head of the last sample, or the gradients of its query, key and value."""
    leaves = [x.detach().requires_grad_(direction == "backward") for x in tensors]
    out = _attend(case, backend)(*leaves)
    if direction == "forward":
        return [out[-1:, ..., -1:, :]]
    grad = torch.cos(torch.arange(out[-1:, ..., -1:, :].numel(), device=out.device)).to(out.dtype)
    pull = torch.zeros_like(out)
    pull[-1:, ..., -1:, :] = grad.view_as(pull[-1:, ..., -1:, :])
    return [x[-1:, ..., -1:, :] for x in torch.autograd.grad(out, leaves, pull)]


def _expected(tensors: list[Tensor], case: Case, direction: Direction, untuned: list[Tensor]) -> list[Tensor]:
    if case.bound.num_queries * case.bound.num_keys > PAIRS:
        return untuned
    alone = [x[-1:, ..., -1:, :].double() for x in tensors]
    return _results(alone, case, direction, "reference")


def _off(found: list[Tensor], expected: list[Tensor], direction: Direction) -> str | None:
    allowed = tolerance(found[0].dtype, gradient=direction == "backward")
    error = max(relative_error(a, e) for a, e in zip(found, expected, strict=True))
    return None if error <= allowed else f"its relative error is {error:.2g}, allowed is {allowed:.2g}"


def _words(tiles: Tiling) -> str:
    sides = ["×".join(map(str, side)) for side in (tiles.q_tile, tiles.kv_tile)]
    words = [f"{sides[0]} queries", f"{sides[1]} keys", f"{tiles.warps} warps", f"{tiles.stages} stages"]
    return ", ".join([*words, f"by {tiles.way}"])


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def _inputs(case: Case, dtype: str, device: str) -> list[Tensor]:
    draw = torch.Generator(device).manual_seed(0)
    shape = (case.batch, *case.grid, case.num_heads, case.head_dim)
    how: dict[str, Any] = {"generator": draw, "device": device, "dtype": getattr(torch, dtype)}
    return [torch.randn(shape, **how) for _ in range(3)]
