"""Decoding by blocks: what a policy reads, equal to its definition row by row, on real caches of decoders."""

import copy
import math
import threading
from dataclasses import dataclass, replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402

from nearfield.hosts import seam  # noqa: E402
from nearfield.hosts.transformers import install  # noqa: E402
from nearfield.hosts.transformers_blocks import (  # noqa: E402
    MOST_ROWS,
    BlockLayer,
    BlockReuse,
    block_cache,
    block_caches,
    install_reuse,
    sparse_layers,
)
from nearfield.ops.neighborhood import Neighborhood  # noqa: E402
from nearfield.plan.pattern import SitePlan  # noqa: E402
from nearfield.plan.reuse import ReusePolicy  # noqa: E402
from nearfield.steer import Steer  # noqa: E402

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # attention that is far from even
}
SLIDING = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
SOURCES = (None, 1, 1, 3)
POLICY = ReusePolicy(SOURCES, num_tokens=16, block_size=4, num_sinks=2, num_recent=4, score="mass")
PROMPT, TOKENS = 40, 58


def build(name, config):
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return model


def llama(**more):
    return build("LlamaForCausalLM", transformers.LlamaConfig(**{**SMALL, **more}))


def qwen2():
    return build("Qwen2ForCausalLM", transformers.Qwen2Config(**SMALL))


def qwen3():
    more = {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "layer_types": SLIDING}
    return build("Qwen3ForCausalLM", transformers.Qwen3Config(**SMALL, **more))


def mistral(window=None):
    return build("MistralForCausalLM", transformers.MistralConfig(**SMALL, sliding_window=window))


def gemma2():
    more = {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 0.05}
    return build("Gemma2ForCausalLM", transformers.Gemma2Config(**SMALL, **more))


def gemma3():
    more = {"head_dim": 16, "sliding_window": 8, "layer_types": SLIDING}
    return build("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**SMALL, **more))


def draw(rows=1, tokens=TOKENS, seed=1):
    return torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def decoded(model, ids, sizes, mask=None, cache=None):
    """Logits of what follows a prompt, read in calls of these sizes through one cache."""
    cache, outs, at = cache or DynamicCache(config=model.config), [], 0
    for size in (ids.shape[1] - sum(sizes), *sizes):
        more = {}
        if mask is not None:
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, at : at + size]
            more = {"attention_mask": mask[:, : at + size], "position_ids": places}
        outs.append(model(ids[:, at : at + size], past_key_values=cache, **more).logits)
        at += size
    return torch.cat(outs[1:], dim=1)


def steps(count):
    return [1] * count


