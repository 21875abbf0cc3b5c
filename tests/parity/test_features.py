"""Maps from inside our models are those of timm's twins that hold the same weights."""

from importlib import import_module

import pytest
import torch

timm = pytest.importorskip("timm")

DAVIT = ((32, 64, 96, 128), (1, 1, 2, 1), (1, 2, 3, 4))
# Ours, timm's name and its options, the picture's side, and how many maps timm has before our first.
TWINS = {
    "davit": (
        lambda m: m.davit(*DAVIT, num_classes=3),
        ("davit_tiny", dict(zip(("embed_dims", "depths", "num_heads"), DAVIT, strict=True))),
        (64, 0),
    ),
    "convit": (
        lambda m: m.convit_tiny(depth=4, local_depth=2, image_size=64, num_classes=3),
        ("convit_tiny", {"depth": 4, "local_up_to_layer": 2, "img_size": 64}),
        (64, 0),
    ),
    "tnt": (
        lambda m: m.tnt_small(depth=3, image_size=64, num_classes=3),
        ("tnt_s_patch16_224", {"depth": 3, "img_size": 64}),
        (64, 0),
    ),
    "tnt legacy": (
        lambda m: m.tnt_small_legacy(depth=3, image_size=64, num_classes=3),
        ("tnt_s_legacy_patch16_224", {"depth": 3, "img_size": 64}),
        (64, 0),
    ),
    # timm's first map is the stem's, and the blocks of attention must divide the maps
    "halonet": (lambda m: m.eca_halonext26ts(num_classes=3), ("eca_halonext26ts", {}), (256, 1)),
    "halonet final": (lambda m: m.haloregnetz_b(num_classes=3), ("haloregnetz_b", {}), (224, 1)),
}


SMALL = [name for name, (*_, (side, _)) in TWINS.items() if side == 64]


@pytest.fixture(scope="module", params=TWINS)
def twins(request):
    """Ours and timm's with the same drawn weights, a picture for them, and how many maps timm has more."""
    build, (name, options), (side, before) = TWINS[request.param]
    home = f"nearfield.systems.{request.param.split()[0]}"
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=3, **options).eval()
    for module in theirs.modules():
        if hasattr(module, "running_mean"):  # some begin as zeros, and nothing would be seen
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    ours = build(import_module(f"{home}.model")).eval()
    ours.load_state_dict(import_module(f"{home}.weights").convert(theirs.state_dict()))
    return ours, theirs, torch.randn(1, 3, side, side), before


@pytest.fixture(autouse=True)
def _one_thread():
    """On nets this small a second thread mostly waits, at length where others use the machine."""
    torch.set_num_threads(1)


def same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.abs().max()))


@torch.no_grad()
def test_every_map_and_the_final_features_are_timms(twins):
    ours, theirs, picture, before = twins
    # timm's ByobNet has its last convolution in the last map, which is the place of the final norm here
    features, found = ours.forward_intermediates(picture, norm=hasattr(theirs, "final_conv"))
    expected, maps = theirs.forward_intermediates(picture)
    same(found, maps[before:])
    same([features.movedim(-1, 1) if features.ndim == 4 else features], [expected])
    sides = [picture.shape[-1] // shown.shape[-1] for shown in found]
    assert [info["reduction"] for info in ours.feature_info] == sides


@torch.no_grad()
@pytest.mark.parametrize("twins", SMALL, indirect=True)
def test_normed_maps_are_timms(twins):
    ours, theirs, picture, _ = twins
    choice = {"norm": True, "intermediates_only": True}
    same(ours.forward_intermediates(picture, **choice), theirs.forward_intermediates(picture, **choice))


@torch.no_grad()
@pytest.mark.parametrize("twins", SMALL, indirect=True)
def test_indices_pick_the_same_maps(twins):
    ours, theirs, picture, _ = twins
    for indices in (1, 2, [0, 2], [2, -1], [-2]):
        choice = {"indices": indices, "stop_early": True, "intermediates_only": True}
        expected = theirs.forward_intermediates(picture, **choice)
        same(ours.forward_intermediates(picture, **choice), expected)
    rows = ours.forward_intermediates(picture, output_fmt="NHWC", **choice)
    same([shown.movedim(-1, 1) for shown in rows], expected)
    channels = timm.models.FeatureInfo(theirs.feature_info, out_indices=(0, 1, 2)).channels()
    assert [info["num_chs"] for info in ours.feature_info][:3] == channels
