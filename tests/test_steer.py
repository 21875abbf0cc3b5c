"""Steering: settings that change nothing keep the bits, the rest equals its definition, nothing stays."""

import copy
import math
import re
import threading
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nearfield.hosts import seam
from nearfield.hosts.seam import Call, Site
from nearfield.steer import Steer, scores
from nearfield.steer.scores import attend_scores, hidden_of, scores_of, weigh
from nearfield.testing import qkv

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SLIDING = ["full_attention", "sliding_attention"] * 2
TOKENS, PADS = 24, 5


def build(name, config):
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def llama(**more):
    return build("LlamaForCausalLM", transformers.LlamaConfig(**{**SMALL, **more}))


def qwen2():
    return build("Qwen2ForCausalLM", transformers.Qwen2Config(**SMALL))


def qwen3():
    more = {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "layer_types": SLIDING}
    return build("Qwen3ForCausalLM", transformers.Qwen3Config(**SMALL, **more))


def mistral():
    return build("MistralForCausalLM", transformers.MistralConfig(**SMALL, sliding_window=8))


def gemma2():
    more = {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 0.05}
    return build("Gemma2ForCausalLM", transformers.Gemma2Config(**SMALL, **more))


def gemma3():
    more = {"head_dim": 16, "sliding_window": 8}
    return build("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**SMALL, **more))


DECODERS = [llama, qwen2, qwen3, mistral, gemma2, gemma3]


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    text = transformers.LlamaConfig(**{**SMALL, "vocab_size": 256})
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=255)
    model = build("LlavaForConditionalGeneration", config)
    return quiet(model), {"pixel_values": draw(2, 3, 16, 16), **prompt(2, 16, 255)}


def qwen_vl(height=8, width=12):
    text = {
        **SMALL,
        "vocab_size": 256,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    tokens = {"image_token_id": 250, "vision_start_token_id": 251, "vision_end_token_id": 252}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **tokens, video_token_id=253
    )
    return quiet(build("Qwen2_5_VLForConditionalGeneration", config)), picture(height, width)


