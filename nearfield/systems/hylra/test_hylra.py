"""HyLRA's steps against masked attention, its policy against the published rules, planted layers found."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from random import Random

import pytest
import torch

from nearfield.hosts import seam
from nearfield.measure import reuse as profiles
from nearfield.measure.reuse import distortion, reuse_profile, sensitive_by_density
from nearfield.ops.topk import block_scores, choose_blocks
from nearfield.plan.reuse import ReusePolicy, best_reuse
from nearfield.steer import Steer
from nearfield.systems.hylra.model import LAYERS, planted
from nearfield.systems.hylra.steer import HyLRA
from nearfield.systems.hylra.study import (
    SMALL,
    Ending,
    answered,
    hylra_policy,
    random_sources,
    uniform_sources,
)

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nearfield[hf]'")
SETTINGS = {"num_tokens": 24, "block_size": 4, "num_sinks": 4, "num_recent": 6, "score": "mass"}
MIXED = (None, 1, 1, 3)


@pytest.fixture(autouse=True)
def _one_thread():
    """The matrices are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made():
    return planted()


def tiny(kind="Llama", **more):
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(**small, **heads, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    with torch.no_grad():  # so peaked that blocks differ
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.normal_(std=0.5)
    return model


def text(tokens=60, seed=0, rows=1):
    return torch.randint(1, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def steps_of(model, ids, first, chunk=1):
    """Logits of the tokens from `first` on, behind a prompt read at once."""
    cache = model(input_ids=ids[:, :first], use_cache=True).past_key_values
    parts = ids[:, first:].split(chunk, dim=1)
    return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], 1)


