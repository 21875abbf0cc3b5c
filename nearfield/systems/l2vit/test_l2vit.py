"""L2ViT: linear attention against all its pairs, the floor, any side, official names."""

import re

import pytest
import torch
from torch.nn import functional as F

from nearfield.measure.flops import count_flops
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.systems.l2vit import model, weights
from nearfield.systems.l2vit.model import Concentration, LinearAttention, Stem, l2vit, l2vit_tiny


def tiny(**options):
    torch.manual_seed(0)
    return l2vit((8, 16), (2, 2), (1, 2), num_classes=5, window_size=4, **options).eval()


@pytest.mark.parametrize("floor", [1e-6, 20.0, 1e4])
def test_linear_attention_is_its_weights_times_the_values(floor):
    torch.manual_seed(0)
    layer = LinearAttention(12, 3, min_denominator=floor).double()
    torch.nn.init.uniform_(layer.temperature)
    x = 3 * torch.randn(2, 3, 5, 12, dtype=torch.float64)
    expected = torch.empty(2, 15, 12, dtype=torch.float64)
    for b in range(2):
        rows = layer.qkv(x[b].flatten(0, 1))  # [N, 3 C]
        for head in range(3):
            q, k, v = (rows[:, 12 * part + 4 * head : 12 * part + 4 * head + 4] for part in range(3))
            pairs = q.relu() @ k.relu().T
            held = pairs.sum(-1, keepdim=True)
            assert (layer.sums(x)[b, :, head] - held[:, 0]).abs().max() < 1e-10
            weights_ = layer.temperature[head] * pairs / held.clamp(min=floor)
            assert (weights_.sum(-1) <= layer.temperature[head] + 1e-12).all()
            expected[b, :, 4 * head : 4 * head + 4] = weights_ @ v
    assert (layer(x) - layer.proj(expected).view(2, 3, 5, 12)).abs().max() < 1e-10


def test_the_temperature_starts_as_the_scale_of_a_softmax():
    assert torch.equal(LinearAttention(64, 2).temperature, torch.full((2,), 32**-0.5))
    with pytest.raises(ValueError, match="no multiple of num_heads=5"):
        LinearAttention(64, 5)


def test_half_precision_sums_over_a_large_map_without_overflow():
    torch.manual_seed(0)
    layer = LinearAttention(32, 1).half()
    with torch.no_grad():
        layer.qkv.weight.fill_(0.05)  # q, k and v of 6.4: a row sums to 85 million
        assert layer(torch.full((1, 256, 256, 32), 4.0, dtype=torch.float16)).isfinite().all()


def test_concentration_reaches_six_tokens_around_and_no_further():
    torch.manual_seed(0)
    layer = Concentration(2).double().eval()
    x = torch.zeros(1, 17, 17, 2, dtype=torch.float64)
    moved = x.clone()
    moved[0, 8, 8] = 1
    changed = (layer(moved) - layer(x)).abs().sum((0, -1)) > 0
    inside = torch.zeros(17, 17, dtype=torch.bool)
    inside[2:15, 2:15] = True
    assert torch.equal(changed, inside)


def test_the_stem_lengthens_other_sides_by_zeros():
    torch.manual_seed(0)
    stem = Stem(3, 8).eval()
    x = torch.randn(1, 9, 14, 3)
    assert torch.equal(stem(x), stem(F.pad(x, (0, 0, 0, 2, 0, 3))))


@pytest.mark.parametrize("side", [(32, 32), (36, 52), (33, 47)])
def test_pictures_may_have_any_sides(side):
    net = tiny()
    x = torch.randn(1, 3, *side)
    first, second = net.forward_intermediates(x, intermediates_only=True)
    assert first.shape == (1, 8, -(-side[0] // 4), -(-side[1] // 4))
    assert second.shape == (1, 16, -(-first.shape[2] // 2), -(-first.shape[3] // 2))
    assert net(x).shape == (1, 5)


def test_kinds_of_block_take_turns_in_each_stage():
    def kinds(net):
        return [type(block.attn).__name__ for stage in net.stages for block in stage.blocks]

    assert kinds(tiny()) == ["WindowAttention", "LinearAttention"] * 2
    assert kinds(tiny(blocks=("linear",))) == ["LinearAttention"] * 4
    plain = tiny(concentrate=False)
    assert not any("local" in name for name, _ in plain.named_parameters())
    assert plain(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(ValueError, match="give one or more of window, linear"):
        tiny(blocks=("window", "global"))


def test_it_offers_what_backbones_do():
    net, x = tiny(), torch.randn(2, 3, 64, 48)
    features = net.forward_features(x)
    assert torch.equal(net.forward_head(features), net(x))
    plain = net(x)
    net.set_grad_checkpointing()
    assert torch.equal(net(x), plain)
    net.reset_classifier(0)
    assert net(x).shape == (2, 16)
    maps = FeaturePyramid(net)(x)
    assert [tuple(each.shape) for each in maps] == [(2, 8, 16, 12), (2, 16, 8, 6)]


OFFICIAL = (  # ours -> the names in the official file
    (r"^stem\.proj\.", "downsample_layers.0.proj.proj."),
    (r"^stem\.norm\.", "downsample_layers.0.norm."),
    (r"^stages\.(\d)\.downsample\.norm_before\.", r"downsample_layers.\1.norm."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"\.blocks\.", "."),
    (r"\.cpe1\.", ".cpe.0."),
    (r"\.cpe2\.", ".cpe.1."),
    (r"\.local\.norm\.", ".local_mp.bn."),
    (r"\.local\.", ".local_mp."),
)


def official(name):
    for pattern, replacement in OFFICIAL:
        name = re.sub(pattern, replacement, name)
    return name


def test_official_names_become_ours():
    with torch.device("meta"):
        state = l2vit_tiny().state_dict()
    theirs = {
        official(name): value[:, None, None] if name.endswith("temperature") else value
        for name, value in state.items()
    }
    assert "downsample_layers.0.proj.proj.4.running_mean" in theirs
    assert "stages.2.1.local_mp.bn.weight" in theirs and "stages.3.0.cpe.1.proj.bias" in theirs
    assert theirs["stages.3.1.attn.temperature"].shape == (24, 1, 1)
    found = weights.convert(theirs)
    assert found.keys() == state.keys()
    assert all(found[name].shape == state[name].shape for name in state)


@pytest.mark.parametrize(
    ("name", "side", "macs", "parameters"),
    [
        ("tiny", 224, 4.71, 28_596_781),
        ("small", 224, 9.02, 50_199_157),
        ("base", 224, 15.86, 88_577_188),
        ("base_384", 384, 47.47, 88_577_188),
    ],
)
def test_size_and_cost_are_as_published(name, side, macs, parameters):
    with torch.device("meta"):
        net = getattr(model, f"l2vit_{name}")().eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    flops = count_flops(lambda: net(torch.empty(1, 3, side, side, device="meta")))
    assert flops / 2e9 == pytest.approx(macs, rel=0.02)
