"""InLine: rows and residual against their definitions, hosts' softmax layers, any sides, official names."""

import re

import pytest
import torch
from torch.nn import functional as F

from nearfield.measure.flops import count_flops
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.nn.swin import PatchMerging, ShiftedWindowAttention
from nearfield.ops.dense import dense_attention
from nearfield.ops.linear import inline_attention, linear_attention
from nearfield.systems.inline import model, weights
from nearfield.systems.inline.layer import InLineAttention, LocalResidual, ReducedAttention, StripeAttention
from nearfield.systems.inline.study import rows

SMALL = {"num_classes": 5, "drop_path": 0.0}
HOSTS = {
    "deit": lambda pattern="IS", **options: model.inline_deit(
        8, 2, 2, pattern="M1" if pattern == "IS" else pattern[0], image_size=64, **SMALL, **options
    ),
    "pvt": lambda pattern="IS", **options: model.inline_pvt(
        (1, 1), (8, 16), (1, 2), pattern=pattern, image_size=32, reductions=(2, 2), mlp_ratios=(2, 2),
        **SMALL, **options,
    ),
    "swin": lambda pattern="IS", **options: model.inline_swin(
        (8, 16), (1, 2), (1, 2), pattern=pattern, window_size=3, **SMALL, **options
    ),
    "cswin": lambda pattern="IS", **options: model.inline_cswin(
        (8, 16), (1, 1), (2, 2), pattern=pattern, stripes=(2, 3), **SMALL, **options
    ),
}  # fmt: skip


