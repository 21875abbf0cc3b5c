"""Arguments that are one number for every dimension or one number for each."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T", int, bool)


def per_dim(name: str, value: T | Iterable[T], rank: int) -> tuple[T, ...]:
    """`value` as one entry per dimension: a single one is repeated, a sequence must have `rank` entries."""
    if isinstance(value, (int, bool)):
        return (value,) * rank
    entries = tuple(value)
    if len(entries) != rank:
        raise ValueError(
            f"{name}={entries} has {len(entries)} entries for {rank} dimensions. Give one, or {rank}."
        )
    return entries
