"""Made sequences whose answers stand earlier in them: recall, regression, state; for small models.

Each maker draws from a `torch.Generator` and returns tensors on the CPU. Where a position asks nothing its
target is `IGNORED`, which torch's cross-entropy leaves out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

IGNORED = -100


class Tokens(NamedTuple):
    """Token ids, and at each position the token that should follow it or `IGNORED`."""

    ids: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]


class Regression(NamedTuple):
    """Pairs of key and noisy value, and the number of the linear map that made each."""

    keys: Float[Tensor, "b t dim"]
    values: Float[Tensor, "b t dim"]
    segments: Int[Tensor, " t"]


def recall(
    num_sequences: int, *, tokens: int, pairs: int, vocabulary: int = 8192, generator: Generator
) -> Tokens:
    """Multi-query associative recall (MQAR; Arora et al., arXiv 2312.04927).

    A sequence begins with `pairs` keys, each followed by its value; every key stands once more somewhere
    behind them, its value then being the target, among tokens that ask nothing. Keys come from the lower half
    of the vocabulary and values from the upper; token 0 fills. Places are uniform (the paper favours near
    ones).
    """
    half = vocabulary // 2
    if pairs < 1 or tokens < 3 * pairs:
        raise ValueError(
            f"{pairs} pairs and their questions do not fit into {tokens} tokens. "
            f"Give at least {3 * max(pairs, 1)} tokens and one pair."
        )
    if pairs > half - 1:
        raise ValueError(
            f"vocabulary={vocabulary} has no {pairs} different keys. Give {2 * pairs + 2} or more."
        )
    keys = 1 + _distinct(num_sequences, half - 1, pairs, generator)
    values = torch.randint(half, vocabulary, (num_sequences, pairs), generator=generator)
    ids = torch.zeros(num_sequences, tokens, dtype=torch.long)
    ids[:, : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + _distinct(num_sequences, tokens - 2 * pairs, pairs, generator)
    targets = torch.full_like(ids, IGNORED)
    ids.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return Tokens(ids, targets)


def hidden_key(
    num_sequences: int, *, tokens: int, digits: int = 5, vocabulary: int = 64, generator: Generator
) -> Tokens:
    """A pass key of `digits` tokens hidden at a random place and asked for at the end.

    Token 0 announces the key where it stands and again where it is asked for; keys are of tokens 1 to 10, the
    text around them of the others.
    """
    if digits < 1 or tokens < 2 * digits + 2 or vocabulary < 12:
        raise ValueError(
            f"A key of {digits} digits does not fit into {tokens} tokens of {vocabulary} kinds. "
            f"Give at least {2 * max(digits, 1) + 2} tokens, 1 digit and 12 kinds."
        )
    ids = torch.randint(11, vocabulary, (num_sequences, tokens), generator=generator)
    key = torch.randint(1, 11, (num_sequences, digits), generator=generator)
    question = tokens - digits - 1
    start = torch.randint(0, question - digits, (num_sequences, 1), generator=generator)
    announced = torch.cat([torch.zeros_like(start), key], 1)
    ids.scatter_(1, start + torch.arange(digits + 1), announced)
    ids[:, question:] = announced
    targets = torch.full_like(ids, IGNORED)
    targets[:, question:-1] = key
    return Tokens(ids, targets)


def permutations(num_sequences: int, *, swaps: int, items: int = 5, generator: Generator) -> Tokens:
    """Swaps of two places, and after each of them which item stands in the first place.

    Items begin in order. Token `a * items + b` swaps places a and b; targets are item numbers.
    """
    if swaps < 1 or items < 2:
        raise ValueError(f"swaps={swaps}, items={items}: give at least one swap of two items.")
    a = torch.randint(0, items, (num_sequences, swaps), generator=generator)
    b = (a + torch.randint(1, items, (num_sequences, swaps), generator=generator)) % items
    state = torch.arange(items).repeat(num_sequences, 1)
    targets = torch.empty_like(a)
    for step in range(swaps):
        places = torch.stack([a[:, step], b[:, step]], 1)
        state.scatter_(1, places, state.gather(1, places.flip(1)))
        targets[:, step] = state[:, 0]
    return Tokens(a * items + b, targets)


def regression(
    num_sequences: int,
    *,
    tokens: int,
    dim: int,
    segment: int | None = None,
    spread: float = 0.7,
    noise: float = 0.05,
    generator: Generator,
) -> Regression:
    """Values that are a linear map of unit keys; every `segment` the map and the place of the keys change.

    key = normalise(spread * unit normal + centre of the segment), value = map of the segment @ key + noise.
    The keys tell the segments apart, as they must for a method that weighs by likeness. Without `segment` one
    map holds for the whole sequence.
    """
    segment = tokens if segment is None else segment
    if tokens < 1 or dim < 1 or segment < 1:
        raise ValueError(f"tokens={tokens}, dim={dim}, segment={segment} must be at least 1.")
    segments = torch.arange(tokens) // segment
    count = int(segments[-1]) + 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(num_sequences, *shape, generator=generator)

    centres = torch.nn.functional.normalize(normal(count, dim), dim=-1)
    around = torch.nn.functional.normalize(normal(tokens, dim), dim=-1)
    keys = torch.nn.functional.normalize(spread * around + centres[:, segments], dim=-1)
    maps = normal(count, dim, dim) / dim**0.5
    values = torch.einsum("btij,btj->bti", maps[:, segments], keys) + noise * normal(tokens, dim)
    return Regression(keys, values, segments)


def _distinct(rows: int, below: int, count: int, generator: Generator) -> Int[Tensor, "rows count"]:
    """`count` different numbers below `below` in each row, in random order (Floyd's way of drawing them)."""
    found = torch.empty(rows, count, dtype=torch.long)
    for place, top in enumerate(range(below - count, below)):
        drawn = torch.randint(0, top + 1, (rows,), generator=generator)
        taken = (found[:, :place] == drawn[:, None]).any(1)
        found[:, place] = drawn.masked_fill(taken, top)
    return found.gather(1, torch.rand(rows, count, generator=generator).argsort(1))
