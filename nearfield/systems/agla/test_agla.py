"""AGLA: heat, masks and assembled logits against closed forms, patches of both models, caches."""

import math

import pytest
import torch
from einops import rearrange

from nearfield.hosts.generation import Branch, generate
from nearfield.hosts.vision_language import image_tokens
from nearfield.systems.agla.claims import tiny
from nearfield.systems.agla.steer import (
    CLIP_MEAN,
    CLIP_STD,
    assemble,
    generate_assembled,
    local_inputs,
    local_picture,
)
from nearfield.systems.agla.study import (
    Matched,
    draw_heat,
    gradient_heat,
    keep_mask,
    keep_ratio,
    matched_by_blip,
    matched_by_itself,
    pixel_map,
)

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nearfield[hf]'")
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def qwen_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = {"hidden_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 256}
    text |= {"num_attention_heads": 4, "intermediate_size": 96, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    tokens = {"image_token_id": 250, "vision_start_token_id": 251, "vision_end_token_id": 252}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, video_token_id=253, **tokens
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    ids = torch.randint(1, 200, (1, 34))
    ids[:, 4:28] = 250
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(96, 96)}
    grid = {"image_grid_thw": torch.tensor([[1, 8, 12]]), "mm_token_type_ids": (ids == 250).int()}
    return model, {**inputs, **grid}


def test_logits_are_added_where_the_whole_picture_finds_them_plausible():
    whole, local = torch.randn(2, 3, 9, dtype=torch.float64)
    found = assemble(1.5, 0.3)([whole, local])
    for row in range(3):
        for token in range(9):
            kept = whole[row, token] >= whole[row].max() + math.log(0.3)
            expected = float(whole[row, token] + 1.5 * local[row, token]) if kept else -math.inf
            assert float(found[row, token]) == pytest.approx(expected)
    assert torch.equal(assemble(1.5, 0.0)([whole, local]), whole + 1.5 * local)
    assert (assemble(1.5, 1.0)([whole, local]).isfinite() == (whole == whole.amax(-1, keepdim=True))).all()
    assert torch.equal(assemble(0.0)([whole, local]).argmax(-1), whole.argmax(-1))
    with pytest.raises(ValueError, match="beta=2 must lie"):
        assemble(beta=2)


def test_heat_is_its_closed_form():
    attention, gradient = torch.rand(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    tokens = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    found = gradient_heat(attention, gradient, tokens)
    for b, texts in enumerate(([1, 2, 3], [1])):
        for key in range(7):
            sums = [attention[b, h, t, key] * max(gradient[b, h, t, key], 0) for t in texts for h in range(3)]
            assert float(found[b, key]) == pytest.approx(float(sum(sums)) / 3 / len(texts))


def test_blip_gives_the_heat_of_its_cross_attention():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**shape, "vocab_size": 64, "encoder_hidden_size": 32, "initializer_range": 0.3}
    vision = {**shape, "image_size": 16, "patch_size": 4, "initializer_range": 0.3}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    model = transformers.BlipForImageTextRetrieval(config).eval()
    ids, mask = torch.randint(4, 60, (2, 7)), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16)}
    found = matched_by_blip(model, inputs, layer=1)
    assert not any(module._forward_hooks for module in model.modules())
    seen = model.vision_model(inputs["pixel_values"]).last_hidden_state
    out = model.text_encoder(ids, mask, encoder_hidden_states=seen, output_attentions=True)
    score = model.itm_head(out.last_hidden_state[:, 0])[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, out.cross_attentions[1])
    for row, stop in enumerate((6, 4)):  # without the first and the last token that is no padding
        kept = out.cross_attentions[1][row, :, 1:stop, 1:] * gradient[row, :, 1:stop, 1:].clamp(min=0)
        torch.testing.assert_close(found.heat[row], kept.mean((0, 1)).view(4, 4))
    assert found.similarity.shape == (2,)
    assert bool((found.similarity.abs() <= 1).all())
    with pytest.raises(ValueError, match="layer=6 is none of the 2"):
        matched_by_blip(model, inputs)


def test_a_model_is_its_own_matcher():
    model, inputs = tiny(0)
    two = {name: each.repeat(2, *(1,) * (each.ndim - 1)) for name, each in inputs.items()}
    two["pixel_values"][1] = torch.randn(3, 32, 32)
    found = matched_by_itself(model, two, target=9)
    model.set_attn_implementation("eager")
    out = model(**two, output_attentions=True)
    told = out.logits[:, -1].log_softmax(-1)[:, 9]
    (gradient,) = torch.autograd.grad(told.sum(), out.attentions[2])
    kept = (out.attentions[2] * gradient.clamp(min=0))[:, :, 68:, 4:68].mean((1, 2)).view(2, 8, 8)
    torch.testing.assert_close(torch.stack(found.heat), kept, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.similarity, told.exp().detach(), rtol=1e-4, atol=1e-7)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="layer=4 is none of the 4"):
        matched_by_itself(model, inputs, layer=4)
    inputs["input_ids"][:, 30] = 7
    texts = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="exactly one image"):
        matched_by_itself(model, texts)


