"""One row of `nearfield bench vision`: what is timed and its rivals take turns; then the memory of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nearfield.bench import vision
from nearfield.bench.cases import Direction
from nearfield.bench.rivals import Unfit
from nearfield.bench.sequence_rows import require_agreement
from nearfield.bench.timing import Timing, in_turn, timed_row
from nearfield.bench.work import peak_growth
from nearfield.core.backend import requested

OURS = ""


def vision_row(
    case: Any,
    dtype: str,
    direction: Direction,
    *,
    device: str,
    backend: str,
    rivals: Sequence[str],
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """The row of a case, as `nearfield.bench.results` holds it, and pictures a second, and memory.

    The backward is the gradients of all inputs and parameters along a retained graph.
    """
    name = requested(backend)
    made = vision.problem(case, dtype, device, name)
    steps = {OURS: _step(made.ours, made.tensors, direction)}
    skipped: dict[str, str] = {}
    for rival in rivals:
        if rival == name or rival not in made.rivals:
            continue
        try:
            contender = made.rivals[rival]()
            with torch.no_grad():
                result = contender.call(*made.tensors)
                if rival not in vision.ANOTHER:
                    require_agreement(result, made.ours.call(*made.tensors))
            steps[rival] = _step(contender, made.tensors, direction)
        except Unfit as reason:
            skipped[rival] = str(reason)
        except Exception as error:  # foreign code may fail in any way; the table says how and goes on
            first_line = (str(error).strip().splitlines() or [""])[0]
            skipped[rival] = f"{type(error).__name__}: {first_line[:200]}"
    found: dict[str, Timing] = {}

    def measure() -> Timing:
        found.update(in_turn(steps, device, budget=seconds))
        return found[OURS]

    row = timed_row(made, dtype, direction, measure, device, name, threads)
    row["rivals"] = {rival: timing.seconds for rival, timing in found.items() if rival != OURS}
    row["rivals_skipped"] = skipped
    row["pictures_per_second"] = case.batch / row["seconds"]
    if direction == "forward":
        peaks = {rival: _peak(call, device) for rival, call in steps.items()}
        row["peak_bytes"] = peaks.pop(OURS)
        row["rivals_peak_bytes"] = peaks
    return row


def _step(
    contender: vision.Contender, tensors: Sequence[Tensor], direction: Direction
) -> Callable[[], object]:
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return contender.call(*tensors)

        return forward
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = contender.call(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    wanted = [*leaves, *contender.parameters]
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True, allow_unused=True)


def _peak(call: Callable[[], object], device: str) -> int:
    """Bytes that the call needs at most beside what is there before it."""
    if device != "cuda":
        return peak_growth(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return int(torch.cuda.max_memory_allocated() - before)
