"""TNT: words stay in their patch, blocks follow the equations, official names, timm's contract."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nearfield.bench.resolution import model_macs
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.systems.tnt import weights
from nearfield.systems.tnt.model import State, tnt, tnt_small, tnt_small_legacy


def tiny(**options):
    torch.manual_seed(0)
    options = {"num_classes": 5, "image_size": 16, "patch_size": 8, "stride": 2, **options}
    return tnt((4, 16), (2, 4), 2, **options).eval()


def attend(layer, x):
    """Softmax attention of one sequence [N, C] by loops."""
    heads, size = layer.num_heads, x.shape[-1] // layer.num_heads
    q, k, v = layer.qkv(x).view(-1, 3, heads, size).unbind(1)
    out = torch.empty_like(v)
    for head in range(heads):
        for i in range(len(x)):
            weight = torch.stack([q[i, head] @ key * size**-0.5 for key in k[:, head]]).softmax(0)
            out[i, head] = weight @ v[:, head]
    return layer.proj(out.flatten(1))


def feed(mlp, x):
    return mlp.fc2(F.gelu(mlp.fc1(x)))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_block_follows_the_equations(legacy):
    block = tiny(legacy=legacy).double().blocks[1]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    words, sentences = torch.randn(1, 2, 3, 16, 4).double(), torch.randn(1, 2, 3, 16).double()
    found = block(State(words, sentences, torch.randn(1, 1, 16).double()))
    inner, token = block.inner, found.token
    expected = []
    for number, each in enumerate(words[0].flatten(0, 1)):  # words of one patch [16, 4]
        each = each + attend(inner.attn, inner.norm1(each))
        each = each + feed(inner.mlp, inner.norm2(each))
        assert (found.words[0].flatten(0, 1)[number] - each).abs().max() < 1e-12
        compose = inner.compose
        if legacy:
            expected.append(compose.proj(compose.norm1(each).flatten()))
        else:
            expected.append(compose.norm2(compose.proj(compose.norm1(each.flatten()))))
    torch.manual_seed(3)
    token = torch.randn(1, 16).double()
    x = torch.cat([token, sentences[0].flatten(0, 1) + torch.stack(expected)])
    x = x + attend(block.attn, block.norm1(x))
    x = x + feed(block.mlp, block.norm2(x))
    found = block(State(words, sentences, token[None]))
    assert (found.sentences[0].flatten(0, 1) - x[1:]).abs().max() < 1e-12
    assert (found.token[0] - x[:1]).abs().max() < 1e-12


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pixel_changes_the_words_of_its_patch_only(legacy):
    model = tiny(legacy=legacy)
    x = torch.randn(1, 3, 16, 24)
    moved = x.clone()
    moved[0, :, 3, 15] += 1.0  # the last column of the second patch, beside the third
    changed = (model.stem(moved)[0] != model.stem(x)[0]).flatten(3).any(-1)[0]
    assert changed.tolist() == [[False, True, legacy], [False, False, False]]
    inner = [model.blocks[0].inner(model.stem(image)[0])[0] for image in (x, moved)]
    assert (inner[0] != inner[1]).flatten(3).any(-1)[0].tolist() == changed.tolist()


def test_words_are_a_convolution_of_each_patch_with_zeros_around_it():
    stem = tiny().stem
    x = torch.randn(2, 3, 16, 24)
    words = stem.words(x)
    for row in range(2):
        for column in range(3):
            patch = x[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            expected = stem.conv(patch).flatten(2).mT
            assert (words[:, row, column] - expected).abs().max() < 1e-6


def test_whole_patches_are_dropped_of_an_inner_branch():
    inner = tiny(drop_path=0.5).blocks[1].inner.train()
    assert inner.drop_path.rate == 0.5
    torch.manual_seed(0)
    branch = inner._dropped(torch.ones(2, 4, 4, 16, 4))
    by_patch = branch.flatten(3)
    assert (by_patch == by_patch[..., :1]).all()
    assert 0 < (by_patch[..., 0] > 0).sum() < 32


def test_every_parameter_learns():
    for options in ({}, {"legacy": True}, {"positions": ()}):
        model = tiny(**options)
        model(torch.randn(2, 3, 16, 16)).square().sum().backward()
        named = dict(model.named_parameters())
        still = {name for name, each in named.items() if each.grad is None or not each.grad.any()}
        assert not still
        assert model.no_weight_decay() <= named.keys()
        assert ("stem.pos_embed" in named) == ("positions" not in options)


@pytest.mark.parametrize("side", [(16, 16), (24, 40), (17, 9)])
def test_pictures_may_have_any_sides(side):
    model, x = tiny(), torch.randn(1, 3, *side)
    grid = tuple(-(-length // 8) for length in side)
    features, maps = model.forward_intermediates(x)
    assert features.shape == (1, 1 + math.prod(grid), 16)
    assert [tuple(each.shape) for each in maps] == [(1, 16, *grid)] * 2
    assert model(x).shape == (1, 5)


def test_no_heads_for_words_leave_the_inner_transformer_out():
    torch.manual_seed(0)
    plain = tnt((4, 16), (0, 4), 2, num_classes=5, image_size=16, patch_size=8, stride=2)
    assert not any("inner" in name for name, _ in plain.named_parameters())
    assert plain(torch.randn(1, 3, 16, 16)).shape == (1, 5)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="stride=3 must divide patch_size=8"):
        tiny(stride=3)
    with pytest.raises(ValueError, match="may hold word and sentence"):
        tiny(positions=("pixel",))


def test_it_keeps_timms_contract():
    model, x = tiny(), torch.randn(2, 3, 16, 16)
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
    model.reset_classifier(7, "token")
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7
    pyramid = FeaturePyramid(tiny(), (0,))
    assert [tuple(each.shape) for each in pyramid(x)] == [(2, 16, 2, 2)]


TIMM = (  # ours -> timm's
    ("stem.conv.", "pixel_embed.proj."),
    ("stem.compose.norm1.", "norm1_proj."),
    ("stem.compose.norm2.", "norm2_proj."),
    ("stem.compose.", ""),
    (".norm1.", ".norm_out."),
    (".norm2.", ".norm_mlp."),
    (".inner.norm_out.", ".norm_in."),
    (".inner.norm_mlp.", ".norm_mlp_in."),
    (".inner.compose.norm_out.", ".norm1_proj."),
    (".inner.compose.norm_mlp.", ".norm2_proj."),
    (".inner.compose.", "."),
    (".inner.attn.", ".attn_in."),
    (".inner.mlp.", ".mlp_in."),
    (".attn.", ".attn_out."),
)
OFFICIAL = (  # timm's -> official
    ("pixel_embed.", "patch_embed."),
    ("norm1_proj.", "proj_norm1."),
    ("norm2_proj.", "proj_norm2."),
    (".norm_in.", ".inner_norm1."),
    (".norm_mlp_in.", ".inner_norm2."),
    (".attn_in.", ".inner_attn."),
    (".mlp_in.", ".inner_mlp."),
    (".norm_out.", ".outer_norm1."),
    (".norm_mlp.", ".outer_norm2."),
    (".attn_out.", ".outer_attn."),
    (".mlp.", ".outer_mlp."),
)


def published(state, official):
    """Our tensors under the names, and in the shapes, of a published file."""
    theirs = {"outer_tokens": torch.zeros(1, 4, 16)} if official else {}
    for name, value in state.items():
        for mine, other in TIMM + (OFFICIAL if official else ()):
            name = name.replace(mine, other)
        if ".qkv." in name:
            third = len(value) // 3
            theirs[name.replace(".qkv.", ".v.")] = value[2 * third :]
            name, value = name.replace(".qkv.", ".qk."), value[: 2 * third]
        if name == "stem.pos_embed":
            name = "inner_pos" if official else "pixel_pos"
            value = value[None] if official else value.mT.reshape(1, -1, 4, 4)
        theirs[name] = value
    places = torch.cat([theirs.pop("pos_embed_token"), theirs.pop("pos_embed").flatten(1, 2)], 1)
    return {**theirs, "outer_pos" if official else "patch_pos": places}


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_published_names_become_ours(official, legacy):
    state = tiny(legacy=legacy).state_dict()
    theirs = published(state, official)
    wanted = {
        False: {"blocks.0.norm1_proj.weight", "blocks.1.attn_in.qk.weight", "patch_pos", "norm2_proj.bias"},
        True: {"blocks.0.proj_norm1.bias", "blocks.1.outer_attn.v.weight", "inner_pos", "outer_tokens"},
    }
    assert wanted[official] <= theirs.keys()
    found = weights.convert(theirs)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_positions_of_no_square_are_refused():
    with pytest.raises(ValueError, match="195 patches"):
        weights.convert({"patch_pos": torch.zeros(1, 196, 2)})


@pytest.mark.compile
def test_it_compiles_whole():
    model, x = tiny(), torch.randn(1, 3, 24, 16)
    model.prune_intermediate_layers([0], prune_head=False)  # one block says it all
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert (compiled(x) - model(x)).abs().max() < 1e-5


def test_cost_is_as_published():
    assert model_macs(tnt_small()) / 1e9 == pytest.approx(5.25, rel=0.02)
    with torch.device("meta"):
        assert sum(p.numel() for p in tnt_small_legacy().parameters()) == 23755336