def by_definition(policy, first):
    """A handler that gives whole forwards what a policy reads, in loops; rows before `first` are a prompt."""
    chosen = {}

    def handler(call):
        layer, (batch, rows, heads) = call.site.layer, call.query.shape[:3]
        source, size, group = policy.sources[layer], policy.block_size, heads // call.key.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * call.scale
        scores = scores.masked_fill(~torch.ones(rows, rows, dtype=torch.bool).tril(), -math.inf)
        for row in range(first, rows):
            if source is None or row + 1 < policy.num_tokens + size:
                continue
            for b in range(batch):
                for head in range(call.key.shape[2]):
                    mine = slice(head * group, (head + 1) * group)
                    if source == layer:
                        share = scores[b, mine, row].softmax(-1).mean(0)
                        worth = [float(share[at : at + size].sum()) for at in range(0, row + 1, size)]
                        kept = {at // size for at in range(policy.num_sinks)}
                        kept |= {at // size for at in range(row + 1 - policy.num_recent, row + 1)}
                        order = sorted(range(len(worth)), key=lambda block: -worth[block])
                        rest = [block for block in order if block not in kept]
                        chosen[row, b, head] = kept | set(rest[: policy.num_tokens // size - len(kept)])
                    hidden = [key for key in range(rows) if key // size not in chosen[row, b, head]]
                    scores[b, mine, row, hidden] = -math.inf
        return (scores.softmax(-1) @ v.repeat_interleave(group, 1)).transpose(1, 2)

    return handler


def close(a, b, within=1e-4):  # logits up to 4, through four layers, sums in other orders: 3e-5
    torch.testing.assert_close(a, b, rtol=within, atol=within)


def trace(model):
    return [
        (
            sorted(vars(m)),
            len(m._forward_hooks) + len(m._forward_pre_hooks),
            getattr(getattr(m, "config", None), "_attn_implementation", None),
        )
        for m in model.modules()
    ]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # models this small only wait for a second one
    with torch.no_grad():
        yield


# What a step reads


@pytest.mark.parametrize("make", [llama, qwen2, mistral, lambda: llama(num_key_value_heads=4)])
def test_steps_are_the_policys_definition(make):
    model, ids = make(), draw(2)
    dense = model(ids).logits[:, PROMPT:]
    with seam.attention(model, by_definition(POLICY, PROMPT)):
        wanted = model(ids).logits[:, PROMPT:]
    restore = install_reuse(model, POLICY)
    found = decoded(model, ids, steps(TOKENS - PROMPT))
    restore()
    close(found, wanted)
    assert (found - dense).abs().max() > 1e-3
    close(decoded(model, ids, steps(TOKENS - PROMPT)), dense)


@pytest.mark.parametrize("score", ["mass", "mean", "bound", "hash"])
@pytest.mark.parametrize("prompt", [PROMPT, 12])
def test_a_chunk_is_as_many_steps(score, prompt):
    """A shorter prompt begins where steps are dense: some rows of a chunk see enough keys, some do not."""
    model, ids, policy = llama(), draw(2), replace(POLICY, score=score)
    install_reuse(model, policy)
    wanted = decoded(model, ids, steps(TOKENS - prompt))
    for sizes in (
        [16, *steps(TOKENS - prompt - 16)],
        [3] * ((TOKENS - prompt) // 3) + [1] * ((TOKENS - prompt) % 3),
    ):
        close(decoded(model, ids, sizes), wanted)


def test_more_rows_than_a_chunk_are_a_prompt():
    model, ids = llama(), draw()
    dense = decoded(model, ids, [MOST_ROWS + 1])
    install_reuse(model, POLICY)
    close(decoded(model, ids, [MOST_ROWS + 1]), dense)
    assert not torch.allclose(decoded(model, ids, [MOST_ROWS])[:, -1], dense[:, -1], atol=1e-3)


@pytest.mark.parametrize("policy", [replace(POLICY, num_tokens=TOKENS), replace(POLICY, sources=(None,) * 4)])
def test_a_policy_that_reads_all_is_dense(policy):
    model, ids = llama(), draw(2)
    dense = decoded(model, ids, steps(18))
    install_reuse(model, policy)
    close(decoded(model, ids, steps(18)), dense)


def test_all_but_a_block_that_nobody_needs_is_dense():
    """The policy skips one block; its values are those of no attention, since its keys are far off."""
    reuse, n = BlockReuse(replace(POLICY, sources=(0,), num_tokens=36)), 40
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, n, 2, 8), torch.randn(1, n, 2, 8)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, 8:12, :, 0] = -1e4
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True
    ).transpose(1, 2)
    close(reuse.attend(0, q, k, v, None, 8**-0.5), dense)


@pytest.mark.parametrize("score", ["mass", "bound"])
def test_padding_in_whole_blocks_changes_nothing(score):
    pads, ids = 12, draw(2)
    model = llama()
    install_reuse(model, replace(POLICY, score=score))
    alone = decoded(model, ids[1:], [*steps(5), 6, *steps(7)])
    mask = torch.ones(2, TOKENS + pads, dtype=torch.long)
    mask[1, :pads] = 0
    both = torch.cat([draw(2, pads, seed=5), ids], 1)
    found = decoded(model, both, [*steps(5), 6, *steps(7)], mask)
    close(found[1:], alone)
    close(found[:1], decoded(model, both[:1], [*steps(5), 6, *steps(7)]))


def test_padded_rows_decode_from_their_own_tokens():
    """Pads that end inside a block: no step sees them, whatever they are."""
    model = llama()
    install_reuse(model, replace(POLICY, score="bound"))
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :7] = 0
    ids = draw(2)
    wanted = decoded(model, ids, steps(18), mask)
    ids[1, :7] = 3
    close(decoded(model, ids, steps(18), mask), wanted)


def test_masks_that_say_more_are_dense():
    model, ids = llama(), draw()
    seen = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    seen[..., 20:30] = False
    seen |= torch.eye(TOKENS, dtype=torch.bool)

    def steps_by_mask():
        cache = DynamicCache(config=model.config)
        model(ids[:, :PROMPT], past_key_values=cache, attention_mask=seen[..., :PROMPT, :PROMPT])
        rows = seen[..., PROMPT : PROMPT + 8, : PROMPT + 8].clone()
        rows[..., 3, 5] = False
        return model(ids[:, PROMPT : PROMPT + 8], past_key_values=cache, attention_mask=rows).logits

    dense = steps_by_mask()
    install_reuse(model, POLICY)
    close(steps_by_mask(), dense)


@pytest.mark.parametrize(
    ("make", "sparse"),
    [(qwen3, (0, 2, 3)), (lambda: mistral(8), ()), (gemma2, ()), (gemma3, (0, 2, 3)), (llama, (0, 1, 2, 3))],
)
def test_layers_that_cannot_be_sparse_stay_dense(make, sparse):
    model, ids = make(), draw()
    assert sparse_layers(model) == sparse
    dense = decoded(model, ids, steps(18))
    restore = install_reuse(model, replace(POLICY, sources=(0, 1, 1, 3)))
    found = decoded(model, ids, steps(18))
    restore()
    assert torch.allclose(found, dense, atol=1e-4) is not bool(sparse)
    if sparse == (0, 2, 3):  # layer 2 finds nothing chosen by its sliding source, and selects
        with seam.attention(model, lambda call: None):
            pass
        same = replace(POLICY, sources=(0, None, 2, 3))
        install_reuse(model, same)
        close(decoded(model, ids, steps(18)), found)


# The cache


def test_generate_uses_layers_of_blocks_by_itself():
    model, ids = llama(), draw(2, PROMPT)
    install_reuse(model, POLICY)
    out = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert all(type(layer) is BlockLayer for layer in out.past_key_values.layers)
    by_hand, cache = ids, DynamicCache(config=model.config)
    given = ids
    for _ in range(12):
        token = model(given, past_key_values=cache).logits[:, -1:].argmax(-1)
        by_hand, given = torch.cat([by_hand, token], 1), token
    assert torch.equal(out.sequences, by_hand)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), by_hand)


