"""HaloNet: its layer against loops, pictures of any side, gates, stages that convolve, timm's names."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from nearfield import catalog
from nearfield.bench.resolution import model_macs
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.systems.halonet import model, weights
from nearfield.systems.halonet.layer import HaloAttention, NeighbourGate, SqueezeExcite
from nearfield.systems.halonet.model import Design, Plan, halonet

PLANS = (Plan(1, 16, 8, (0,), 1, 4, 1), Plan(2, 24, 16, (0, 1), 2, 4, 1, v_ratio=1.5))
DESIGN = Design(PLANS, stem=(8,), stem_size=3, final=32)


def tiny(design=DESIGN, **options):
    torch.manual_seed(0)
    return halonet(design, num_classes=5, **options).eval()


def by_loops(layer, x):
    """The layer from its definition, query by query; keys outside the map are zeros, or are not there."""
    batch, height, width, _ = x.shape
    block, halo, (dim, dv) = layer.block_size, layer.halo_size, layer.head_dims
    window, stride = block + 2 * halo, layer.query_stride
    step = stride if layer.rel_stride == "exact" else 1
    q = torch.einsum("byxc,oc->byxo", x, layer.q.weight[..., 0, 0]).unflatten(-1, (-1, dim))
    kv = torch.einsum("byxc,oc->byxo", x, layer.kv.weight[..., 0, 0]).unflatten(-1, (-1, dim + dv))
    out = x.new_zeros(batch, -(-height // stride), -(-width // stride), layer.num_heads, dv)
    for y in range(0, height, stride):
        for x_ in range(0, width, stride):
            query = q[:, y, x_]  # [B, H, D]
            (y0, i), (x0, j) = ((place // block * block, place % block) for place in (y, x_))
            logits, values = [], []
            for m in range(window):
                for n in range(window):
                    ky, kx = y0 - halo + m, x0 - halo + n
                    inside = 0 <= ky < height and 0 <= kx < width
                    if layer.border == "mask" and not inside:
                        continue
                    pair = kv[:, ky, kx] if inside else torch.zeros_like(kv[:, 0, 0])
                    place = (
                        layer.height_rel[window - 1 + m - i // stride * step]
                        + layer.width_rel[window - 1 + n - j // stride * step]
                    )
                    logits.append((query * (pair[..., :dim] * dim**-0.5 + place)).sum(-1))
                    values.append(pair[..., dim:])
            shares = torch.stack(logits).softmax(0)
            out[:, y // stride, x_ // stride] = (shares.unsqueeze(-1) * torch.stack(values)).sum(0)
    return out.flatten(-2)


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize(
    ("sides", "options"),
    [
        ((4, 4), {}),
        ((5, 3), {}),
        ((3, 6), {"stride": 2}),
        ((5, 5), {"stride": 2, "rel_stride": "timm"}),
    ],
)
def test_the_layer_is_its_definition(border, sides, options):
    torch.manual_seed(0)
    layer = HaloAttention(6, 2, block_size=2, halo_size=1, qk_dim=4, v_dim=6, border=border, **options)
    layer = layer.double()
    x = torch.randn(2, *sides, 6, dtype=torch.float64)
    assert (layer(x) - by_loops(layer, x)).abs().max() < 1e-10


def test_pooling_averages_the_attention_of_all_positions():
    torch.manual_seed(0)
    layer = HaloAttention(8, 2, block_size=3, halo_size=1, stride=2, pool=True).double()
    x = torch.randn(1, 5, 7, 8, dtype=torch.float64)
    whole = by_loops(layer, x)
    expected = torch.stack(
        [
            torch.stack([whole[:, y : y + 2, x_ : x_ + 2].mean((1, 2)) for x_ in range(0, 7, 2)], 1)
            for y in range(0, 5, 2)
        ],
        1,
    )
    assert (layer(x) - expected).abs().max() < 1e-10


def test_hidden_padding_has_the_gradients_of_the_definition():
    torch.manual_seed(0)
    layer = HaloAttention(4, 1, block_size=2, halo_size=1, border="mask").double()
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    wanted = (x, *layer.parameters())
    found, expected = (
        torch.autograd.grad(each(x).square().sum(), wanted) for each in (layer, partial(by_loops, layer))
    )
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-10


def test_gates_are_their_definition():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 64)
    means = x.mean((1, 2))
    gate = NeighbourGate(64)
    (taps,) = gate.conv.weight[0]
    assert len(taps) == 3
    for c in (0, 5, 63):
        near = sum(taps[t] * means[:, c + t - 1] for t in range(3) if 0 <= c + t - 1 < 64)
        assert torch.allclose(gate(x)[..., c], x[..., c] * near.sigmoid()[:, None, None], atol=1e-6)
    squeeze = SqueezeExcite(64, 8)
    opened = squeeze.fc2(squeeze.fc1(means).relu()).sigmoid()
    assert torch.allclose(squeeze(x), x * opened[:, None, None], atol=1e-6)


@pytest.mark.parametrize("sides", [(32, 32), (36, 52), (33, 47)])
@pytest.mark.parametrize("options", [{}, {"downsampling": "pool", "border": "mask"}])
def test_pictures_may_have_any_sides(sides, options):
    net = tiny(**options)
    first, second = net.forward_intermediates(torch.randn(2, 3, *sides), intermediates_only=True)
    assert first.shape == (2, 16, -(-sides[0] // 4), -(-sides[1] // 4))
    assert second.shape == (2, 24, -(-first.shape[2] // 2), -(-first.shape[3] // 2))
    assert net(torch.randn(2, 3, *sides)).shape == (2, 5)


def test_it_keeps_timms_contract():
    net = tiny()
    x = torch.randn(1, 3, 32, 32)
    features = net.forward_features(x)
    assert features.shape == (1, 4, 4, 32) and net.num_features == 32
    assert torch.equal(net.forward_head(features), net(x))
    assert [info["reduction"] for info in net.feature_info] == [4, 8]
    last = net.forward_intermediates(x, 1, norm=True, intermediates_only=True)[0]
    assert torch.equal(last, features.movedim(-1, 1))
    net.set_grad_checkpointing()
    net.train()(x.expand(2, -1, -1, -1)).sum().backward()
    net.eval()
    net.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
    assert net.num_features == 24 and net(x).shape == (1, 5)
    maps = FeaturePyramid(tiny())(torch.randn(1, 3, 64, 48))
    assert [tuple(each.shape) for each in maps] == [(1, 16, 16, 12), (1, 24, 8, 6)]


def test_a_block_begins_as_its_shortcut():
    x = torch.randn(2, 8, 8, 24)
    block = tiny().stages[1].blocks[1]
    assert torch.equal(block(x), block.activation(x))


def test_first_stages_may_convolve():
    net = tiny(num_conv_stages=1)
    kinds = [[isinstance(b.mix.layer, HaloAttention) for b in stage.blocks] for stage in net.stages]
    assert kinds == [[False], [True, True]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(tiny, num_conv_stages=3), "num_conv_stages=3: the model has 2 stages"),
        (partial(tiny, downsampling="max"), "downsampling='max' is unknown"),
        (partial(tiny, activation="gelu"), "activation='gelu' is unknown. Choose relu or silu"),
        (partial(HaloAttention, 8, 3), "qk_dim=8 or v_dim=8 is no multiple of num_heads=3"),
        (partial(HaloAttention, 8, 2, block_size=7, stride=2), "stride=2 does not divide block_size=7"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


TIMM = (  # ours -> timm's
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"^norm\.", "final_conv."),
    (r"^head\.", "head.fc."),
    (r"\.gate\.", ".attn."),
    (r"\.mix\.layer\.(height|width)_rel", r".self_attn.pos_embed.\1_rel"),
    (r"\.mix\.layer\.(q|kv)\.", r".self_attn.\1."),
    (r"(\.conv1|\.mix|\.conv2|\.shortcut|\.convs\.\d|^final_conv)\.layer\.", r"\1.conv."),
    (r"(\.conv1|\.mix|\.conv2|\.shortcut|\.convs\.\d|^final_conv)\.norm\.", r"\1.bn."),
    (r"\.conv1\.", ".conv1_1x1."),
    (r"\.mix\.", ".conv2_kxk."),
    (r"\.conv2\.", ".conv3_1x1."),
)


def timm_names(state):
    found = {}
    for name, value in state.items():
        attends = name.replace(name.split(".mix.")[-1], "layer.q.weight") in state
        for pattern, replacement in TIMM:
            name = re.sub(pattern, replacement, name)
        if attends:
            name = name.replace(".conv2_kxk.bn.", ".post_attn.")
        if name.startswith("stem."):
            name = re.sub(r"^stem\.convs\.(\d)", lambda m: f"stem.conv{int(m[1]) + 1}", name)
        is_gate = ".attn.fc" in name and name.endswith("weight")
        found[name] = value[..., None, None] if is_gate else value
    return found


@pytest.mark.parametrize("name", ["halonet26t", "sehalonet33ts", "eca_halonext26ts"])
def test_timms_names_become_ours(name):
    with torch.device("meta"):
        state = getattr(model, name)().state_dict()
    theirs = timm_names(state)
    assert "stages.3.0.self_attn.pos_embed.height_rel" in theirs and "stages.3.0.post_attn.weight" in theirs
    assert "stages.0.1.conv2_kxk.bn.weight" in theirs and "stem.conv3.conv.weight" in theirs
    found = weights.convert(theirs)
    assert found.keys() == state.keys()
    assert all(found[name].shape == state[name].shape for name in state)


def test_a_joint_projection_is_taken_apart_by_heads():
    joint = torch.arange(24.0)[:, None, None, None]  # two heads of 4: queries, keys, values
    home = "stages.0.0.self_attn."
    found = weights.convert({f"{home}qkv.weight": joint, f"{home}pos_embed.height_rel": torch.zeros(3, 4)})
    q, kv = (found[f"stages.0.blocks.0.mix.layer.{name}.weight"].flatten().tolist() for name in ("q", "kv"))
    assert q == [*range(8)]
    assert kv == [*range(8, 12), *range(16, 20), *range(12, 16), *range(20, 24)]


def test_cost_is_as_published():
    assert model_macs(model.halonet26t(), (3, 256, 256)) / 1e9 == pytest.approx(3.19, rel=0.02)


def test_sizes_are_as_published():
    published = {"h0": 5.5, "h1": 8.1, "h2": 9.4, "h3": 11.8, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}
    counted = catalog.find("halonet").params
    for name, millions in published.items():
        assert counted[f"halonet_{name}"] / 1e6 == pytest.approx(millions, abs=0.06)


def test_designs_can_be_changed():
    (design,) = model.halonet_h1.args
    stages = tuple(replace(plan, num_heads=8) for plan in design.stages)
    with torch.device("meta"):  # timm's H1
        net = halonet(replace(design, stages=stages), activation="relu")
    assert sum(parameter.numel() for parameter in net.parameters()) == 8100056