def picture(height, width):
    """What a Qwen-VL processor makes of a prompt with one image."""
    inputs = prompt(1, height * width // 4, 250)
    more = {"image_grid_thw": torch.tensor([[1, height, width]]), "pixel_values": draw(height * width, 96)}
    return {**inputs, **more, "mm_token_type_ids": (inputs["input_ids"] == 250).int()}


def prompt(rows, images, token):
    ids = torch.randint(0, 200, (rows, images + 10), generator=torch.Generator().manual_seed(3))
    ids[:, 4 : 4 + images] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def quiet(model):
    model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return model


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(tokens=TOKENS):
    return torch.randint(0, 100, (2, tokens), generator=torch.Generator().manual_seed(1))


def padded(side):
    """A batch whose second row has pads on one side, or none."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    if side == "left":
        mask[1, :PADS] = 0
    if side == "right":
        mask[1, -PADS:] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if side else {}


@dataclass
class Sharpen(Steer):
    """Scores times a factor, by way of the queries."""

    factor: float = 1.0
    sites: str = "*"

    def edit(self, site, query, key, value):
        return query * self.factor, key, value


@dataclass
class Favour(Steer):
    """Every fifth token of the sequence gets more attention, wherever a cache holds it."""

    bias: float = 0.0
    sites: str = "*"

    def score(self, site, scores, rows, keys):
        chosen = torch.arange(keys.start, keys.stop, device=scores.device) % 5 == 0
        return scores + self.bias * chosen


@dataclass
class Louder(Steer):
    """Head 1 counts more."""

    factor: float = 1.0
    sites: str = "*"

    def output(self, site, heads):
        scale = torch.ones(heads.shape[-2], 1)
        scale[1] = self.factor
        return heads * scale


def idle():
    return Sharpen() + Favour() + Louder()


def busy():
    return Sharpen(1.3) + Favour(2.0) + Louder(1.5)


def trace(model):
    """All that a `with` could leave on a model."""
    return [
        (
            name,
            sorted(vars(m)),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            getattr(getattr(m, "config", None), "_attn_implementation", None),
        )
        for name, m in model.named_modules()
    ]


def close(a, b, within=1e-5):
    torch.testing.assert_close(a, b, rtol=within, atol=within)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


# Settings that change nothing


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("make", DECODERS)
def test_identity_is_bit_equal_and_leaves_nothing(make, side):
    model, given = make(), padded(side)
    alone, before = model(ids(), **given).logits, trace(model)
    for steer in (Sharpen(), Favour(), Louder(), idle()):
        with steer(model):
            assert torch.equal(model(ids(), **given).logits, alone)
        assert trace(model) == before
    with busy()(model):
        assert not torch.allclose(model(ids(), **given).logits, alone, atol=1e-4)
    assert trace(model) == before
    assert torch.equal(model(ids(), **given).logits, alone)


@pytest.mark.parametrize("make", [llava, qwen_vl])
def test_identity_is_bit_equal_on_vision_language_models(make):
    model, given = make()
    alone, before = model(**given).logits, trace(model)
    with idle()(model):
        assert torch.equal(model(**given).logits, alone)
        assert torch.equal(
            model.generate(**given, max_new_tokens=4), model.generate(**given, max_new_tokens=4)
        )
    assert trace(model) == before
    with Favour(3.0, sites="*vis*")(model):
        seen = model(**given).logits
    with Favour(3.0, sites="*language_model*")(model):
        said = model(**given).logits
    assert not torch.equal(seen, alone)
    assert not torch.equal(said, alone)
    assert not torch.equal(said, seen)


@dataclass
class Shift(Steer):
    """All scores of a row the same amount larger, which the softmax does not mind."""

    sites: str = "*"

    def score(self, site, scores, rows, keys):
        return scores + 0.5 * torch.arange(rows.start, rows.stop).to(scores)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", DECODERS)
def test_scores_shifted_by_row_are_the_same_attention(make, dtype):
    model = make().to(dtype)
    for side in (None, "left", "right"):
        given = padded(side)
        seen = given.get("attention_mask", torch.ones(2, TOKENS)).bool()
        alone = model(ids(), **given).logits[seen]
        with torch.inference_mode(), Shift()(model):
            shifted = model(ids(), **given).logits[seen]
        close(shifted.float(), alone.float(), 1e-5 if dtype == torch.float32 else 0.05)
        assert not torch.equal(shifted, alone)
    for module in model.modules():
        assert not any("nearfield" in key for key in vars(module))


def test_scores_are_float32_under_autocast():
    model, seen = llama(), []

    @dataclass
    class Look(Shift):
        def score(self, site, scores, rows, keys):
            seen.append(scores.dtype)
            return super().score(site, scores, rows, keys)

    with torch.autocast("cpu", torch.bfloat16):
        alone = model(ids()).logits
        with Look()(model):
            shifted = model(ids()).logits
    assert set(seen) == {torch.float32} and shifted.dtype == alone.dtype
    close(shifted.float(), alone.float(), 0.02)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Vit(nn.Module):
    def __init__(self, prefix=0):
        super().__init__()
        self.patch_embed, self.block = nn.Conv2d(3, 16, 4, stride=4), Attention()
        self.first = nn.Parameter(torch.ones(1, prefix, 16))

    def forward(self, image):
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        return self.block(torch.cat([self.first.expand(len(x), -1, -1), x], 1))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), draw(2, 12, 16)


@pytest.mark.parametrize(
    "make", [encoder, lambda: (Vit(), draw(2, 3, 16, 24)), lambda: (Vit(2), draw(2, 3, 8, 8))]
)
def test_identity_is_bit_equal_on_plain_torch_hosts(make):
    model, x = make()
    alone, before = model(x), trace(model)
    for steer in (Sharpen(), Favour(), Louder(), idle()):
        with steer(model):
            assert torch.equal(model(x), alone)
    with busy()(model):
        assert not torch.allclose(model(x), alone, atol=1e-4)
    assert trace(model) == before
    assert torch.equal(model(x), alone)


def test_attention_weights_that_were_asked_for_stay():
    layer, x = nn.MultiheadAttention(16, 2, batch_first=True), draw(2, 7, 16)
    alone = layer(x, x, x)
    with idle()(layer):
        inside = layer(x, x, x)
    assert torch.equal(inside[0], alone[0]) and torch.equal(inside[1], alone[1])
    with Sharpen(1.3)(layer):
        edited, _ = layer(x, x, x)
    layer.in_proj_weight[:16] *= 1.3
    layer.in_proj_bias[:16] *= 1.3
    close(edited, layer(x, x, x)[0])


def test_diffusion_transformers_and_unets():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    given = (draw(1, 4, 8, 8), 3, draw(1, 5, 16, seed=2))
    alone, before, met = unet(*given).sample, trace(unet), set()

    @dataclass
    class Look(Steer):
        sites: str = "*"

        def edit(self, site, query, key, value):
            met.add((site.role, tuple(query.shape[1:-2]), tuple(key.shape[1:-2])))
            return query, key, value

    with (idle() + Look())(unet):
        assert torch.equal(unet(*given).sample, alone)
    assert {("self", (8, 8), (8, 8)), ("cross", (64,), (5,))} <= met
    with Sharpen(2.0, sites="cross")(unet):
        crossed = unet(*given).sample
    with Sharpen(2.0, sites="self")(unet):
        assert not torch.equal(unet(*given).sample, crossed)
    assert trace(unet) == before
    assert torch.equal(unet(*given).sample, alone)
    with pytest.raises(TypeError, match=r"pipe\.unet|Module"), Sharpen()(object()):
        pass
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 8),
        "in_channels": 4,
    }
    more = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    flux = diffusers.FluxTransformer2DModel(**sizes, **more).eval()
    given = {
        "hidden_states": draw(1, 16, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "pooled_projections": draw(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    alone, before = flux(**given).sample, trace(flux)
    with idle()(flux):
        assert torch.equal(flux(**given).sample, alone)
    with busy()(flux):
        assert not torch.allclose(flux(**given).sample, alone, atol=1e-4)
    assert trace(flux) == before


# What the methods mean


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("make", DECODERS)
def test_a_sharpened_model_equals_one_with_that_scale(make, side):
    model, given = make(), padded(side)
    with Sharpen(1.3)(model):
        edited = model(ids(), **given).logits
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling *= 1.3
    close(edited, model(ids(), **given).logits)


def test_scores_are_changed_after_the_cap_and_before_the_mask():
    model = gemma2()

    @dataclass
    class Look(Steer):
        sites: str = "*"

        def score(self, site, scores, rows, keys):
            assert scores.abs().max() <= 0.05
            assert scores.isfinite().all()  # what is hidden is hidden afterwards
            return scores * 1.5

    with Look()(model):
        edited = model(ids(), **padded("left")).logits
    cap = model.config.attn_logit_softcapping

    def scaled(module, query, key, value, mask, softcap=None, **more):
        original = transformers.models.gemma2.modeling_gemma2.eager_attention_forward
        share = module.num_key_value_groups
        s = query @ key.repeat_interleave(share, 1).mT * more["scaling"]
        s = 1.5 * cap * torch.tanh(s / cap) + mask
        assert original is not None
        return (s.softmax(-1) @ value.repeat_interleave(share, 1)).transpose(1, 2), None

    transformers.AttentionInterface.register("scaled", scaled)
    transformers.AttentionMaskInterface.register("scaled", transformers.masking_utils.eager_mask)
    model.set_attn_implementation("scaled")
    close(edited[:, PADS:], model(ids(), **padded("left")).logits[:, PADS:])


def by_loops(call, query, key, value, change):
    """Attention by its definition, one row at a time."""
    batch, n, heads, _ = query.shape
    m, share = key.shape[1], heads // key.shape[2]
    out, lse = (
        torch.zeros(batch, n, heads, value.shape[-1], dtype=torch.double),
        torch.zeros(batch, heads, n).double(),
    )
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                found = []
                for j in range(m):
                    s = float(query[b, i, h] @ key[b, j, h // share]) * call.scale
                    s = call.softcap * math.tanh(s / call.softcap) if call.softcap else s
                    mask = None if call.mask is None else call.mask.expand(batch, heads, n, m)[b, h, i, j]
                    if mask is not None and mask.dtype != torch.bool and mask > -1e30:
                        s += float(mask)
                    hidden = call.site.is_causal and mask is None and j > i + m - n
                    if mask is not None:
                        hidden = not mask if mask.dtype == torch.bool else mask < -1e30
                    found.append(-math.inf if hidden else change(s, call.site.rows[i], call.site.keys[j]))
                total = sum(math.exp(s) for s in found)
                lse[b, h, i] = math.log(total) if total else -math.inf
                for j, s in enumerate(found):
                    if total:
                        out[b, i, h] += math.exp(s) / total * value[b, j, h // share].double()
    return out, lse


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("mask", [None, "bool", "float", "keys"])
def test_scores_equal_nested_loops(monkeypatch, mask, cap, chunk):
    monkeypatch.setattr(scores, "WORKSPACE", chunk)
    n, m = 3, 5
    query, key, value = qkv(2, m, 4, 8, num_kv_heads=2, value_dim=6, dtype=torch.double)
    query = query[:, -n:]
    seen = torch.rand(2, 1, n, m, generator=torch.Generator().manual_seed(0)) < 0.6
    seen[0, :, 1] = False  # a row that sees nothing
    given = {
        None: None,
        "bool": seen,
        "float": draw(1, 4, n, m).double().masked_fill(~seen, torch.finfo(torch.double).min),
        "keys": seen[:, :, :1],
    }[mask]
    site = Site("a", "self", (m,), 0, True, 4, 2, range(20, 20 + n), range(18, 18 + m))

    def refuse(*_):
        raise AssertionError("all rows are changed")

    call = Call(site, nn.Identity(), query, key, value, given, 0.3, cap, host=refuse)

    class Change(Steer):
        def score(self, site, scores, rows, keys):
            bias = torch.tensor([[math.sin(3 * i + j) for j in keys] for i in rows], dtype=torch.double)
            return 1.5 * scores + bias

    expected, lse = by_loops(call, query, key, value, lambda s, i, j: 1.5 * s + math.sin(3 * i + j))
    out = attend_scores(call, query, key, value, [(Change(), site.rows)])
    torch.testing.assert_close(out, expected)
    here = slice(0, n)
    changed = Change().score(site, scores_of(call, query, key, here), site.rows, site.keys)
    torch.testing.assert_close(weigh(changed, value, hidden_of(call, here, m, key.device)).lse, lse)


@pytest.mark.parametrize("make", DECODERS)
@pytest.mark.parametrize("side", [None, "left"])
def test_steps_through_a_cache_equal_one_forward(make, side):
    model, given = make(), padded(side)
    seen = given.get("attention_mask", torch.ones(2, TOKENS)).bool()
    with busy()(model):
        whole = model(ids(), **given).logits
        for cache in (transformers.DynamicCache(config=model.config), None):
            if cache is None and model.config.model_type != "llama":
                continue
            if cache is None:
                cache = transformers.StaticCache(config=model.config, max_cache_len=30)
            outs, at = [], 0
            for size in (14, 1, 1, 3, 1, 1, 1, 1, 1):
                part = {}
                if given:
                    part = {
                        "attention_mask": given["attention_mask"][:, : at + size],
                        "position_ids": given["position_ids"][:, at : at + size],
                    }
                outs.append(model(ids()[:, at : at + size], past_key_values=cache, **part).logits)
                at += size
            close(torch.cat(outs, 1)[seen], whole[seen], 1e-4)


@pytest.mark.parametrize("make", DECODERS)
def test_generation_equals_choosing_by_whole_forwards(make):
    model, text = quiet(make()), ids(12)
    with busy()(model):
        made = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=8, do_sample=False)
        for _ in range(8):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, text)


def test_only_the_rows_asked_for_are_changed():
    model, chunks = llama(), []

    @dataclass
    class Last(Favour):
        def takes(self, site):
            return super().takes(site) and site.layer >= 2

        def rows(self, site):
            return site.rows[-1:]

        def score(self, site, scores, rows, keys):
            chunks.append((site.layer, rows, keys, scores.shape[2]))
            return super().score(site, scores, rows, keys)

    alone = model(ids()).logits
    with Last(4.0)(model):
        edited = model(ids()).logits
    assert chunks == [(layer, range(23, 24), range(24), 1) for layer in (2, 3)]
    assert torch.equal(edited[:, :-1], alone[:, :-1])
    assert not torch.allclose(edited[:, -1], alone[:, -1], atol=1e-3)


def test_no_scores_of_all_pairs_are_ever_held(monkeypatch):
    monkeypatch.setattr(scores, "WORKSPACE", 1 << 18)

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "scaled_dot" not in str(func):
                self.most = max(self.most, out.numel())
            return out

    model, most = llama(num_hidden_layers=1), []
    for tokens in (256, 512):
        with Favour(1.0)(model), Largest() as mode:
            model.model(ids(tokens))
        most.append(mode.most)
    assert most[1] <= 2.1 * most[0] and most[1] < 4 * 512 * 512


def test_patches_come_on_their_grid_and_class_tokens_in_a_row():
    shapes = []

    class Look(Steer):
        def edit(self, site, query, key, value):
            shapes.append((query.shape, key.shape, site.grid, site.num_prefix))
            return query, key, value

        def output(self, site, heads):
            shapes.append(heads.shape)
            return heads

    image = draw(2, 3, 16, 24)
    with Look()(Vit()) as model:
        model(image)
    assert shapes == [((2, 4, 6, 2, 8), (2, 4, 6, 2, 8), (4, 6), 0), (2, 4, 6, 2, 8)]
    shapes.clear()
    with Look()(Vit(1)) as model:
        model(image)
    assert shapes == [((2, 25, 2, 8), (2, 25, 2, 8), (4, 6), 1), (2, 25, 2, 8)]


def test_keys_of_another_picture_may_be_added():
    model, image = Vit(), draw(2, 3, 16, 24)

    @dataclass
    class Lend(Steer):
        lent: list = field(default_factory=list)

        def edit(self, site, query, key, value):
            more = [torch.cat([x, x], 1) for x in (key, value)]  # each key twice: nothing changes
            return query, *more

    with Lend()(model):
        close(model(image), Vit.forward(model, image))

    with pytest.raises(ValueError, match=r"gave 48 keys.*layers\.0\.self_attn"), Lend()(llama()) as decoder:
        decoder(ids())


def test_outputs_carry_gradients_and_equal_a_hook_before_the_projection():
    model, vectors = llama(), nn.Parameter(torch.zeros(4, 4, 16))
    model.requires_grad_(False)

    class Offsets(Steer):
        def output(self, site, heads):
            return heads + vectors[site.layer]

    with torch.enable_grad(), (Offsets() + Favour(0.5))(model):
        model(ids(), **padded("left")).logits[1, PADS:].square().sum().backward()
    assert vectors.grad.isfinite().all() and vectors.grad.abs().amin() > 0
    vectors.data = draw(4, 4, 16)
    with Offsets()(model):
        edited = model(ids()).logits
    for layer, v in zip(model.model.layers, vectors, strict=True):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, v=v: (args[0] + v.flatten(),))
    close(edited, model(ids()).logits)


# Composition, and the way back


def test_sums_apply_in_order_and_nesting_is_a_sum():
    model = llama()

    class Add(Steer):
        def edit(self, site, query, key, value):
            return query + 1, key, value

        def output(self, site, heads):
            return heads + 1

    class Double(Steer):
        def edit(self, site, query, key, value):
            return query * 2, key, value

        def output(self, site, heads):
            return heads * 2

    def run(*steers):
        with contexts(model, *steers):
            return model(ids()).logits

    class Both(Steer):
        def edit(self, site, query, key, value):
            return (query + 1) * 2, key, value

        def output(self, site, heads):
            return (heads + 1) * 2

    together = run(Both())
    assert torch.equal(run(Add() + Double()), together)
    assert torch.equal(run(Add(), Double()), together)
    assert not torch.allclose(run(Double() + Add()), together)
    three = run(Add() + (Double() + Favour(2.0)))
    assert torch.equal(three, run((Add() + Double()) + Favour(2.0)))
    assert torch.equal(three, run(Favour(2.0), Add(), Double()))  # edits before scores, scores before outputs
    assert not torch.allclose(three, together)


def contexts(model, *steers):
    from contextlib import ExitStack

    stack = ExitStack()
    for steer in steers:
        stack.enter_context(steer(model))
    return stack


def test_a_steer_on_two_models_twice_on_one_and_left_in_any_order():
    one, two = llama(), qwen3()
    alone, before = (one(ids()).logits, two(ids()).logits), (trace(one), trace(two))
    steer = Sharpen(1.2)
    with steer(one):
        once = one(ids()).logits
        with steer(two), steer(one):
            assert not torch.equal(two(ids()).logits, alone[1])
            twice = one(ids()).logits
        assert torch.equal(one(ids()).logits, once)
        assert torch.equal(two(ids()).logits, alone[1])
    with Sharpen(1.2**2)(one):
        close(one(ids()).logits, twice)
    first, second = Louder(2.0)(one), Sharpen(1.2)(one)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(one(ids()).logits, once)
    second.__exit__(None, None, None)
    assert (trace(one), trace(two)) == before
    assert torch.equal(one(ids()).logits, alone[0])


@pytest.mark.parametrize("make", [lambda: (llama(), ids()), encoder])
def test_everything_is_put_back_after_an_exception(make):
    model, x = make()
    before = trace(model)

    class Fail(Steer):
        def output(self, site, heads):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), (busy() + Fail())(model):
        model(x)
    with pytest.raises(ZeroDivisionError), busy()(model), Sharpen()(model):
        1 / len(model(x)[:0])
    assert trace(model) == before
    assert torch.overrides._get_current_function_mode_stack() == []


def test_other_threads_go_on_as_they_were():
    model, found = llama(), []
    alone = model(ids()).logits

    def run():
        with torch.no_grad():
            found.append(model(ids()).logits)
            with Louder(3.0)(model):
                found.append(model(ids()).logits)

    with Sharpen(2.0)(model):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not torch.equal(model(ids()).logits, alone)
    assert torch.equal(found[0], alone)
    with Louder(3.0)(model):
        assert torch.equal(model(ids()).logits, found[1])


@pytest.mark.compile
def test_compiled_hosts_inside_and_after():
    for model, x in ((llama(num_hidden_layers=1), ids()), (Vit(), draw(2, 3, 16, 24))):

        def run(model, x=x):
            out = model(x)
            return out if isinstance(out, torch.Tensor) else out.logits

        with busy()(model):
            edited = run(model)
        whole = copy.deepcopy(model)
        compiled = torch.compile(model, backend="eager")
        whole.compile(backend="eager")
        for host in (compiled, whole):
            plain = run(host)
            with busy()(host):
                assert torch.equal(run(host), edited)
            with idle()(host):
                assert torch.equal(run(host), plain)
            assert torch.equal(run(host), plain)


def test_a_steered_model_can_be_watched_and_a_watched_one_steered():
    model, shown = llama(), []
    with Sharpen(1.3)(model):
        edited = model(ids()).logits
        with seam.attention(model, lambda call: shown.append(call.query)):
            assert torch.equal(model(ids()).logits, edited)
    raw = shown[0]
    shown.clear()
    with seam.attention(model, lambda call: shown.append(call.query)), Sharpen(1.3)(model):
        assert torch.equal(model(ids()).logits, edited)
    assert torch.equal(shown[0], raw * 1.3)  # outside stands nearer to the host
    vit, image, seen = Vit(), draw(2, 3, 16, 24), []
    with Sharpen(1.3)(vit):
        edited = vit(image)
    with seam.attention(vit, lambda call: seen.append(call.site.name)), Sharpen(1.3)(vit):
        assert torch.equal(vit(image), edited)
    assert seen == ["block"]
    stack, x = encoder()
    with Sharpen(1.3)(stack):
        edited = stack(x)
    seen.clear()
    with seam.attention(stack, lambda call: seen.append(call.site.name)), Sharpen(1.3)(stack):
        assert torch.equal(stack(x), edited)
    assert seen == ["layers.0.self_attn", "layers.1.self_attn"]


def test_a_converted_model_can_be_steered():
    from nearfield.convert import convert
    from nearfield.ops.neighborhood import Neighborhood

    for model, x, more in (
        (llama(), ids(), {}),
        (Vit(), draw(2, 3, 16, 24), {"example": (draw(2, 3, 16, 24),)}),
        (*encoder(), {"example": (draw(2, 12, 16),)}),
    ):

        def run(model=model, x=x):
            out = model(x)
            return out if isinstance(out, torch.Tensor) else out.logits

        full = run()
        causal = not more
        report = convert(model, Neighborhood(3, is_causal=causal), **more)
        local = run()
        assert not torch.allclose(full, local)
        with idle()(model):
            assert torch.equal(run(), local)
        with Sharpen(2.0)(model):
            sharp = run()
        assert not torch.equal(sharp, local)
        with Sharpen(2.0)(model), seam.attention(model, lambda call: None):
            assert torch.equal(run(), sharp)
        report.restore()
        assert torch.equal(run(), full)


# Refusals


def test_a_missing_site_is_named():
    before = trace(model := llama())
    words = r"sites='cross'.*LlamaForCausalLM.*layers\.0\.self_attn"
    with pytest.raises(ValueError, match=words), Sharpen(sites="cross")(model):
        pass
    with (
        pytest.raises(ValueError, match=r"Favour finds no.*layers\.9"),
        (Sharpen() + Favour(sites="*layers.9*"))(model),
    ):
        pass
    assert trace(model) == before
    mamba = build(
        "MambaForCausalLM", transformers.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*Its sites are: none"), Sharpen()(mamba):
        pass
    vit, image = Vit(), draw(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"sites='cross' in this Vit.*block"), Sharpen(sites="cross")(vit):
        vit(image)
    with Sharpen(sites="cross")(vit):
        pass  # nothing ran
    sinks = transformers.GptOssConfig(
        **SMALL, head_dim=16, num_local_experts=2, num_experts_per_tok=1, layer_types=SLIDING
    )
    model = build("GptOssForCausalLM", sinks)
    with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn.*GptOss"), Sharpen()(model):
        pass


def test_overlapping_models_and_wrong_shapes_are_refused():
    model, x = encoder()
    before = trace(model)
    for outer, inner in ((model, model.layers[0]), (model.layers[0], model)):
        with pytest.raises(RuntimeError, match="steered already"), Sharpen()(outer), Sharpen()(inner):
            pass
    assert trace(model) == before

    class Wrong(Steer):
        def edit(self, site, query, key, value):
            return query[:, 1:], key, value

    class Short(Steer):
        def score(self, site, scores, rows, keys):
            return scores[..., 1:]

    class Flat(Steer):
        def output(self, site, heads):
            return heads.flatten(-2)

    for steer in (Wrong(), Short(), Flat()):
        words = rf"{type(steer).__name__}\.\w+ gave .*layers\.0\.self_attn"
        with pytest.raises(ValueError, match=words), steer(model):
            model(x)


def test_a_score_path_without_its_mask_is_noticed(monkeypatch):
    model = llama()
    with Favour(1.0)(model):
        right = model(ids()).logits
    monkeypatch.setattr(scores, "hidden_of", lambda *given: None)
    with Favour(1.0)(model):
        assert not torch.allclose(model(ids()).logits, right, atol=1e-3)


# Images


def test_image_tokens_are_found_by_row_and_image():
    from nearfield.hosts.vision_language import image_tokens, vision_tower

    model, given = llava()
    assert image_tokens(model, given) == [[range(4, 20)], [range(4, 20)]]
    joined = given["input_ids"].clone()
    joined[0, 4:36] = 255
    both = {"input_ids": F.pad(joined, (0, 12), value=3)[:1], "pixel_values": given["pixel_values"]}
    both["input_ids"][0, 4:36] = 255
    assert image_tokens(model, both) == [[range(4, 20), range(20, 36)]]
    with pytest.raises(ValueError, match=r"32 image tokens and its images make 16"):
        image_tokens(model, {**both, "pixel_values": given["pixel_values"][:1]})
    tower = vision_tower(model, given)
    assert (tower.name, tower.num_prefix, tower.grids, tower.num_tokens) == (
        "model.vision_tower",
        1,
        ((4, 4), (4, 4)),
        32,
    )
    assert [site.name for site in seam.sites(model, **given) if site.grid == (4, 4)] == list(tower.sites)
    model, given = qwen_vl()
    assert image_tokens(model, given) == [[range(4, 28)]]
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM names no image token"):
        image_tokens(llama(), given)
    with pytest.raises(NotImplementedError, match=r"no vision tower"):
        vision_tower(llama(), given)


def test_the_order_of_a_windowed_tower_is_that_of_its_calls():
    from nearfield.hosts.vision_language import vision_tower

    model, given = qwen_vl(8, 12)
    tower, rows, first = vision_tower(model, given), [], {}

    def watch(call):
        if call.site.name == tower.sites[0]:
            rows.append(call.site.rows)
        first.setdefault(call.site.name, call.key)

    with seam.attention(model, watch):
        model(**given)
    assert tower.grids == ((4, 6),)
    assert [i for part in rows for i in part] == list(range(96))
    for part in rows:  # a window holds squares of 2 x 2 tokens, four patches each
        tokens = tower.places[list(part)].unique()
        assert len(tokens) * 4 == len(part)
        assert int((tokens // 6).max() - (tokens // 6).min()) <= 1
        assert int((tokens % 6).max() - (tokens % 6).min()) <= 1
    # Moving one patch's pixels moves the one position of the first layer that is said to hold its token.
    moved = {**given, "pixel_values": given["pixel_values"].clone()}
    moved["pixel_values"][4 * 7 + 2] += 1
    keys = []
    for each in (given, moved):
        with seam.attention(
            model, lambda call: keys.append(call.key) if call.site.name == tower.sites[0] else None
        ):
            model(**each)
    half = len(keys) // 2
    changed = (torch.cat(keys[:half], 1) != torch.cat(keys[half:], 1)).flatten(2).any(-1)[0].nonzero()[:, 0]
    assert tower.places[changed].tolist() == [7]


# Branches


def greedy(z):
    return z[0]


@pytest.mark.parametrize(
    "make", [lambda: (quiet(llama()), {"input_ids": ids(12), **left(12)}), llava, qwen_vl]
)
def test_equal_branches_generate_what_the_model_generates(make):
    from nearfield.hosts.generation import Branch, generate

    model, given = make()
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 20, "temperature": 0.7}):
        torch.manual_seed(5)
        alone = model.generate(**given, max_new_tokens=6, **options)
        for combine in (greedy, lambda z: 0.5 * z[0] + 0.5 * z[1]):
            torch.manual_seed(5)
            both = generate(model, [Branch(given), Branch(given)], combine, max_new_tokens=6, **options)
            assert torch.equal(both, alone)


def left(tokens):
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, :4] = 0
    return {"attention_mask": mask}


@pytest.mark.parametrize("make", [llava, qwen_vl])
def test_each_branch_keeps_its_image_and_cache(make):
    from nearfield.hosts.generation import Branch, generate

    model, given = make()
    other = {**given, "pixel_values": 0 * given["pixel_values"]} if make is llava else picture(4, 4)
    alone = model.generate(**given, max_new_tokens=6, do_sample=False)[:, -6:]
    by_other = model.generate(**other, max_new_tokens=6, do_sample=False)[:, -6:]

    def second(first):
        return generate(model, first, lambda z: z[1], max_new_tokens=6, do_sample=False)[:, -6:]

    assert torch.equal(second([Branch(other), Branch(given)]), alone)
    assert torch.equal(second([Branch(given), Branch(other)]), by_other)
    fused = generate(
        model, [Branch(given), Branch(other)], lambda z: z[0] - 3 * z[1], max_new_tokens=6, do_sample=False
    )
    assert not torch.equal(fused[:, -6:], alone)


def test_a_branch_may_be_steered_alone_and_stop_at_the_end():
    from nearfield.hosts.generation import Branch, generate

    model = quiet(llama())
    given = {"input_ids": ids(12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = model.generate(**given, **options)
    with busy()(model):
        steered = model.generate(**given, **options)
    assert not torch.equal(steered, alone)
    branches = [Branch(given), Branch(given, within=lambda: busy()(model))]
    assert torch.equal(generate(model, branches, greedy, **options), alone)
    assert torch.equal(generate(model, branches, lambda z: z[1], **options), steered)
    shorter = Branch({key: value[:, 3:] for key, value in given.items()})
    text = generate(model, [Branch(given), shorter], lambda z: z[1], **options)
    assert torch.equal(text[:, 12:], model.generate(**shorter.inputs, **options)[:, 9:])
    end = {**options, "eos_token_id": int(alone[0, 14])}
    assert torch.equal(generate(model, [Branch(given)] * 2, greedy, **end), model.generate(**given, **end))
    for wrong, error, words in (
        ({"num_beams": 2}, NotImplementedError, "num_beams"),
        ({"return_dict_in_generate": True}, NotImplementedError, "return_dict"),
    ):
        with pytest.raises(error, match=words):
            generate(model, branches, greedy, **options, **wrong)
    with pytest.raises(ValueError, match=r"combine gave \[2, 3\]"):
        generate(model, branches, lambda z: z[0][:, :3], **options)
    with pytest.raises(NotImplementedError, match="LlamaModel has no language head"):
        generate(model.model, branches, greedy)


def test_a_cache_with_room_copies_nothing_and_changes_nothing():
    from nearfield.hosts.transformers_blocks import block_cache

    for make in (llama, qwen3):
        model = quiet(make())
        cache, outs = block_cache(model, 30), []
        for start, stop in ((0, 14), (14, 15), (15, 18), (18, 24)):
            outs.append(model(ids()[:, start:stop], past_key_values=cache).logits)
            first = cache.layers[0]
            assert first.keys.data_ptr() == first.buffers[0].data_ptr()
            assert first.keys.shape[2] == stop
        close(torch.cat(outs, 1), model(ids()).logits)
        if make is llama:
            cache.crop(-4)
            close(model(ids()[:, 20:], past_key_values=cache).logits, model(ids()).logits[:, 20:])
    model = quiet(llama())
    given = {"attention_mask": torch.ones(2, 12, dtype=torch.long), "max_new_tokens": 5, "num_beams": 2}
    alone = model.generate(ids(12), do_sample=False, **given)
    assert torch.equal(
        model.generate(ids(12), do_sample=False, past_key_values=block_cache(model, 40), **given), alone
    )


def test_the_page_runs_as_it_stands(root):
    page = (root / "docs" / "steer.md").read_text(encoding="utf-8")
    model, given = llama(), {"input_ids": ids()}
    before = model(**given).logits
    names = {"model": model, "inputs": given}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert not torch.allclose(names["edited"].logits, before, atol=1e-3)
    assert torch.equal(model(**given).logits, before)
    assert names["tokens"].shape == (2, TOKENS + 8)
