"""Offsets of heads equal the published loop, fold into biases, and training leaves the model as it was."""

import math

import pytest
import torch

from nearfield.systems.lofit import convert
from nearfield.systems.lofit.convert import PUBLISHED, Setting, completion, preference, select, tune
from nearfield.systems.lofit.steer import Change, HeadOffsets, fold, heads_of, load, mass_mean

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SITE = "model.layers.1.self_attn"


def build(kind="Llama", **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(tokens=9, rows=2):
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(2))


def samples(count=12, tokens=8):
    return [
        {"ids": row, "labels": row.clone().index_fill(0, torch.arange(5), -100)} for row in ids(tokens, count)
    ]


def offsets(dim=8):
    return HeadOffsets(
        {SITE: Change((1, 3), draw(2, dim)), "model.layers.2.self_attn": Change((0,), draw(1, dim))}
    )


QUICK = Setting(1e-2, 1e-3, 1e-2, 3)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Llama", {}), ("Gemma", {"head_dim": 16}), ("Qwen2", {}), ("Qwen3", {"head_dim": 16}), ("Mistral", {})],
)
def test_offsets_equal_the_published_loop_over_heads(kind, more):
    model, dim = build(kind, **more), more.get("head_dim", 8)
    added = offsets(dim)

    def loop(change):
        def hook(module, args):
            z = args[0].clone()
            for head, vector in zip(*change, strict=True):
                z[:, :, head * dim : (head + 1) * dim] = z[:, :, head * dim : (head + 1) * dim] + vector
            return (z,)

        return hook

    with torch.no_grad():
        with added(model):
            ours = model(ids()).logits
        hooks = [
            model.get_submodule(f"{site}.o_proj").register_forward_pre_hook(loop(change))
            for site, change in added.at.items()
        ]
        theirs = model(ids()).logits
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - model(ids()).logits).abs().max() > 1e-2


def test_offsets_of_zero_keep_the_bits():
    model = build()
    zero = HeadOffsets({SITE: Change((1, 3), torch.zeros(2, 8))})
    with torch.no_grad(), zero(model):
        inside = model(ids()).logits
    assert torch.equal(inside, model(ids()).logits)


@pytest.mark.parametrize(("kind", "reloads"), [("Llama", True), ("Qwen2", False)])
@torch.no_grad()
def test_folding_gives_the_same_for_any_length_and_from_a_cache(kind, reloads, tmp_path):
    model, added = build(kind), offsets()
    with added(model):
        steered = model(ids()).logits
    before = set(model.state_dict())
    fold(model, added)
    whole = model(ids())
    torch.testing.assert_close(whole.logits, steered, rtol=0, atol=1e-5)
    first = model(ids()[:, :5], use_cache=True)
    rest = model(ids()[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, steered[:, 5:], rtol=0, atol=1e-5)
    assert all("bias" in name for name in set(model.state_dict()) - before)
    if reloads:
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(again(ids()).logits, whole.logits)


def test_a_file_holds_the_offsets_in_few_kilobytes_and_others_are_refused(tmp_path):
    from safetensors.torch import save_file

    added = offsets()
    added.strength = 0.5
    again = load(added.save(tmp_path / "kept.safetensors"))
    assert (tmp_path / "kept.safetensors").stat().st_size < 2048
    for site, (heads, values) in again.at.items():
        assert heads == added.at[site].heads and torch.equal(values, 0.5 * added.at[site].offsets)
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="no offsets of heads"):
        load(tmp_path / "other.safetensors")


def test_published_runs_have_as_many_parameters_as_stated():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    assert sum(heads_of(model).values()) * 128 == 131_072
    assert PUBLISHED["mquake", "llama-2-7b"].heads * 128 == 4096
    assert PUBLISHED["mquake", "llama-2-13b"].heads * 128 == 6144
    assert PUBLISHED["mquake", "gemma-7b"].heads * 256 == 4096


