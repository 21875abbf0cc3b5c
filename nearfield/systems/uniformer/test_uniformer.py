"""UniFormer: affinities by loops, pruning token by token, both orders of split attention, names."""

import re

import pytest
import torch

from nearfield.measure.flops import count_flops
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.systems.uniformer import model, weights
from nearfield.systems.uniformer.layer import LocalAttention, SplitBlock, State, TokenBlock, halved
from nearfield.systems.uniformer.model import (
    set_prune_ratio,
    uniformer,
    uniformer_light,
    uniformer_video,
)
from nearfield.train import vision

SIZES = ((8, 16, 24, 32), (1, 1, 2, 1), 8)


def tiny(**options):
    torch.manual_seed(0)
    return uniformer(*SIZES, num_classes=5, **options).eval()


def tiny_light(**options):
    torch.manual_seed(0)
    return uniformer_light(SIZES[0], (1, 1, 3, 2), 8, num_classes=5, **options).eval()


def tiny_video(**options):
    torch.manual_seed(0)
    return uniformer_video(*SIZES, **{"num_classes": 5, **options}).eval()


def attend(layer, rows):
    """An attention layer on rows `[N, C]`, pair by pair, and its weights by head."""
    q, k, v = layer.qkv(rows).unflatten(-1, (3, layer.num_heads, -1)).unbind(1)  # [N, H, D]
    shares = (torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return layer.proj(torch.einsum("hnm,mhd->nhd", shares, v).flatten(1)), shares


def test_local_attention_weighs_the_positions_around_by_their_offset():
    torch.manual_seed(0)
    layer = LocalAttention(3).double()
    x = torch.randn(1, 4, 6, 3, dtype=torch.float64)
    values, mixed = layer.value(x)[0], torch.empty(4, 6, 3, dtype=torch.float64)
    for y in range(4):
        for z in range(6):
            mixed[y, z] = layer.affinity.bias
            for dy in range(-2, 3):
                for dz in range(-2, 3):
                    if 0 <= y + dy < 4 and 0 <= z + dz < 6:
                        mixed[y, z] += layer.affinity.weight[:, 0, dy + 2, dz + 2] * values[y + dy, z + dz]
    assert (layer(x)[0] - layer.proj(mixed)).abs().max() < 1e-12


@pytest.mark.parametrize("official", [True, False])
def test_split_attention_goes_through_time_and_then_over_each_frame(official):
    torch.manual_seed(0)
    block = SplitBlock(8, 2, model.Attention(8, 2), official=official).double().eval()
    x = torch.randn(1, 3, 2, 2, 8, dtype=torch.float64)
    coded = block.pos_embed(x)[0]
    seen, out = coded.clone(), torch.empty_like(coded)
    for y in range(2):
        for z in range(2):
            seen[:, y, z] += attend(block.time_attn, block.time_norm(coded[:, y, z]))[0]
    for t in range(3):
        told, _ = attend(block.attn, block.norm1(seen[t].flatten(0, 1)))
        out[t] = (coded if official else seen)[t] + told.unflatten(0, (2, 2))
    out = out + block.mlp(block.norm2(out))
    assert (block(x)[0] - out).abs().max() < 1e-12


def test_nothing_comes_through_time_in_a_new_model():
    clip = torch.randn(1, 3, 4, 32, 32)
    orders = [tiny_video(split=split) for split in ("official", "sequential")]
    assert torch.equal(orders[0](clip), orders[1](clip))
    orders[0](clip).sum().backward()
    assert orders[0].stages[3].blocks[0].time_attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scaled", [None, 0.5])
def test_pruned_tokens_take_what_the_merged_one_is_told(scaled):
    torch.manual_seed(0)
    block = TokenBlock(8, 2, prune_ratio=0.5, trade_off=0.25, layer_scale=scaled).double().eval()
    x, token = torch.randn(1, 3, 3, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)
    score = torch.rand(1, 9, dtype=torch.float64)
    found = block(State(x, token, score))
    tokens, factor = block.pos_embed(x)[0].flatten(0, 1), 1.0 if scaled is None else scaled
    order = sorted(range(9), key=lambda place: -score[0, place])
    kept, others = order[:4], order[4:]
    merged = sum(score[0, place] * tokens[place] for place in others) / sum(score[0, i] for i in others)
    rows = torch.stack([token[0, 0], *(tokens[place] for place in kept), merged])
    told, shares = attend(block.attn, block.norm1(rows))
    rows = rows + factor * told
    fed = block.mlp(block.norm2(rows))
    rows = rows + factor * fed
    for place in others:
        assert torch.equal(found.score[0, place], score[0, place])
        wanted = tokens[place] + factor * (told[-1] + fed[-1])
        assert (found.map.flatten(1, 2)[0, place] - wanted).abs().max() < 1e-12
    for row, place in enumerate(kept, 1):
        assert (found.map.flatten(1, 2)[0, place] - rows[row]).abs().max() < 1e-12
        wanted = 0.75 * score[0, place] + 0.25 * shares[:, 0, row].mean()
        assert (found.score[0, place] - wanted).abs() < 1e-12
    assert (found.token[0, 0] - rows[0]).abs().max() < 1e-12


def test_the_first_block_sets_the_scores_and_all_tokens_pass_it():
    torch.manual_seed(0)
    block = TokenBlock(8, 2, prune_ratio=0.5).double().eval()
    x, token = torch.randn(1, 2, 3, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)
    rows = torch.cat([token, block.pos_embed(x).flatten(1, 2)], 1)[0]
    _, shares = attend(block.attn, block.norm1(rows))
    assert (block(State(x, token, None)).score[0] - shares[:, 0, 1:].mean(0)).abs().max() < 1e-12


def test_of_49_tokens_24_pass_with_the_class_token_and_the_merged_one():
    net, rows = tiny_light(), []
    for block in (*net.stages[2].blocks, *net.stages[3].blocks):
        block.attn.qkv.register_forward_pre_hook(lambda layer, given: rows.append(given[0].shape[1]))
    net(torch.randn(1, 3, 112, 112))  # 7 x 7 positions, then 4 x 4
    assert rows == [50, 26, 26, 10, 10]
    set_prune_ratio(net, 1.0)
    net(torch.randn(1, 3, 112, 112))
    assert rows[5:] == [50, 50, 50, 17, 17]
    pruned, whole = (tiny_light(layer_scale=0.1, prune_ratio=ratio).state_dict() for ratio in (0.5, 1.0))
    assert pruned.keys() == whole.keys()


def test_halved_scores_are_means_that_sum_to_the_same():
    score = torch.rand(2, 15, dtype=torch.float64)
    means, grid = halved(score, (3, 5)).view(2, 2, 3), score.view(2, 3, 5)
    assert torch.allclose(means.sum((1, 2)), score.sum(1))
    ratio = means[:, 0, 0] / grid[:, :2, :2].mean((1, 2))
    assert torch.allclose(means[:, 1, 2] / grid[:, 2, 4], ratio)  # an odd end is its own mean


@pytest.mark.parametrize("side", [(64, 64), (36, 52), (33, 47)])
@pytest.mark.parametrize("make", [tiny, lambda: tiny(conv_stem=True), tiny_light])
def test_pictures_may_have_any_sides(make, side):
    net, x = make(), torch.randn(1, 3, *side)
    sizes = [-(-length // 4) for length in side]
    for shown in net.forward_intermediates(x, intermediates_only=True):
        assert list(shown.shape[2:]) == sizes
        sizes = [-(-length // 2) for length in sizes]
    assert net(x).shape == (1, 5)


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_clips_may_have_any_number_of_frames(frames):
    clip = torch.randn(1, 3, frames, 36, 32)
    for options in ({}, {"long_kernels": True}, {"blocks": ("local", "local", "window", "global")}):
        net = tiny_video(window_size=2, **options)
        shown = net.forward_intermediates(clip, intermediates_only=True)
        assert [tuple(each.shape[2:]) for each in shown] == [
            (-(-frames // 2), y, x) for y, x in ((9, 8), (5, 4), (3, 2), (2, 1))
        ]
        assert net(clip).shape == (1, 5)


def test_windows_have_the_same_weights_and_as_large_as_the_map_do_the_same():
    x = torch.randn(1, 3, 64, 96)
    for kind in ("window", "hybrid"):
        net = tiny(blocks=("local", "local", kind, "global"), window_size=(4, 6))
        assert torch.allclose(net(x), tiny()(x), atol=1e-5)
        net.stages[2].blocks[0].attn.window_size = 3
        assert not torch.allclose(net(x), tiny()(x), atol=1e-5)
    with torch.device("meta"):
        net = model.uniformer_small(blocks=("local", "local", "hybrid", "global"))
    kinds = [type(block.attn).__name__ for block in net.stages[2].blocks]
    assert kinds == (["WindowAttention"] * 3 + ["Attention"]) * 2


def test_it_offers_what_backbones_do():
    for net in (tiny(layer_scale=0.1), tiny_light(layer_scale=0.1)):
        x = torch.randn(2, 3, 64, 48)
        assert torch.equal(net.forward_head(net.forward_features(x)), net(x))
        plain = net(x)
        net.set_grad_checkpointing()
        assert torch.equal(net(x), plain)
        net.reset_classifier(0)
        assert net(x).shape == (2, 32)
        maps = FeaturePyramid(net)(x)
        assert [tuple(each.shape[1:]) for each in maps] == [(8, 16, 12), (16, 8, 6), (24, 4, 3), (32, 2, 2)]


def test_training_takes_the_mean_of_both_losses():
    net, labels = tiny_light(), torch.tensor([0, 4, 2])
    images = torch.randn(3, 3, 64, 64)
    loss = vision._loss(0.0)(net.eval(), {"images": images, "labels": labels})
    parts = [torch.nn.functional.cross_entropy(logits, labels) for logits in net.forward_both(images)]
    assert torch.allclose(loss.mean, sum(parts) / 2)


def test_a_light_model_gives_the_same_logits_in_both_ways_and_trains_all_it_has():
    net = tiny_light().train()
    x = torch.randn(2, 3, 64, 64)
    both = net.forward_both(x)
    assert torch.equal(both.map, net(x)) and both.token.shape == (2, 5)
    (both.map.square().sum() + both.token.square().sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.no_weight_decay() == {"stages.2.cls_token"}
    net.reset_classifier(3)
    assert [each.shape for each in net.forward_both(x)] == [(2, 3), (2, 3)]
    net.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="has no class token"):
        net.forward_both(x)


@pytest.mark.compile
def test_a_pruning_model_compiles_whole():
    net = uniformer_light((8, 8, 8, 8), (0, 0, 2, 1), 8, num_classes=2).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(torch.compile(net, fullgraph=True, backend="eager")(x), net(x), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny(blocks=("local", "global")), "for each of 4 stages"),
        (lambda: tiny(blocks=("local", "local", "linear", "global")), "give one of local, global"),
        (lambda: uniformer((8, 12), (1, 1), 8, blocks=("local", "global")), "does not divide the 12"),
        (lambda: tiny_video(split="joint"), "none of None, 'official'"),
        (lambda: tiny_light(prune_ratio=0), "must lie above 0"),
        (lambda: set_prune_ratio(tiny_light(), 1.5), "at most 1"),
    ],
)
def test_wrong_options_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("centred", [True, False])
def test_inflated_kernels_sum_to_those_of_pictures(centred):
    net, clips = tiny(), tiny_video()
    clips.load_state_dict(weights.inflate(net.state_dict(), clips.state_dict(), centred=centred))
    kernel = clips.stages[0].blocks[0].attn.affinity.weight
    assert kernel.shape == (8, 1, 5, 5, 5)
    assert torch.allclose(kernel.sum(2), net.stages[0].blocks[0].attn.affinity.weight)
    picture = torch.randn(1, 3, 64, 64)
    logits = clips(picture.unsqueeze(2).expand(-1, -1, 6, -1, -1))
    assert torch.allclose(logits, net(picture), atol=1e-5) == centred  # else zeros behind the ends are seen


def test_what_pictures_do_not_have_stays_when_they_are_inflated():
    net, clips = tiny(), tiny_video(num_classes=7, split="sequential")
    found = weights.inflate(net.state_dict(), clips.state_dict())
    clips.load_state_dict(found)
    assert found["head.bias"].shape == (7,) and any("time_attn" in name for name in found)
    with pytest.raises(ValueError, match=r"has no stages\.0\.blocks\.1"):
        weights.inflate(uniformer(SIZES[0], (2, 1, 2, 1), 8).state_dict(), clips.state_dict())
    with pytest.raises(ValueError, match="which time does not make"):
        weights.inflate(uniformer((8, 8, 24, 32), (1, 1, 2, 1), 8).state_dict(), clips.state_dict())


OFFICIAL = (  # ours -> the names in the official file
    (r"\.attn\.value\.", ".conv1."),
    (r"\.attn\.affinity\.", ".attn."),
    (r"\.time_(norm|attn)\.", r".t_\1."),
    (r"\.pos_embed\.proj\.", ".pos_embed."),
    (r"\.scale(\d)\.gamma", r".gamma_\1"),
    (r"^stem\.", "patch_embed1."),
    (r"^norm_token\.", "norm_cls."),
    (r"^head_token\.", "head_cls."),
    (r"^stages\.2\.cls_token", "cls_token"),
    (r"^stages\.3\.widen\.", "cls_upsample."),
    (r"^norm\.norm\.", "norm."),
)


def official(state):
    """A state under the names, and in the shapes, of the official files."""
    found = {}
    overlaps = any(".downsample.norm.norm." in name for name in state)
    rank = 3 if state["stages.0.blocks.0.attn.affinity.weight"].dim() == 5 else 2
    for ours, value in state.items():
        block = re.match(r"stages\.\d\.blocks\.\d+", ours)
        name = ours
        if block and f"{block[0]}.attn.value.weight" in state:
            name = re.sub(r"\.attn\.proj\.", ".conv2.", re.sub(r"\.(norm\d)\.norm\.", r".\1.", name))
            if re.search(r"(value|attn\.proj|fc\d)\.weight$", ours):
                value = value[(..., *(None,) * rank)]
            elif ours.endswith("gamma"):
                value = value[None, :, None, None]
        if overlaps:
            name = re.sub(r"\.downsample\.proj\.", ".downsample.proj.0.", name)
            name = re.sub(r"\.downsample\.norm\.norm\.", ".downsample.proj.1.", name)
        for pattern, replacement in OFFICIAL:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"blocks{int(m[1]) + 1}", name)
        name = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"patch_embed{int(m[1]) + 1}", name)
        found[name] = value
    return found


@pytest.mark.parametrize(
    ("make", "some"),
    [
        (
            tiny,
            ("patch_embed1.norm.bias", "blocks1.0.conv2.weight", "blocks3.1.attn.proj.bias", "norm.weight"),
        ),
        (lambda: tiny(conv_stem=True), ("patch_embed1.proj.4.running_var", "patch_embed3.proj.1.weight")),
        (lambda: tiny(layer_scale=0.1), ("blocks4.0.gamma_2", "patch_embed2.proj.weight")),
        (lambda: tiny_light(layer_scale=0.1), ("cls_token", "cls_upsample.bias", "norm_cls.bias")),
        (lambda: tiny_light(layer_scale=0.1), ("blocks1.0.gamma_1", "blocks3.1.gamma_3", "head_cls.weight")),
        (lambda: tiny_video(split="official"), ("blocks3.0.t_attn.qkv.bias", "blocks1.0.attn.weight")),
    ],
)
def test_official_names_become_ours(make, some):
    net = make()
    theirs = official(net.state_dict())
    assert theirs.keys() >= set(some)
    rank = theirs[
        "patch_embed2.proj.weight" if "patch_embed2.proj.weight" in theirs else "blocks1.0.attn.weight"
    ].dim()
    assert theirs["blocks2.0.mlp.fc1.weight"].dim() == rank
    found = weights.convert({**theirs, "aux_head.weight": torch.zeros(1)})
    state = net.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_official_detectors_become_feature_pyramids():
    pyramid = FeaturePyramid(tiny(blocks=("local", "local", "hybrid", "global"), window_size=2))
    state = pyramid.state_dict()
    inside = {name.removeprefix("backbone."): v for name, v in state.items() if name.startswith("backbone.")}
    norms = {f"norm{int(n[6]) + 1}{n[7:]}": v for n, v in state.items() if n.startswith("norms.")}
    theirs = {**official(inside), **norms}
    for each in (
        theirs,
        {**{f"backbone.{name}": v for name, v in theirs.items()}, "neck.conv.weight": norms},
    ):
        found = weights.convert(each)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("name", "size", "macs"),
    [
        ("small", (224, 224), 3.64),
        ("small_plus", (224, 224), 4.21),
        ("base_ls", (224, 224), 8.27),
        ("xxs", (128, 128), 0.43),
        ("video_small", (16, 224, 224), 41.76),
    ],
)
def test_cost_is_as_published(name, size, macs):
    with torch.device("meta"):
        net = getattr(model, f"uniformer_{name}")().eval()
    flops = count_flops(lambda: net(torch.empty(1, 3, *size, device="meta")))
    assert flops / 2e9 == pytest.approx(macs, rel=0.02)
