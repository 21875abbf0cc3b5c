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

    def verdict(predicted, flops):
        points = list(zip(predicted, [m + 1 for m in measured], [f + 1 for f in flops], strict=True))
        return claims._judged({"ours": points}, 0.9)

    assert verdict(swapped, shuffled)[1]
    assert not verdict(swapped, swapped)[1]
    assert not verdict(shuffled, shuffled)[1]
    words, _ = verdict(measured, shuffled)
    assert words.startswith("ours: 1.000 over 30 settings, FLOPs alone")
