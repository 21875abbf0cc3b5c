"""The settings and the verdict of the claims about predictions."""

from random import Random

from nearfield.ops.neighborhood.triton_plan import tiling
from nearfield.systems.gna import claims


def test_settings_differ_by_at_most_four_times_in_work():
    for found in (
        claims._settings(Random(0), (64, 64), 30),
        claims._settings_on_gpu(Random(0), (128, 128), full=True),
    ):
        assert len(found) == 30
        pairs = [pattern.on((128, 128)).num_pairs for pattern in found]
        assert max(pairs) <= 4 * min(pairs)


def test_few_kernels_serve_the_settings_of_a_gpu():
    needed = {
        (tiling((pattern.on((128, 128)),), "forward", 2, 128, 90, "groups"), min(pattern.stride))
        for pattern in claims._settings_on_gpu(Random(0), (128, 128), full=True)
    }
    assert len({(tiles, least == 1) for tiles, least in needed}) <= claims.VARIANTS


def test_predictions_must_be_clearly_better_than_counting_work():
    measured = [float(i) for i in range(30)]
    swapped = [*measured[1::-1], *measured[2:]]  # nearly the right order, as FLOPs may have it, too
    shuffled = Random(0).sample(measured, 30)

    def draw(predicted, flops):
        return [claims.Point(p, m + 1, f + 1) for p, m, f in zip(predicted, measured, flops, strict=True)]

    def judged(*draws):
        return claims._judged({"ours": list(draws)}, 0.9)

    good, poor = draw(swapped, shuffled), draw(shuffled, shuffled)
    assert judged(good)[1]
    assert judged(good, good)[1]
    assert not judged(draw(swapped, swapped))[1]
    assert not judged(poor)[1]
    assert not judged(good, poor, good)[1]  # the worst draw decides
    words, _ = judged(draw([m + 1 for m in measured], shuffled), poor)
    low = f"{claims._rank_correlation(poor, 'predicted'):.3f}"
    assert words.startswith(f"ours: 1.000, {low} over 30 settings, FLOPs alone {low}, {low} (")
