"""Sequences of different lengths one after the other in a batch of 1, as the batches they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor | None]
States = tuple[Tensor, ...] | None
Run = Callable[[Tensor, Tensor, Tensor, Tensors, States], tuple[Tensor, tuple[Tensor, ...]]]
ALIKE = 64  # tokens: sequences that need as many steps of this length go together


def ends_of(cu_seqlens: Tensor | Sequence[int], batch: int, tokens: int) -> list[int]:
    """Where sequences begin and end, as checked numbers."""
    ends = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens goes with one packed row, but the batch is {batch}. Give [1, T, ...].")
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens or any(b < a for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens={ends} must rise from 0 to the {tokens} tokens given.")
    return ends


def run_packed(
    run: Run,
    ends: Sequence[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensors,
    state: States,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `run` gives on every sequence of [1, T, ...] with its row of the state, packed again.

    Sequences of nearly one length are one batch, the shorter ones filled up at their end by zeros and False:
    a key of zero without decay leaves every state as it was.
    """
    lengths = [b - a for a, b in pairwise(ends)]
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(-(-length // ALIKE), []).append(number)

    outs: list[Tensor] = [torch.empty(0)] * len(lengths)
    states: list[tuple[Tensor, ...]] = [()] * len(lengths)
    for numbers in groups.values():
        longest = max(lengths[i] for i in numbers)

        def take(x: Tensor, numbers: list[int] = numbers, longest: int = longest) -> Tensor:
            rows = [x[0, ends[i] : ends[i + 1]] for i in numbers]
            return torch.stack([F.pad(r, (0, 0) * (r.dim() - 1) + (0, longest - len(r))) for r in rows])

        own = {name: None if x is None else take(x) for name, x in gates.items()}
        first = None if state is None else tuple(x[numbers] for x in state)
        out, last = run(take(query), take(key), take(value), own, first)
        for place, number in enumerate(numbers):
            outs[number] = out[place, : lengths[number]]
            states[number] = tuple(x[place] for x in last)
    return torch.cat(outs)[None], tuple(torch.stack(parts) for parts in zip(*states, strict=True))
