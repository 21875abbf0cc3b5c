"""PAINT: the choice of tokens and the boost against literal forms, only the newest token, guidance."""

import math

import numpy as np
import pytest
import torch

from nearfield.hosts.seam import Site
from nearfield.hosts.vision_language import image_tokens, vision_tower
from nearfield.systems.imbalanced_attention.steer import (
    InformedBoost,
    generate_informed,
    guide,
    without_image,
)
from nearfield.systems.imbalanced_attention.study import (
    Informed,
    chair,
    chair_counts,
    choose,
    head_factors,
    image_shares,
    informed_tokens,
)

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nearfield[hf]'")
SITE = Site("language_model.layers.2", "self", None, 0, True, 4, 2)
GREEDY = {"max_new_tokens": 5, "do_sample": False}
SMALL = {"num_attention_heads": 4, "intermediate_size": 96, "initializer_range": 0.3}
TEXT = {**SMALL, "hidden_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 256}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def llava(**more):
    """A model of random weights that prefers some tokens, and two prompts, a picture each."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=48, num_hidden_layers=3, image_size=32, patch_size=4, initializer_factor=4.0, **SMALL
    )
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=255, **more)
    torch.manual_seed(0)
    model = quiet(transformers.LlavaForConditionalGeneration(config))
    size = 65 if more else 64
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), **prompt(2, size, 255)}


def qwen_vl():
    text = {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    tokens = {"image_token_id": 250, "vision_start_token_id": 251, "vision_end_token_id": 252}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, video_token_id=253, **tokens
    )
    torch.manual_seed(0)
    model = quiet(transformers.Qwen2_5_VLForConditionalGeneration(config))
    inputs = prompt(1, 24, 250)
    inputs["input_ids"][:, 3], inputs["input_ids"][:, 28] = 251, 252
    more = {"image_grid_thw": torch.tensor([[1, 8, 12]]), "pixel_values": torch.randn(96, 96)}
    return model, {**inputs, **more, "mm_token_type_ids": (inputs["input_ids"] == 250).int()}


def prompt(rows, images, token):
    ids = torch.randint(1, 200, (rows, images + 10))
    ids[:, 4 : 4 + images] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def quiet(model):
    model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return model.eval()


def maps(model, inputs):
    """Attention maps `[B, heads, N, N]` of the tower, by the host's own eager path."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    found = tower(inputs["pixel_values"], output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    return found


def literal(maps, parity):
    """The official procedure on the maps of one picture, with both spatial axes."""
    first, late = maps[0], maps[-2]
    u, w = first[:, 0, 1:].sum(0), late[:, 0, 1:].sum(0)
    low, high = np.percentile(w.numpy(), 25), np.percentile(w.numpy(), 75)
    count = len(np.where(w.numpy() > high + 1.5 * (high - low))[0])
    local = set(torch.topk(u, 16).indices.tolist())
    mean = first.mean(0)
    spatial = mean.sum(-1) if parity else mean[1:, 1:].sum(0)
    local |= set(torch.topk(spatial, 6).indices.tolist())
    summary = set(torch.topk(w, count).indices.tolist())
    return local - summary, summary


@pytest.mark.parametrize("parity", [False, True])
def test_the_choice_is_the_official_procedure(parity):
    model, inputs = llava()
    found = informed_tokens(model, inputs, share=0.25, spatial=0.1, parity=parity)
    every = maps(model, inputs)
    assert any(row.summary for row in found)
    for row, mine in enumerate(found):
        local, summary = literal([layer[row] for layer in every], parity)
        assert set(mine.summary) == {4 + place for place in summary}
        if parity:  # rows of a softmax sum to one: which of them come first is rounding
            assert {4 + place for place in local} & set(mine.local)
            assert len(mine.local) <= 16 + 6
        else:
            assert set(mine.local) == {4 + place for place in local}


def test_rounding_may_lose_a_summary_token_under_parity():
    lost = next(n for n in range(50, 600) for k in (7,) if int(n * (k / n)) < k)
    late = torch.zeros(lost)
    late[:7] = torch.arange(7) + 1.0
    counts = [len(choose(late, late, parity=parity).summary) for parity in (False, True)]
    assert counts == [7, 6]


def test_class_tokens_that_are_passed_on_are_not_counted():
    model, inputs = llava(vision_feature_select_strategy="full")
    every = maps(model, inputs)
    local, summary = literal([layer[0] for layer in every], False)
    found = informed_tokens(model, inputs, spatial=0.1)[0]
    assert set(found.local) == {5 + place for place in local}
    assert set(found.summary) == {5 + place for place in summary}


def test_a_tower_in_windows_without_a_class_token_chooses_by_what_is_received():
    model, inputs = qwen_vl()
    tower = vision_tower(model, inputs)
    (found,) = informed_tokens(model, inputs)
    assert len(set(found.local) | set(found.summary)) >= 6
    where = image_tokens(model, inputs)[0][0]
    assert all(place in where for place in (*found.local, *found.summary))
    # attention of one window goes nowhere else: what a window's tokens receive is their number
    from nearfield.systems.imbalanced_attention.study import _watch

    looked = _watch(model, inputs, tower, every=True, parity=False)["first"]
    assert float(looked.sum()) == pytest.approx(tower.num_tokens, rel=1e-4)
    assert float(looked.view(4, 6)[:2, :2].sum()) == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize("mode", ["abs", "log"])
def test_the_boost_is_its_formula(mode):
    scores = torch.randn(2, 4, 1, 12, dtype=torch.float64)
    scores[:, :, :, 3] = 0
    tokens = [Informed((2, 3, 5), (5, 7)), Informed((9,), ())]
    heads = torch.rand(4, 4)
    found = InformedBoost(tokens, mode=mode, heads=heads).score(SITE, scores, range(1), range(1, 13))
    for b, head, key in np.ndindex(2, 4, 12):
        place, e = key + 1, scores[b, head, 0, key]  # a window of keys that begins at place 1
        gain = 0.4 if place in tokens[b].summary else 0.7 if place in tokens[b].local else 0.0
        gain *= float(heads[2, head])
        expected = e + gain * abs(e) if mode == "abs" else e + math.log1p(gain)
        assert found[b, head, 0, key] == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("make", [llava, qwen_vl])
def test_gains_of_zero_and_no_guidance_give_the_same_bits(make):
    model, inputs = make()
    boost = InformedBoost(informed_tokens(model, inputs), alpha=0.0, beta=0.0)
    alone = model(**inputs).logits
    with boost(model):
        assert torch.equal(model(**inputs).logits, alone)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(generate_informed(model, inputs, boost=boost, gamma=1, **GREEDY), expected)
    strong = InformedBoost(boost.tokens, alpha=6.0, beta=6.0, start=0)
    with strong(model):
        assert not torch.allclose(model(**inputs).logits[:, -1], alone[:, -1], atol=1e-4)


def test_only_the_newest_token_sees_the_boost():
    model, inputs = llava()
    boost = InformedBoost(informed_tokens(model, inputs), alpha=6.0, start=1)
    alone = model(**inputs).logits
    with boost(model):
        boosted = model(**inputs).logits
    assert torch.equal(boosted[:, :-1], alone[:, :-1])
    assert not torch.equal(boosted[:, -1], alone[:, -1])


def test_shares_are_those_of_the_maps_and_rise_with_the_boost():
    model, inputs = llava()
    model.set_attn_implementation("eager")
    every = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    expected = torch.stack([layer[:, :, -1, 4:68].sum(-1) for layer in every], 1)
    shares = image_shares(model, inputs)
    torch.testing.assert_close(shares, expected)
    boost = InformedBoost(informed_tokens(model, inputs), mode="log", start=2, alpha=2.0, beta=2.0)
    more = image_shares(model, inputs, boost=boost)
    torch.testing.assert_close(more[:, :2], shares[:, :2])
    assert bool((more[:, 2] > shares[:, 2]).all())


def test_factors_of_heads():
    shares = torch.tensor([[[0.1, 0.4], [0.3, 0.3]], [[0.1, 0.0], [0.1, 0.5]]])
    expected = torch.tensor([[0.5, 1.0], [0.5, 1.0]])
    torch.testing.assert_close(head_factors(shares), expected)
    assert head_factors(shares, mode="top").tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_guidance_is_its_formula():
    seen, blind = torch.randn(2, 2, 9, dtype=torch.float64)
    a, b = seen.log_softmax(-1), blind.log_softmax(-1)
    found = guide(1.5, 0.2)([seen, blind])
    for row in range(2):
        for token in range(9):
            cut = a[row, token] < math.log(0.2) + a[row].max()
            expected = -math.inf if cut else float(1.5 * (a[row, token] - b[row, token]) + b[row, token])
            assert float(found[row, token]) == pytest.approx(expected)
    assert torch.equal(guide(1)([seen, blind]), a)


@pytest.mark.parametrize("make", [llava, qwen_vl])
def test_guided_generation_equals_choosing_by_whole_forwards(make):
    model, inputs = make()
    boost = InformedBoost(informed_tokens(model, inputs), alpha=3.0)
    blind = without_image(model, inputs)
    assert not (blind["input_ids"] >= 250).any()
    assert "pixel_values" not in blind
    found = generate_informed(model, inputs, boost=boost, gamma=1.6, **GREEDY)
    combine, new = guide(1.6), []
    for step in range(2 if make is llava else 1):  # Qwen's positions of longer prompts need a processor
        texts = [{**each, **longer(each, new)} for each in (inputs, blind)]
        with boost(model):
            seen = model(**texts[0]).logits[:, -1]
        new.append(combine([seen, model(**texts[1]).logits[:, -1]]).argmax(-1))
        assert torch.equal(found[:, inputs["input_ids"].shape[1] + step], new[-1])


def longer(inputs, new):
    ids = torch.cat([inputs["input_ids"], *(each[:, None] for each in new)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_chair_counts_what_is_named():
    counts = chair_counts([{"star", "ring"}, {"cross"}, ()], [("star", "cross"), ("cross",), ("ring",)])
    assert counts.tolist() == [[1, 1, 2], [0, 1, 1], [0, 0, 1]]
    found = chair(counts)
    assert [float(each) for each in found] == pytest.approx([1 / 3, 1 / 3, 2 / 4])


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="mode='add' is unknown"):
        InformedBoost([Informed((1,), ())], mode="add")
    with pytest.raises(ValueError, match="tokens is empty"):
        InformedBoost([])
    model, inputs = llava()
    with (
        InformedBoost([Informed((5,), ())] * 3)(model),
        pytest.raises(ValueError, match="3 entries for a batch of 2"),
    ):
        model(**inputs)
    inputs["input_ids"][1, 4] = 7
    with pytest.raises(ValueError, match="unequal numbers of image tokens"):
        without_image(model, {key: inputs[key] for key in ("input_ids", "attention_mask")})
