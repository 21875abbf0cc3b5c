"""HTNet against its description in loops, its input map, scores and protocols, made motion, names."""

import re

import pytest
import torch
from torch.nn import functional as F

from nearfield.data import motions
from nearfield.measure.flops import count_flops
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.systems.htnet import study, weights
from nearfield.systems.htnet.model import BlockAttention, htnet, htnet_blocks4, htnet_official
from nearfield.systems.htnet.study import cross_subjects, region_map, scores, silent_parameters


def tiny(**options):
    torch.manual_seed(0)
    return htnet(**{"dim": 8, "num_heads": 3, "depths": (1, 1)} | options)


def norm(x, layer):
    mean = x.mean(0, keepdim=True)
    x = (x - mean) / ((x - mean).square().mean(0, keepdim=True) + 1e-5).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


def point(x, layer):
    """A linear layer at each place of [C, Y, X]."""
    out = torch.einsum("oc,cyx->oyx", layer.weight, x)
    return out if layer.bias is None else out + layer.bias[:, None, None]


def described(net, picture):
    """The published network, one picture at a time, blocks in loops, channels first."""
    proj = net.stem.proj
    x = F.conv2d(picture[None], proj.weight, proj.bias, stride=7)[0]
    for level in net.stages:
        if level is not net.stages[0]:
            x = F.conv2d(x[None], level.downsample.conv.weight, level.downsample.conv.bias, padding=1)[0]
            x = F.max_pool2d(norm(x, level.downsample.norm)[None], 3, 2, 1)[0]
        size, out = level.block_size, x.clone()
        for y in range(0, x.shape[1], size):
            for column in range(0, x.shape[2], size):
                block = x[:, y : y + size, column : column + size] + level.pos_emb.view(size, size)
                for layer in level.blocks:
                    heads = layer.attn.num_heads
                    rows = point(norm(block, layer.norm1), layer.attn.qkv).flatten(1)  # [3 inner, n]
                    q, k, v = rows.view(3, heads, -1, size**2)
                    weight = (q.mT @ k * q.shape[1] ** -0.5).softmax(-1)  # [heads, n, n]
                    mixed = (v @ weight.mT).reshape(-1, size, size)
                    block = block + point(mixed, layer.attn.proj)
                    inner = F.gelu(point(norm(block, layer.norm2), layer.mlp.fc1))
                    block = block + point(inner, layer.mlp.fc2)
                out[:, y : y + size, column : column + size] = block
        x = out
    return norm(x, net.norm).mean((1, 2)) @ net.head.weight.T + net.head.bias


