"""How a change of quality is told: paired, with intervals that cover what they should."""

from math import exp, expm1

import pytest
import torch

from nearfield.convert.quality import SPAN, feature_change, perplexity_change, recall_change


def losses(slices=4, tokens=512, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(tokens, generator=draw) * 4 for _ in range(slices)]


def jitter(values, size, seed=9):
    """Slices with noise that sums to zero over every run that is resampled as one."""
    draw = torch.Generator().manual_seed(seed)
    noise = [size * torch.randn(len(value) // SPAN, SPAN, generator=draw) for value in values]
    return [value + (n - n.mean(1, keepdim=True)).flatten() for value, n in zip(values, noise, strict=True)]


def test_nothing_changed_is_a_change_of_nothing():
    found = perplexity_change(losses(), losses())
    assert (found.mean, found.worst, found.low, found.high) == (0, 0, 0, 0)
    assert found.before == found.after == pytest.approx(exp(float(torch.cat(losses()).mean())))


def test_a_known_shift_is_recovered_and_shared_noise_cancels():
    """Losses vary by nats, the shift is a hundredth: only a paired comparison finds it so closely."""
    before = losses()
    found = perplexity_change(before, [b + 0.01 for b in jitter(before, 0.1)])
    assert found.mean == pytest.approx(expm1(0.01), abs=1e-6)
    assert found.low <= found.mean <= found.high
    assert found.high - found.low < 1e-5


def test_the_interval_covers_noise_about_nothing_and_not_a_clear_shift():
    before = losses(tokens=2048)
    draw = torch.Generator().manual_seed(1)
    noise = [torch.randn(len(b), generator=draw) * 0.3 for b in before]
    quiet = perplexity_change(before, [b + n for b, n in zip(before, noise, strict=True)])
    assert quiet.low < 0 < quiet.high
    assert 0.01 < quiet.high - quiet.low < 0.04  # 4 x 0.3 / sqrt(8192) is 0.013
    shifted = perplexity_change(before, [b + n + 0.05 for b, n in zip(before, noise, strict=True)])
    assert 0 < shifted.low < expm1(0.05) < shifted.high


def test_neighbouring_losses_are_resampled_together():
    """Noise that is equal within a run of tokens leaves a wider interval than as much independent noise."""
    before = losses(tokens=2048)
    draw = torch.Generator().manual_seed(2)
    runs = [torch.randn(len(b) // SPAN, generator=draw).repeat_interleave(SPAN) * 0.1 for b in before]
    alone = [torch.randn(len(b), generator=draw) * 0.1 for b in before]
    wide, narrow = (
        perplexity_change(before, [b + n for b, n in zip(before, noise, strict=True)])
        for noise in (runs, alone)
    )
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_the_worst_slice_and_each_slice_are_told():
    before = losses(3)
    added = (0.01, 0.2, -0.1)
    found = perplexity_change(before, [b + a for b, a in zip(before, added, strict=True)])
    assert found.slices == pytest.approx([expm1(a) for a in added], abs=1e-6)
    assert found.worst == pytest.approx(expm1(0.2), abs=1e-6)
    assert found.mean == pytest.approx(expm1(sum(added) / 3), abs=1e-6)
    told = found.json()
    assert told == {
        "mean": found.mean,
        "worst": found.worst,
        "interval": [found.low, found.high],
        "slices": found.slices,
    }


def test_slices_of_another_number_are_refused():
    with pytest.raises(ValueError):
        perplexity_change(losses(3), losses(4))


def test_one_seed_gives_one_interval():
    before, after = losses(), losses(seed=3)
    assert perplexity_change(before, after) == perplexity_change(before, after)
    assert perplexity_change(before, after) != perplexity_change(before, after, seed=1)


@pytest.mark.parametrize(
    ("right", "lost", "won", "kept"),
    [
        (100, 0, 0, True),
        (99, 1, 0, True),  # one point
        (0, 40, 0, False),
        (30, 10, 0, False),
        (20, 10, 10, True),  # as many won as lost: the interval covers nothing
        (34, 4, 2, True),  # five points, which four against two do not show
        (20, 18, 2, False),
    ],
)
def test_retrieval_is_kept_within_a_point_or_within_chance(right, lost, won, kept):
    before = [True] * (right + lost) + [False] * won
    after = [True] * right + [False] * lost + [True] * won
    found = recall_change(before, after)
    assert found.kept is kept
    assert found.count == right + lost + won
    assert found.before == pytest.approx((right + lost) / found.count)
    assert found.after == pytest.approx((right + won) / found.count)
    assert found.low <= found.after - found.before <= found.high
    assert found.json()["kept"] is kept
    assert set(found.json()) == {"before", "after", "interval", "prompts", "kept"}


@pytest.mark.parametrize("right", range(1, 101, 7))
def test_one_point_is_one_point_whatever_its_last_digit(right):
    """0.8 - 0.79 is a little more than 0.01 to a computer."""
    from nearfield.convert.quality import Recall

    assert Recall(right / 100, (right - 1) / 100, -0.03, -0.001, 100).kept
    assert not Recall(right / 100, (right - 1.2) / 100, -0.03, -0.001, 100).kept


def test_the_comparison_of_answers_is_paired():
    """The same shares before and after, once on the same questions and once on others."""
    half = [True, False] * 20
    same, other = recall_change(half, half), recall_change(half, half[::-1])
    assert (same.low, same.high) == (0, 0)
    assert other.low < -0.1 < 0.1 < other.high


def features(count=3, tokens=50, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 24, generator=draw) for _ in range(count)]


def test_equal_features_have_turned_by_nothing_and_lengths_do_not_count():
    before = features()
    found = feature_change(before, [3 * b for b in before])
    assert max(abs(x) for x in (found.mean, found.worst, found.low, found.high)) < 1e-6
    assert found.same_neighbour == 1.0


def test_features_turned_by_a_known_angle():
    before = [torch.tensor([[1.0, 0.0]]).repeat(40, 1) for _ in range(3)]
    angles = (0.1, 0.2, 0.6)
    after = [
        torch.tensor([[a, b]]).repeat(40, 1)
        for a, b in zip(map(cos_, angles), map(sin_, angles), strict=True)
    ]
    found = feature_change(before, after)
    turned = [1 - cos_(angle) for angle in angles]
    assert found.mean == pytest.approx(sum(turned) / 3, abs=1e-6)
    assert found.worst == pytest.approx(turned[2], abs=1e-6)
    assert found.low == pytest.approx(found.mean, abs=1e-6) == pytest.approx(found.high, abs=1e-6)


def cos_(angle):
    return float(torch.tensor(angle).cos())


def sin_(angle):
    return float(torch.tensor(angle).sin())


def test_the_interval_of_features_holds_its_mean_and_neighbours_move():
    before = features()
    noise = features(seed=5)
    near = feature_change(before, [b + 0.2 * n for b, n in zip(before, noise, strict=True)])
    assert 0 < near.low < near.mean < near.high < near.worst + 0.01
    far = feature_change(before, noise)
    assert far.mean == pytest.approx(1, abs=0.1)
    assert far.same_neighbour < 0.1 < near.same_neighbour
