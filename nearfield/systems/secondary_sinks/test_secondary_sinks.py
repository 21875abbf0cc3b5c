"""The profile of attention sinks against its definition, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nearfield.hosts import seam
from nearfield.systems.secondary_sinks import study
from nearfield.systems.secondary_sinks.layer import decoder_blocks, mlp_stages, trigger_directions
from nearfield.systems.secondary_sinks.model import planted
from nearfield.systems.secondary_sinks.steer import RescaleSinks
from nearfield.systems.secondary_sinks.study import label, levels, origin, primary_band, sink_profile

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nearfield[hf]'")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def _one_thread():
    """The matrices are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made():
    return planted(tokens=96, sinks=8)


def tiny(kind="Llama", **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **more})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def hooks(model):
    """How many there are; transformers keeps some of its own."""
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]


def published(states, candidates):
    """The rules of the paper in loops, on states behind the blocks `[L, N, dim]`."""
    means = [sum(float(state[c].norm()) for state in states) / len(states) for c in range(candidates)]
    primary = max(range(candidates), key=means.__getitem__)
    rises = [float(b[primary].norm() - a[primary].norm()) for a, b in zip(states, states[1:], strict=False)]
    start = max(range(len(rises)), key=rises.__getitem__) + 1
    end = min(range(start, len(rises)), key=rises.__getitem__) + 1
    layers = {}
    for layer in range(start, end):
        for token in range(primary + 1, len(states[0])):
            a, b = states[layer][token], states[layer][primary]
            if abs(float(a @ b / a.norm() / b.norm())) > 0.9:
                layers.setdefault(token, []).append(layer)
    return primary, range(start, end), layers


@torch.no_grad()
def test_parity_equals_the_published_rules_written_out(made):
    states = made.model(input_ids=made.input_ids, output_hidden_states=True).hidden_states[1:]
    primary, band, layers = published([state[0] for state in states], 3)
    profile = sink_profile(made.model, made.input_ids, candidates=3, parity=True)
    assert (profile.primary, profile.band) == (primary, band)
    assert {sink.position: list(sink.layers) for sink in profile.sinks} == layers and layers
    assert all(sink.label == label(sink.lifetime, 20, "layers") for sink in profile.sinks)
    assert torch.allclose(profile.norms, torch.stack([state[0].norm(dim=-1) for state in states]))


def test_labels_are_those_of_the_published_results():
    """Qwen3-4B-Base, 36 layers, and DeepSeek-R1-Distill-Qwen-14B, 48: the files beside the official code."""
    assert label(18, 36, "layers") == "secondary" and label(29, 36, "layers") == "primary"
    assert {label(n, 48, "layers") for n in (16, 21, 22, 23, 24)} == {"secondary"}
    assert label(43, 48, "layers") == "primary" and label(4, 48, "layers") == "noise"
    assert [label(n, 20) for n in (2, 3, 14, 15)] == ["noise", "secondary", "secondary", "primary"]


def test_the_band_goes_from_the_largest_rise_to_the_largest_fall():
    norms = torch.tensor([1.0, 9.0, 9.0, 10.0, 3.0, 3.5])  # before the first block, then behind each
    assert primary_band(norms) == range(3)
    assert primary_band(norms[1:], has_start=False) == range(2, 3)  # the first block's rise is not seen
    assert primary_band(torch.tensor([1.0, 2.0, 9.0, 9.5, 10.0])) == range(1, 4)  # no fall: to the end
    assert primary_band(torch.tensor([1.0, 2.0, 9.0])) == range(1, 2)  # a rise in the last block


def test_planted_sinks_are_found_where_they_are(made):
    profile = sink_profile(made.model, made.input_ids)
    assert profile.primary == 0 and profile.band == made.band
    assert {sink.position for sink in profile.of("secondary")} == set(made.positions)
    assert {sink.born for sink in profile.sinks} == {made.born}
    assert sum(levels([profile, profile]).values()) == 2 * len(made.positions)
    about = origin(made.model, made.input_ids, profile)
    assert all(each["input"] < 0.5 < 0.9 < each["output"] for each in about)
    # a planted direction has no massive dimensions, so the cosine does not hang on three of them
    assert (profile.trimmed[made.born, list(made.positions)].abs() > 0.85).all()


@pytest.mark.parametrize(
    ("kind", "more"), [("Llama", {}), ("Qwen3", {"head_dim": 8}), ("Gemma2", {"head_dim": 8})]
)
@torch.no_grad()
def test_attention_received_is_the_mean_of_the_eager_maps(kind, more, monkeypatch):
    monkeypatch.setattr(study, "WORKSPACE", 2000)  # several chunks of rows
    model, ids = tiny(kind, **more), torch.arange(14)[None] % 11
    profile = sink_profile(model, ids)
    model.set_attn_implementation("eager")
    maps = torch.stack(model(input_ids=ids, output_attentions=True).attentions)[:, 0].double().mean(1)
    for key in range(13):
        expected = maps[:, key + 1 :, key].mean(1)
        assert torch.allclose(profile.received[:, key].double(), expected, atol=1e-6)
    assert profile.received[:, -1].isnan().all()


