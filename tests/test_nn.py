"""The trunk of the vision models: what each part computes, and what tools ask of a backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.nn.attention import Attention, WindowAttention
from nearfield.nn.backbone import Backbone
from nearfield.nn.convolution import ConvPosition, convolve, pad_to
from nearfield.nn.mlp import Mlp
from nearfield.nn.pyramid import ConvStem, FeaturePyramid, PatchEmbed, Pyramid, Stage
from nearfield.nn.residual import DropPath, LayerScale, drop_path_rates
from nearfield.testing import assert_close

DIMS = (8, 12, 16)


class Block(nn.Module):
    def __init__(self, dim: int, drop: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, 2, 2)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.attn(self.norm(x)))


def pyramid(*, num_classes: int = 5, drop: float = 0.0, norm_pooled: bool = False) -> Pyramid:
    """Three stages of two blocks."""
    torch.manual_seed(0)
    stages = [
        Stage(
            PatchEmbed(DIMS[n - 1], dim, 2, 2) if n else nn.Identity(), [Block(dim, drop), Block(dim, drop)]
        )
        for n, dim in enumerate(DIMS)
    ]
    return Pyramid(
        PatchEmbed(3, DIMS[0], 4, 4),
        stages,
        DIMS,
        num_classes=num_classes,
        strides=(4, 1, 2, 2),
        norm=nn.LayerNorm(DIMS[-1]),
        norm_pooled=norm_pooled,
    )


class Tokens(Backbone):
    """A model of a class token and patches, whose parts hand on a pair."""

    parts_name = "blocks"

    def __init__(self, num_classes: int = 5):
        super().__init__(8, num_classes)
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 8))
        self.blocks = nn.ModuleList(Pair() for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = self.make_head(num_classes)
        self.feature_info = [{"num_chs": 8, "reduction": 1, "module": f"blocks.{n}"} for n in range(3)]
        self.initialise()

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_token.expand(len(images), -1), self.stem(images.movedim(1, -1))

    def as_map(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return state[1]

    def finish(self, state: tuple[Tensor, Tensor]) -> Tensor:
        token, patches = state
        return self.norm(torch.cat([token.unsqueeze(1), patches.flatten(1, 2)], 1))

    def pool(self, features: Tensor) -> Tensor:
        return features[:, 0]

    def _normed(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.norm(state[0]), self.norm(state[1])

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        token, patches = state
        return token + self.line(patches.mean((1, 2))), patches + self.line(patches)


MODELS: list[Callable[..., Backbone]] = [pyramid, Tokens]


def picture(side: int = 16, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


# what a backbone offers


@pytest.mark.parametrize("build", [*MODELS, lambda: pyramid(norm_pooled=True)])
def test_forward_is_features_then_head(build: Callable[..., Backbone]) -> None:
    net, x = build().eval(), picture()
    features = net.forward_features(x)
    pooled = net.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, net.num_features) and net.head_hidden_size == net.num_features
    assert torch.equal(net(x), net.forward_head(features)) and torch.equal(net(x), net.head(pooled))
    assert net.get_classifier() is net.head


def test_the_norm_stands_before_or_behind_the_pooling() -> None:
    before, behind = pyramid().eval(), pyramid(norm_pooled=True).eval()
    behind.load_state_dict(before.state_dict())
    x = picture()
    features = behind.forward_features(x)
    assert_close(behind.norm(features), before.forward_features(x))
    assert_close(behind.forward_head(features, pre_logits=True), behind.norm(features.mean((1, 2))))


@pytest.mark.parametrize("build", MODELS)
def test_intermediates_are_those_of_the_parts(build: Callable[..., Backbone]) -> None:
    net, x = build().eval(), picture()
    final, maps = net.forward_intermediates(x)
    assert torch.equal(final, net.forward_features(x))
    assert len(maps) == len(net.parts) == len(net.feature_info)
    seen: list[Tensor] = []
    hooks = [part.register_forward_hook(lambda m, i, out: seen.append(net.as_map(out))) for part in net.parts]
    net(x)
    for hook in hooks:
        hook.remove()
    for shown, part, info in zip(maps, seen, net.feature_info, strict=True):
        assert torch.equal(shown, part.movedim(-1, 1))
        assert shown.shape[1:] == (info["num_chs"], 16 // info["reduction"], 16 // info["reduction"])
        assert net.get_submodule(info["module"]) is not None
    some = net.forward_intermediates(
        x, [2, 0], output_fmt="NHWC", intermediates_only=True
    )  # in the order of parts
    assert [torch.equal(a, seen[n]) for a, n in zip(some, (0, 2), strict=True)] == [True, True]
    last = net.forward_intermediates(x, 2, intermediates_only=True)
    negative = net.forward_intermediates(x, (-2, -1), intermediates_only=True)
    assert all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(last, maps[1:], negative, strict=True)
    )


@pytest.mark.parametrize("build", MODELS)
def test_the_last_intermediate_may_be_normed(build: Callable[..., Backbone]) -> None:
    net, x = build().eval(), picture()
    plain, normed = (net.forward_intermediates(x, norm=norm, output_fmt="NHWC")[1] for norm in (False, True))
    assert torch.equal(plain[0], normed[0]) and torch.equal(net.norm(plain[-1]), normed[-1])


def test_stopping_early_runs_no_later_part() -> None:
    net = pyramid().eval()
    net.stages[1].register_forward_hook(lambda *_: pytest.fail("ran"))
    assert len(net.forward_intermediates(picture(), [0], stop_early=True, intermediates_only=True)) == 1


@pytest.mark.parametrize("build", MODELS)
def test_what_is_pruned_changes_no_remaining_map(build: Callable[..., Backbone]) -> None:
    x = picture()
    expected = build().eval().forward_intermediates(x, intermediates_only=True)
    net = build().eval()
    assert net.prune_intermediate_layers([0, -2]) == [0, 1]
    assert len(net.parts) == 2 and isinstance(net.head, nn.Identity) and isinstance(net.norm, nn.Identity)
    found = net.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected[:2], strict=True))
    assert net(x).shape == (2, net.num_features) and net.num_features == net.feature_info[1]["num_chs"]
    whole = build()
    whole.prune_intermediate_layers(1, prune_head=False)
    assert whole(x).shape == (2, 5) and isinstance(whole.norm, nn.LayerNorm)


@pytest.mark.parametrize("indices", [0, 4, [], [3], [-4]])
def test_parts_that_are_not_there_are_refused(indices: int | list[int]) -> None:
    for call in (
        pyramid().prune_intermediate_layers,
        lambda i: pyramid().forward_intermediates(picture(), i),
    ):
        with pytest.raises(ValueError, match="indices="):
            call(indices)


def test_a_head_is_replaced_where_the_model_is() -> None:
    net = pyramid().double()
    net.reset_classifier(7)
    assert net.num_classes == 7 and net(picture().double()).shape == (2, 7)
    net.reset_classifier(0, "avg")
    assert net(picture().double()).shape == (2, DIMS[-1])
    with pytest.raises(ValueError, match="global_pool='max'"):
        net.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="num_classes=-1"):
        pyramid(num_classes=-1)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        pyramid().forward_intermediates(picture(), output_fmt="NLC")  # type: ignore[arg-type]


@pytest.mark.parametrize("build", [lambda: pyramid(drop=0.3), Tokens])
def test_checkpointing_changes_no_gradient(build: Callable[..., Backbone]) -> None:
    def gradients(enable: bool) -> tuple[Tensor, list[Tensor]]:
        net = build().train()
        net.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        loss = net(picture()).square().sum()
        return loss, list(torch.autograd.grad(loss, list(net.parameters())))

    (plain, expected), (loss, found) = gradients(False), gradients(True)
    assert torch.equal(plain, loss) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    net = build()
    net.set_grad_checkpointing()
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        net(picture())
        checkpointed, net.grad_checkpointing = len(kept), False
        kept.clear()
        net(picture())
    assert checkpointed < len(kept)


@pytest.mark.parametrize("build", MODELS)
def test_every_parameter_has_a_layer_as_timm_sorts_them(build: Callable[..., Backbone]) -> None:
    import re

    net = build()
    for coarse in (False, True):
        layers: dict[str, tuple[float, ...]] = {}
        for name, _ in net.named_parameters():
            layers[name] = (float("inf"),)
            for place, (_, rules) in enumerate(net.group_matcher(coarse).items()):
                for rule, ending in [(rules, None)] if isinstance(rules, str) else rules:
                    found = re.match(rule, name)
                    if found and layers[name] == (float("inf"),):
                        groups = [float(group) for group in found.groups() if group is not None]
                        layers[name] = (float(place), *groups, *map(float, ending or ()))
        assert layers["stem.proj.weight" if build is pyramid else "stem.weight"] == (0.0,)
        assert layers["head.weight"] == (float("inf"),)
        if build is pyramid:
            assert layers["stages.1.downsample.proj.weight"][:2] == (1.0, 1.0)
            same = layers["stages.2.blocks.0.attn.qkv.weight"] == layers["stages.2.blocks.1.attn.qkv.weight"]
            assert same == coarse
    names = {name for name, _ in net.named_parameters()}
    assert net.no_weight_decay() <= names


def test_a_backbone_that_does_not_say_what_it_does_is_told() -> None:
    for call in (Backbone(4, 2).embed, Backbone(4, 2).finish):
        with pytest.raises(NotImplementedError, match="must say how it"):
            call(picture())


@pytest.mark.compile
def test_a_pyramid_compiles_whole() -> None:
    torch._dynamo.reset()
    net = pyramid().eval()
    assert_close(torch.compile(net, fullgraph=True, backend="eager")(picture()), net(picture()))


def test_a_backbone_is_its_own_state() -> None:
    net, other = pyramid(), pyramid()
    nn.init.ones_(other.head.weight)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(picture()), other.eval()(picture()))
    with torch.device("meta"):
        assert pyramid()(picture().to("meta")).shape == (2, 5)


# dense prediction


def test_a_feature_pyramid_norms_the_maps_that_are_asked_for() -> None:
    x = picture(24)
    expected = pyramid().eval().forward_intermediates(x, [0, 1], intermediates_only=True)
    plain = FeaturePyramid(pyramid(), [0, 1], norm=False).eval()
    assert plain.channels == [8, 12] and plain.reductions == [4, 8] and len(plain.backbone.stages) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain(x), expected, strict=True))
    normed = FeaturePyramid(pyramid()).eval()
    assert [shown.shape[1] for shown in normed(x)] == [8, 12, 16]
    for shown, net in zip(normed(x), expected, strict=False):
        assert_close(shown, F.layer_norm(net.movedim(1, -1), (net.shape[1],), eps=1e-6).movedim(-1, 1))
    names = [
        name for name, p in normed.named_parameters() if name.startswith(("backbone.norm", "backbone.head"))
    ]
    assert not names  # nothing without a gradient
    assert [
        len(FeaturePyramid(Tokens(), [2]).eval()(picture())),
        len(FeaturePyramid(Tokens())(picture())),
    ] == [1, 3]


# layers


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5)])
def test_padding_lengthens_the_end_of_each_side(sizes: tuple[int, int]) -> None:
    x = torch.randn(2, 7, 8, 3)
    padded = pad_to(x, sizes)
    assert all(
        side % size == 0 and side - was < size
        for side, size, was in zip(padded.shape[1:3], sizes, (7, 8), strict=True)
    )
    assert torch.equal(padded[:, :7, :8], x) and padded.count_nonzero() == x.count_nonzero()
    assert pad_to(padded, sizes) is padded


def test_window_attention_sees_padding_as_tokens_of_zero() -> None:
    torch.manual_seed(0)
    layer, x = WindowAttention(8, 2, 4), torch.randn(2, 5, 6, 8)
    whole = torch.zeros(2, 8, 8, 8)
    whole[:, :5, :6] = x
    assert_close(layer(x), layer(whole)[:, :5, :6])
    dense = Attention(8, 2)
    dense.load_state_dict(layer.state_dict())
    assert_close(layer(x[:, :4, :4]), dense(x[:, :4, :4]))
    for make in (lambda: Attention(8, 3), lambda: WindowAttention(8, 0, 2)):
        with pytest.raises(ValueError, match="no multiple of num_heads"):
            make()


def test_attention_is_the_softmax_over_all_positions() -> None:
    torch.manual_seed(0)
    layer = Attention(6, 2, qkv_bias=False).double()
    x = torch.randn(1, 2, 3, 6, dtype=torch.float64)
    rows = x.flatten(1, 2)[0]
    q, k, v = (part.view(6, 2, 3) for part in layer.qkv(rows).split(6, -1))
    out = torch.empty(6, 2, 3, dtype=torch.float64)
    for head in range(2):
        for i in range(6):
            out[i, head] = (k[:, head] @ q[i, head] * 3**-0.5).softmax(0) @ v[:, head]
    assert_close(layer(x), layer.proj(out.flatten(1)).view(1, 2, 3, 6))
    assert layer.qkv.bias is None


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_take_channels_last(rank: int) -> None:
    torch.manual_seed(0)
    layer, x = ConvPosition(4, rank=rank), torch.randn(2, *(5, 4, 3)[:rank], 4)
    assert_close(layer(x), x + layer.proj(x.movedim(-1, 1).contiguous()).movedim(1, -1))
    pooled = convolve(nn.AvgPool2d(2), torch.ones(1, 4, 6, 3))
    assert pooled.shape == (1, 2, 3, 3)


def test_a_patch_that_does_not_fit_is_padded_or_not() -> None:
    x = torch.randn(1, 9, 10, 3)
    assert PatchEmbed(3, 4, 4, 4)(x).shape == (1, 3, 3, 4)
    assert PatchEmbed(3, 4, 4, 4, pad=False)(x).shape == (1, 2, 2, 4)
    layer = PatchEmbed(3, 4, 2, 2, norm_before=nn.LayerNorm(3), norm=nn.LayerNorm(4))
    x = x[:, :8]
    assert_close(layer(x), layer.norm(convolve(layer.proj, layer.norm_before(x))))
    assert ConvStem(3, 8, nn.GELU)(torch.randn(2, 9, 12, 3)).shape == (2, 3, 3, 8)


def test_the_feed_forward_network_may_look_around() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 3)
    plain, looking = Mlp(3, 6), Mlp(3, 6, conv_size=3)
    assert_close(plain(x), plain.fc2(F.gelu(plain.fc1(x))))
    moved = x.clone()
    moved[:, 0, 0] += 1
    assert int((plain(x) != plain(moved)).any(-1).sum()) == 1
    assert int((looking(x) != looking(moved)).any(-1).sum()) == 4  # the corner and its neighbours


# residual branches


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    layer, x = DropPath(0.25).train(), torch.ones(4000, 2, 3)
    out = layer(x)
    kept = out[:, 0, 0] > 0
    assert torch.equal(out, kept[:, None, None] * x / 0.75)
    assert abs(float(kept.float().mean()) - 0.75) < 0.03 and abs(float(out.mean()) - 1) < 0.04
    assert layer.eval()(x) is x and DropPath(0.0).train()(x) is x
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="rate="):
            DropPath(rate)


@given(st.floats(0, 0.9), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_drop_rates_rise_in_equal_steps(rate: float, depths: list[int]) -> None:
    rates = drop_path_rates(rate, tuple(depths))
    assert [len(stage) for stage in rates] == depths
    flat = [each for stage in rates for each in stage]
    assert flat[0] == 0 and flat == sorted(flat) and (len(flat) == 1 or flat[-1] == pytest.approx(rate))
    steps = [b - a for a, b in zip(flat, flat[1:], strict=False)]
    assert all(step == pytest.approx(steps[0]) for step in steps)


def test_layer_scale_is_a_factor_for_each_channel() -> None:
    layer = LayerScale(3, 0.5)
    layer.gamma.data[1] = 2
    assert torch.equal(layer(torch.ones(2, 4, 3)), torch.tensor([0.5, 2.0, 0.5]).expand(2, 4, 3))