def double(layer):
    """In float64, with weights large enough that nothing hides behind a bias."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.double().eval()


def heads(x, layer):
    return layer(x).unflatten(-1, (3, 2, -1)).unbind(-3)  # two heads


@pytest.mark.parametrize("others", [0, 1])
def test_attention_is_its_matrix_of_rows_that_sum_to_one(others):
    layer = double(InLineAttention(8, 2, residual=False))
    x = torch.randn(2, others + 12, 8, dtype=torch.float64)
    q, k, v = (each.transpose(1, 2) for each in heads(x, layer.qkv))  # [B, H, N, D]
    scores = q @ k.mT * 4**-0.5
    rows = (scores - scores.mean(-1, keepdim=True) + 1) / x.shape[1]
    assert (rows.sum(-1) - 1).abs().max() < 1e-12
    expected = layer.proj((rows @ v).transpose(1, 2).flatten(-2))
    assert (layer(x, grid=(3, 4)) - expected).abs().max() < 1e-12


def test_the_residual_convolves_each_sample_by_a_kernel_of_its_own():
    layer = double(LocalResidual(4, 2))
    values, source = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    found = layer(values, source)
    w1, w2 = layer.fc1.weight[..., 0], layer.fc2.weight[..., 0]  # [C, C/heads], [9 C, C/heads]
    for b in range(2):
        mean = source[b].flatten(0, 1).mean(0)
        hidden = torch.cat([w1[2 * h : 2 * h + 2] @ mean[2 * h : 2 * h + 2] for h in range(2)])
        hidden = F.gelu(hidden + layer.fc1.bias)
        kernel = torch.cat([w2[18 * h : 18 * h + 18] @ hidden[2 * h : 2 * h + 2] for h in range(2)])
        kernel = (kernel + layer.fc2.bias).view(4, 3, 3)  # nine numbers side by side for each channel
        for y in range(3):
            for x in range(4):
                expected = torch.zeros(4, dtype=torch.float64)
                for dy in range(3):
                    for dx in range(3):
                        if 0 <= y + dy - 1 < 3 and 0 <= x + dx - 1 < 4:
                            expected += kernel[:, dy, dx] * values[b, y + dy - 1, x + dx - 1]
                assert (found[b, y, x] - expected).abs().max() < 1e-12


def test_of_a_sequence_only_the_map_at_its_end_has_neighbours():
    layer = double(InLineAttention(8, 2))
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    added = layer(x, grid=(3, 4)) - _without(layer)(x, grid=(3, 4))
    values = heads(x, layer.qkv)[2].flatten(-2)[:, 1:].unflatten(1, (3, 4))
    expected = F.linear(layer.residual(values, x), layer.proj.weight).flatten(1, 2)
    assert added[:, 0].abs().max() < 1e-12 < added[:, 1:].abs().max()
    assert (added[:, 1:] - expected).abs().max() < 1e-12


def _without(layer):
    plain = InLineAttention(8, 2, residual=False).double()
    plain.load_state_dict({n: v for n, v in layer.state_dict().items() if not n.startswith("residual")})
    return plain


def test_the_matrix_that_the_claims_look_at_is_the_operators():
    torch.manual_seed(0)
    q, k = torch.rand(
        2, 2, 3, 6, 4, dtype=torch.float64
    )  # [B, H, N, D]; above 0, or a divided row may be empty
    identity = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)
    q_t, k_t, ones = (each.transpose(1, 2) for each in (q, k, identity))
    expected = {
        "InLine": inline_attention(q_t, k_t, ones).output,
        "softmax": dense_attention(q_t, k_t, ones),
        "divided": linear_attention(q_t.relu(), k_t.relu(), ones, is_causal=False, normalize=True).output,
    }
    hidden = torch.eye(6, dtype=torch.bool)
    for kind, each in expected.items():
        assert (rows(kind, q, k) - each.transpose(1, 2)).abs().max() < 1e-8
        found = rows(kind, q, k, hidden)
        assert (found.diagonal(dim1=-2, dim2=-1) == 0).all() and (found.sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize(("sides", "shift"), [((6, 9), 1), ((6, 6), 0), ((5, 8), 1), ((2, 7), 1)])
def test_shifted_windows_are_attention_among_the_tokens_that_started_together(sides, shift):
    layer = double(ShiftedWindowAttention(8, 2, 3, shift=shift))
    x = torch.randn(2, *sides, 8, dtype=torch.float64)
    windows = [min(3, side) for side in sides]
    padded = [-(-side // window) * window for side, window in zip(sides, windows, strict=True)]
    q, k, v = heads(F.pad(x, (0, 0, 0, padded[1] - sides[1], 0, padded[0] - sides[0])), layer.qkv)

    def tile(place, axis):
        by = shift if sides[axis] > 3 else 0
        return (place - by) // windows[axis]  # before the first full tile -1: no neighbour of the last one

    places = [(y, x) for y in range(padded[0]) for x in range(padded[1])]
    expected = torch.empty(2, *padded, 2, 4, dtype=torch.float64)
    for at in places:
        seen = [p for p in places if all(tile(p[axis], axis) == tile(at[axis], axis) for axis in (0, 1))]
        bias = torch.stack([layer.relative_bias[(at[0] - y + 2) * 5 + at[1] - x + 2] for y, x in seen], -1)
        keys, values = (torch.stack([each[:, y, x] for y, x in seen], 2) for each in (k, v))  # [B, H, n, D]
        scores = (q[:, at[0], at[1], :, None] * keys).sum(-1) / 2 + bias
        expected[:, at[0], at[1]] = (scores.softmax(-1).unsqueeze(-1) * values).sum(2)
    expected = layer.proj(expected[:, : sides[0], : sides[1]].flatten(-2))
    assert (layer(x) - expected).abs().max() < 1e-12


def test_a_softmax_that_sees_too_much_is_noticed():
    layer = double(ShiftedWindowAttention(8, 2, 3, shift=1))
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    right = layer(x)
    layer._apart = lambda *_: torch.zeros(4, 9, 9, dtype=torch.bool)
    assert (layer(x) - right).abs().max() > 1e-3


def test_merged_patches_stand_in_swins_order():
    layer = double(PatchMerging(2, 3))
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 0, 0, 1))
    four = [padded[:, 2, 2], padded[:, 3, 2], padded[:, 2, 3], padded[:, 3, 3]]
    assert (layer(x)[:, 1, 1] - layer.reduction(layer.norm(torch.cat(four, -1)))).abs().max() < 1e-12


@pytest.mark.parametrize("sides", [(4, 6), (5, 7)])
def test_stripes_are_as_long_as_the_map(sides):
    layer = double(StripeAttention(8, 2, 2))
    x = torch.randn(1, *sides, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, sides[1] % 2, 0, sides[0] % 2))
    q, k, v = heads(padded, layer.qkv)
    expected = torch.empty(*padded.shape[:3], 2, 4, dtype=torch.float64)
    for head, axis in enumerate((2, 1)):  # the first head sees two columns, the second two rows
        for start in range(0, padded.shape[axis], 2):
            part = [each.narrow(axis, start, 2)[..., head, :] for each in (q, k, v)]
            flat_q, flat_k, flat_v = (each.flatten(1, 2) for each in part)
            seen = ((flat_q @ flat_k.mT) / 2).softmax(-1) @ flat_v
            local = layer.positions[head](part[2].movedim(-1, 1)).movedim(1, -1)
            expected.narrow(axis, start, 2)[..., head, :] = seen.view(part[2].shape) + local
    expected = layer.proj(expected[:, : sides[0], : sides[1]].flatten(-2))
    assert (layer(x) - expected).abs().max() < 1e-12


def test_a_reduced_map_is_all_that_its_attention_sees():
    layer = double(ReducedAttention(8, 2, 2))
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    small = F.conv2d(x.movedim(-1, 1), layer.reduce.proj.weight, layer.reduce.proj.bias, stride=2)
    small = layer.reduce.norm(small.movedim(1, -1)).flatten(1, 2)  # 2 x 2: the last column is cut off
    q = layer.q(x).flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2)
    k, v = layer.kv(small).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
    expected = layer.proj(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(-2)).view(x.shape)
    assert (layer(x) - expected).abs().max() < 1e-12


def test_a_pattern_names_the_attention_of_every_block():
    assert model.kinds("IIMS2", (2, 2, 6, 2)) == ["II", "II", "IISSSS", "SS"]
    assert model.kinds("MG9", (2, 1)) == ["II", "G"]
    for wrong in ("II", "IIIX", "IIMS", "IIIS2", ""):
        with pytest.raises(ValueError, match="one of I, S, G, M for each of the 4 stages"):
            model.kinds(wrong, (2, 2, 6, 2))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("side", [(32, 32), (36, 52), (47, 33)])
def test_pictures_may_have_any_sides(host, side):
    torch.manual_seed(0)
    net = HOSTS[host]().eval()
    maps = net.forward_intermediates(torch.randn(1, 3, *side), intermediates_only=True)
    patch = net.feature_info[0]["reduction"]
    up = host in ("swin", "cswin", "deit")  # zeros behind the end, where PVT cuts off
    first = [-(-length // patch) if up else length // patch for length in side]
    assert maps[0].shape == (1, 8, *first)
    if host != "deit":
        assert maps[1].shape == (1, 16, *(-(-length // 2) if up else length // 2 for length in first))
    assert net(torch.randn(1, 3, *side)).shape == (1, 5)


@pytest.mark.parametrize("host", HOSTS)
def test_each_host_trains_and_does_what_timms_tools_ask(host):
    torch.manual_seed(0)
    net, x = HOSTS[host](), torch.randn(2, 3, 32, 32)
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    expected = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    net.set_grad_checkpointing()
    net(x).square().mean().backward()
    assert all((p.grad - expected[n]).abs().max() < 1e-6 for n, p in net.named_parameters())
    features, maps = net.forward_intermediates(x, norm=True)
    assert torch.equal(net.forward_head(features), net(x))
    tokens = features[:, 1:].unflatten(1, (2, 2)) if host == "deit" else features
    assert torch.equal(maps[-1], tokens.movedim(-1, 1))
    names = {n for n, _ in net.named_parameters()}
    assert net.no_weight_decay() <= names
    found = FeaturePyramid(net)(x)
    assert [each.shape[1] for each in found] == [info["num_chs"] for info in net.feature_info]
    assert isinstance(net.head, torch.nn.Identity)


def test_a_residual_may_be_left_out_and_softmax_be_global():
    net = HOSTS["swin"]("GI", residual=False)
    assert not any("residual" in name for name in net.state_dict())
    assert type(net.stages[0].blocks[0].attn).__name__ == "Attention"
    assert net(torch.randn(1, 3, 20, 20)).shape == (1, 5)


@pytest.mark.parametrize("make", [InLineAttention, ReducedAttention, ShiftedWindowAttention])
def test_heads_must_divide_the_channels(make):
    with pytest.raises(ValueError, match="dim=8 is no multiple of num_heads=3"):
        make(8, 3)


def test_stripes_need_two_halves_of_heads_and_a_shift_a_window():
    with pytest.raises(ValueError, match="num_heads=1 must be even"):
        StripeAttention(8, 1, 2)
    with pytest.raises(ValueError, match="shift=3 must be at least 0 and below window_size=3"):
        ShiftedWindowAttention(8, 2, 3, shift=3)


LAYERS = {
    "inline": lambda: InLineAttention(8, 2, position=True),
    "shifted": lambda: ShiftedWindowAttention(8, 2, 3, shift=1),
}


@pytest.mark.compile
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compile_without_a_break(name):
    layer, x = LAYERS[name]().eval(), torch.randn(1, 5, 7, 8)
    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True, backend="eager")(x)
        assert (found - layer(x)).abs().max() < 1e-5


def official(name, host):
    """Our name of a tensor of a host as its official file has it."""
    name = name.replace(".residual.fc1.", ".residual.0.").replace(".residual.fc2.", ".residual.2.")
    if host in ("deit", "swin"):
        name = re.sub(r"^stem\.", "patch_embed.", name)
        name = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        name = re.sub(r"^stages\.", "layers.", name)
        return name.replace(".relative_bias", ".relative_position_bias_table")
    if host == "pvt":
        name = re.sub(r"^stem\.", "stages.0.downsample.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.patches", lambda m: f"patch_embed{int(m[1]) + 1}", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.pos", lambda m: f"pos_embed{int(m[1]) + 1}:", name)
        name = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"block{int(m[1]) + 1}", name).split(":")[0]
        return name.replace(".attn.reduce.proj.", ".attn.sr.").replace(".attn.reduce.norm.", ".attn.norm.")
    name = name.replace("stem.proj.", "stage1_conv_embed.0.").replace("stem.norm.", "stage1_conv_embed.2.")
    name = re.sub(r"^stages\.(\d)\.downsample\.proj", r"merge\1.conv", name)
    name = re.sub(r"^stages\.(\d)\.downsample", r"merge\1", name)
    name = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"stage{int(m[1]) + 1}", name)
    name = re.sub(r"\.attn\.(qkv|proj)\.", r".\1.", name).replace(".attn.residual.", ".attns.0.residual.")
    return re.sub(r"\.attn\.positions?\.(?:(\d)\.)?", lambda m: f".attns.{m[1] or 0}.get_v.", name)


KEYS = {
    "deit": ("inline_deit_tiny", {"cls_token", "blocks.11.attn.residual.2.weight"}),
    "pvt": ("inline_pvt_tiny", {"pos_embed4", "patch_embed1.norm.bias", "block3.1.attn.kv.weight"}),
    "swin": (
        "inline_swin_base",
        {"layers.2.blocks.2.attn.relative_position_bias_table", "layers.2.downsample.reduction.weight"},
    ),
    "cswin": (
        "inline_cswin_tiny",
        {"stage1.0.attns.0.residual.0.bias", "stage3.9.attns.1.get_v.weight", "merge3.conv.weight"},
    ),
}


@pytest.mark.parametrize("host", KEYS)
def test_official_names_become_ours(host):
    name, expected = KEYS[host]
    with torch.device("meta"):
        state = getattr(model, name)(**({"pattern": "IISS"} if host == "pvt" else {})).state_dict()
    theirs = {}
    for ours, value in state.items():
        if host != "deit" and ours.endswith("pos_embed"):
            value = value.flatten(1, 2)
        if host == "pvt" and ".attn.qkv." in ours:  # two matrices there
            theirs[official(ours, host).replace(".qkv.", ".q.")] = value.chunk(3)[0]
            theirs[official(ours, host).replace(".qkv.", ".kv.")] = torch.cat(value.chunk(3)[1:])
        else:
            theirs[official(ours, host)] = value
    if host == "swin":
        theirs["layers.3.blocks.0.attn.relative_position_index"] = torch.empty(49, 49)
        theirs["layers.2.blocks.3.attn_mask"] = torch.empty(4, 49, 49)
    assert expected <= theirs.keys()
    found = weights.convert(theirs)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in state.items()}


MACS = [("inline_pvt_tiny", 224, 1.99), ("inline_swin_tiny", 224, 4.48)]  # what the official code counts


@pytest.mark.parametrize(("name", "side", "published"), MACS, ids=[name for name, *_ in MACS])
def test_cost_is_as_published(name, side, published):
    with torch.device("meta"), torch.no_grad():
        net = getattr(model, name)().eval()
        counted = count_flops(lambda: net(torch.empty(1, 3, side, side))) / 2
    assert counted / 1e9 == pytest.approx(published, rel=0.02)
