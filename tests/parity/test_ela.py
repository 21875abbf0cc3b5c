"""Our hosts hold timm's weights and give its logits; gates go into timm's networks and out again."""

import pytest
import torch

from nearfield.systems.ela import model, weights
from nearfield.systems.ela.convert import insert

HOSTS = {  # timm's name -> ours, and where the gates go
    "resnet18": (model.ela_resnet18, "layer?.*.bn2", 8, 17_280),
    "resnet50": (model.ela_resnet50, "layer?.*.bn3", 16, 135_936),
    "mobilenetv2_100": (model.ela_mobilenet_v2, "blocks.[1-6].*.bn2", 16, 63_936),
}


def untied(name):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False, num_classes=10)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # some begin as zeros, and nothing would be seen
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return theirs.eval()


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", HOSTS)
def test_logits_equal_timms(name):
    theirs = untied(name)
    ours = HOSTS[name][0](num_classes=10, gate="none").eval()
    ours.load_state_dict(weights.convert(theirs.state_dict()))
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        close(ours(x), theirs(x))


@pytest.mark.parametrize("name", HOSTS)
def test_gates_go_into_timms_networks_and_out_again(name):
    theirs, (ours, where, count, parameters) = untied(name), HOSTS[name]
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        plain = theirs(x)
        inserted = insert(theirs, where)
        assert len(inserted.channels) == count and inserted.num_parameters == parameters
        gated = ours(num_classes=10).eval()
        state = {
            key.replace("bn2.inserted_gate", "gate").replace("bn3.inserted_gate", "gate"): value
            for key, value in theirs.state_dict().items()
        }
        missing = gated.load_state_dict(weights.convert(state), strict=False).missing_keys
        if not missing:  # our MobileNetV2 has one in its first block too
            close(gated(x), theirs(x))
        assert not torch.allclose(theirs(x), plain, atol=1e-4)
        inserted.remove()
        assert torch.equal(theirs(x), plain)
