"""Seconds of a call: the median of repeats after warm-up, on a clock that fits the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU that is benched


CYCLES = 2e9  # of a GPU in a second, at most


class Timing(NamedTuple):
    """Seconds of one call: median, least and most over `repeats` calls.

    `host`: seconds that this machine takes to give a GPU the call, which the others leave out.
    """

    seconds: float
    min: float
    max: float
    repeats: int
    host: float | None = None


def once(call: Callable[[], object], device: str) -> float:
    """Seconds of one call: wall clock on the CPU, events on CUDA."""
    if device != "cuda":
        begin = perf_counter()
        call()
        return perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) / 1e3


def timed(
    call: Callable[[], object], device: str, *, budget: float = 3.0, least: int = 3, most: int = 50
) -> Timing:
    """The call's timing, in about `budget` seconds of repeats.

    Untimed calls come first, until two in a row agree within a quarter: the first may compile, build tables
    and touch fresh memory. One is enough for a call above the budget.
    """
    last = once(call, device)
    for _ in range(4):
        if last > budget:
            break
        before, last = last, once(call, device)
        if abs(before - last) <= 0.25 * last:
            break
    if device == "cuda":
        return _queued(call, max(least, min(most, round(budget / last))))
    found: list[float] = []
    while len(found) < least or (len(found) < most and sum(found) < budget):
        found.append(once(call, device))
    return Timing(median(found), min(found), max(found), len(found))


def _queued(call: Callable[[], object], repeats: int) -> Timing:
    """A call on CUDA, timed by events around each of `repeats` calls that stand in one queue.

    The GPU first waits for as long as the host needs to fill the queue, else short calls would be the
    launches between them. A buffer larger than the L2 cache is overwritten before each, outside the clock, so
    that inputs come from memory as they do between a model's layers.
    """
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    begin = perf_counter()
    call()
    host = perf_counter() - begin
    torch.cuda.synchronize()
    torch.cuda._sleep(int(CYCLES * host * repeats))
    events = []
    for _ in range(repeats):
        scratch.zero_()
        pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        pair[0].record()
        call()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize()
    found = [float(first.elapsed_time(last)) / 1e3 for first, last in events]
    return Timing(median(found), min(found), max(found), repeats, host)


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    *,
    budget: float = 3.0,
    least: int = 3,
    most: int = 50,
) -> dict[str, Timing]:
    """Timings of several calls that take turns, so that a machine's slow moments fall on all of them."""
    for call in calls.values():
        for _ in range(2):
            once(call, device)
    found: dict[str, list[float]] = {name: [] for name in calls}
    while True:
        for name, call in calls.items():
            found[name].append(once(call, device))
        rounds = len(next(iter(found.values())))
        if rounds >= most or (rounds >= least and sum(map(sum, found.values())) >= budget * len(calls)):
            return {name: Timing(median(t), min(t), max(t), rounds) for name, t in found.items()}


class Gemm:
    """A square matrix product in one dtype: the ruler beside which a row is read.

    Its side is 1024 on the CPU, and 8192 on CUDA, where 1024 would time little more than the launch.
    """

    SIDES: ClassVar = {"cpu": 1024, "cuda": 8192}

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)
        self.side = self.SIDES[device]
        shape = (self.side, self.side)
        self.left, self.right = (
            torch.randn(shape, generator=draw, device=device).to(dtype) for _ in range(2)
        )
        self.out = torch.empty_like(self.left)
        self.device = device
        self.seconds: list[float] = []

    def _multiply(self) -> Tensor:
        return torch.mm(self.left, self.right, out=self.out)

    def measure(self, repeats: int = 8) -> None:
        """Takes part of the samples: call it before and after the row, so that both saw the same machine."""
        self._multiply()
        self.seconds += [once(self._multiply, self.device) for _ in range(repeats)]

    @property
    def gflops(self) -> float:
        """GFLOP/s, from the median of all samples."""
        return 2.0 * self.side**3 / median(self.seconds) / 1e9


def timed_row(
    case: Any,
    dtype: str,
    direction: str,
    measure: Callable[[], Timing],
    device: str,
    backend: str,
    threads: int,
) -> dict[str, Any]:
    """One row of a table: a timing taken between two samples of a matrix product, and the useful work."""
    gemm = Gemm(getattr(torch, dtype), device)
    gemm.measure()
    timing = measure()
    gemm.measure()
    rate = case.useful_flops(direction) / timing.seconds / 1e9
    return {
        "case": case.id,
        "direction": direction,
        "dtype": dtype,
        "backend": backend,
        "threads": threads,
        "seconds": timing.seconds,
        "min": timing.min,
        "max": timing.max,
        "repeats": timing.repeats,
        "host_seconds": timing.host,
        "predicted_seconds": None,
        "useful_gflops": rate,
        "gemm_gflops": gemm.gflops,
        "ratio_to_gemm": rate / gemm.gflops,
        "rivals": {},
        "rivals_skipped": {},
        "rivals_notes": {},
        "rivals_compile_seconds": {},
        "rivals_setup_seconds": {},
        "rivals_variants": {},
    }
