"""A 5-gram model with interpolated Kneser–Ney smoothing: what the pocket language model must beat clearly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
BASE = 2048  # tokens are below it, so five of them fit into an int64


class NGram:
    """Counts of runs of up to `order` tokens; `log_probability` of the tokens of a sequence.

    Of a run w after a context h: (count(h w) - D) / count(h) + D · kinds(h) / count(h) · p(w | shorter h),
    where shorter runs count in how many different contexts they occur, and D = n1 / (n1 + 2 n2).
    """

    def __init__(self, tokens: Integers, order: int = 5):
        self.order = order
        runs = [_runs(tokens, length) for length in range(1, order + 1)]
        self.tables = []
        for length in range(1, order + 1):
            if length == order:
                keys, counts = np.unique(runs[-1], return_counts=True)
            else:  # in how many contexts of one token a run occurs
                keys, counts = np.unique(np.unique(runs[length]) % BASE**length, return_counts=True)
            ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
            discount = ones / (ones + 2 * twos) if ones else 0.5
            contexts, first = np.unique(keys // BASE, return_index=True)
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(np.append(first, len(keys)))
            self.tables.append((keys, counts, discount, contexts, totals, kinds))

    def log_probability(self, tokens: Integers) -> NDArray[np.float64]:
        """Of each token but the first, given those before it."""
        found = np.empty(len(tokens) - 1)
        found.fill(1 / BASE)
        for length, (keys, counts, discount, contexts, totals, kinds) in enumerate(self.tables, 1):
            if length > len(tokens):
                break
            # runs that end at token 1 at least, and lie inside the sequence
            start = max(length, 2)
            wanted = _runs(tokens[start - length :], length)
            context, is_known = _find(contexts, wanted // BASE)
            run, was_seen = _find(keys, wanted)
            total = np.where(is_known, totals[context], 1)
            mass = np.where(was_seen, np.maximum(counts[run] - discount, 0), 0) / total
            rest = discount * kinds[context] / total
            tail = found[start - 2 :]
            found[start - 2 :] = np.where(is_known, mass + rest * tail, tail)
        return np.log(found)


def _runs(tokens: Integers, length: int) -> Integers:
    """All runs of a length, each as one number, the first token in the highest place."""
    count = len(tokens) - length + 1
    keys = np.zeros(max(count, 0), np.int64)
    for place in range(length):
        keys = keys * BASE + tokens[place : place + count]
    return keys


def _find(table: Integers, wanted: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    places = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return places, table[places] == wanted