def test_beams_and_speculative_steps_take_the_same_tokens():
    model, ids = llama(), draw(1, PROMPT).repeat(1, 2)  # a prompt that repeats itself can be looked up
    install_reuse(model, POLICY)
    greedy = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(
        model.generate(ids, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=4), greedy
    )
    beams = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    restored = copy.deepcopy(beams)
    assert torch.equal(model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False), restored)


def test_a_step_copies_nothing_and_buffers_double():
    layer, places, sizes = BlockLayer(), set(), set()
    for _ in range(1000):
        layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 3))
        places.add(layer.keys.data_ptr())
        sizes.add(layer.buffers[0].shape[2])
    assert sorted(sizes) == [257, 514, 1028]
    assert len(places) == 3
    assert BlockLayer(100).nbytes == 0
    exact = BlockLayer(100)
    exact.update(torch.randn(1, 2, 64, 4), torch.randn(1, 2, 64, 3))
    assert exact.buffers[0].shape[2] == 100
    assert exact.nbytes == 2 * 100 * 7 * 4


@pytest.mark.parametrize("score", ["mean", "bound", "hash"])
def test_a_layer_is_what_its_tokens_make_it(score):
    """After updates, crops and changes of the batch: keys, values and summary as if made at once."""
    draws = torch.Generator().manual_seed(0)

    def new(rows, tokens):
        return torch.randn(rows, 2, tokens, 4, generator=draws), torch.randn(
            rows, 2, tokens, 3, generator=draws
        )

    layer, keys, values = BlockLayer(), torch.zeros(2, 2, 0, 4), torch.zeros(2, 2, 0, 3)
    changes = [
        ("crop", lambda x: x[:, :, :-5], -5),
        ("batch_repeat_interleave", lambda x: x.repeat_interleave(2, 0), 2),
        ("reorder_cache", lambda x: x[[3, 0, 1, 1]], torch.tensor([3, 0, 1, 1])),
        ("crop", lambda x: x[:, :, :-1], -1),
        ("batch_select_indices", lambda x: x[[2, 0]], torch.tensor([2, 0])),
    ]
    for tokens, (name, change, argument) in zip((21, 1, 4, 3, 300), changes, strict=True):
        k, v = new(len(keys), tokens)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        layer.update(k, v)
        for _ in range(2):
            table = layer.summarize(4, score).table
            fresh = BlockLayer()
            fresh.update(keys, values)
            wanted = fresh.summarize(4, score).table
            assert torch.equal(table[:, :, : wanted.shape[2]], wanted)
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        getattr(layer, name)(argument)
        keys, values = change(keys), change(values)
    assert layer.get_seq_length() == keys.shape[2]
    with pytest.raises(ValueError, match="as a negative number"):
        layer.crop(5)
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0


