"""The transformers host: watching by site name, local patterns for good, caches bounded by their windows."""

import copy
import json
import threading
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
    ViTConfig,
    ViTModel,
)
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function  # noqa: E402

from nearfield.hosts import seam  # noqa: E402
from nearfield.hosts.transformers import (  # noqa: E402
    NAME,
    attention,
    attention_modules,
    cache_bytes,
    cache_bytes_after,
    install,
    sites,
)
from nearfield.hosts.transformers_cache import BoundedLayer  # noqa: E402
from nearfield.hosts.transformers_masks import dense_mask, read_mask  # noqa: E402
from nearfield.ops.neighborhood import Neighborhood  # noqa: E402
from nearfield.plan.pattern import GroupPlan, SitePlan  # noqa: E402

SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
DECODER = {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2}
IMAGE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
}
WINDOW = Neighborhood(6, is_causal=True, num_sinks=2)


def build(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def llama(**more):
    return build(LlamaForCausalLM, LlamaConfig(**{**DECODER, **more}))


def qwen():
    kinds = ["full_attention", "sliding_attention"] * 2
    more = {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    return build(Qwen3ForCausalLM, Qwen3Config(**DECODER, **more))


def mistral():
    return build(MistralForCausalLM, MistralConfig(**DECODER, sliding_window=8))


def gpt2():
    return build(GPT2LMHeadModel, GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def bert():
    return build(BertModel, BertConfig(**SMALL, num_hidden_layers=2))


def vit():
    return build(ViTModel, ViTConfig(**IMAGE, patch_size=4))


def registers():
    return build(
        Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**IMAGE, patch_size=4, num_register_tokens=3)
    )


def clip_vision():
    return build(CLIPVisionModel, CLIPVisionConfig(**IMAGE, patch_size=4))


def siglip():
    return build(SiglipVisionModel, SiglipVisionConfig(**IMAGE, patch_size=4))


def llava():
    text = LlamaConfig(**{**DECODER, "vocab_size": 256})
    vision = CLIPVisionConfig(**IMAGE, patch_size=4)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=255, vision_feature_layer=-2)
    return build(LlavaForConditionalGeneration, config)


def ids(rows=2, tokens=40, seed=1):
    return torch.randint(0, 100, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def pixels(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


def left_padded(pads=9, tokens=40):
    """Padding mask and positions of two rows, the second of which begins later."""
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, :pads] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def uniform(model, pattern):
    heads = {
        name: 2 if "model." in name and hasattr(m, "layer_idx") else 4
        for name, m in attention_modules(model).items()
    }
    return {name: SitePlan.uniform(name, count, pattern) for name, count in heads.items()}


def mixed(model, *patterns):
    """One key/value head of each decoder layer to each pattern."""
    groups = tuple(GroupPlan((head,), pattern) for head, pattern in enumerate(patterns))
    return {name: SitePlan(name, groups) for name in attention_modules(model)}


def steps(model, tokens, chunks, mask=None):
    """Logits of a forward in chunks through one cache, and the cache."""
    cache, outs, at = DynamicCache(config=model.config), [], 0
    for size in chunks:
        more = {}
        if mask is not None:
            more = {
                "attention_mask": mask["attention_mask"][:, : at + size],
                "position_ids": mask["position_ids"][:, at : at + size],
            }
        outs.append(model(tokens[:, at : at + size], past_key_values=cache, **more).logits)
        at += size
    return torch.cat(outs, dim=1), cache


def shown(pattern, tokens):
    """The 4-D mask of a pattern, from the geometry."""
    places = torch.arange(tokens)
    return pattern.on(tokens).mask_mod(None, None, places[:, None], places)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def strings(model):
    return {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # models this small only wait for a second one
    with torch.no_grad():
        yield


# Watching


@pytest.mark.parametrize("make", [llama, qwen, mistral, gpt2, bert, vit, registers, clip_vision, siglip])
def test_watching_changes_nothing(make):
    model = make()
    image = hasattr(model.config, "patch_size")
    given = (
        {"pixel_values": pixels()}
        if image
        else {"input_ids": ids(), "attention_mask": left_padded()["attention_mask"]}
    )
    plain, before, calls = model(**given)[0], strings(model), []
    with attention(model, calls.append):
        watched = model(**given)[0]
        assert set(strings(model).values()) == {NAME}
    assert torch.equal(plain, watched)
    assert strings(model) == before
    assert not any("nearfield" in key for module in model.modules() for key in vars(module))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [call.site.name for call in calls] == list(attention_modules(model))
    assert torch.equal(model(**given)[0], plain)


def test_keys_come_clean_and_masks_complete():
    model, calls = llama(), []
    padding = left_padded()
    with attention(model, calls.append):
        model(ids(), **padding)
        model(ids())
    padded, plain = calls[0], calls[4]
    assert padded.key.shape == (2, 40, 2, 16)  # two key/value heads, not repeated to four
    assert padded.query.shape == (2, 40, 4, 16)
    assert (padded.site.role, padded.site.is_causal, padded.site.grid) == ("self", True, (40,))
    assert padded.mask.dtype == torch.bool
    assert not padded.mask[1, 0, 20, 8]  # padding: without a registered mask function it vanished silently
    assert not padded.mask[0, 0, 20, 21]  # causality
    assert plain.mask is None


def test_without_a_mask_causality_is_the_handlers():
    model = llama()
    plain = model(ids()).logits

    def own(call, causal):
        q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        return sdpa(
            q, k, v, attn_mask=call.mask, is_causal=causal, scale=call.scale, enable_gqa=True
        ).transpose(1, 2)

    with attention(
        model, lambda call: own(call, call.mask is None and call.site.is_causal and call.query.shape[1] > 1)
    ):
        close(model(ids()).logits, plain)
        cached, _ = steps(model, ids(), [30] + [1] * 10)  # one query sees all keys
        close(cached, plain)
    with attention(model, lambda call: own(call, False)):
        assert (model(ids()).logits - plain).abs().max() > 0.01


def test_a_static_cache_shows_only_the_keys_that_are_there():
    model, sizes = llama(), []
    cache = StaticCache(config=model.config, max_cache_len=50)
    with attention(
        model, lambda call: sizes.append((call.query.shape[1], call.key.shape[1], call.mask is None))
    ):
        watched = model(ids(), past_key_values=cache).logits
    assert sizes == [(40, 40, True)] * 4  # and not 50, whose causality would be aligned at the wrong end
    close(watched, model(ids()).logits)


def test_the_innermost_handler_answers_first():
    model, asked = llama(num_hidden_layers=1), []

    def answer(call):
        asked.append("outer")
        return torch.zeros_like(call.query)

    zero = model.model.embed_tokens(ids())
    with attention(model, answer):
        with attention(model, lambda call: asked.append("inner")):
            silenced = model.model(ids(), output_hidden_states=True).hidden_states[0]
        assert asked == ["inner", "outer"]
        with attention(model, lambda call: call.query * 0):
            model(ids())
        assert asked == ["inner", "outer"]
    assert torch.equal(silenced, zero)


def test_a_handler_that_fails_leaves_nothing():
    model = llama()
    before = strings(model)
    with pytest.raises(ZeroDivisionError), attention(model, lambda call: 1 / 0):
        model(ids())
    assert strings(model) == before
    with (
        pytest.raises(ValueError, match=r"Give \[B, N, heads, Dv\]"),
        attention(model, lambda call: call.query[:, :1]),
    ):
        model(ids())
    assert not any("nearfield" in key for module in model.modules() for key in vars(module))


def test_models_and_threads_do_not_hear_one_another():
    config = LlamaConfig(**DECODER)
    one, two = build(LlamaForCausalLM, config), build(LlamaForCausalLM, config)  # one config object
    heard = {"one": 0, "two": 0, "thread": 0}

    def note(name):
        return lambda call: heard.update({name: heard[name] + 1})

    def other_thread():
        with torch.no_grad(), attention(one, note("thread")):
            one(ids())

    first, second = attention(one, note("one")), attention(two, note("two"))
    first.__enter__()
    second.__enter__()
    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert heard == {"one": 0, "two": 0, "thread": 4}
    two(ids())
    assert heard == {"one": 0, "two": 4, "thread": 4}
    first.__exit__(None, None, None)  # not in the order in which they were entered
    two(ids())
    assert heard["two"] == 8
    second.__exit__(None, None, None)
    assert config._attn_implementation == "sdpa"


def test_sub_configs_get_their_own_strings_back():
    model = llava()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = strings(model)
    assert len(set(before.values())) == 2
    restore = install(model, {n: p for n, p in uniform_text(model).items() if "layers.1." in n})
    assert model.config.text_config._attn_implementation == NAME
    assert model.config.vision_config._attn_implementation == "sdpa"  # not asked for, not touched
    with attention(model, lambda call: None):
        assert set(strings(model).values()) == {NAME}
    assert model.config.text_config._attn_implementation == NAME
    restore()
    assert strings(model) == before


def uniform_text(model, pattern=WINDOW):
    names = [name for name in attention_modules(model) if "language_model" in name]
    return {name: SitePlan.uniform(name, 2, pattern) for name in names}


@pytest.mark.parametrize(
    ("make", "height", "width", "prefix"),
    [
        (vit, 32, 32, 1),
        (vit, 24, 40, 1),
        (registers, 24, 32, 4),
        (clip_vision, 32, 32, 1),
        (siglip, 32, 32, 0),
    ],
)
def test_image_models_have_the_grid_of_the_image_given(make, height, width, prefix):
    model = make()
    more = {"interpolate_pos_encoding": True} if make is vit else {}
    site = seam.sites(model, pixels(height, width), **more)[0]
    assert (site.grid, site.num_prefix, site.is_causal) == ((height // 4, width // 4), prefix, False)
    assert site.num_kv_heads == site.num_heads == 4  # CLIP and SigLIP do not say how often to repeat keys


@pytest.mark.parametrize("make", [llama, qwen, gpt2, bert, vit, registers, clip_vision, siglip])
def test_a_config_tells_the_sites_that_a_forward_shows(make):
    model = make()
    given = pixels() if hasattr(model.config, "patch_size") else ids(1, 8)
    for told, seen in zip(sites(model), seam.sites(model, given), strict=True):
        longest = (model.config.max_position_embeddings,) if len(seen.grid) == 1 else seen.grid
        assert told == replace(seen, grid=longest)


def test_of_two_towers_only_one_has_a_grid():
    text = {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 16}
    model = build(CLIPModel, CLIPConfig(text_config=text, vision_config={**IMAGE, "patch_size": 4}))
    found = seam.sites(model, input_ids=ids(2, 12), pixel_values=pixels())
    grids = (
        {site.grid for site in found if "text" in site.name},
        {site.grid for site in found if "vision" in site.name},
    )
    assert grids == ({(12,)}, {(8, 8)})
    assert not hasattr(model.vision_model.encoder.layers[0].self_attn, "layer_idx")


def test_what_the_interface_cannot_say_is_refused():
    model = llama()
    module = model.model.layers[0].self_attn
    with attention(model, lambda call: None):
        function = transformers.AttentionInterface()[NAME]
        q = torch.randn(1, 4, 5, 16)
        with pytest.raises(NotImplementedError, match="softcap"):
            function(module, q, q[:, :2], q[:, :2], None, softcap=30.0)
    with pytest.raises(ValueError, match="nf_ctx"):  # so what a conversion knows is kept on its modules
        model.generate(ids(), nf_ctx=object(), max_new_tokens=1)


# Masks


def test_masks_are_read_as_padding_only_where_they_are():
    left, right = torch.ones(2, 12, dtype=torch.bool), torch.ones(2, 12, dtype=torch.bool)
    left[1, :5] = False
    right[1, 8:] = False
    for padding, last in ((left, 4), (right, 11)):
        mask = sdpa_mask(2, 12, 12, attention_mask=padding, allow_is_causal_skip=False)
        reading = read_mask(mask, is_causal=True)
        assert reading.plain
        assert torch.equal(reading.keys, padding)
        assert reading.last_hidden == last
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        assert read_mask(additive, is_causal=True).plain
        assert not read_mask(additive + 0.5, is_causal=True).plain  # a bias
        assert not read_mask(mask, is_causal=False).plain
    one_off = mask.clone()
    one_off[0, 0, 6, 2] = False
    assert not read_mask(one_off, is_causal=True).plain
    sliding = sdpa_mask(2, 12, 12, mask_function=sliding_window_causal_mask_function(4), attention_mask=left)
    assert read_mask(sliding, is_causal=True, window=4).plain
    assert not read_mask(sliding, is_causal=True, window=5).plain
    assert not read_mask(sliding, is_causal=True).plain
    chunk = sdpa_mask(2, 3, 12, q_offset=9, attention_mask=left)
    assert read_mask(chunk, is_causal=True).plain
    assert torch.equal(read_mask(chunk, is_causal=True).keys, left)


def test_a_mask_that_is_changed_is_read_again():
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    assert read_mask(mask, is_causal=True).plain
    mask[0, 0, 4, 1] = False
    assert not read_mask(mask, is_causal=True).plain


def test_a_dense_mask_takes_sinks_from_the_first_keys_of_each_row():
    padding = torch.ones(2, 10, dtype=torch.bool)
    padding[1, :3] = False
    mask = sdpa_mask(2, 10, 10, attention_mask=padding, allow_is_causal_skip=False)
    seen = dense_mask(mask, padding, Neighborhood(2, is_causal=True, num_sinks=2))
    assert seen[0, 0, 9].nonzero().flatten().tolist() == [0, 1, 8, 9]
    assert seen[1, 0, 9].nonzero().flatten().tolist() == [3, 4, 8, 9]
    assert seen[1, 0, 3].nonzero().flatten().tolist() == [3]


# Converting


@pytest.mark.parametrize("make", [llama, qwen, bert, clip_vision])
def test_a_plan_that_leaves_all_full_touches_nothing(make):
    model = make()
    before = strings(model)
    restore = install(model, uniform(model, None))
    assert strings(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    restore()


@pytest.mark.parametrize("given", [{}, left_padded()])
def test_a_group_without_a_pattern_keeps_its_bits(given):
    model, found = llama(num_hidden_layers=1), []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: found.append(args[0])
    )
    model(ids(), **given)
    install(model, mixed(model, WINDOW, None))
    model(ids(), **given)
    plain, local = (heads.unflatten(-1, (4, 16)) for heads in found)
    assert torch.equal(plain[:, :, 2:], local[:, :, 2:])  # the query heads of key/value head 1
    assert (plain - local)[0, 10:, :2].abs().max() > 1e-3


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_pattern_equals_its_mask(make):
    model = make()
    expected = model(ids(), attention_mask=shown(WINDOW, 40)[None, None].expand(2, 1, -1, -1)).logits
    plain = model(ids()).logits
    plan = (
        uniform(model, WINDOW)
        if make is llama
        else {n: SitePlan.uniform(n, 4, WINDOW) for n in attention_modules(model)}
    )
    restore = install(model, plan)
    close(model(ids()).logits, expected)
    assert (model(ids()).logits - plain).abs().max() > 1e-3
    restore()
    assert torch.equal(model(ids()).logits, plain)


def test_padded_rows_equal_the_rows_alone():
    model = llama()
    install(model, mixed(model, WINDOW, None))
    alone = model(ids()[1:, 9:], use_cache=False).logits
    padding = left_padded()
    close(model(ids(), **padding, use_cache=False).logits[1:, 9:], alone)
    right = torch.cat([ids()[1:, 9:], ids()[1:, :9]], dim=1)
    close(model(right, attention_mask=padding["attention_mask"].flip(1)[1:]).logits[:, :31], alone)


@pytest.mark.parametrize(
    "chunks", [[1] * 40, [12] + [1] * 28, [5, 6, 3] + [1] * 26, [20] + [4] * 5, [3] + [1] * 9 + [28]]
)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_through_the_cache_equal_one_forward(chunks, padded):
    model = llama()
    install(model, mixed(model, WINDOW, None))
    mask = left_padded() if padded else None
    whole = model(ids(), **(mask or {}), use_cache=False).logits
    stepped, cache = steps(model, ids(), chunks, mask)
    close(stepped[0], whole[0])
    close(stepped[1, 9:], whole[1, 9:])
    assert isinstance(cache.layers[0], BoundedLayer)
    assert cache.layers[0].held == {0: 5 + 2, 1: 40}
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize(
    "pattern",
    [
        Neighborhood(1, is_causal=True),
        Neighborhood(1, is_causal=True, num_sinks=3),
        Neighborhood(5, is_causal=True, dilation=3, num_sinks=1),
        Neighborhood(3, is_causal=True, num_sinks=20),
        Neighborhood(500, is_causal=True, num_sinks=4),
    ],
)
def test_awkward_patterns_step_as_they_read(pattern):
    model = llama(num_hidden_layers=2)
    install(model, mixed(model, pattern, WINDOW))
    mask = left_padded()
    whole = model(ids(), **mask, use_cache=False).logits
    for chunks in ([7] + [1] * 33, [4, 18] + [1] * 18, [2, 2, 36]):
        stepped, _ = steps(model, ids(), chunks, mask)
        close(stepped[0], whole[0])
        close(stepped[1, 9:], whole[1, 9:])


def test_the_buffer_of_a_window_stays_small():
    model = llama(num_hidden_layers=1)
    install(model, uniform(model, Neighborhood(16, is_causal=True, num_sinks=2)))
    tokens = ids(1, 300)
    _, cache = steps(model, tokens, [100] + [1] * 200)
    per_key = 2 * 2 * 16 * 4  # keys and values, two heads of 16 floats
    assert cache_bytes(cache) <= per_key * (15 + 2 + 2 + 1 + 32)  # sinks twice, and room to move
    assert cache_bytes_after(model, 300) == per_key * 17
    plain = llama(num_hidden_layers=1)
    _, grown = steps(plain, tokens, [300])
    assert cache_bytes(grown) == cache_bytes_after(plain, 300) == per_key * 300


def greedy_by_mask(model, tokens, count, pattern):
    """Greedy decoding of the unconverted host without a cache, under the pattern's mask."""
    for _ in range(count):
        mask = shown(pattern, tokens.shape[1])[None, None].expand(len(tokens), 1, -1, -1)
        logits = model(tokens, attention_mask=mask, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


def test_generation_equals_generation_under_the_mask():
    model = llama()
    prompt = ids(2, 10)
    expected = greedy_by_mask(model, prompt, 30, WINDOW)
    assert not torch.equal(model.generate(prompt, max_new_tokens=30, do_sample=False), expected)
    install(model, uniform(model, WINDOW))
    for chunk in (None, 4):
        given = {
            "max_new_tokens": 30,
            "do_sample": False,
            "return_dict_in_generate": True,
            "prefill_chunk_size": chunk,
        }
        made = model.generate(prompt, **given)
        assert torch.equal(made.sequences, expected)
        assert set(made.past_key_values.layers[0].held.values()) == {5 + 2}


def test_all_ways_to_generate_need_no_more_than_the_bounded_cache():
    model = llama(num_hidden_layers=2)
    install(model, mixed(model, WINDOW, None))
    prompt, padding = ids(2, 20), {"attention_mask": left_padded(tokens=20)["attention_mask"]}
    for way in (
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "prefill_chunk_size": 6},
    ):
        torch.manual_seed(3)
        cached = model.generate(prompt, **padding, **way, max_new_tokens=14)
        torch.manual_seed(3)
        without = model.generate(
            prompt, **padding, **{**way, "prefill_chunk_size": None}, max_new_tokens=14, use_cache=False
        )
        assert torch.equal(cached, without), way
    batch = model.generate(prompt, **padding, do_sample=False, max_new_tokens=14)
    alone = model.generate(prompt[1:, 9:], do_sample=False, max_new_tokens=14)
    assert torch.equal(batch[1, 20:], alone[0, 11:])
    with pytest.raises(NotImplementedError, match="default cache"):
        model.generate(prompt, max_new_tokens=2, cache_implementation="static")


def test_rows_of_a_cache_can_be_repeated_chosen_reordered_copied_and_reset():
    model = llama(num_hidden_layers=2)
    install(model, mixed(model, WINDOW, None))
    tokens, mask = ids(), left_padded()
    whole = model(tokens, **mask, use_cache=False).logits

    def next_logits(cache, rows):
        more = {
            "attention_mask": mask["attention_mask"][rows, :31],
            "position_ids": mask["position_ids"][rows, 30:31],
        }
        return model(tokens[rows, 30:31], past_key_values=cache, **more).logits[:, 0]

    _, cache = steps(model, tokens, [25, 1, 1, 1, 1, 1], mask)
    for change, rows in (
        (lambda c: None, [0, 1]),
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    ):
        twin = copy.deepcopy(cache)
        change(twin)
        close(next_logits(twin, rows), whole[rows, 30])
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(tokens, **mask, past_key_values=cache).logits
    close(again[0], whole[0])
    assert cache.get_seq_length() == 40


def test_a_cache_is_cropped_until_a_key_has_left_the_window():
    model = llama(num_hidden_layers=2)
    install(model, mixed(model, WINDOW, None))
    whole = model(ids(), use_cache=False).logits
    _, cache = steps(model, ids(), [4])
    cache.crop(-3)
    close(model(ids()[:, 1:9], past_key_values=cache).logits, whole[:, 1:9])
    with pytest.raises(RuntimeError, match="have left the window"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(1)
    prompt = ids(1, 3).repeat(1, 8)
    with pytest.raises(RuntimeError, match="without an assistant"):
        model.generate(prompt, prompt_lookup_num_tokens=3, max_new_tokens=20, do_sample=False)


def test_a_cache_crosses_grad_and_inference_modes():
    model = llama(num_hidden_layers=2)
    install(model, mixed(model, WINDOW, None))
    whole = model(ids(), use_cache=False).logits
    cache, outs = DynamicCache(config=model.config), []
    with torch.inference_mode():
        outs.append(model(ids()[:, :12], past_key_values=cache).logits)
        outs.append(model(ids()[:, 12:13], past_key_values=cache).logits)
    outs.append(model(ids()[:, 13:14], past_key_values=cache).logits)
    close(torch.cat(outs, 1), whole[:, :14])
    with torch.enable_grad():
        stepped, _ = steps(model, ids(), [10] + [1] * 30)
        close(stepped, whole)
        stepped[:, -1].sum().backward()
        through_cache = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
        model.zero_grad()
        model(ids(), use_cache=False).logits[:, -1].sum().backward()
    close(through_cache, model.model.layers[0].self_attn.k_proj.weight.grad)


def test_a_window_of_the_host_is_our_kernel_size():
    for make, sliding in ((qwen, ("layers.1.", "layers.3.")), (mistral, ("layers.",))):
        model = make()
        plain = model(ids()).logits
        mask = left_padded()
        padded = model(ids(), **mask).logits
        names = [name for name in attention_modules(model) if any(part in name for part in sliding)]
        own = Neighborhood(8, is_causal=True)
        for pattern in (own, None):
            groups = (GroupPlan((0,), pattern), GroupPlan((1,), own))
            restore = install(model, {name: SitePlan(name, groups) for name in names})
            close(model(ids()).logits, plain)
            close(model(ids(), **mask).logits[1, 9:], padded[1, 9:])
            stepped, cache = steps(model, ids(), [12, 5] + [1] * 23, mask)
            close(stepped[1, 9:], padded[1, 9:])
            assert cache.layers[1].held == {0: 7, 1: 7}
            restore()
        restore = install(model, {names[0]: SitePlan.uniform(names[0], 2, Neighborhood(3, is_causal=True))})
        narrow = model(ids(), use_cache=False).logits
        assert (narrow - plain).abs().max() > 1e-3
        stepped, _ = steps(model, ids(), [12, 5] + [1] * 23)
        close(stepped, narrow)
        restore()
        for wrong in (Neighborhood(9, is_causal=True), Neighborhood(4, is_causal=True, num_sinks=1)):
            with pytest.raises(ValueError, match="sliding window of 8"):
                install(model, {names[0]: SitePlan.uniform(names[0], 2, wrong)})


def test_masks_that_say_more_are_applied_densely_or_refused():
    model = llama(num_hidden_layers=2)
    positions = torch.cat([torch.arange(22), torch.arange(18)])[None].expand(
        2, -1
    )  # two texts packed in a row
    window = Neighborhood(6, is_causal=True)
    install(model, mixed(model, window, None))
    packed = model(ids(), position_ids=positions, use_cache=False).logits
    close(packed[:, :22], model(ids()[:, :22], use_cache=False).logits)
    close(packed[:, 22:], model(ids()[:, 22:], use_cache=False).logits)
    own = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    own[:, :, 20:, 3] = False
    cache = DynamicCache(config=model.config)
    first = model(ids(), attention_mask=own, past_key_values=cache).logits
    close(first, model(ids(), attention_mask=own, use_cache=False).logits)
    odd = torch.ones(2, 1, 2, 42, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="more than causality and padding"):
        model(ids()[:, :2], attention_mask=odd, past_key_values=cache)


def test_encoders_see_no_padding():
    model = bert()
    pattern = Neighborhood(7, border="truncate")
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    both = (shown(pattern, 40) & mask[:, None, :].bool())[:, None]
    expected = model(ids(), attention_mask=both).last_hidden_state
    restore = install(model, uniform(model, pattern))
    padded = model(ids(), attention_mask=mask).last_hidden_state
    close(padded[0], expected[0])
    close(padded[1, :30], expected[1, :30])
    close(padded[1:, :30], model(ids()[1:, :30]).last_hidden_state)
    restore()
    install(model, uniform(model, Neighborhood(7)))
    model(ids())
    with pytest.raises(ValueError, match="border='truncate'"):
        model(ids(), attention_mask=mask)


@pytest.mark.parametrize("make", [vit, registers, clip_vision, siglip])
def test_patches_see_their_neighborhood_and_class_tokens_all(make):
    model = make()
    module = next(iter(attention_modules(model).values()))
    plain = model(pixels()).last_hidden_state
    restore = install(model, uniform(model, Neighborhood(8)))
    close(model(pixels()).last_hidden_state, plain)  # a window as large as the grid
    restore()
    install(model, uniform(model, Neighborhood((3, 5))))
    prefix = {vit: 1, registers: 4, clip_vision: 1, siglip: 0}[make]
    places = torch.arange(64)
    seen = torch.ones(64 + prefix, 64 + prefix, dtype=torch.bool)
    seen[prefix:, prefix:] = Neighborhood((3, 5)).on((8, 8)).mask_mod(None, None, places[:, None], places)
    calls = []
    hook = module.register_forward_hook(
        lambda m, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    assert (model(pixels()).last_hidden_state - plain).abs().max() > 1e-3
    hook.remove()
    args, kwargs, out = calls[0]
    twin = copy.deepcopy(module)
    del twin.__dict__["_nearfield_seat"]  # the module without its conversion
    hidden = args[0] if args else kwargs["hidden_states"]
    close(out[0], twin(hidden, attention_mask=seen[None, None].expand(2, 1, -1, -1))[0])


def test_one_tower_of_two_is_converted():
    model = llava()
    text = torch.cat([torch.full((2, 64), 255), ids(2, 20)], dim=1)
    plain = model(input_ids=text, pixel_values=pixels())
    restore = install(model, uniform_text(model))
    local = model(input_ids=text, pixel_values=pixels())
    assert torch.equal(local.image_hidden_states, plain.image_hidden_states)
    assert (local.logits - plain.logits).abs().max() > 1e-3
    made = model.generate(input_ids=text, pixel_values=pixels(), max_new_tokens=6, do_sample=False)
    without = model.generate(
        input_ids=text, pixel_values=pixels(), max_new_tokens=6, do_sample=False, use_cache=False
    )
    assert torch.equal(made, without)
    restore()
    assert torch.equal(model(input_ids=text, pixel_values=pixels()).logits, plain.logits)


def test_restore_leaves_no_trace(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "before")
    plain, keys, before = model(ids()).logits, list(model.state_dict()), strings(model)
    restore = install(model, uniform(model, WINDOW))
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert NAME not in json.dumps(model.config.to_dict())
    _, cache = steps(model, ids(), [20])
    twin = copy.deepcopy(model)
    restore()
    restore()  # once more does no harm
    assert strings(model) == before
    assert torch.equal(model(ids()).logits, plain)
    assert not any("nearfield" in key for module in model.modules() for key in vars(module))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (twin(ids()).logits - plain).abs().max() > 1e-3  # a copy stays converted
    with pytest.raises(RuntimeError, match="fresh cache"):
        model(ids()[:, 20:21], past_key_values=cache)
    later = install(model, uniform(model, Neighborhood(5, is_causal=True)))
    with pytest.raises(RuntimeError, match="another plan"):
        model(ids()[:, 20:21], past_key_values=cache)
    later()


def test_a_converted_model_can_be_watched():
    model = llama()
    install(model, mixed(model, WINDOW, None))
    local, calls = model(ids()).logits, []
    with attention(model, calls.append):
        assert torch.equal(model(ids()).logits, local)
        assert len(calls) == 4
        with pytest.raises(NotImplementedError, match="use_cache=False"):
            steps(model, ids(), [20, 1])
    assert torch.equal(model(ids()).logits, local)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="switched to attn_implementation='sdpa'"):
        model(ids())


def test_plans_that_do_not_fit_are_refused_before_anything_changes():
    model = llama(attention_dropout=0.1)
    name = "model.layers.0.self_attn"
    before = strings(model)

    def refuse(error, words, pattern=WINDOW, site=name, heads=2):
        with pytest.raises(error, match=words):
            install(model, {site: SitePlan.uniform(site, heads, pattern)})
        assert strings(model) == before
        assert not any(module._forward_pre_hooks for module in model.modules())

    refuse(ValueError, "Near it: model.layers.0.self_attn", site="model.layers.0.attn")
    refuse(ValueError, "the site has 2", heads=4)
    refuse(ValueError, "must be so too", Neighborhood(5))
    refuse(ValueError, "must be so too", Neighborhood((5, 5), is_causal=(True, True)))
    refuse(ValueError, "stride above 1", Neighborhood(6, stride=2, is_causal=True))
    refuse(ValueError, "border='pad'", Neighborhood(6, is_causal=True, border="pad"))
    model.config.layer_types = ["linear_attention"] * 4
    refuse(NotImplementedError, "linear_attention")
    model.config.layer_types = None
    restore = install(model, {name: SitePlan.uniform(name, 2, WINDOW)})
    with pytest.raises(RuntimeError, match="converted already"):
        install(model, {name: SitePlan.uniform(name, 2, WINDOW)})
    assert model.config._attn_implementation == NAME
    with pytest.raises(NotImplementedError, match="dropout"):
        model.train()(ids())
    restore()
    assert strings(model) == before
    with pytest.raises(ValueError, match="must be so too"):
        install(bert(), {n: SitePlan.uniform(n, 4, WINDOW) for n in attention_modules(bert())})
