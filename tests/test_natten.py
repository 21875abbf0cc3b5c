"""NATTEN's names: the two halves against loops, the layers, and transformers' DiNAT while installed."""

import sys

import pytest
import torch

from nearfield import natten
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention, unfused


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


PATTERNS = [
    ((9,), Neighborhood(4, dilation=2)),
    ((10,), Neighborhood(3, stride=2, is_causal=True)),
    ((5, 6), Neighborhood((3, 4))),
    ((6, 7), Neighborhood((3, 2), dilation=(2, 3), is_causal=(False, True))),
    ((5,), Neighborhood(4, border="truncate")),
]


def looped(query, key, value, bias, bound):
    """Scores, and the attention without a scale, one query and key after the other."""
    grid = [axis.size for axis in bound.axes]
    places = list(torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid)).tolist())
    out = torch.zeros_like(value)
    rows = []
    for place in places:
        windows = [list(axis.window(at)) for axis, at in zip(bound.axes, place, strict=True)]
        seen = list(torch.cartesian_prod(*map(torch.tensor, windows)).view(-1, len(grid)).tolist())
        found = []
        for at in seen:
            q, k = query[(slice(None), *place)], key[(slice(None), *at)]
            entry = tuple(
                (j - i) // axis.dilation + axis.kernel_size - 1
                for axis, i, j in zip(bound.axes, place, at, strict=True)
            )
            found.append((q * k).sum(-1) + bias[(slice(None), *entry)])
        row = torch.stack(found, -1)
        rows.append(row)
        values = torch.stack([value[(slice(None), *at)] for at in seen], -1)  # [B, H, D, keys]
        out[(slice(None), *place)] = (values * row.softmax(-1)[..., None, :]).sum(-1)
    return rows, out


@pytest.mark.parametrize(("grid", "pattern"), PATTERNS)
def test_halves_are_what_the_geometry_says(grid, pattern):
    q, k, v = (draw(2, *grid, 2, 3, seed=seed) for seed in range(3))
    bound = pattern.on(grid)
    bias = draw(2, *(2 * axis.kernel_size - 1 for axis in bound.axes), seed=3)
    rows, expected = looped(q, k, v, bias, bound)
    found = unfused.scores(q, k, pattern, bias=bias)
    for number, row in enumerate(rows):
        mine = found.flatten(1, -3)[:, number]
        assert torch.allclose(mine[mine.isfinite()].sort()[0], row.flatten().sort()[0])
    assert torch.allclose(unfused.weigh(found.softmax(-1), v, pattern), expected)
    fused = neighborhood_attention(q, k, v, pattern, bias=bias, scale=1.0, backend="reference")
    assert torch.allclose(fused, expected)


@pytest.mark.parametrize(
    ("grid", "pattern"), [((4,), Neighborhood(2, is_causal=True)), ((2, 3), Neighborhood((1, 2)))]
)
def test_halves_are_differentiable_twice(grid, pattern):
    def attend(query, key, value):
        return unfused.weigh(unfused.scores(query, key, pattern).softmax(-1), value, pattern)

    given = [draw(1, *grid, 1, 2, seed=seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(attend, given)
    assert torch.autograd.gradgradcheck(attend, given, fast_mode=True)


def test_a_key_that_is_not_seen_brings_nothing_not_even_nan():
    pattern = Neighborhood(3, is_causal=True)
    k, v = draw(1, 6, 1, 4, seed=1), draw(1, 6, 1, 4, seed=2)
    k[:, 3:] = v[:, 3:] = torch.nan
    out = unfused.weigh(unfused.scores(draw(1, 6, 1, 4), k, pattern).softmax(-1), v, pattern)
    assert out[:, :3].isfinite().all() and out[:, 3:].isnan().all()


@pytest.mark.compile
def test_halves_compile_whole():
    pattern = Neighborhood((3, 3))

    def attend(query, key, value):
        return unfused.weigh(unfused.scores(query, key, pattern).softmax(-1), value, pattern)

    given = [draw(1, 5, 6, 2, 4, seed=seed).requires_grad_() for seed in range(3)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*given), attend(*given))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="agree in all but the last"):
        unfused.scores(draw(1, 5, 2, 4), draw(1, 6, 2, 4), Neighborhood(3))
    with pytest.raises(ValueError, match=r"bias has shape \[2, 4\]. It must be \[2, 5\]"):
        unfused.scores(draw(1, 5, 2, 4), draw(1, 5, 2, 4), Neighborhood(3), bias=draw(2, 4))
    with pytest.raises(ValueError, match="weights have 4 entries"):
        unfused.weigh(draw(1, 5, 2, 4), draw(1, 5, 2, 4), Neighborhood(3))