@pytest.mark.parametrize("depths", [(1, 1), (1, 1, 2)])
def test_it_is_as_described(depths):
    net = tiny(depths=depths).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    expected = torch.stack([described(net, picture) for picture in x])
    assert (net(x) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_one_token_a_block_leaves_queries_and_keys_without_a_gradient():
    x = torch.randn(2, 3, 28, 28)
    published, four = tiny(dim=16, depths=(1, 1, 1)), tiny(dim=16)
    for net, dead in ((published, True), (four, False)):
        counted = sum(2 * m.qkv.weight.numel() // 3 for m in net.modules() if isinstance(m, BlockAttention))
        assert silent_parameters(net, x) == counted if dead else silent_parameters(net, x) < counted / 50
    with torch.no_grad():
        layer = four.stages[0].blocks[0].attn
        x = torch.randn(2, 4, 4, 16)
        maps = study.attention_maps(layer, x)
        assert maps.shape == (2, 4, 3, 4, 4)
        _, _, v = layer.heads(x)
        block = v[0, 2:, :2].flatten(0, 1)  # of the lower left
        mixed = torch.einsum("hij,jhd->ihd", maps[0, 2], block).flatten(1)
        assert torch.allclose(layer(x)[0, 2:, :2].flatten(0, 1), layer.proj(mixed), atol=1e-6)


def test_heads_that_do_not_divide_leave_channels_out():
    with torch.device("meta"):
        assert htnet_official().stages[0].blocks[0].attn.qkv.out_features == 3 * 255


def test_sizes_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="image_size=42 does not split into patches of 7 and 3 levels"):
        htnet(image_size=42)
    with pytest.raises(ValueError, match=r"A picture of \(30, 28\) does not tile.*multiples of 28"):
        tiny()(torch.randn(1, 3, 30, 28))


def test_larger_pictures_have_more_blocks():
    maps = FeaturePyramid(tiny(depths=(1, 1, 1)))(torch.randn(1, 3, 56, 84))
    assert [tuple(each.shape) for each in maps] == [(1, 8, 8, 12), (1, 16, 4, 6), (1, 32, 2, 3)]


def test_the_map_is_tiled_of_four_regions():
    motion = torch.arange(28 * 28.0).view(1, 1, 28, 28)  # row * 28 + column
    points = torch.tensor([[[9.9, 12.2], [20.0, 11.0], [0.0, 0.0], [3.0, 30.0], [18.0, 20.5]]])
    out = region_map(motion, points)[0, 0]
    corners = [out[0, 0], out[0, 14], out[14, 0], out[14, 14]]
    assert [divmod(int(each), 28) for each in corners] == [(5, 2), (4, 13), (14, 0), (13, 11)]
    assert torch.equal(out[:14, :14], motion[0, 0, 5:19, 2:16])
    swapped = region_map(motion, points, swap_xy=True)[0, 0]
    assert torch.equal(swapped, region_map(motion, points.flip(-1))[0, 0])
    assert region_map(motion).shape == motion.shape
    with pytest.raises(ValueError, match=r"\(28, 26\) has no four tiles"):
        region_map(motion[..., :26], points)


def test_scores_of_hand_made_predictions():
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    found = scores(truth, torch.tensor([0, 0, 0, 1, 1, 0, 0]))  # class 2 is never predicted
    assert found.uf1 == pytest.approx((2 * 3 / 9 + 2 / 4 + 0) / 3)
    assert found.uar == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    two = scores(torch.tensor([0, 1]), torch.tensor([0, 1]))  # class 2 is nowhere
    assert two == (1.0, 1.0)
    with pytest.raises(ValueError, match="nothing to score"):
        scores(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))


def test_subjects_are_left_out_once_each():
    subjects = torch.tensor([4, 7, 4, 9])
    left = dict(study.leave_one_out(subjects))
    assert list(left) == [4, 7, 9] and sum(left.values()).tolist() == [1, 1, 1, 1]


def test_what_a_model_learns_of_a_subject_left_out_it_did_not_see():
    pytest.importorskip("accelerate")
    labels = torch.arange(8) % 2
    subjects = torch.arange(8) // 2
    maps = labels.view(8, 1, 1, 1).float().expand(8, 1, 2, 2) * 2 - 1
    marked = maps + (subjects == 1).view(8, 1, 1, 1) * torch.tensor(
        torch.nan
    )  # what sees this learns nothing

    def make():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))

    found = cross_subjects(make, maps, labels, subjects, epochs=10, lr=0.1, num_inside=1)
    assert found.last == found.best_on_test == (1.0, 1.0)
    with pytest.raises(ValueError, match="gradient norm nan"):
        cross_subjects(make, marked, labels, subjects, epochs=2, num_inside=1)
    with pytest.raises(ValueError, match="Give more subjects"):
        cross_subjects(make, maps, labels, labels, epochs=1)


def test_flow_finds_a_motion_and_strain_its_deformation():
    smooth = motions.blur(torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)), 1.5)
    moved = torch.tensor([0.6, -0.4]).view(1, 2, 1, 1).expand(2, 2, 32, 32)
    flow = motions.optical_flow(smooth, motions.warped(smooth, moved, back=True))
    assert (flow - moved)[..., 6:-6, 6:-6].abs().mean() < 0.05
    x, y = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="xy")
    stretched = torch.stack([0.3 * x + 0.2 * y, 0.1 * x - 0.5 * y])[None]  # u, v
    expected = (0.3**2 + 0.5**2 + 0.5 * 0.3**2) ** 0.5
    inside = motions.optical_strain(stretched)[0, 0, 1:-1, 1:-1]
    assert torch.allclose(inside, torch.full_like(inside, expected), atol=1e-5)