def test_the_share_of_pixels_that_is_kept():
    similarity = torch.tensor([1.0, 0.4, 0.0, -0.6])
    torch.testing.assert_close(keep_ratio(similarity), torch.tensor([0.5, 0.8, 1 - 1e-5, 1 - 1e-5]))
    heat = torch.rand(6, 6)
    pixels = pixel_map(heat, (40, 48))
    assert float(pixels.min()) == 0
    assert float(pixels.max()) == 1
    for ratio in (0.1, 0.5, 0.83, 1.0):
        mask = keep_mask(pixels, ratio)
        assert float(mask.float().mean()) == pytest.approx(ratio, abs=1.5 / mask.numel())
        assert float(pixels[mask].min()) > float(pixels[~mask].max() if (~mask).any() else -1)
    assert bool(keep_mask(pixel_map(torch.full((6, 6), 0.3), (40, 48)), 0.5).all())


def test_pixels_are_hot_where_their_tokens_are_and_as_in_the_official_code():
    heat = torch.zeros(8, 8)
    heat[2, 5] = 1.0
    for parity in (False, True):
        if parity:
            pytest.importorskip("skimage", reason="needs scikit-image")
        hottest = int(pixel_map(heat, (96, 96), parity=parity).argmax())
        assert abs(hottest // 96 - 29.5) <= 1
        assert abs(hottest % 96 - 65.5) <= 1
    smooth = pixel_map(torch.rand(8, 8), (96, 96)), pixel_map(torch.rand(8, 8), (96, 96), parity=True)
    assert all(each.shape == (96, 96) for each in smooth)


def test_colder_pixels_are_black_before_they_are_normalised():
    _, inputs = tiny(0)
    heat = torch.rand(8, 8)
    found = local_inputs(inputs, Matched((heat,), torch.tensor([0.6])))["pixel_values"][0]
    mask = keep_mask(pixel_map(heat, (32, 32)), 0.7)
    assert torch.equal(found[:, mask], inputs["pixel_values"][0][:, mask])
    for channel in range(3):
        black = -CLIP_MEAN[channel] / CLIP_STD[channel]
        assert found[channel][~mask].tolist() == pytest.approx([black] * int((~mask).sum()))
    with pytest.raises(ValueError, match="hold 1 pictures and 2 were matched"):
        local_inputs(inputs, Matched((heat, heat), torch.zeros(2)))


def test_patches_of_qwen_are_masked_in_their_own_order():
    _, inputs = qwen_vl()
    heat = torch.rand(4, 6)
    found = local_inputs(inputs, Matched((heat,), torch.zeros(1)), ratio=0.5, mean=[0.5] * 3, std=[0.25] * 3)
    order = {"h": 4, "w": 6, "m": 2, "n": 2, "c": 3, "t": 2, "p": 4, "q": 4}
    pattern = "(h w m n) (c t p q) -> t c (h m p) (w n q)"
    before, after = (rearrange(each["pixel_values"], pattern, **order) for each in (inputs, found))
    mask = keep_mask(pixel_map(heat, (32, 48)), 0.5)
    assert torch.equal(after[..., mask], before[..., mask])
    assert bool((after[..., ~mask] == -2).all())


def test_pictures_are_squashed_as_in_the_official_code():
    pytest.importorskip("skimage", reason="needs scikit-image")
    picture, heat = 0.2 + 0.8 * torch.rand(3, 40, 60), torch.rand(6, 6)
    assert local_picture(picture, heat, 0.5).shape == (3, 40, 60)
    found = local_picture(picture, heat, 0.75, parity=True)
    assert found.shape == (3, 384, 384)
    assert float((found != 0).any(0).float().mean()) == pytest.approx(0.75, abs=1e-4)


@pytest.mark.parametrize("make", [lambda: tiny(0), qwen_vl])
def test_the_same_picture_twice_is_plain_decoding(make):
    model, inputs = make()
    expected = model.generate(**inputs, **GREEDY)
    for parity in (False, True):
        assert torch.equal(generate_assembled(model, inputs, inputs, parity=parity, **GREEDY), expected)


@pytest.mark.parametrize("make", [lambda: tiny(1), qwen_vl])
def test_a_local_picture_has_a_cache_of_its_own(make):
    model, inputs = make()
    matched = matched_by_itself(model, inputs)
    local = local_inputs(inputs, matched, ratio=0.2)
    assert len(matched.heat[0].flatten()) == len(image_tokens(model, inputs)[0][0])
    branches = [Branch(inputs), Branch(local)]
    expected = generate(model, branches, lambda z: assemble(8.0, 0.0)(z), **GREEDY)
    assert torch.equal(generate_assembled(model, inputs, local, alpha=8.0, beta=0.0, **GREEDY), expected)


def test_heat_is_drawn_over_its_picture():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    draw_heat(axes, torch.rand(3, 32, 48), torch.rand(4, 6), 0.5)
    assert len(axes.images) == 2
    assert all(image.get_array().shape[:2] == (32, 48) for image in axes.images)
