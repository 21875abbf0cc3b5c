"""Our ConViT holds timm's weights and gives its logits."""

import pytest
import torch

from nearfield.systems.convit import model, weights


@pytest.mark.parametrize("name", ["convit_tiny", "convit_small"])
def test_logits_equal_timms(name):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False, num_classes=10).eval()
    ours = getattr(model, name)(num_classes=10).eval()
    with torch.no_grad():
        for block in theirs.blocks[:10]:  # as after some training: gates and heads differ
            block.attn.gating_param.normal_()
            block.attn.pos_proj.weight.add_(torch.randn_like(block.attn.pos_proj.weight), alpha=0.1)
    ours.load_state_dict(weights.convert(theirs.state_dict()))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_it_starts_where_timms_starts():
    import timm

    theirs = timm.create_model("convit_tiny", pretrained=False).blocks[0].attn
    ours = model.convit_tiny().blocks[0].attn
    assert torch.equal(ours.pos_proj.weight, theirs.pos_proj.weight)
    assert torch.equal(ours.qkv.weight[2 * 192 :], theirs.v.weight)
    assert torch.equal(ours.gating_param, theirs.gating_param)
