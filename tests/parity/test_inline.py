"""The hosts that InLine changes: with softmax everywhere they hold timm's weights and give its logits."""

import re

import pytest
import torch

from nearfield.systems.inline import model, weights

HOSTS = {
    "swin_tiny_patch4_window7_224": lambda: model.inline_swin(
        model.SWIN, (2, 2, 6, 2), model.SWIN_HEADS, pattern="SSSS", num_classes=10
    ),
    "deit_tiny_patch16_224": lambda: model.inline_deit(192, 3, pattern="S", num_classes=10),
}


def official(name):
    """timm merges patches at the start of a stage of Swin, the official code at the end of the one before."""
    name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    return name.replace("head.fc.", "head.")


@pytest.mark.parametrize("name", HOSTS)
def test_logits_equal_timms(name):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False, num_classes=10).eval()
    ours = HOSTS[name]().eval()
    ours.load_state_dict(weights.convert({official(key): held for key, held in theirs.state_dict().items()}))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