def test_faces_move_where_their_features_are():
    pytest.importorskip("skimage")
    made = motions.faces_in_motion(4, 3, strength=1.0)
    assert (
        made.before.shape == (12, 1, 28, 28)
        and made.subjects.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    )
    assert made.labels.tolist() == [0, 1, 2] * 4
    assert torch.equal(made.before[0], made.before[2]) and not torch.equal(made.before[0], made.before[3])
    again = motions.faces_in_motion(4, 3)
    assert torch.equal(made.after, again.after)
    assert ((made.landmarks > 0) & (made.landmarks < 27)).all()
    still = motions.faces_in_motion(4, 3, strength=0.0)
    assert (still.after - still.before).abs().mean() < (made.after - made.before).abs().mean()
    with pytest.raises(ValueError, match="give 2 to 100 subjects"):
        motions.faces_in_motion(101)


OFFICIAL = (  # ours -> the names in the official file
    (r"^stem\.proj\.", "to_patch_embedding.1."),
    (r"^stages\.(\d)\.pos_emb", r"layers.\1.0.pos_emb"),
    (r"^stages\.(\d)\.blocks\.(\d+)\.norm1\.", r"layers.\1.0.layers.\2.0.norm."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.attn\.qkv\.", r"layers.\1.0.layers.\2.0.fn.to_qkv."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.attn\.proj\.", r"layers.\1.0.layers.\2.0.fn.to_out.0."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.norm2\.", r"layers.\1.0.layers.\2.1.norm."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.mlp\.fc1\.", r"layers.\1.0.layers.\2.1.fn.net.0."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.mlp\.fc2\.", r"layers.\1.0.layers.\2.1.fn.net.3."),
    (r"^norm\.", "mlp_head.0."),
    (r"^head\.", "mlp_head.2."),
)


def official(name, value):
    down = re.match(r"^stages\.(\d)\.downsample\.(conv|norm)\.(.*)", name)
    if down:
        name = f"layers.{int(down[1]) - 1}.1.{int(down[2] == 'norm')}.{down[3]}"
    for pattern, replacement in OFFICIAL:
        name = re.sub(pattern, replacement, name)
    if re.search(r"norm\.|^layers\.\d\.1\.1\.|mlp_head\.0", name):  # a gain and a bias of [1, C, 1, 1]
        return re.sub("weight$", "g", re.sub("bias$", "b", name)), value[None, :, None, None]
    if "to_patch_embedding" in name and value.dim() == 4:  # rows of p1 p2 c, channel fastest
        return name, value.movedim(1, -1).flatten(1)[..., None, None]
    return name, value[..., None, None] if value.dim() == 2 and "mlp_head" not in name else value


def test_official_names_become_ours():
    net = tiny(depths=(1, 2, 1))
    state = net.state_dict()
    theirs = dict(official(name, value) for name, value in state.items())
    for name in (
        "layers.1.0.layers.1.0.fn.to_qkv.weight",
        "layers.0.1.0.bias",
        "layers.1.1.1.g",
        "mlp_head.0.b",
    ):
        assert name in theirs
    found = weights.convert(theirs)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_patch_is_flattened_with_the_channel_fastest():
    net, x = tiny(), torch.randn(1, 3, 28, 28)
    name, flat = official("stem.proj.weight", net.stem.proj.weight)
    patch = x[0, :, 7:14, :7].permute(1, 2, 0).flatten()
    expected = flat[:, :, 0, 0] @ patch + net.stem.proj.bias
    assert name == "to_patch_embedding.1.weight"
    assert torch.allclose(net.stem(x.movedim(1, -1))[0, 1, 0], expected, atol=1e-5)


def test_cost_is_as_published():
    with torch.device("meta"):
        net, x = htnet_official(), torch.empty(1, 3, 28, 28)
    assert count_flops(lambda: net(x)) / 2e9 == pytest.approx(0.214, rel=0.02)


def test_four_tokens_a_block_at_both_levels():
    with torch.device("meta"):
        assert [level.block_size for level in htnet_blocks4().stages] == [2, 2]