# NATTEN's layouts


def test_old_names_take_heads_first():
    q, k, v = (draw(2, 3, 5, 6, 4, seed=seed) for seed in range(3))
    rpb = draw(3, 5, 5, seed=3)
    scores = natten.natten2dqkrpb(q, k, rpb, 3, 1)
    assert scores.shape == (2, 3, 5, 6, 9)
    out = natten.natten2dav(scores.softmax(-1), v, 3, 1)
    expected = neighborhood_attention(
        *(x.movedim(1, -2) for x in (q, k, v)), Neighborhood((3, 3)), bias=rpb, scale=1.0
    )
    assert torch.allclose(out, expected.movedim(-2, 1))
    q, k, v = (x[:, :, 0] for x in (q, k, v))
    line = natten.natten1dav(natten.natten1dqkrpb(q, k, rpb[:, 0], 3, 2).softmax(-1), v, 3, 2)
    expected = neighborhood_attention(
        *(x.movedim(1, -2) for x in (q, k, v)), Neighborhood(3, dilation=2), bias=rpb[:, 0], scale=1.0
    )
    assert torch.allclose(line, expected.movedim(-2, 1))


@pytest.mark.parametrize("rank", [1, 2])
def test_additional_keys_come_last(rank):
    grid = (6, 5)[:rank]
    q, k, v = (draw(2, 3, *grid, 4, seed=seed) for seed in range(3))
    more_k, more_v = draw(2, 3, 2, 4, seed=3), draw(2, 3, 2, 4, seed=4)
    qk, av = (natten.na1d_qk, natten.na1d_av) if rank == 1 else (natten.na2d_qk, natten.na2d_av)
    scores = qk(q, k, 3, additional_keys=more_k, is_causal=True)
    out = av(scores.softmax(-1), v, 3, additional_values=more_v, is_causal=True)
    expected = neighborhood_attention(
        *(x.movedim(1, -2) for x in (q, k, v)),
        Neighborhood((3,) * rank, is_causal=(True,) * rank),
        additional_keys=more_k.movedim(1, -2),
        additional_values=more_v.movedim(1, -2),
        scale=1.0,
    )
    assert torch.allclose(out, expected.movedim(-2, 1))


def test_new_names_are_the_operator():
    q, k, v = (draw(1, 6, 7, 2, 4, seed=seed) for seed in range(3))
    out, lse = natten.na2d(
        q, k, v, 3, dilation=2, is_causal=(True, False), return_lse=True, backend="flex-fna"
    )
    pattern = Neighborhood((3, 3), dilation=(2, 2), is_causal=(True, False))
    expected = neighborhood_attention(q, k, v, pattern, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert torch.equal(natten.na2d(q, k, v, (3, 3), 1, 2, (True, False)), out)
    with pytest.raises(ValueError, match="na1d takes"):
        natten.na1d(q, k, v, 3)
    with pytest.raises(TypeError, match="tile: no argument of NATTEN's"):
        natten.na2d(q, k, v, 3, tile=4)


def test_merged_parts_are_the_whole():
    q, k, v = (draw(2, 8, 2, 4, seed=seed).requires_grad_() for seed in range(3))
    everything = Neighborhood(8)
    masks = [torch.arange(8).expand(2, 8) < 3, torch.arange(8).expand(2, 8) >= 3]
    parts = [neighborhood_attention(q, k, v, everything, key_mask=mask, return_lse=True) for mask in masks]
    out, lse = natten.merge_attentions([part[0] for part in parts], [part[1] for part in parts])
    expected, expected_lse = neighborhood_attention(q, k, v, everything, return_lse=True)
    assert torch.allclose(out, expected) and torch.allclose(lse, expected_lse)
    grad = draw(*out.shape, seed=5)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected)), strict=True):
        assert torch.allclose(a, b)
    blind = [torch.zeros(1, 2, 1, 4)] * 2, [torch.full((1, 2, 1), -torch.inf)] * 2
    assert natten.merge_attentions(*blind)[0].eq(0).all()
    with pytest.raises(ValueError, match="as many of each"):
        natten.merge_attentions([out], [])