def test_caches_that_were_filled_before_are_taken_over():
    model, ids = llama(), draw()
    cache = DynamicCache(config=model.config)
    model(ids[:, :PROMPT], past_key_values=cache)
    install_reuse(model, POLICY)
    wanted = decoded(model, ids, steps(4))
    found = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(PROMPT, PROMPT + 4)]
    assert all(type(layer) is BlockLayer for layer in cache.layers)
    close(torch.cat(found, 1), decoded(model, ids[:, : PROMPT + 4], steps(4)))
    assert wanted.shape[1] == 4
    cropped = decoded(model, ids, steps(3), cache=block_cache(model, 64))
    close(cropped, decoded(model, ids, steps(3)))


def test_a_cache_made_for_inference_goes_on_outside():
    model, ids = llama(), draw()
    install_reuse(model, replace(POLICY, score="bound"))
    wanted, cache = decoded(model, ids, steps(4)), DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, : TOKENS - 4], past_key_values=cache)
        model(ids[:, TOKENS - 4 : TOKENS - 2], past_key_values=cache)
    found = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in (TOKENS - 2, TOKENS - 1)]
    close(torch.cat(found, 1), wanted[:, 2:])


def test_gradients_flow_through_a_prompt_and_a_step():
    model, ids = llama(), draw()
    grads = []
    for policy in (None, replace(POLICY, num_tokens=TOKENS)):
        if policy is not None:
            install_reuse(model, policy)
        model.zero_grad()
        with torch.enable_grad():
            decoded(model, ids, steps(2)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-3)


# In and out


def test_watchers_see_the_calls_and_the_answer():
    model, ids, seen = llama(), draw(), []
    install_reuse(model, POLICY)
    wanted = decoded(model, ids, steps(6))

    def look(call):
        seen.append((call.query.shape[1], call.key.shape[1]))
        return call.host(call.query, call.key, call.value)

    with seam.attention(model, look):
        close(decoded(model, ids, steps(6)), wanted)
    assert seen[-4:] == [(1, TOKENS)] * 4
    with seam.attention(model, lambda call: None):
        close(decoded(model, ids, steps(6)), wanted)


