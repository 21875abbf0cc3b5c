"""Made sequences: every answer can be read from what stands before it, and from nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.data.sequences import IGNORED, hidden_key, permutations, recall, regression


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(0, 20), st.integers(0, 99))
def test_each_key_is_asked_for_once_and_its_value_stood_beside_it(pairs, more, seed):
    ids, targets = recall(3, tokens=3 * pairs + more, pairs=pairs, vocabulary=64, generator=draw(seed))
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        book = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(book) == pairs and all(0 < key < 32 <= value for key, value in book.items())
        places = [i for i, target in enumerate(asked) if target != IGNORED]
        assert min(places) >= 2 * pairs and {row[i] for i in places} == set(book)
        assert all(asked[i] == book[row[i]] for i in places)
        assert all(token == 0 for i, token in enumerate(row) if i >= 2 * pairs and i not in places)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 30), st.integers(0, 99))
def test_a_hidden_key_is_asked_for_at_the_end(digits, more, seed):
    tokens = 2 * digits + 2 + more
    ids, targets = hidden_key(4, tokens=tokens, digits=digits, generator=draw(seed))
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        first, second = (i for i, token in enumerate(row) if token == 0)
        assert second == tokens - digits - 1 and first + digits < second
        key = row[first + 1 : first + 1 + digits]
        assert row[second + 1 :] == key and asked[second:-1] == key
        assert asked[:second] == [IGNORED] * second and asked[-1] == IGNORED
        assert all(token > 10 for i, token in enumerate(row[:second]) if not first <= i <= first + digits)


def test_swaps_lead_to_the_item_that_is_first():
    items = 4
    ids, targets = permutations(5, swaps=30, items=items, generator=draw())
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        state = list(range(items))
        for token, first in zip(row, asked, strict=True):
            a, b = divmod(token, items)
            assert a != b
            state[a], state[b] = state[b], state[a]
            assert state[0] == first
    assert targets.unique().tolist() == list(range(items))


def test_values_are_one_linear_map_of_their_keys_within_a_segment_and_not_across():
    made = regression(2, tokens=96, dim=4, segment=32, noise=0.0, generator=draw())
    assert torch.allclose(made.keys.norm(dim=-1), torch.ones(2, 96))
    assert made.segments.unique_consecutive(return_counts=True)[1].tolist() == [32, 32, 32]

    def residual(part):
        fit = torch.linalg.lstsq(made.keys[:, part].double(), made.values[:, part].double()).solution
        return (made.keys[:, part].double() @ fit - made.values[:, part]).abs().max()

    assert residual(slice(32, 64)) < 1e-5 < 0.1 < residual(slice(0, 64))


def test_noise_and_spread_are_what_was_asked_for():
    made = regression(64, tokens=64, dim=3, spread=0.0, noise=0.5, generator=draw())
    assert torch.allclose(made.keys, made.keys[:, :1].expand_as(made.keys), atol=1e-6)  # the centre alone
    assert float((made.values - made.values.mean(1, keepdim=True)).std()) == pytest.approx(0.5, rel=0.05)


def test_makers_repeat_themselves_by_their_generator_only():
    first, again, other = (recall(2, tokens=12, pairs=3, generator=draw(seed)).ids for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: recall(1, tokens=8, pairs=3, generator=g), "do not fit into 8 tokens. Give at least 9"),
        (lambda g: recall(1, tokens=99, pairs=9, vocabulary=18, generator=g), "Give 20 or more"),
        (lambda g: hidden_key(1, tokens=9, digits=4, generator=g), "Give at least 10 tokens"),
        (lambda g: permutations(1, swaps=3, items=1, generator=g), "at least one swap of two items"),
        (lambda g: regression(1, tokens=4, dim=0, generator=g), "must be at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(draw())
