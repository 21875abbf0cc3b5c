"""Our HaloNets hold timm's weights and give its logits."""

from dataclasses import replace

import pytest
import torch

from nearfield.systems.halonet import model, weights

SIDES = {
    "halonet26t": 256,
    "sehalonet33ts": 256,
    "halonet50ts": 256,
    "eca_halonext26ts": 256,
    "haloregnetz_b": 224,
    "halo2botnet50ts_256": 256,
}


def equal(theirs, ours, side):
    ours.load_state_dict(weights.convert(theirs.state_dict()))
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    assert expected.abs().max() > 1e-3  # the blocks' last norms do not hold all at 0
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def lively(net):
    """The net with norms that are drawn: timm's begin at 0 behind each block."""
    for module in net.modules():
        if hasattr(module, "running_mean"):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return net.eval()


@pytest.mark.parametrize("name", SIDES)
def test_logits_equal_timms(name):
    import timm

    torch.manual_seed(0)
    theirs = lively(timm.create_model(name, pretrained=False, num_classes=10))
    equal(theirs, getattr(model, name)(num_classes=10).eval(), SIDES[name])


def test_logits_of_h1_equal_timms():
    import timm

    torch.manual_seed(0)
    theirs = lively(timm.create_model("halonet_h1", pretrained=False, num_classes=10))
    (design,) = model.halonet_h1.args
    stages = tuple(replace(plan, num_heads=8) for plan in design.stages)  # the paper's first stage has 4
    ours = model.halonet(replace(design, stages=stages), num_classes=10, rel_stride="timm", activation="relu")
    equal(theirs, ours.eval(), 256)
