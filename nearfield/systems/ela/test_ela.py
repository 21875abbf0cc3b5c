"""ELA against loops over rows and columns, its rivals, gates put into networks and out again, names."""

import copy

import pytest
import torch
from torch import nn

from nearfield.bench.resolution import model_macs
from nearfield.nn.pyramid import FeaturePyramid
from nearfield.systems.ela import model, weights
from nearfield.systems.ela.convert import insert
from nearfield.systems.ela.layer import ELA, GATES, VARIANTS, CoordinateAttention


def draw(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer.double().eval()


def strip(z, layer, which=""):
    """Gates of one axis, in loops: `z` is [C, N]."""
    conv, norm = getattr(layer, f"conv{which}"), getattr(layer, f"norm{which}")
    dim, length = z.shape
    mixed, size = conv.weight.shape[1:]
    out = torch.zeros(dim, length, dtype=z.dtype)
    for c in range(dim):
        for n in range(length):
            for other in range(mixed):
                for k in range(size):
                    at = n + k - size // 2
                    if 0 <= at < length:
                        out[c, n] += conv.weight[c, other, k] * z[c // mixed * mixed + other, at]
    each = dim // norm.num_groups
    for start in range(0, dim, each):
        part = out[start : start + each]
        mean = part.mean()
        out[start : start + each] = (part - mean) / ((part - mean).square().mean() + 1e-5).sqrt()
    return torch.sigmoid(out * norm.weight[:, None] + norm.bias[:, None])


@pytest.mark.parametrize(
    ("variant", "share", "sides"),
    [("T", True, (4, 2)), ("B", True, (1, 1)), ("S", True, (2, 3)), ("L", False, (3, 2))],
)
def test_it_is_a_gate_for_each_row_times_one_for_each_column(variant, share, sides):
    layer = draw(ELA(32, variant, share=share))
    x = torch.randn(1, 32, *sides, dtype=torch.float64)
    with torch.no_grad():
        found = layer(x)[0]
        rows = strip(x[0].mean(2), layer)
        columns = strip(x[0].mean(1), layer, "" if share else "_columns")
        expected = torch.zeros_like(x[0])
        for y in range(sides[0]):
            for column in range(sides[1]):
                expected[:, y, column] = x[0, :, y, column] * rows[:, y] * columns[:, column]
    assert (found - expected).abs().max() < 1e-12
    assert (found.abs() <= x[0].abs()).all()


def test_turning_the_map_turns_the_output():
    layer = draw(ELA(16, "S"))
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    assert torch.allclose(layer(x.mT), layer(x).mT, atol=1e-12)


@pytest.mark.parametrize(
    ("dim", "counts"), [(64, (448, 576, 2688, 3712)), (2048, (14336, 18432, 86016, 118784))]
)
def test_parameters_are_as_published(dim, counts):
    assert tuple(sum(p.numel() for p in ELA(dim, v).parameters()) for v in VARIANTS) == counts


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="ELA-T needs channels in multiples of 32, given 144; B and S and L"):
        ELA(144, "T")
    with pytest.raises(ValueError, match="given 24; the sizes"):
        ELA(24)
    with pytest.raises(ValueError, match="variant='X' is unknown"):
        ELA(32, "X")
    with pytest.raises(ValueError, match="norm='layer' is unknown"):
        ELA(32, norm="layer")


@pytest.mark.parametrize("gate", sorted(GATES))
def test_every_gate_keeps_shape_and_dtype_and_makes_nothing_larger(gate):
    torch.manual_seed(0)
    layer = GATES[gate](32).eval()
    x = torch.randn(2, 32, 5, 7)
    assert layer(x).shape == x.shape and (layer(x).abs() <= x.abs()).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_bottleneck_and_batch_norm_are_there_to_compare():
    layer = ELA(32, norm="batch", reduction=4)
    assert layer(torch.randn(3, 32, 4, 5)).shape == (3, 32, 4, 5)
    assert layer.norm.num_batches_tracked == 1  # both axes in one
    assert layer.conv[0].weight.shape == (8, 32, 1)


def host():
    torch.manual_seed(0)
    return model.ela_resnet8(in_channels=1, gate="none").eval()


def test_gates_go_in_by_name_and_out_without_a_trace():
    net, x = host(), torch.randn(2, 1, 16, 16)
    before, expected = {k: v.clone() for k, v in net.state_dict().items()}, net(x)
    inserted = insert(net, "stages.*.bn2", gate="ela-b")
    assert inserted.channels == {f"stages.{n}.blocks.0.bn2": 16 * 2**n for n in range(3)}
    assert inserted.num_parameters == 9 * (16 + 32 + 64)
    assert before.keys() < net.state_dict().keys()  # its own names stay
    built = model.ela_resnet8(in_channels=1).eval()
    state = {name.replace("bn2.inserted_gate", "gate"): value for name, value in net.state_dict().items()}
    built.load_state_dict(state)
    assert torch.equal(net(x), built(x)) and not torch.allclose(net(x), expected)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.stages[0].blocks[0].bn2.inserted_gate.conv.weight.zero_()
    assert torch.equal(net(x), built(x)) and not torch.equal(twin(x), net(x))
    with pytest.raises(ValueError, match="has a gate already"):
        insert(net, "stages.0.*.bn2")
    inserted.remove()
    inserted.remove()
    assert torch.equal(net(x), expected) and net.state_dict().keys() == before.keys()
    assert not any(module._forward_hooks for module in net.modules())


def test_behind_other_modules_an_example_shows_the_channels():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    with pytest.raises(ValueError, match="1, a Sequential, show when it runs"):
        insert(net, "1")
    inserted = insert(net, "1", gate=lambda dim: nn.Conv2d(dim, dim, 1), example=(torch.randn(1, 3, 8, 8),))
    assert inserted.channels == {"1": 16} and net.training
    gate = net[1].inserted_gate
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(net(x), gate(net[1][1](net[1][0](net[0](x)))))
    inserted.remove()
    assert len(net[1]) == 2


def test_what_does_not_fit_changes_nothing():
    net = host()
    with pytest.raises(ValueError, match="matches no module. Norms and convolutions are: stem.conv, stem.bn"):
        insert(net, "layer*")
    with pytest.raises(
        ValueError, match=r"stages\.0\.blocks\.0\.bn2: ELA-T needs channels in multiples of 32"
    ):
        insert(net, "*.bn2", gate="ela-t")
    with pytest.raises(ValueError, match="gate='cbam' is unknown"):
        insert(net, "*.bn2", gate="cbam")
    assert not any("inserted" in name for name, _ in net.named_modules())


@pytest.mark.parametrize(("name", "options"), [("ela_resnet8", {}), ("ela_mobilenet_v2", {"width": 0.5})])
def test_pictures_may_have_any_sides(name, options):
    net = getattr(model, name)(num_classes=5, small=True, **options).eval()
    picture = torch.randn(1, 3, 9, 14)
    features, maps = net.forward_intermediates(picture)
    for shown, info in zip(maps, net.feature_info, strict=True):
        assert shown.shape == (1, info["num_chs"], *(-(-each // info["reduction"]) for each in (9, 14)))
    assert torch.equal(net.forward_head(features), net(picture)) and net(picture).shape == (1, 5)


def test_it_is_a_feature_pyramid_for_dense_prediction():
    maps = FeaturePyramid(model.ela_resnet8(gate=CoordinateAttention))(torch.randn(2, 3, 24, 16))
    assert [tuple(each.shape) for each in maps] == [(2, 16, 24, 16), (2, 32, 12, 8), (2, 64, 6, 4)]


def test_copies_names_become_ours():
    state = ELA(16).state_dict()
    theirs = {
        "con1.weight": state["conv.weight"],
        "GN.weight": state["norm.weight"],
        "GN.bias": state["norm.bias"],
    }
    ELA(16).load_state_dict(weights.convert(theirs))
    names = {
        "layer2.0.ela.con1.weight": "stages.1.blocks.0.ela.conv.weight",
        "layer2.0.ela.gn.bias": "stages.1.blocks.0.ela.norm.bias",
        "layer1.1.bn2.weight": "stages.0.blocks.1.bn2.weight",
        "fc.weight": "head.weight",
    }
    found = weights.convert({name: torch.tensor(number) for number, name in enumerate(names)})
    assert {name: int(value) for name, value in found.items()} == {
        name: number for number, name in enumerate(names.values())
    }


def test_cost_is_that_of_the_host():
    assert model_macs(model.ela_resnet18(gate="none")) / 1e9 == pytest.approx(1.82, rel=0.01)


@pytest.mark.compile
def test_it_compiles_whole():
    layer, x = ELA(16).eval(), torch.randn(2, 16, 6, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
