"""Which implementation of an operator runs: asked for by name, or chosen and explained."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from nearfield.core.errors import BackendUnavailable

BACKENDS = ("auto", "reference", "tiled", "native", "triton", "flex", "natten", "natten-hub", "flash")
VARIABLE = "NEARFIELD_BACKEND"


@dataclass(frozen=True)
class Verdict:
    """What one backend says to one problem: nothing, "I cannot", or "I can, but another is better"."""

    cannot: str | None = None
    unfit: str | None = None


@dataclass(frozen=True)
class Choice:
    """The backend that "auto" takes, and in words why each other one was passed over; `str()` is readable."""

    op: str
    backend: str
    others: Mapping[str, str]

    def json(self) -> dict[str, object]:
        """The choice for programs."""
        return {"op": self.op, "backend": self.backend, "others": dict(self.others)}

    def __str__(self) -> str:
        lines = [f"{self.op} runs on {self.backend!r}."]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.others.items()])


def requested(backend: str) -> str:
    """`backend`, known to exist; the variable NEARFIELD_BACKEND replaces "auto" and nothing else."""
    source = "backend"
    if backend == "auto" and os.environ.get(VARIABLE):
        backend, source = os.environ[VARIABLE], VARIABLE
    if backend not in BACKENDS:
        near = get_close_matches(str(backend), BACKENDS, n=2) or BACKENDS
        raise ValueError(f"{source}={backend!r} is unknown. Did you mean {' or '.join(map(repr, near))}?")
    return backend


def choose(op: str, backend: str, ask: Mapping[str, Callable[[], Verdict]]) -> str:
    """The name of the backend to run: `backend` itself if it can, for "auto" the first willing one of `ask`.

    Raises `BackendUnavailable` when the one asked for by name cannot run.
    """
    backend = requested(backend)
    if backend == "auto":
        for name, verdict in ask.items():
            said = verdict()
            if said.cannot is None and said.unfit is None:
                return name
        raise BackendUnavailable(f"No backend of {op} can run this: {explain(op, ask).others}")
    reason = (
        ask[backend]().cannot if backend in ask else f"{op} has no such backend; it has {', '.join(ask)}."
    )
    if reason is not None:
        raise BackendUnavailable(
            f"backend={backend!r} cannot run here: {reason} backend='auto' picks one that can."
        )
    return backend


def explain(op: str, ask: Mapping[str, Callable[[], Verdict]]) -> Choice:
    """What "auto" takes and why not the others, in the order of preference."""
    taken, others = "none", {}
    for name, verdict in ask.items():
        said = verdict()
        reason = said.cannot or said.unfit
        if reason is None and taken == "none":
            taken = name
        else:
            others[name] = reason or f"could run; {taken!r} comes first."
    return Choice(op, taken, others)
