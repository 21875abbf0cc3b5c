"""DaViT: channel attention against its definition, any side, half precision on large maps, official names."""

import re

import pytest
import torch

from nearfield.bench.resolution import model_macs
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.systems.davit import weights
from nearfield.systems.davit.model import ChannelAttention, davit, davit_tiny


def tiny(**options):
    torch.manual_seed(0)
    return davit((8, 16), (1, 1), (1, 2), num_classes=5, window_size=4, **options).eval()


@pytest.mark.parametrize("scaled", [False, True])
def test_channel_attention_is_a_softmax_between_the_channels_of_each_group(scaled):
    torch.manual_seed(0)
    layer = ChannelAttention(12, 3, scale_by_tokens=scaled).double()
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    rows = layer.qkv(x.flatten(1, 2))  # [B, N, 3 C]
    expected = torch.empty(2, 15, 12, dtype=torch.float64)
    for b in range(2):
        for group in range(3):
            q, k, v = (rows[b, :, 12 * part + 4 * group : 12 * part + 4 * group + 4] for part in range(3))
            for i in range(4):
                if scaled:  # channel i of q looks at the channels of k and takes those of v
                    weight = torch.stack([(q[:, i] * k[:, j]).sum() / 15**0.5 for j in range(4)]).softmax(0)
                    expected[b, :, 4 * group + i] = sum(weight[j] * v[:, j] for j in range(4))
                else:  # channel i of k looks at the channels of v and takes those of q
                    weight = torch.stack([(k[:, i] * v[:, j]).sum() / 4**0.5 for j in range(4)]).softmax(0)
                    expected[b, :, 4 * group + i] = sum(weight[j] * q[:, j] for j in range(4))
    expected = layer.proj(expected).view(2, 3, 5, 12)
    assert (layer(x) - expected).abs().max() < 1e-6  # the softmax is taken in float32


def test_half_precision_does_not_overflow_on_a_large_map():
    torch.manual_seed(0)
    layer = ChannelAttention(32, 1).half()
    x = torch.full((1, 256, 256, 32), 4.0, dtype=torch.float16)
    with torch.no_grad():
        layer.qkv.weight.fill_(0.05)  # q, k, v of 6.4: their sum over 65,536 positions is 2.7 million
        assert layer(x).isfinite().all()


@pytest.mark.parametrize("side", [(32, 32), (36, 52), (33, 47)])
@pytest.mark.parametrize("overlapped", [False, True])
def test_pictures_may_have_any_sides(side, overlapped):
    net = tiny(overlapped=overlapped, scale_by_tokens=overlapped)
    x = torch.randn(1, 3, *side)
    first, second = net.forward_intermediates(x, intermediates_only=True)
    assert first.shape == (1, 8, -(-side[0] // 4), -(-side[1] // 4))
    assert second.shape == (1, 16, -(-first.shape[2] // 2), -(-first.shape[3] // 2))
    assert net(x).shape == (1, 5)


def test_it_is_a_feature_pyramid_for_dense_prediction():
    maps = FeaturePyramid(tiny())(torch.randn(2, 3, 64, 48))
    assert [tuple(each.shape) for each in maps] == [(2, 8, 16, 12), (2, 16, 8, 6)]


def test_an_unknown_kind_of_attention_is_refused():
    with pytest.raises(ValueError, match="global is none of window, channel"):
        tiny(attentions=("window", "global"))


OFFICIAL = (  # ours -> the names in the official file
    (r"^stem\.", "patch_embeds.0."),
    (r"^stages\.(\d)\.downsample\.norm_before\.", r"patch_embeds.\1.norm."),
    (r"^stages\.(\d)\.downsample\.", r"patch_embeds.\1."),
    (r"^norm\.", "norms."),
    (r"\.cpe1\.", ".cpe.0."),
    (r"\.cpe2\.", ".cpe.1."),
)


def official(name):
    name = re.sub(
        r"^stages\.(\d)\.blocks\.(\d+)\.",
        lambda m: f"main_blocks.{m[1]}.{int(m[2]) // 2}.{int(m[2]) % 2}.",
        name,
    )
    for pattern, replacement in OFFICIAL:
        name = re.sub(pattern, replacement, name)
    return name


def test_official_names_become_ours():
    with torch.device("meta"):
        state = davit_tiny().state_dict()
    theirs = {official(name): value for name, value in state.items()}
    assert "main_blocks.2.1.0.cpe.1.proj.weight" in theirs and "patch_embeds.3.norm.bias" in theirs
    found = weights.convert(theirs)
    assert found.keys() == state.keys()
    assert all(found[name] is state[name] for name in state)


def test_cost_is_as_published():
    assert model_macs(davit_tiny()) / 1e9 == pytest.approx(4.54, rel=0.02)


def test_shapes_are_known_without_memory():
    with torch.device("meta"):
        assert davit_tiny()(torch.empty(2, 3, 96, 64)).shape == (2, 1000)