@torch.no_grad()
def test_the_model_is_as_before(made):
    before, own = made.model(input_ids=made.input_ids).logits, hooks(made.model)
    sink_profile(made.model, made.input_ids)
    mlp_stages(made.model, made.input_ids, 3, [0, 4])
    assert torch.equal(before, made.model(input_ids=made.input_ids).logits)
    assert hooks(made.model) == own


@torch.no_grad()
def test_stages_are_those_of_the_gated_mlp():
    model, ids = tiny(), torch.arange(9)[None]
    stages = mlp_stages(model, ids, 2, [1, 5])
    mlp = model.model.layers[2].mlp
    gate, up = mlp.gate_proj(stages["input"]), mlp.up_proj(stages["input"])
    assert torch.allclose(stages["gate"], gate) and torch.allclose(stages["up"], up)
    assert torch.allclose(stages["product"], F.silu(gate) * up, atol=1e-6)
    assert torch.allclose(stages["output"], mlp.down_proj(stages["product"]), atol=1e-6)


def test_directions_that_set_an_mlp_off_are_told():
    torch.manual_seed(0)
    mlp = tiny().model.layers[0].mlp
    axis, target = torch.eye(32)[0], torch.eye(32)[1]
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight.normal_(std=0.3)[0] = axis
        mlp.down_proj.weight.normal_(std=0.3)
        mlp.down_proj.weight[:, 0] = 9 * target
    noise = 0.1 * torch.randn(40, 32) * (1 - axis)
    found = trigger_directions(mlp, noise[:20] + 3 * axis, noise[20:], target)
    assert found.components.shape == (10, 32) and found.effective()[0] and found.effective().sum() == 1
    assert not trigger_directions(mlp, noise[:20], noise[20:], target).effective().any()


@torch.no_grad()
def test_rescaling_gives_the_norm_and_spares_the_first_tokens_also_while_decoding(made):
    direction = mlp_stages(made.model, made.input_ids, made.born, [0])["output"][0]
    with RescaleSinks(made.born, direction, norm=2.0)(made.model):
        after = mlp_stages(made.model, made.input_ids, made.born, [0, *made.positions])["output"].norm(dim=-1)
    assert torch.allclose(after[1:], torch.full_like(after[1:], 2.0), atol=1e-4)
    assert torch.allclose(after[0], direction.norm(), atol=1e-4)
    first = made.positions[-1]
    steer = RescaleSinks(made.born, direction, norm=2.0, spared=first)
    with steer(made.model):
        whole = made.model(input_ids=made.input_ids[:, : first + 1]).logits[0, -1]
        cache = made.model(input_ids=made.input_ids[:, :first]).past_key_values
        step = made.model(input_ids=made.input_ids[:, first : first + 1], past_key_values=cache).logits[0, -1]
    plain = made.model(input_ids=made.input_ids[:, : first + 1]).logits[0, -1]
    assert torch.allclose(whole, step, atol=1e-4) and (whole - plain).abs().max() > 0.1


@torch.no_grad()
def test_settings_that_change_nothing_keep_the_bits(made):
    plain, own = made.model(input_ids=made.input_ids).logits, hooks(made.model)
    aside = F.normalize(torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0)
    for steer in (RescaleSinks(made.born, aside, norm=None), RescaleSinks(made.born, aside, norm=1.0)):
        with steer(made.model):
            assert torch.equal(made.model(input_ids=made.input_ids).logits, plain)
    with pytest.raises(KeyError), RescaleSinks(made.born, aside)(made.model):
        raise KeyError
    assert hooks(made.model) == own


def test_what_cannot_be_looked_at_is_refused(made):
    with pytest.raises(ValueError, match="one text"):
        sink_profile(made.model, made.input_ids[:, :2])
    with pytest.raises(NotImplementedError, match="causal attention site"):
        sink_profile(torch.nn.Linear(2, 2), made.input_ids)
    with (
        pytest.raises(ValueError, match="layer=20 is not one of the 20"),
        RescaleSinks(20, torch.ones(64))(made.model),
    ):
        pass
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert sink_profile(model, torch.arange(8)[None]).norms.shape == (2, 8)
    with pytest.raises(NotImplementedError, match=r"'transformer.h.1' has no MLP with gate_proj"):
        mlp_stages(model, torch.arange(8)[None], 1, [0])


def test_a_study_that_looks_one_layer_too_early_is_noticed(made, monkeypatch):
    monkeypatch.setattr(study, "primary_band", lambda norms, **more: primary_band(norms[1:], **more))
    assert sink_profile(made.model, made.input_ids).band != made.band


def test_blocks_are_those_with_causal_attention(made):
    names = [name for name, _, _ in decoder_blocks(made.model)]
    assert names == [f"model.layers.{n}" for n in range(20)]
    assert len(seam.listed_sites(made.model)) == 20
