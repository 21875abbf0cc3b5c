"""Our TNT holds timm's weights, in both layouts, and gives its logits."""

import pytest
import torch

from nearfield.systems.tnt import model, weights


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("tnt_small", "tnt_s_patch16_224"),
        ("tnt_base", "tnt_b_patch16_224"),
        ("tnt_small_legacy", "tnt_s_legacy_patch16_224"),
    ],
)
def test_logits_equal_timms(name, timms):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(timms, pretrained=False, num_classes=10).eval()
    ours = getattr(model, name)(num_classes=10).eval()
    ours.load_state_dict(weights.convert(theirs.state_dict()))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