def test_layers_hold_what_nattens_hold():
    layer = natten.NeighborhoodAttention2D(8, 2, 3, dilation=2, qk_scale=0.3).double()
    assert set(layer.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    x = draw(2, 6, 7, 8)
    q, k, v = layer.qkv(x).view(2, 6, 7, 3, 2, 4).unbind(3)
    out = natten.na2d(q, k, v, 3, dilation=2, scale=0.3)
    assert torch.allclose(layer(x), layer.proj(out.flatten(-2)))
    assert natten.NeighborhoodAttention1D(8, 2, 3, is_causal=True)(torch.randn(1, 5, 8)).shape == (1, 5, 8)
    assert natten.NeighborhoodAttention3D(8, 2, 3)(torch.randn(1, 3, 4, 5, 8)).shape == (1, 3, 4, 5, 8)
    with pytest.raises(ValueError, match="NeighborhoodAttention2D takes"):
        layer(draw(2, 6, 8))


# install, uninstall


@pytest.fixture
def installed():
    pytest.importorskip("transformers")
    natten.install()
    yield
    natten.uninstall()


def tiny_dinat():
    from transformers import DinatConfig, DinatForImageClassification

    torch.manual_seed(0)
    config = DinatConfig(
        patch_size=4,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        kernel_size=3,
        dilations=[[1, 2], [1, 1]],
        num_labels=3,
    )
    model = DinatForImageClassification(config)
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return model


def test_a_stand_in_is_found_and_leaves(installed):
    import importlib.util

    assert importlib.util.find_spec("natten") is not None
    from natten import na2d
    from natten.functional import natten2dav

    assert natten2dav is natten.natten2dav and na2d is natten.na2d
    there = sys.modules["natten"]
    natten.install()
    assert sys.modules["natten"] is there
    natten.uninstall()
    natten.uninstall()
    assert sys.modules.get("natten") is not there


def test_dinat_runs_and_trains(installed):
    model = tiny_dinat()
    pictures, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    loss = model(pictures, labels=labels).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    assert model(pictures, labels=labels).loss < loss


def test_dinat_equals_an_unfused_computation_in_double(installed, monkeypatch):
    from transformers.models.dinat import modeling_dinat

    model, pictures = tiny_dinat().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = model(pictures).logits
        calls = []

        def forward(self, hidden_states, output_attentions=False):
            calls.append(self.kernel_size)
            q, k, v = (
                layer(hidden_states).unflatten(-1, (-1, self.attention_head_size))
                for layer in (self.query, self.key, self.value)
            )
            bound = Neighborhood((self.kernel_size,) * 2, dilation=(self.dilation,) * 2).on(q.shape[1:3])
            return (looped(q / self.attention_head_size**0.5, k, v, self.rpb, bound)[1].flatten(-2),)

        monkeypatch.setattr(modeling_dinat.NeighborhoodAttention, "forward", forward)
        exact = model.double()(pictures.double()).logits
    assert len(calls) == 4
    assert (found - exact).abs().max() < 1e-5


def test_dinat_without_us_says_what_to_do(installed):
    model = tiny_dinat()
    natten.uninstall()
    from transformers.models.dinat import modeling_dinat

    if modeling_dinat.natten2dav is not natten._gone:
        pytest.skip("DiNAT was imported before")
    with pytest.raises(RuntimeError, match=r"Call nearfield.natten.install\(\)"):
        model(torch.randn(1, 3, 32, 32))