def test_restored_it_is_what_it_was():
    model, ids = llama(), draw()
    install_reuse(model, POLICY)()  # what is registered once is there now
    before, wanted = trace(model), decoded(model, ids, steps(4))
    restore = install_reuse(model, POLICY)
    twin = copy.deepcopy(model)
    assert trace(model) != before
    sparse = decoded(model, ids, steps(4))
    restore()
    assert trace(model) == before
    assert torch.equal(decoded(model, ids, steps(4)), wanted)
    close(decoded(twin, ids, steps(4)), sparse)


def test_threads_step_apart():
    model = llama()
    install_reuse(model, POLICY)
    texts = [draw(1, TOKENS, seed) for seed in (1, 2)]
    wanted = [decoded(model, ids, steps(18)) for ids in texts]
    found = [None, None]

    def run(at):
        with torch.no_grad():
            found[at] = decoded(model, texts[at], steps(18))

    threads = [threading.Thread(target=run, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


@dataclass
class Sparse(Steer):
    """The same policy for a while, through the steers' hook."""

    reuse: BlockReuse | None = None
    sites: str = "*"

    def attend(self, site, query, key, value, mask, scale):
        return self.reuse.attend(site.layer, query, key, value, mask, scale)


@pytest.mark.parametrize("score", ["mass", "bound"])
def test_a_steer_by_the_same_policy_is_the_same(score):
    model, ids, policy = llama(), draw(2), replace(POLICY, score=score)
    before, dense = trace(model), decoded(model, ids, steps(8))
    restore = install_reuse(model, policy)
    wanted = decoded(model, ids, steps(8))
    restore()
    with block_caches(model, policy) as reuse, Sparse(reuse)(model):
        cache = DynamicCache(config=model.config)
        close(decoded(model, ids, steps(8), cache=cache), wanted)
        assert type(cache.layers[0]) is BlockLayer
        assert (cache.layers[1].summary is None) is (score == "mass")
        assert cache.layers[2].summary is None  # it reuses
    assert trace(model) == before
    assert torch.equal(decoded(model, ids, steps(8)), dense)


def test_a_choice_that_is_wrong_is_seen(monkeypatch):
    model, ids = llama(), draw(2)
    with seam.attention(model, by_definition(POLICY, PROMPT)):
        wanted = model(ids).logits[:, PROMPT:]
    install_reuse(model, POLICY)
    choose = BlockReuse._choose

    def one_off(self, *arguments):
        found = choose(self, *arguments)
        found[..., 1] = (found[..., 1] + 1) % 9
        return found

    monkeypatch.setattr(BlockReuse, "_choose", one_off)
    assert not torch.allclose(decoded(model, ids, steps(TOKENS - PROMPT)), wanted, atol=1e-3)


@pytest.mark.parametrize("sources", [(None, 1, 1), (None, 1, 1, 3, 3)])
def test_a_policy_for_another_number_of_layers_is_refused(sources):
    model = llama()
    before = trace(model)
    with pytest.raises(ValueError, match=f"is for {len(sources)} layers; the model has 4"):
        install_reuse(model, replace(POLICY, sources=sources))
    assert trace(model) == before


def test_what_cannot_decode_by_blocks_is_refused():
    bert = transformers.BertModel(
        transformers.BertConfig(**{k: v for k, v in SMALL.items() if "kv" not in k})
    )
    with pytest.raises(NotImplementedError, match="BertModel is no decoder"):
        install_reuse(bert, POLICY)
    model = llama()
    install_reuse(model, POLICY)
    with pytest.raises(NotImplementedError, match="cannot use a StaticLayer at layer 0"):
        model(draw(), past_key_values=StaticCache(config=model.config, max_cache_len=64))
    with pytest.raises(RuntimeError, match="converted already"):
        install_reuse(model, POLICY)
    window = SitePlan.uniform("model.layers.1.self_attn", 2, Neighborhood(6, is_causal=True))
    with pytest.raises(RuntimeError, match="converted already"):
        install(model, {window.name: window})
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="was switched to attn_implementation='sdpa'"):
        model(draw())
