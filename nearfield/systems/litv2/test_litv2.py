"""LITv2: HiLo against its two parts, merging against interpolation by hand, any side, official names."""

import re
from math import floor

import pytest
import torch
from torch.nn import functional as F

from nearfield.bench.resolution import model_macs
from nearfield.measure.flops import count_flops
from nearfield.nn.attention import Attention
from nearfield.nn.hilo import HiLo
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.systems.litv2 import model, weights
from nearfield.systems.litv2.model import DeformableMerge, litv2, litv2_small, moved


def tiny(**options):
    torch.manual_seed(0)
    options = {"window_sizes": (None, 2, 1), **options}
    return litv2((8, 16, 24), (1, 1, 1), (1, 4, 3), num_classes=5, **options).eval()


def softmax_attention(q, k, v):
    """Of `[N, heads, D]` to `[M, heads, D]`."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_high_heads_see_their_window_and_low_heads_the_means_of_all(alpha):
    torch.manual_seed(0)
    layer = HiLo(16, 4, 2, alpha).double()
    x = torch.randn(1, 4, 6, 16, dtype=torch.float64)
    low, high = layer.low_heads, layer.high_heads
    assert (low, high) == (int(4 * alpha), 4 - int(4 * alpha))
    parts = []
    if high:
        q, k, v = layer.high_qkv(x[0]).unflatten(-1, (3, high, 4)).unbind(2)
        out = torch.empty(4, 6, high, 4, dtype=torch.float64)
        for y in range(0, 4, 2):
            for z in range(0, 6, 2):
                window = (slice(y, y + 2), slice(z, z + 2))
                tile = softmax_attention(*(each[window].flatten(0, 1) for each in (q, k, v)))
                out[window] = tile.unflatten(0, (2, 2))
        parts.append(layer.high_proj(out.flatten(-2)))
    if low:
        pooled = F.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)
        k, v = layer.low_kv(pooled[0]).flatten(0, 1).unflatten(-1, (2, low, 4)).unbind(1)
        q = layer.low_q(x[0]).flatten(0, 1).unflatten(-1, (low, 4))
        parts.append(layer.low_proj(softmax_attention(q, k, v).flatten(-2)).unflatten(0, (4, 6)))
    assert (layer(x)[0] - torch.cat(parts, -1)).abs().max() < 1e-10


def test_windows_of_one_token_are_ordinary_attention():
    torch.manual_seed(0)
    layer, plain = HiLo(12, 3, 1, 0.3).double(), Attention(12, 3).double()
    with torch.no_grad():
        for part in ("weight", "bias"):
            getattr(plain.qkv, part).copy_(
                torch.cat([getattr(layer.low_q, part), getattr(layer.low_kv, part)])
            )
        plain.proj.load_state_dict(layer.low_proj.state_dict())
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    assert (layer(x) - plain(x)).abs().max() < 1e-10


def test_a_map_that_windows_do_not_divide_is_padded_or_refused():
    torch.manual_seed(0)
    layer = HiLo(8, 2, 2).double()
    x = torch.randn(1, 3, 5, 8, dtype=torch.float64)
    assert torch.equal(layer(x), layer(F.pad(x, (0, 0, 0, 1, 0, 1)))[:, :3, :5])
    with pytest.raises(ValueError, match=r"does not divide the grid \(3, 5\)"):
        HiLo(8, 2, 2, pad=False).double()(x)


def test_the_layer_has_the_published_size_and_cost():
    layer = HiLo(384, 12, 2, 0.5, qkv_bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 516_480
    with torch.no_grad():
        assert count_flops(lambda: layer(torch.randn(1, 14, 14, 384))) / 2 == 83_467_776


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_heads": 5}, "no multiple of"),
        ({"alpha": 1.5}, "give 0 to 1"),
        ({"window_size": 0}, "at least 1"),
    ],
)
def test_wrong_options_of_the_layer_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        HiLo(**{"dim": 12, "num_heads": 3, **given})


def test_merging_without_offsets_is_a_strided_convolution():
    torch.manual_seed(0)
    layer = DeformableMerge(4, 6).double().eval()
    x = torch.randn(2, 6, 8, 4, dtype=torch.float64)
    plain = F.gelu(layer.norm(F.conv2d(x.movedim(-1, 1), layer.conv.weight, layer.conv.bias, stride=2)))
    assert (layer(x) - plain.movedim(1, -1)).abs().max() < 1e-10


def test_taps_read_between_the_pixels_where_their_offsets_point():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    offset = 2 * torch.randn(1, 8, 2, 3, dtype=torch.float64)  # many point outside
    expected = torch.zeros(2, 4, 6, dtype=torch.float64)
    for y in range(4):
        for z in range(6):
            tap = 2 * (y % 2) + z % 2
            at_y = y + float(offset[0, 2 * tap, y // 2, z // 2])
            at_z = z + float(offset[0, 2 * tap + 1, y // 2, z // 2])
            for row in (floor(at_y), floor(at_y) + 1):
                for column in (floor(at_z), floor(at_z) + 1):
                    if 0 <= row < 4 and 0 <= column < 6:
                        weight = (1 - abs(at_y - row)) * (1 - abs(at_z - column))
                        expected[:, y, z] += weight * x[0, :, row, column].detach()
    assert (moved(x, offset)[0] - expected).abs().max() < 1e-10
    assert torch.autograd.gradcheck(moved, (x, offset.requires_grad_()))


@pytest.mark.parametrize("side", [(32, 32), (36, 52), (33, 47)])
def test_pictures_may_have_any_sides(side):
    net = tiny()
    maps = net.forward_intermediates(torch.randn(1, 3, *side), intermediates_only=True)
    sizes = [-(-length // 4) for length in side]
    for shown in maps:
        assert list(shown.shape[2:]) == sizes
        sizes = [-(-length // 2) for length in sizes]
    assert net(torch.randn(1, 3, *side)).shape == (1, 5)


def test_windows_may_grow_after_training():
    net, larger = tiny(), tiny(window_sizes=(None, 4, 1))
    larger.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 64, 64)
    wanted = larger(x)
    net.stages[1].blocks[0].attn.window_size = 4
    assert torch.equal(net(x), wanted)
    assert model_macs(larger, (3, 64, 64)) < model_macs(tiny(), (3, 64, 64))


def test_it_offers_what_backbones_do():
    net, x = tiny(), torch.randn(2, 3, 32, 32)
    features = net.forward_features(x)
    assert torch.equal(net.forward_head(features), net(x))
    assert [info["reduction"] for info in net.feature_info] == [4, 8, 16]
    plain = net(x)
    net.set_grad_checkpointing()
    assert torch.equal(net(x), plain)
    net.reset_classifier(0)
    assert net(x).shape == (2, 24)
    maps = FeaturePyramid(net)(x)
    assert [tuple(each.shape[1:]) for each in maps] == [(8, 8, 8), (16, 4, 4), (24, 2, 2)]


OFFICIAL = (  # ours -> the names in the official file
    (r"^stem\.", "patch_embed."),
    (r"^stages\.", "layers."),
    (r"\.downsample\.offset\.", ".downsample.dconv.conv_offset."),
    (r"\.downsample\.conv\.", ".downsample.dconv."),
    (r"\.downsample\.norm\.", ".downsample.norm_layer."),
    (r"\.mlp\.conv\.", ".mlp.dwconv.dwconv."),
    (r"\.low_", ".l_"),
    (r"\.high_", ".h_"),
)


def official(name):
    name = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) - 1}.downsample", name)
    for pattern, replacement in OFFICIAL:
        name = re.sub(pattern, replacement, name)
    return name


def test_official_names_become_ours():
    with torch.device("meta"):
        state = litv2_small().state_dict()
    theirs = {official(name): value for name, value in state.items()}
    assert (
        "layers.2.downsample.dconv.conv_offset.bias" in theirs
        and "layers.3.blocks.1.attn.l_kv.bias" in theirs
    )
    assert (
        "layers.0.blocks.0.norm1.weight" not in theirs and "layers.3.blocks.0.attn.h_proj.bias" not in theirs
    )
    found = weights.convert(theirs)
    assert found.keys() == state.keys()
    assert all(found[name] is state[name] for name in state)


@pytest.mark.parametrize(
    ("name", "macs", "parameters"),
    [("small", 3.73, 27.84), ("medium", 7.48, 48.83), ("base", 13.19, 86.52), ("base_384", 39.71, 86.52)]
    + [(f"small_alpha{a}", None, p) for a, p in (("00", 28.09), ("02", 27.84), ("04", 27.70))]
    + [(f"small_alpha{a}", None, p) for a, p in (("05", 27.65), ("07", 27.70), ("10", 28.09))],
)
def test_size_and_cost_are_as_published(name, macs, parameters):
    with torch.device("meta"):
        net = getattr(model, f"litv2_{name}")().eval()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == parameters
    if macs is not None:
        side = 384 if name.endswith("384") else 224
        flops = count_flops(lambda: net(torch.empty(1, 3, side, side, device="meta")))
        assert flops / 2e9 == pytest.approx(macs, rel=0.02)