def test_training_changes_offsets_alone():
    model, data = build(), samples()
    model.model.norm.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned = convert.lofit(model, data, setting=QUICK)
    assert learned.num_parameters == 3 * 8
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert not any(m._forward_pre_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    batch = {key: torch.stack([each[key] for each in data]) for key in ("ids", "labels")}
    with torch.no_grad():
        base = completion(model, batch).mean
        with learned(model):
            assert completion(model, batch).mean < base


def test_a_loss_that_fails_leaves_the_model_as_it_was():
    model = build()

    def broken(model, batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        tune(model, samples(), {SITE: (0,)}, recipe=QUICK.recipe(1e-2, steps=1), loss=broken)
    assert not hasattr(model.get_submodule(f"{SITE}.o_proj"), "head_offset")
    assert all(p.requires_grad for p in model.parameters())


def test_a_large_penalty_drives_scales_to_zero_and_a_mean_counts_less_than_a_sum():
    def norm(**more):
        draw = torch.Generator().manual_seed(0)
        recipe = QUICK.recipe(1e-2, steps=10, batch_size=4)
        found = select(build(), samples(), recipe=recipe, generator=draw, **more)
        assert len(found.scores) == 12 and found.scores == tuple(sorted(found.scores, key=lambda s: -s[2]))
        return sum(score for *_, score in found.scores)

    free, summed, mean = norm(penalty=0.0), norm(penalty=1.0), norm(penalty=1.0, reduction="mean")
    assert summed < 0.5 * mean < mean < 1.001 * free


def test_only_the_layers_that_are_named_are_scored():
    found = select(build(), samples(), recipe=QUICK.recipe(1e-2, steps=1), penalty=0.0, layers=[1])
    assert {site for site, *_ in found.scores} == {SITE}
    assert found.top(4) == {SITE: (0, 1, 2, 3)}
    with pytest.raises(ValueError, match="1 to 4"):
        found.top(5)


def test_completion_counts_the_response_alone():
    model, data = build(), samples(2)
    batch = {key: torch.stack([each[key] for each in data]) for key in ("ids", "labels")}
    with torch.no_grad():
        found = completion(model, batch)
        log = model(batch["ids"]).logits.double().log_softmax(-1)
    wanted = -sum(log[row, at - 1, batch["ids"][row, at]] for row in range(2) for at in (5, 6, 7))
    assert found.count == 6
    torch.testing.assert_close(found.total.double(), wanted, rtol=1e-5, atol=0)


def test_preference_is_log_two_at_the_base_model_and_dpo_elsewhere():
    model, data = build(), samples(4)
    pairs = [
        {"wanted": a["ids"], "wanted_labels": a["labels"], "other": b["ids"], "other_labels": b["labels"]}
        for a, b in zip(data[:2], data[2:], strict=True)
    ]
    known = convert.with_reference(model, pairs)
    batch = {key: torch.stack([each[key] for each in known]) for key in known[0]}
    with torch.no_grad():
        assert preference(model, batch).mean == pytest.approx(math.log(2), abs=1e-5)
        with offsets()(model):
            found = preference(model, batch, beta=0.3).total
            gains = [
                convert.log_probability(model, batch[k], batch[f"{k}_labels"]) - batch[f"{k}_reference"]
                for k in ("wanted", "other")
            ]
    expected = sum(math.log1p(math.exp(-0.3 * float(a - b))) for a, b in zip(*gains, strict=True))
    assert float(found) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_mean_directions_are_what_their_formula_says():
    model, seen = build(), []
    hook = model.get_submodule(f"{SITE}.o_proj").register_forward_pre_hook(
        lambda m, a: seen.append(a[0][:, -1])
    )
    true, false = (
        [{"input_ids": row[None]} for row in ids(6, 3)],
        [{"input_ids": row[None]} for row in ids(5, 4)],
    )
    for each in (*true, *false):
        model(**each)
    hook.remove()
    z = torch.cat(seen).unflatten(-1, (4, 8)).double()
    ours = mass_mean(model, true, false, {SITE: (2,)}, strength=3.0).at[SITE]
    direction = z[:3, 2].mean(0) - z[3:, 2].mean(0)
    direction /= direction.norm()
    torch.testing.assert_close(
        ours.offsets[0].double(), 3.0 * (z[:, 2] @ direction).std() * direction, rtol=1e-4, atol=1e-6
    )


def test_a_vision_language_model_is_tuned_in_its_language_part():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**SMALL), vision_config=vision)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    counts = heads_of(model)
    assert len(counts) == 3 and all("language_model" in site and n == 4 for site, n in counts.items())
    found = tune(model, samples(4), {min(counts): (2,)}, recipe=QUICK.recipe(1e-2, steps=2))
    with torch.no_grad():
        with found(model):
            steered = model(input_ids=ids()).logits
        torch.testing.assert_close(fold(model, found)(input_ids=ids()).logits, steered, rtol=0, atol=1e-5)


def test_sites_that_are_not_there_are_refused_by_name():
    with pytest.raises(ValueError, match=r"model\.layers\.7\.self_attn.*model\.layers\.0\.self_attn"):
        tune(build(), samples(), {"model.layers.7.self_attn": (0,)}, recipe=QUICK.recipe(1e-2, steps=1))
    with pytest.raises(ValueError, match=r"no linear layer model\.layers\.7"):
        fold(build(), HeadOffsets({"model.layers.7.self_attn": Change((0,), draw(1, 8))}))
    with pytest.raises(ValueError, match="reduction='max'"):
        select(build(), samples(), recipe=QUICK.recipe(1e-2, steps=1), penalty=0.0, reduction="max")
