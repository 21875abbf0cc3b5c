"""ConViT: gated positional attention against its definition, its start, official names, timm's contract."""

import math

import pytest
import torch
from torch import nn

from nearfield.bench.resolution import global_vit, model_macs
from nearfield.nn.attention import Attention
from nearfield.nn.position import resize_positions
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.systems.convit import weights
from nearfield.systems.convit.convert import localise, to_gated
from nearfield.systems.convit.layer import GatedPositionalAttention
from nearfield.systems.convit.model import convit, convit_tiny


def tiny(**options):
    torch.manual_seed(0)
    options = {"num_classes": 5, "image_size": 32, "patch_size": 8, **options}
    return convit(4, 4, 3, 2, **options).eval()


def layer(**options):
    torch.manual_seed(0)
    made = GatedPositionalAttention(12, 3, **options).double()
    nn.init.normal_(made.gating_param)
    nn.init.normal_(made.pos_proj.weight, std=0.5)
    return made


def by_hand(made, x):
    """The output by loops over heads, queries and keys of one map."""
    _, height, width, dim = x.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    q, k, v = made.qkv(x).flatten(1, 2)[0].view(-1, 3, made.num_heads, dim // made.num_heads).unbind(1)
    out = torch.empty_like(v)
    for head in range(made.num_heads):
        w, gate = made.pos_proj.weight[head], torch.sigmoid(made.gating_param[head])
        for i, (row, column) in enumerate(places):
            content, local = [], []
            for j, (other_row, other_column) in enumerate(places):
                dx, dy = other_column - column, other_row - row
                content.append(q[i, head] @ k[j, head] * (dim // made.num_heads) ** -0.5)
                local.append(w[0] * dx + w[1] * dy + w[2] * (dx**2 + dy**2) + made.pos_proj.bias[head])
            content, local = torch.stack(content).softmax(0), torch.stack(local).softmax(0)
            out[i, head] = ((1 - gate) * content + gate * local) @ v[:, head]
    return made.proj(out.flatten(1)).view(x.shape)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_it_mixes_a_softmax_of_content_with_one_of_offsets(qkv_bias):
    made = layer(qkv_bias=qkv_bias)
    x = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    expected = by_hand(made, x)
    assert (made(x) - expected).abs().max() < 1e-12
    with torch.no_grad():
        made.pos_proj.weight[1, 0] += 0.1  # along x of one head
    assert (made(x) - expected).abs().max() > 1e-4


def test_gradients_are_those_of_the_definition():
    made = layer()
    x = torch.randn(1, 2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, x, fast_mode=True)
    mixture = torch.randn(x.shape, dtype=torch.float64)
    names, parameters = zip(*made.named_parameters(), strict=True)
    found = torch.autograd.grad((made(x) * mixture).sum(), parameters)  # of every one, or it raises
    expected = torch.autograd.grad((by_hand(made, x) * mixture).sum(), parameters)
    for name, one, other in zip(names, found, expected, strict=True):
        assert (one - other).abs().max() < 1e-10, name


def test_the_maps_are_the_ones_that_forward_applies():
    made = layer()
    x = torch.randn(2, 3, 2, 12, dtype=torch.float64)
    maps = made.maps(x)
    assert (maps.sum(-1) - 1).abs().max() < 1e-12
    v = made.qkv(x).flatten(1, 2)[..., 24:].unflatten(-1, (3, 4)).transpose(1, 2)
    assert (made(x) - made.proj((maps @ v).transpose(1, 2).flatten(-2)).view(x.shape)).abs().max() < 1e-12


@pytest.mark.parametrize(("num_heads", "strength"), [(4, 1.0), (9, 0.5), (16, 2.0)])
def test_heads_start_as_gaussians_around_the_offsets_of_a_square(num_heads, strength):
    made = GatedPositionalAttention(4 * num_heads, num_heads, locality_strength=strength).double()
    rows, columns = made.offset_maps(5, 7)
    side = math.isqrt(num_heads)
    centres = [place - (side - 1) / 2 for place in range(side)]
    for head in range(num_heads):
        for maps, centre in ((rows, centres[head % side]), (columns, centres[head // side])):
            place = torch.arange(maps.shape[-1], dtype=torch.float64)
            expected = (-strength * (place - place[:, None] - centre).square()).exp()
            assert (maps[head] - expected / expected.sum(-1, keepdim=True)).abs().max() < 1e-12
    assert torch.equal(made.qkv.weight[-made.proj.in_features :], torch.eye(made.proj.in_features).double())
    assert made.gates.sub(torch.sigmoid(torch.tensor(1.0))).abs().max() < 1e-6


def test_without_a_local_start_values_and_offsets_are_drawn():
    made = GatedPositionalAttention(12, 4, locality_strength=None)
    assert made.pos_proj.weight.unique().numel() == 12
    model = tiny(locality_strength=None)
    assert not torch.equal(model.blocks[0].attn.qkv.weight[-16:], torch.eye(16))


def test_half_precision_holds_on_a_large_map():
    made = GatedPositionalAttention(4, 1, locality_strength=2.0).bfloat16()
    rows, columns = made.offset_maps(300, 300)  # squared offsets beyond float16
    assert rows.dtype == torch.float32 and rows.isfinite().all() and torch.equal(rows, columns)
    assert made(torch.randn(1, 3, 40, 4, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("side", [(32, 32), (24, 40), (33, 17)])
def test_pictures_may_have_any_sides(side):
    model, x = tiny(), torch.randn(1, 3, *side)
    grid = tuple(-(-length // 8) for length in side)
    features, maps = model.forward_intermediates(x)
    assert features.shape == (1, 1 + math.prod(grid), 16)
    assert [tuple(each.shape) for each in maps] == [(1, 16, *grid)] * 3
    assert model(x).shape == (1, 5)


def test_positions_of_the_own_grid_are_taken_as_they_are():
    positions = torch.randn(1, 4, 5, 3)
    assert resize_positions(positions, (4, 5)) is positions
    flat = torch.full((1, 4, 5, 3), 2.0)
    assert (resize_positions(flat, (7, 3)) - 2).abs().max() < 1e-5


def test_the_class_token_comes_in_with_plain_attention():
    model = tiny()
    x = torch.randn(1, 3, 32, 32)
    state = model.embed(x)
    for number, block in enumerate(model.blocks):
        state = block(state)
        assert torch.equal(state.token, model.cls_token) == (number < 2)
    with pytest.raises(ValueError, match="local_depth=3 must be 0 to 2"):
        convit(4, 4, 3, 3)


def test_it_keeps_timms_contract():
    model, x = tiny(), torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
    final, maps = model.forward_intermediates(x, 1, norm=True, output_fmt="NHWC")
    assert (maps[0].flatten(1, 2) - final[:, 1:]).abs().max() < 1e-6
    expected = model(x)
    model.set_grad_checkpointing()
    kept = model(x)
    assert torch.equal(kept, expected)
    kept.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    model.reset_classifier(7, "token")
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7
    with pytest.raises(ValueError, match="in its own way only, 'token'"):
        model.reset_classifier(7, "avg")
    pyramid = FeaturePyramid(tiny(), (0, 1))
    assert [tuple(each.shape) for each in pyramid(x)] == [(2, 16, 4, 4)] * 2


def test_plain_attention_becomes_gated_and_stays_what_it_was_where_gates_are_shut():
    torch.manual_seed(0)
    plain = Attention(16, 4).double()
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    assert (to_gated(plain, gate=1e-9)(x) - plain(x)).abs().max() < 1e-7
    half = to_gated(plain, gate=0.5)
    assert half.gates.sub(0.5).abs().max() < 1e-12 and (half(x) - plain(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="gate=0 must lie between"):
        to_gated(plain, gate=0)
    with pytest.raises(TypeError, match="A Linear has no qkv and no proj and no num_heads"):
        to_gated(nn.Linear(3, 3))


def test_layers_of_a_vision_transformer_become_gated_by_name():
    torch.manual_seed(0)
    model = global_vit(16, 3, 4, patch=8, side=32, num_classes=5)
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    with pytest.raises(ValueError, match="No module matches"):
        localise(model, "layers.*")
    with pytest.raises(TypeError, match="has no qkv"):
        localise(model, "blocks.0.*")
    assert localise(model, "blocks.[01].attn", gate=1e-6) == ["blocks.0.attn", "blocks.1.attn"]
    assert isinstance(model.blocks[1].attn, GatedPositionalAttention)
    assert (model(x) - before).abs().max() < 1e-4


def test_official_names_become_ours():
    with torch.device("meta"):
        state = convit_tiny().state_dict()
    theirs = {}
    for name, value in state.items():
        name = name.replace("stem.", "patch_embed.")
        if name == "pos_embed":
            value = value.flatten(1, 2)
        if name.startswith("blocks.") and int(name.split(".")[1]) < 10 and ".qkv." in name:
            theirs[name.replace(".qkv.", ".v.")] = value[384:]
            name, value = name.replace(".qkv.", ".qk."), value[:384]
        theirs[name] = value
    assert theirs["pos_embed"].shape == (1, 196, 192)
    assert theirs["blocks.9.attn.qk.weight"].shape == (384, 192)
    assert theirs["blocks.10.attn.qkv.weight"].shape == (576, 192)
    found = weights.convert(theirs)
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in state.items()}
    with pytest.raises(ValueError, match="195 positions"):
        weights.convert({"pos_embed": torch.zeros(1, 195, 2)})


def test_queries_keys_and_values_are_joined_in_order():
    found = weights.convert(
        {"blocks.0.attn.v.weight": torch.full((2, 2), 3.0), "blocks.0.attn.qk.weight": torch.ones(4, 2)}
    )
    assert found["blocks.0.attn.qkv.weight"][:, 0].tolist() == [1, 1, 1, 1, 3, 3]


@pytest.mark.compile
def test_it_compiles_whole():
    model, x = tiny(), torch.randn(1, 3, 24, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert (compiled(x) - model(x)).abs().max() < 1e-5


def test_cost_is_as_published():
    assert model_macs(convit_tiny()) / 1e9 == pytest.approx(1.26, rel=0.02)