@torch.no_grad()
def by_masks(model, ids, first, policy):
    """The same by whole forwards, in which a mask hides from rows behind the prompt what is not chosen."""
    chosen = {}

    def masked(call):
        layer, tokens = call.site.layer, call.query.shape[1]
        source = policy.sources[layer]
        if source is None:
            return None
        if source == layer:
            scores = block_scores(
                call.query, call.key, block_size=policy.block_size, score="mass", scale=call.scale
            )
            chosen[layer] = choose_blocks(
                scores, policy.num_blocks, block_size=policy.block_size, num_keys=tokens,
                num_sinks=policy.num_sinks, num_recent=policy.num_recent,
            )  # fmt: skip
        size, index = policy.block_size, chosen[source][0].transpose(0, 1)  # [Hkv, N, s]
        kept = torch.zeros(2, tokens, tokens // size + 2, dtype=torch.bool)
        kept.scatter_(2, index.masked_fill(index < 0, tokens // size + 1), True)
        kept = kept[..., :-1].repeat_interleave(size, dim=2)[..., :tokens].repeat_interleave(2, dim=0)
        kept[:, : max(first, policy.least_tokens - 1)] = True  # of the prompt, or with few keys
        shown = torch.ones(tokens, tokens, dtype=torch.bool).tril() & kept[None]
        q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, shown, scale=call.scale)
        return out.transpose(1, 2)

    with seam.attention(model, masked):
        return model(input_ids=ids, use_cache=False).logits[:, first:]


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("sources", [MIXED, (0, 0, 2, 2), (0, 1, 2, 3)])
def test_steps_are_attention_with_the_other_blocks_hidden(sources, chunk):
    model, ids, policy = tiny(), text(), ReusePolicy(sources, **SETTINGS)
    expected = by_masks(model, ids, 20, policy)
    with HyLRA(policy)(model):
        found = steps_of(model, ids, 20, chunk)
    assert torch.allclose(found, expected, atol=2e-5)
    assert (found - steps_of(model, ids, 20)).abs().max() > 1e-2


def test_full_layers_keep_the_bits_and_few_keys_the_numbers():
    model, ids = tiny(), text()
    plain = steps_of(model, ids, 30)
    with HyLRA(ReusePolicy((None,) * 4, **SETTINGS))(model):
        assert torch.equal(steps_of(model, ids, 30), plain)
    with HyLRA(ReusePolicy((0,) * 4, **{**SETTINGS, "num_tokens": 60}))(model):
        # views of larger buffers are summed in another order
        assert torch.allclose(steps_of(model, ids, 30), plain, atol=1e-6)
    assert torch.equal(steps_of(model, ids, 30), plain)


def test_generating_takes_the_steps_of_its_own_tokens():
    model, ids, steer = tiny(), text(40), HyLRA(ReusePolicy(MIXED, **SETTINGS))
    with steer(model):
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
        logits = steps_of(model, tokens[:, :-1], 40)
    assert tokens[0, 41:].tolist() == logits[0].argmax(-1).tolist()


def test_padded_rows_decode_as_they_do_alone():
    model, ids = tiny(), text(50, rows=2)
    steer, mask = HyLRA(ReusePolicy((0, 0, 2, 2), **SETTINGS)), torch.ones(2, 50, dtype=torch.long)
    mask[1, :9] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with steer(model):
        both = model.generate(ids, attention_mask=mask, **options)
        first = model.generate(ids[:1], **options)
    assert torch.equal(both[:1], first)
    with pytest.raises(KeyError), steer(model):
        raise KeyError
    assert not steer._entered


def test_it_nests_with_other_steers_and_says_so_where_it_cannot_be_summed():
    @dataclass
    class Louder(Steer):
        def output(self, site, heads):
            return 2 * heads

    model, ids, steer = tiny(), text(), HyLRA(ReusePolicy(MIXED, **SETTINGS))
    with steer(model):
        alone = steps_of(model, ids, 30)
    with steer(model), Louder()(model):
        nested = steps_of(model, ids, 30)
    assert (nested - alone).abs().max() > 1e-2
    with pytest.raises(RuntimeError, match="Enter it by itself"), (steer + Louder())(model):
        steps_of(model, ids, 30)
    plain, told = steps_of(model, ids, 30), []
    with steer(model):  # another thread's model is not steered
        thread = threading.Thread(target=lambda: told.append(steps_of(model, ids, 30)))
        thread.start()
        thread.join()
    assert torch.equal(told[0], plain)


def test_layers_with_windows_are_left_to_the_host():
    model, ids = tiny("Mistral", sliding_window=16), text()
    plain = steps_of(model, ids, 30)
    with (
        pytest.raises(ValueError, match="no attention site"),
        HyLRA(ReusePolicy((0,) * 4, **SETTINGS))(model),
    ):
        pass
    assert torch.equal(steps_of(model, ids, 30), plain)
    with pytest.raises(ValueError, match="for 3 layers"), HyLRA(ReusePolicy((0,) * 3, **SETTINGS))(tiny()):
        pass


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_groups_and_the_planted_dense_layer_are_found(seed):
    world = planted(seed=seed)
    profile = reuse_profile(world.model, world.calibration, steps=32, **SMALL)
    assert sensitive_by_density(profile, 1 / LAYERS) == (world.wide,)
    found = best_reuse(profile.matrix(), sensitive=[world.wide], max_changes=3).sources
    assert found == tuple(None if j == world.wide else world.group(j) for j in range(LAYERS))


def test_the_papers_scorer_finds_the_planted_dense_layer(made):
    found = distortion(made.model, made.calibration, steps=32, **SMALL)
    assert found.sensitive(1 / LAYERS) == (made.wide,)
    assert found.divergence.argmax() == made.wide == found.output.argmax()


def test_a_policy_is_that_of_its_parts(made):
    policy = hylra_policy(made.model, made.calibration, **SMALL, sensitive=1 / LAYERS, steps=16)
    profile = reuse_profile(made.model, made.calibration, **SMALL, steps=16)
    assert policy.full == (made.wide,) and policy.score == "bound"
    assert policy.sources == best_reuse(profile.matrix(), sensitive=[made.wide]).sources
    given = hylra_policy(made.model, made.calibration, **SMALL, sensitive=(3, 5), steps=16, heads="mean")
    assert given.full == (3, 5)
    assert given.sources == best_reuse(profile.matrix("mean"), sensitive=(3, 5)).sources
    both = [reuse_profile(made.model, ids, **SMALL, steps=16) for ids in (made.calibration, made.input_ids)]
    several = hylra_policy(made.model, [made.calibration, made.input_ids], **SMALL, sensitive=(), steps=16)
    assert several.sources == best_reuse([each.matrix() for each in both]).sources
    with pytest.raises(ValueError, match="no text"):
        hylra_policy(made.model, [])


def test_parity_profiles_the_models_own_answer_by_the_published_rules(made):
    prompt = made.calibration[:, :300]
    policy = hylra_policy(made.model, prompt, **SMALL, sensitive=1 / LAYERS, steps=12, parity=True)
    read = answered(made.model, prompt, 12)
    assert torch.equal(read[:, :300], prompt) and read.shape == (1, 312)
    profile = reuse_profile(made.model, read, **SMALL, steps=12, parity=True)
    full = sensitive_by_density(profile, 1 / LAYERS)
    assert policy.sources == best_reuse(profile.matrix(), sensitive=full, parity=True).sources
    assert policy.score == "hash" and policy.full == full


def test_policies_to_compare_with_select_as_often():
    assert uniform_sources(7, (0, 3), 2) == (None, 1, 1, None, 4, 4, 4)
    for seed in range(20):
        sources = random_sources(9, (2,), 4, Random(seed))
        policy = ReusePolicy(sources)
        assert policy.full == (2,) and len(policy.selecting) == 4 and sources[0] == 0


def test_an_ending_is_that_of_the_whole_text_and_comes_back():
    model, ids = tiny(), text()
    ending = Ending(model, ids, 20)
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, -20:].log_softmax(-1)
    expected = -logs[:-1].gather(1, ids[0, -19:, None])[:, 0]
    dense = ending.follow()
    assert torch.allclose(dense.nats.float(), expected, atol=1e-5) and dense.divergence.abs().max() == 0
    policy = ReusePolicy(MIXED, **SETTINGS)
    found = ending.follow(policy)
    sparse = by_masks(model, ids, 40, policy)[0].log_softmax(-1)
    assert torch.allclose(found.nats.float(), -sparse[:-1].gather(1, ids[0, -19:, None])[:, 0], atol=1e-4)
    divergence = (logs.exp() * (logs - sparse)).sum(-1)
    assert torch.allclose(found.divergence.float(), divergence, atol=1e-4)
    assert torch.equal(ending.follow().nats, dense.nats) and ending.cache.get_seq_length() == 40


def test_a_profile_of_another_rule_is_noticed(made, monkeypatch):
    monkeypatch.setattr(
        profiles, "_most", lambda scores, share, fixed: (min(range(12), key=scores.__getitem__),)
    )
    profile = reuse_profile(made.model, made.calibration, steps=8, **SMALL)
    assert sensitive_by_density(profile, 1 / LAYERS) != (made.wide,)
