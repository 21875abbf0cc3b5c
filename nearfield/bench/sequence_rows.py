"""One row of `nearfield bench linear|lla|scan`: the operator timed, then its rivals on the same tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nearfield.bench import sequences
from nearfield.bench.cases import Direction
from nearfield.bench.rivals import Unfit, step
from nearfield.bench.timing import once, timed, timed_row
from nearfield.core.backend import requested
from nearfield.core.errors import BackendUnavailable

SLOWEST = 1.0  # seconds of a rival's forward: its backward takes several times as long
ORDER = ("native", "triton", "tiled", "reference")  # in which "auto" asks


def sequence_row(
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
    """The row of a case, as `nearfield.bench.results` holds it."""
    name = _backend_used(case, dtype, device) if requested(backend) == "auto" else requested(backend)
    made = sequences.problem(case, dtype, device, name)
    call = step(made.call, made.tensors, direction)
    row = timed_row(
        case, dtype, direction, lambda: timed(call, device, budget=seconds), device, name, threads
    )
    for rival in rivals:
        if rival == name or rival not in made.rivals:
            continue
        try:
            row["rivals"][rival] = _seconds(made, rival, direction, device, seconds)
        except Unfit as reason:
            row["rivals_skipped"][rival] = str(reason)
    return row


def _seconds(made: sequences.Problem, rival: str, direction: Direction, device: str, seconds: float) -> float:
    """A rival's time; `Unfit` with the reason where it cannot be had or computes something else."""
    call = made.rivals[rival]()
    is_same = rival not in sequences.ANOTHER
    tensors = made.tensors if is_same else made.tensors[:3]  # attention knows no gates
    try:
        with torch.no_grad():
            first = once(lambda: call(*tensors), device)
            if first > SLOWEST:
                raise Unfit(f"too slow: {first:.1f} s for one call, above the bound of {SLOWEST:.0f} s")
            if is_same:
                require_agreement(call(*tensors), made.call(*tensors))
        return timed(step(call, tensors, direction), device, budget=seconds / 2, least=1).seconds
    except Unfit:
        raise
    except Exception as error:  # foreign code may fail in any way; the table says how and goes on
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise Unfit(f"{type(error).__name__}: {first_line[:200]}") from error


def require_agreement(found: torch.Tensor, ours: torch.Tensor) -> None:
    """Raises `Unfit` where a rival that should compute the same does not."""
    error = ((found.float() - ours.float()).square().mean() / ours.float().square().mean()).sqrt().item()
    allowed = 1e-3 if ours.dtype == torch.float32 else 3e-2
    if not error <= allowed:
        raise Unfit(f"its output differs from ours by {error:.1e} (rms), so the two are not the same problem")


def _backend_used(case: sequences.Sequence, dtype: str, device: str) -> str:
    """The first backend, in the order of "auto", that takes the case."""
    for name in ORDER:
        made = sequences.problem(case, dtype, device, name)
        try:
            with torch.no_grad():
                made.call(*(x[:, :1] if x.dim() > 2 else x for x in made.tensors))
        except BackendUnavailable:
            continue
        return name
    raise BackendUnavailable(f"No backend runs {case.id} on {device}.")
