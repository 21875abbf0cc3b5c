"""Runs the table: every row beside a GEMM of its dtype and thread count, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from nearfield.bench import sequences, vision
from nearfield.bench.cases import CASES, DIRECTIONS, DTYPES, Case, Direction, find, for_device
from nearfield.bench.results import BenchResult, provenance
from nearfield.bench.rivals import RIVALS, Unfit, measure, step
from nearfield.bench.sequence_rows import sequence_row
from nearfield.bench.timing import timed, timed_row
from nearfield.bench.vision_rows import vision_row
from nearfield.core.backend import requested
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood import neighborhood_attention, why
from nearfield.plan.roofline import DEVICES, REACH, predict

Progress = Callable[[str, float, float], None]
# where none are asked for: on a GPU what its matrix units are for, and calls so short that less time will do
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
DEFAULT_SECONDS = {"cpu": 3.0, "cuda": 0.4}
GPU_LIMIT = 3.0  # seconds that a call of a rival may take on a GPU


def run_op(
    op: str,
    *,
    device: str,
    cases: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    directions: Sequence[Direction],
    backend: str,
    rivals: bool | Sequence[str],
    threads: int,
    seconds: float | None,
    minutes: float | None,
    out: str | Path | None,
    progress: Progress | None,
) -> BenchResult:
    """The rows of `nearfield bench OP`; `nearfield.bench.run` holds the other defaults."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} cannot be benched. Choose cpu or cuda.")
    usual_of = device if op == "neighborhood" else "cpu"
    dtypes = DEFAULT_DTYPES[usual_of] if dtypes is None else dtypes
    seconds = DEFAULT_SECONDS[usual_of] if seconds is None else seconds
    deadline = None if minutes is None else monotonic() + 60 * minutes
    _require_known("dtype", dtypes, DTYPES)
    _require_known("direction", directions, DIRECTIONS)
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("device='cuda' was asked for; torch sees no CUDA device. Use device='cpu'.")
    table: Sequence[Any] = CASES
    names = [rival.name for rival in RIVALS]
    row: Callable[..., dict[str, Any]] = _row
    usual = [rival.name for rival in RIVALS if device in rival.devices]
    if op == "vision":
        table, row = vision.CASES, vision_row
        usual = names = list(vision.RIVALS)
    elif op != "neighborhood":
        table = [case for case in sequences.CASES if case.op == op]
        usual = names = list(sequences.RIVALS)
        row = sequence_row
    wanted = usual if rivals is True else rivals or ()
    _require_known("rival", wanted, names)
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1.")
    chosen = [find(id, table) for id in cases] if cases is not None else list(for_device(device, table))
    for case in chosen:
        if case.device not in ("cpu", device):
            raise ValueError(f"Case {case.id} is meant for {case.device}; on {device} it would take hours.")
    plan = [
        (case, dtype, direction)
        for case in chosen
        for dtype in dtypes
        for direction in directions
        if direction in getattr(case, "directions", DIRECTIONS)
    ]
    if device == "cuda":  # the whole table in one dtype before the next: time may run out
        plan.sort(key=lambda entry: tuple(dtypes).index(entry[1]))
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    timed_until = {"deadline": deadline} if op == "neighborhood" else {}
    origin = provenance(device, threads)

    def result() -> BenchResult:
        return BenchResult(op=op, rows=tuple(rows), left_out=tuple(left), **origin)

    if out is not None:
        result().save(out)  # what cannot be written is known before anything is measured
    with _threads(threads):
        for done, (case, dtype, direction) in enumerate(plan):
            if progress is not None:
                progress(f"bench {op}", done, len(plan))
            if _is_over(deadline):
                left.append(f"{case.id} {direction} {dtype}")
                continue
            rows.append(
                row(
                    case,
                    dtype,
                    direction,
                    device=device,
                    backend=backend,
                    rivals=wanted,
                    threads=threads,
                    seconds=seconds,
                    **timed_until,
                )
            )
            if out is not None:
                result().save(out)
    if progress is not None:
        progress(f"bench {op}", len(plan), len(plan))
    if out is not None:
        result().save(out)
    return result()


def _row(
    case: Any,
    dtype: str,
    direction: Direction,
    *,
    device: str,
    backend: str,
    rivals: Sequence[str],
    threads: int,
    seconds: float,
    deadline: float | None = None,
) -> dict[str, Any]:
    tensors = _inputs(case, dtype, device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return neighborhood_attention(query, key, value, case.pattern, backend=backend)

    name = _backend_used(case, tensors, backend)
    call = step(attend, tensors, direction)
    row = timed_row(
        case, dtype, direction, lambda: timed(call, device, budget=seconds), device, name, threads
    )
    gemm_gflops = row["gemm_gflops"]
    row["predicted_seconds"] = _predicted(case, dtype, direction, device, name, gemm_gflops)
    if rivals:
        limits = {"limit": seconds}
        if device == "cuda":
            limits = {"limit": max(seconds, GPU_LIMIT), "budget": seconds}
        with torch.no_grad():
            ours = attend(*tensors)
        for rival in RIVALS:
            if rival.name not in rivals or rival.name == row["backend"]:
                continue
            try:
                if _is_over(deadline):
                    raise Unfit("no time was left")
                found = measure(rival, case, tensors, direction, ours=ours, gemm_gflops=gemm_gflops, **limits)
            except Unfit as reason:
                row["rivals_skipped"][rival.name] = str(reason)
                continue
            row["rivals"][rival.name] = found.seconds
            for name, value in (
                ("notes", found.note),
                ("compile_seconds", found.compile_seconds),
                ("setup_seconds", found.setup_seconds),
                ("variants", found.variant),
            ):
                if value is not None:
                    row[f"rivals_{name}"][rival.name] = value
    return row


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and monotonic() >= deadline


def _backend_used(case: Case, tensors: list[Tensor], backend: str) -> str:
    """The backend that runs the case: the one asked for, or the one that "auto" takes."""
    query, key, value = tensors
    name = requested(backend)
    return why(query, key, value, case.pattern).backend if name == "auto" else name


def _predicted(
    case: Case, dtype: str, direction: Direction, device: str, backend: str, gemm_gflops: float
) -> float | None:
    """What `nearfield.plan` expects; None for a GPU or a backend that it does not know."""
    if backend not in REACH:
        return None
    known = "cpu"
    if device == "cuda":
        gpu = torch.cuda.get_device_name().lower()
        known = next((name for name in DEVICES if name in gpu), "")
        if not known:
            return None
    return predict(
        case.bound,
        heads=case.num_heads,
        head_dim=case.head_dim,
        dtype=dtype,
        direction=direction,
        gemm_gflops=gemm_gflops,
        backend=backend,
        device=known,
        batch=case.batch,
    )


def _inputs(case: Case, dtype: str, device: str) -> list[Tensor]:
    draw = torch.Generator(device).manual_seed(0)
    shape = (case.batch, *case.grid, case.num_heads, case.head_dim)
    return [torch.randn(shape, generator=draw, device=device).to(getattr(torch, dtype)) for _ in range(3)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's thread count for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_known(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    for entry in given:
        if entry not in known:
            raise ValueError(f"{name}={entry!r} is unknown. Choose from {', '.join(known)}.")
