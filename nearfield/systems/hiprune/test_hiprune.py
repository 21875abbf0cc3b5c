"""HiPrune against a literal form of its selection, shorter prompts against embeddings gathered by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.hosts.vision_language import image_tokens, vision_tower
from nearfield.systems.hiprune.steer import HiPrune, select, shorten
from nearfield.systems.hiprune.study import hit_rate, prefill_flops, tower_scores

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nearfield[hf]'")
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llava(rows=1):
    vision = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        image_size=32, patch_size=4, initializer_factor=4.0,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL), vision_config=vision, image_token_id=255
    )
    model, inputs = built("LlavaForConditionalGeneration", config), prompt(rows, 64, 255)
    return model, {**inputs, "pixel_values": draw(rows, 3, 32, 32)}


def qwen(height=8, width=12):
    text = {
        **SMALL,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    tokens = {"image_token_id": 250, "vision_start_token_id": 251, "vision_end_token_id": 252}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **tokens, video_token_id=253
    )
    inputs = prompt(1, height * width // 4, 250)
    more = {"image_grid_thw": torch.tensor([[1, height, width]]), "pixel_values": draw(height * width, 96)}
    kinds = (inputs["input_ids"] == 250).int()
    return built("Qwen2_5_VLForConditionalGeneration", config), {**inputs, **more, "mm_token_type_ids": kinds}


def built(name, config):
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return model


def prompt(rows, images, token):
    ids = torch.randint(1, 200, (rows, images + 10), generator=torch.Generator().manual_seed(3))
    ids[:, 4 : 4 + images] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def literal(objects, deep, width, keep, alpha):
    """Steps 2 to 6 of the published selection, in lists."""
    number = len(objects)
    anchors = sorted(range(number), key=lambda j: -objects[j])[: round(keep * alpha / 5)]
    chosen = set(anchors)
    for i in anchors:
        chosen |= {min(max(j, 0), number - 1) for j in (i - 1, i + 1, i - width, i + width)}
    rest = [deep[j] - (j in chosen) for j in range(number)]
    registers = sorted(range(number), key=lambda j: -rest[j])[: keep - len(chosen)]
    return sorted(chosen | set(registers))


@given(
    seed=st.integers(0, 999),
    grid=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    share=st.floats(0.05, 1.0),
    alpha=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
@settings(max_examples=60, deadline=None)
def test_selection_equals_its_literal_form(seed, grid, share, alpha):
    number = grid[0] * grid[1]
    keep = max(1, int(share * number))
    scores = torch.rand(2, number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for rule in ("grid", "clamp-flat"):
        found = select(*scores, grid, keep, alpha=alpha, neighbors=rule)
        assert len(found.kept) == keep == len(found.kept.unique())
        assert torch.equal(found.kept, found.kept.sort().values)
        groups = torch.cat(
            [found.anchors[torch.isin(found.anchors, found.kept)], found.buffers, found.registers]
        )
        assert torch.equal(groups.sort().values, found.kept)
    anchors = round(keep * alpha / 5)
    if 5 * anchors <= keep:
        assert found.kept.tolist() == literal(*scores.tolist(), grid[1], keep, alpha)


def test_neighbours_end_with_the_grid_and_flat_numbers_wrap():
    objects, deep = torch.zeros(2, 16)
    objects[4] = 1  # the first token of the second row
    deep[15] = 1
    assert select(objects, deep, (4, 4), 5, alpha=1.0).kept.tolist() == [0, 4, 5, 8, 15]
    flat = select(objects, deep, (4, 4), 5, alpha=1.0, neighbors="clamp-flat")
    assert flat.kept.tolist() == [0, 3, 4, 5, 8]


def test_scores_above_one_are_chosen_again_by_the_published_rule_alone():
    objects, deep = torch.zeros(2, 25)
    objects[12], deep[12] = 5.0, 5.0
    assert len(select(objects, deep, (5, 5), 6, alpha=0.8).kept) == 6
    assert len(select(objects, deep, (5, 5), 6, alpha=0.8, exclude="subtract").kept) == 5


@torch.no_grad()
def test_scores_are_column_means_of_the_eager_maps():
    model, inputs = llava(rows=2)
    scores, features = tower_scores(model, inputs, (1, 2))
    model.model.vision_tower.set_attn_implementation("eager")
    out = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    for layer in (1, 2):
        expected = out.attentions[layer].mean(1).mean(1)[:, 1:]  # heads, then queries; no class token
        assert torch.allclose(torch.stack(scores[layer]), expected, atol=1e-6)
    assert [each.shape for each in features] == [(64, 64)] * 2


@torch.no_grad()
def test_merged_scores_are_means_in_reading_order():
    """Layers that see the whole image: published sums are the means times the number of patches."""
    model, inputs = qwen()
    means, _ = tower_scores(model, inputs, (0, 1))
    sums, _ = tower_scores(model, inputs, (0, 1), parity=True)
    assert torch.allclose(96 * means[1][0], sums[1][0], rtol=1e-4)
    assert torch.allclose(sums[1][0].mean(), torch.tensor(1.0)) and (sums[1][0] > 1).any()
    # inside windows each patch receives from its own window alone, so that not even the order is the same
    assert not torch.allclose(96 * means[0][0], sums[0][0], rtol=1e-2)


@pytest.mark.parametrize("host", [llava, qwen])
@torch.no_grad()
def test_keeping_all_gives_the_same_bits(host):
    model, inputs = host()
    plain = model(**inputs).logits
    number = vision_tower(model, inputs).num_tokens
    pruned = HiPrune(number).prune(model, inputs)
    assert torch.equal(model(**pruned.inputs).logits, plain)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    pruned = HiPrune(number).prune(model, inputs)
    assert torch.equal(model.generate(**pruned.inputs, max_new_tokens=5, do_sample=False), tokens)


@pytest.mark.parametrize("host", [llava, qwen])
@torch.no_grad()
def test_a_shorter_prompt_is_its_embeddings_gathered_by_hand(host):
    model, inputs = host()
    pruned = HiPrune(7, alpha=0.8).prune(model, inputs)
    (image,), kept = image_tokens(model, inputs)[0], pruned.kept[0]
    assert len(kept) == 7
    stays = [
        *range(image.start),
        *(image.start + kept).tolist(),
        *range(image.stop, inputs["input_ids"].shape[1]),
    ]
    _, features = tower_scores(model, inputs, ())
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[0, image.start : image.stop] = features[0]
    more = {}
    if host is qwen:
        given = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids", "attention_mask")}
        places, _ = model.model.get_rope_index(inputs["input_ids"], **given)
        more["position_ids"] = places[:, :, stays]
        assert torch.equal(more["position_ids"], pruned.inputs["position_ids"])
    expected = model(inputs_embeds=embeds[:, stays], **more).logits
    assert torch.allclose(model(**pruned.inputs).logits, expected, atol=1e-5)
    # tokens that follow go on from the last place, whoever steps
    cache = model(**HiPrune(7, alpha=0.8).prune(model, inputs).inputs, use_cache=True).past_key_values
    stepped = model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits[:, -1]
    one = torch.cat([embeds[:, stays], model.get_input_embeddings()(torch.tensor([[9]]))], 1)
    places = {name: torch.cat([x, x[..., -1:] + 1], -1) for name, x in more.items()}
    assert torch.allclose(stepped, model(inputs_embeds=one, **places).logits[:, -1], atol=1e-5)
    pruned = HiPrune(7, alpha=0.8).prune(model, inputs)
    out = model.generate(**pruned.inputs, max_new_tokens=3, do_sample=False)
    given, chosen = embeds[:, stays], []
    for _ in range(3):
        chosen.append(model(inputs_embeds=given, **more).logits[0, -1].argmax())
        given = torch.cat([given, model.get_input_embeddings()(chosen[-1])[None, None]], 1)
        if more:
            more["position_ids"] = torch.cat([more["position_ids"], more["position_ids"][..., -1:] + 1], -1)
    assert out[0, -3:].tolist() == [int(token) for token in chosen]


def test_layers_are_the_published_depths():
    for depth, published in ((24, (8, 22)), (8, (2, 6))):
        vision = transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=depth, num_attention_heads=1,
            image_size=8, patch_size=4,
        )  # fmt: skip
        config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**SMALL), vision_config=vision)
        model = built("LlavaForConditionalGeneration", config)
        tower = vision_tower(model, {"pixel_values": draw(1, 3, 8, 8)})
        assert HiPrune(4).layers(model, tower) == published
    model, inputs = qwen()
    assert HiPrune(4).layers(model, vision_tower(model, inputs)) == (1, 3)


def test_batches_and_shares():
    model, inputs = llava(rows=2)
    pruned = HiPrune(0.25).prune(model, inputs)
    assert [len(kept) for kept in pruned.kept] == [16, 16]
    assert pruned.inputs["input_ids"].shape == (2, 26) == pruned.inputs["attention_mask"].shape
    assert not torch.equal(*pruned.kept)
    with torch.no_grad():
        each = [{name: x[at : at + 1] for name, x in inputs.items()} for at in range(2)]
        alone = [model(**HiPrune(0.25).prune(model, one).inputs).logits for one in each]
        assert torch.allclose(model(**pruned.inputs).logits, torch.cat(alone), atol=1e-5)


def test_what_cannot_be_kept_is_refused():
    model, inputs = llava(rows=2)
    with pytest.raises(ValueError, match="keep=65"):
        HiPrune(65).prune(model, inputs)
    with pytest.raises(ValueError, match="Layer 5 is none of the 4"):
        HiPrune(8, object_layer=5).prune(model, inputs)
    with pytest.raises(ValueError, match="1 selections for 2 images"):
        shorten(model, inputs, [torch.arange(3)])
    with pytest.raises(ValueError, match=r"would have \[13, 14\] tokens"):
        shorten(model, inputs, [torch.arange(3), torch.arange(4)])
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(NotImplementedError, match="no place on the grid"):
        tower_scores(model, inputs, (0,))


def test_cost_and_hits_are_those_of_their_definitions():
    config = transformers.LlamaConfig(**SMALL)
    weights = sum(
        p.numel() for name, p in transformers.LlamaModel(config).named_parameters() if "proj" in name
    )
    assert prefill_flops(config, 10) == 2 * 10 * weights + config.num_hidden_layers * 4 * 100 * 64
    scores = torch.arange(20.0)
    assert hit_rate(scores, scores >= 19) == 0.5 and hit_rate(scores, scores < 10) == 0.0
