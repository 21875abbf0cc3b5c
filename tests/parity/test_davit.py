"""Our DaViT holds timm's weights and gives its logits."""

import pytest
import torch

from nearfield.systems.davit import model, weights


@pytest.mark.parametrize("name", ["davit_tiny", "davit_base_fl"])
@pytest.mark.parametrize("size", [224, 200])
def test_logits_equal_timms(name, size):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False, num_classes=10).eval()
    ours = getattr(model, name)(num_classes=10).eval()
    ours.load_state_dict(weights.convert(theirs.state_dict()))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
