"""Plans of block reuse against all plans there are; profiles of overlap against loops."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from math import ceil
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.hosts import seam
from nearfield.measure import reuse as profiles
from nearfield.measure.reuse import distortion, draw_sources, reuse_profile, sensitive_by_density
from nearfield.ops.dense import dense_attention
from nearfield.plan import reuse as plan
from nearfield.plan.reuse import ReusePolicy, best_reuse, fewest_selections


def matrix(draw, layers, levels=None):
    """Random overlaps; of few values where ties are wanted, each a sum of powers of two."""
    value = draw.random if levels is None else lambda: draw.randrange(levels + 1) / levels
    return [[value() for _ in range(layers)] for _ in range(layers)]


def follow(layers, full, selecting):
    """The sources of a plan: a sparse layer has the last that selects."""
    sources, last = [], None
    for layer in range(layers):
        last = layer if layer in selecting else last
        sources.append(None if layer in full else last)
    return tuple(sources)


def worth(tables, sources):
    values = [1.0 if i is None or i == j else table[i][j] for table in tables for j, i in enumerate(sources)]
    return min(values), sum(values)


def every_plan(layers, full):
    """All sources there are with these full layers: the first sparse layer selects, others may."""
    sparse = [layer for layer in range(layers) if layer not in full]
    for number in range(len(sparse)):
        for others in itertools.combinations(sparse[1:], number):
            yield follow(layers, full, {sparse[0], *others})
    if not sparse:
        yield (None,) * layers


def count(sources):
    return sum(i is None or i == j for j, i in enumerate(sources))


def published_paths(tables, full, max_changes):
    """All paths of the published programme with their worth: overlaps with full layers are 0."""
    layers = len(tables[0])
    for switches in itertools.product((False, True), repeat=layers - 1):
        if sum(switches) <= max_changes:
            path = [0]
            for j, switch in enumerate(switches, start=1):
                path.append(j if switch else path[-1])
            values = [
                1.0 if i == j else 0.0 if {i, j} & full else table[i][j]
                for table in tables
                for j, i in enumerate(path)
            ]
            yield min(values), sum(values)


@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 7),
    sets=st.integers(1, 3),
    levels=st.sampled_from([None, 2, 4]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_programme_finds_the_best_of_all_plans(seed, layers, sets, levels, data):
    draw = Random(seed)
    tables = [matrix(draw, layers, levels) for _ in range(sets)]
    full = data.draw(st.sets(st.integers(0, layers - 1), max_size=layers))
    most = data.draw(st.integers(len(full) - (len(full) == layers), layers + 1))
    given_ = tables if sets > 1 else data.draw(st.sampled_from([tables, tables[0]]))
    found = best_reuse(given_, sensitive=full, max_changes=most)
    allowed = [s for s in every_plan(layers, full) if count(s) <= most + 1]
    assert found.sources in allowed
    best = max(worth(tables, sources) for sources in allowed)
    assert worth(tables, found.sources) == pytest.approx(best, abs=1e-12)
    assert (found.least, found.total) == pytest.approx(best, abs=1e-12)
    if levels:  # sums are exact, so ties are ties: the fewest selections of those
        assert worth(tables, found.sources) == best
        assert count(found.sources) == min(count(s) for s in allowed if worth(tables, s) == best)
    ReusePolicy(found.sources)


@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 7),
    sets=st.integers(1, 2),
    levels=st.sampled_from([None, 4]),
    threshold=st.sampled_from([0.0, 0.25, 0.4, 0.75, 1.0]),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_fewest_selections_are_the_fewest(seed, layers, sets, levels, threshold, data):
    tables = [matrix(Random(seed), layers, levels) for _ in range(sets)]
    full = data.draw(st.sets(st.integers(0, layers - 1), max_size=layers))
    found = fewest_selections(tables, sensitive=full, threshold=threshold)
    allowed = [s for s in every_plan(layers, full) if worth(tables, s)[0] >= threshold]
    fewest = min(map(count, allowed))
    assert found.sources in allowed and count(found.sources) == fewest
    best = max(worth(tables, s)[1] for s in allowed if count(s) == fewest)
    assert found.total == pytest.approx(best, abs=1e-12)


def test_the_published_programme_finds_the_best_least():
    for seed in range(300):
        draw = Random(seed)
        layers = draw.randint(1, 7)
        tables = [matrix(draw, layers) for _ in range(draw.randint(1, 2))]
        full = set(draw.sample(range(layers), draw.randint(0, layers // 2)))
        most = draw.randint(0, layers)
        found = best_reuse(tables, sensitive=full, max_changes=most, parity=True)
        least, total = max(published_paths(tables, full, most))
        assert found.least == least and found.total <= total + 1e-12
        ReusePolicy(found.sources)
        if not full:  # the same plans are allowed
            ours = best_reuse(tables, max_changes=most)
            assert ours.least == least and ours.total == pytest.approx(total, abs=1e-12)


def test_the_published_programme_may_lose_the_best_total():
    """With layer 4 as source it keeps 0 1 1 1 (least 0.6) over 0 0 2 2 (0.5, but 0.2 more in total); that
    layer 5 can only reuse at 0.4 makes the least of both equal.
    """
    table = [[0.0] * 6 for _ in range(6)]
    for i, j, value in ((1, 2, 0.6), (1, 3, 0.6), (0, 1, 0.5), (2, 3, 0.9), (4, 5, 0.4)):
        table[i][j] = value
    ours, theirs = (best_reuse(table, max_changes=2, parity=parity) for parity in (False, True))
    assert ours.sources == (0, 0, 2, 2, 4, 4) and theirs.sources == (0, 1, 1, 1, 4, 4)
    assert ours.least == theirs.least == 0.4
    assert (ours.total, theirs.total) == pytest.approx((4.8, 4.6))


def test_a_full_layer_does_not_end_a_run_and_spares_its_neighbours_a_selection():
    table = [[0.9] * 6 for _ in range(6)]
    ours = best_reuse(table, sensitive=[2], max_changes=1)
    assert ours.sources == (0, 0, None, 0, 0, 0) and ours.least == 0.9
    theirs = best_reuse(table, sensitive=[2], max_changes=2, parity=True)
    assert theirs.sources == (0, 0, None, 3, 3, 3) and theirs.least == 0.9
    assert best_reuse(table, sensitive=[2], max_changes=1, parity=True).least == 0


def test_the_default_number_of_changes_is_published():
    """36 layers of which 4 are sensitive, as of Qwen3-4B: ceil(36 * 0.91 * 0.3) + 4 changes."""
    table = matrix(Random(0), 36)
    found = best_reuse(table, sensitive=range(4))
    assert count(found.sources) == ceil(36 * 0.91 * 0.3) + 4 + 1
    assert found == best_reuse(table, sensitive=range(4), max_changes=14)
    assert len([s for j, s in enumerate(found.sources) if s == j]) == 11


def test_budgets_beyond_need_change_nothing():
    table = matrix(Random(1), 6)
    found = best_reuse(table, max_changes=5)
    assert found.sources == tuple(range(6)) and found.least == 1 and found.total == 6
    assert best_reuse(table, max_changes=50) == found
    assert best_reuse([[1.0] * 6] * 6, max_changes=5).sources == (0,) * 6  # nothing is gained by selecting
    assert best_reuse(table, sensitive=range(6), max_changes=5).sources == (None,) * 6


@pytest.mark.parametrize(
    ("overlap", "more", "message"),
    [
        ([], {}, "overlap is empty"),
        ([[1, 0.5]], {}, "Row 0 of overlap"),
        ([1, 0.5], {}, "layers by layers"),
        ([[1, 0.5], [0]], {}, "Row 1 of overlap"),
        ([[1, float("nan")], [0, 1]], {}, r"overlap\[0\]\[1\]=nan must be a share"),
        ([[1, 1.5], [0, 1]], {}, r"overlap\[0\]\[1\]=1.5"),
        ([[[1, 0.5], [0, 1]], [[1]]], {}, "of the same size"),
        ([[1, 0.5], [0, 1]], {"sensitive": [2]}, "layers' numbers from 0 to 1"),
        ([[1, 0.5], [0, 1]], {"max_changes": -1}, "whole number from 0"),
        ([[1, 0.5], [0, 1]], {"sensitive": [0], "max_changes": 0}, "at least 1"),
    ],
)
def test_overlaps_that_are_none_are_refused(overlap, more, message):
    with pytest.raises(ValueError, match=message):
        best_reuse(overlap, **more)
    if "max_changes" not in more:
        with pytest.raises(ValueError, match=message):
            fewest_selections(overlap, **more, threshold=0.5)


def test_a_threshold_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match="threshold=nan"):
        fewest_selections([[1]], threshold=float("nan"))


POLICY = ReusePolicy((None, 1, 1, 3, None, 3), 256, 16, 16, 32, "mean")


def test_a_policy_says_who_does_what():
    assert (POLICY.full, POLICY.selecting, POLICY.reusing) == ((0, 4), (1, 3), (2, 5))
    assert POLICY.num_blocks == 16 and POLICY.least_tokens == 272


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), "no layer"),
        ((0, 1.0), "Layer 1 has the source 1.0"),
        ((True,), "Layer 0 has the source True"),
        ((None, 0), "Layer 1 has the source 0. It may reuse the blocks of no other layer"),
        ((0, 1, 0), r"Layer 2 has the source 0. .* of 1, the last that selects before it"),
        ((0, 2, 2), "Layer 1 has the source 2"),
    ],
)
def test_sources_that_no_step_could_follow_are_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        ReusePolicy(sources)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_tokens": 0}, "num_tokens=0 must be a whole number from 1"),
        ({"block_size": 64.0}, "block_size=64.0"),
        ({"num_recent": True}, "num_recent=True"),
        ({"num_tokens": 8, "num_sinks": 0, "num_recent": 0}, "less than one block of 16"),
        ({"num_sinks": 240}, "nothing is left to choose"),
        ({"score": "best"}, "Choose one of mass, mean, bound, hash"),
    ],
)
def test_settings_that_no_step_could_follow_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        replace(POLICY, **more)


def test_a_policy_comes_back_from_json():
    text = json.dumps(POLICY.to_json(), allow_nan=False)
    assert ReusePolicy.from_json(json.loads(text)) == POLICY


def test_other_json_is_refused():
    for key, wrong, message in (
        ("sources", "all", "must be a list"),
        ("sources", [0, "1"], "source '1'"),
        ("num_tokens", "256", "num_tokens='256'"),
        ("score", 3, "score=3"),
    ):
        with pytest.raises(ValueError, match=message):
            ReusePolicy.from_json({**POLICY.to_json(), key: wrong})
    with pytest.raises(ValueError, match="no key 'score'"):
        ReusePolicy.from_json({k: v for k, v in POLICY.to_json().items() if k != "score"})
    with pytest.raises(ValueError, match="unknown key 'more'"):
        ReusePolicy.from_json({**POLICY.to_json(), "more": 1})


@given(
    tokens=st.integers(1, 900), recent=st.integers(0, 100), sinks=st.integers(0, 40), size=st.integers(1, 32)
)
@settings(max_examples=150, deadline=None)
def test_keys_read_are_those_of_the_blocks_that_are_kept(tokens, recent, sinks, size):
    policy = ReusePolicy((0, 0), 160, size, sinks, recent)
    blocks = ceil(tokens / size)
    kept = {key // size for key in range(min(sinks, tokens))}
    kept |= {key // size for key in range(max(0, tokens - recent), tokens)}
    spare = [block for block in range(blocks) if block not in kept]
    kept |= set(spare[: max(0, policy.num_blocks - len(kept))])
    read = sum(min(size, tokens - block * size) for block in kept)
    assert policy.keys_read(tokens) == (tokens if tokens < policy.least_tokens else read)


def test_bytes_are_keys_times_their_size():
    shape = {"kv_heads": 3, "key_dim": 64, "value_dim": 32, "itemsize": 2}
    pair, keys = 3 * 96 * 2, 256
    dense = POLICY.dense_bytes(4096, **shape)
    assert dense == [4096 * pair] * 6
    looks = {"mass": 4096 * 384, "mean": 256 * 384, "bound": 512 * 384, "hash": 4096 * 3 * 8}
    for score, look in looks.items():
        found = replace(POLICY, score=score).bytes_read(4096, **shape)
        full, selects, reuses = 4096 * pair, keys * pair + look, keys * pair
        assert found == [full, selects, reuses, selects, full, reuses]
    assert POLICY.bytes_read(271, **shape) == [271 * pair] * 6


def test_a_programme_that_selects_too_late_is_noticed(monkeypatch):
    walk = plan._walk
    monkeypatch.setattr(plan, "_walk", lambda tables, sparse, floor, most: walk(tables, sparse, 0.0, most))
    table = [[1.0, 0.1, 1.0, 0.0], [0.0, 1.0, 0.5, 0.5], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    assert best_reuse(table, max_changes=1).least < max(
        worth([table], s)[0] for s in every_plan(4, set()) if count(s) <= 2
    )


# Profiles of models

SETTINGS = {"steps": 6, "num_tokens": 20, "block_size": 4, "num_sinks": 4, "num_recent": 6}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tiny(kind="Llama", **more):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # so peaked that blocks differ
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.normal_(std=0.5)
    return model


def text(tokens=63, seed=0):
    return torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def maps_of(model, ids):
    """Eager maps `[layer][kv_head]` of `[N, N]`, the mean of the heads that share a key head."""
    model.set_attn_implementation("eager")
    maps = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    return [each[0].double().unflatten(0, (2, 2)).mean(1) for each in maps]


def by_loops(maps, steps, num_tokens, block_size, num_sinks, num_recent, mass, parity):
    """Densities [layer][head] and overlaps [i][j][head] by their definitions."""
    layers, heads, tokens = len(maps), len(maps[0]), maps[0].shape[-1]
    chosen, density = {}, torch.zeros(steps, layers, heads, dtype=torch.float64)
    for step, layer, head in itertools.product(range(steps), range(layers), range(heads)):
        at = tokens - steps + step
        row = maps[layer][head][at].tolist()
        blocks = ceil((at + 1) / block_size)
        shares = [sum(row[b * block_size : (b + 1) * block_size]) for b in range(blocks)]
        order = sorted(range(blocks), key=lambda b: -shares[b])
        held, needed = 0.0, 0
        while held < mass:
            held, needed = held + shares[order[needed]], needed + 1
        density[step, layer, head] = (needed - parity) / blocks
        if parity:
            forced = set(range(num_sinks // block_size))
            forced |= set(range(blocks - num_recent // block_size, blocks))
        else:
            forced = {key // block_size for key in range(num_sinks)}
            forced |= {key // block_size for key in range(at + 1 - num_recent, at + 1)}
        rest = [b for b in order if b not in forced]
        chosen[step, layer, head] = forced | set(rest[: max(0, num_tokens // block_size - len(forced))])
    if parity:
        low, high = density.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64), dim=0)
        density = density.clamp(low - 1.5 * (high - low), high + 1.5 * (high - low))
    overlap = torch.zeros(layers, layers, heads, dtype=torch.float64)
    for i, j, head in itertools.product(range(layers), range(layers), range(heads)):
        if i <= j:
            pairs = [(chosen[step, i, head], chosen[step, j, head]) for step in range(steps)]
            overlap[i, j, head] = sum(len(a & b) / len(b) for a, b in pairs) / steps
    return density.mean(0), overlap


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("tokens", [63, 64])
def test_profiles_are_those_of_the_eager_maps(parity, tokens):
    model, ids = tiny(), text(tokens)
    profile = reuse_profile(model, ids, **SETTINGS, parity=parity)
    density, overlap = by_loops(maps_of(model, ids), **SETTINGS, mass=0.9, parity=parity)
    assert torch.allclose(profile.density, density) and torch.allclose(profile.overlap, overlap)
    assert profile.names == tuple(f"model.layers.{layer}.self_attn" for layer in range(4))
    assert 0.3 < overlap[0, 1].mean() < 1 and profile.fixed == ()


def test_heads_are_merged_by_the_least_or_the_mean():
    profile = reuse_profile(tiny(), text(), **SETTINGS)
    assert profile.matrix() == profile.overlap.amin(-1).tolist()
    assert profile.matrix("mean") == profile.overlap.mean(-1).tolist()
    best_reuse(profile.matrix(), sensitive=sensitive_by_density(profile, 0.3))


def test_layers_that_need_most_blocks_are_sensitive():
    profile = reuse_profile(tiny(), text(), **SETTINGS)
    profile = replace(profile, density=torch.tensor([[0.1, 0.3], [0.5, 0.6], [0.3, 0.4], [0.5, 0.4]]))
    assert sensitive_by_density(profile, 0.25) == (1,) and sensitive_by_density(profile, 0.26) == (1, 3)
    assert sensitive_by_density(profile, 0.0) == () and sensitive_by_density(profile, 1.0) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="share=1.1"):
        sensitive_by_density(profile, 1.1)


@pytest.mark.parametrize(
    ("kind", "more", "fixed"),
    [
        ("Qwen3", {}, ()),
        ("Gemma2", {"sliding_window": 16}, (0, 1, 2, 3)),  # all cap their scores
        (
            "Gemma3Text",
            {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
            (0, 2),
        ),
    ],
)
def test_layers_with_windows_or_capped_scores_are_fixed(kind, more, fixed):
    kind, net = kind.removesuffix("Text"), kind
    model = tiny(net) if not more else windowed(kind, net, more)
    profile = reuse_profile(model, text(), **SETTINGS)
    assert profile.fixed == fixed
    for layer in fixed:
        assert profile.density[layer].isnan().all() and profile.overlap[layer, layer + 1 :].sum() == 0
    assert set(fixed) <= set(sensitive_by_density(profile, 0.0))
    rest = [layer for layer in range(4) if layer not in fixed]
    assert not profile.density[rest].isnan().any()


def windowed(kind, net, more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{net}Config")(**{**SMALL, **more})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def test_profiles_stay_linear_and_leave_the_model_as_it_was():
    model, ids, told = tiny(), text(), []
    with torch.no_grad():
        before = model(input_ids=ids).logits
    reuse_profile(model, ids, **SETTINGS, progress=lambda done, of: told.append((done, of)))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@torch.no_grad()
def test_distortion_is_that_of_one_layer_with_the_other_blocks_masked():
    model, ids, steps = tiny(), text(), SETTINGS["steps"]
    found = distortion(model, ids, **SETTINGS)
    dense = model(input_ids=ids).logits[0, -steps:].log_softmax(-1)
    scores = [each.transpose(0, 1)[None] for each in maps_of(model, ids)]  # [1, N, Hkv, N]
    for layer in range(4):
        blocks = torch.nn.functional.pad(scores[layer], (0, 1)).unflatten(-1, (16, 4)).sum(-1)[:, -steps:]
        options = {name: SETTINGS[name] for name in ("block_size", "num_sinks", "num_recent")}
        index = profiles.choose_blocks(blocks, 5, num_keys=63, **options)[0]
        shown = torch.ones(63, 63, dtype=torch.bool).tril().expand(4, -1, -1).clone()
        for step, head in itertools.product(range(steps), range(4)):
            kept = {4 * b + k for b in index[step, head // 2].tolist() if b >= 0 for k in range(4)}
            hidden = [key for key in range(63) if key not in kept]
            shown[head, 63 - steps + step, hidden] = False
        errors = []

        def masked(call, layer=layer, shown=shown, errors=errors):
            if call.site.layer != layer:
                return None
            bias = torch.zeros(1, *shown.shape).masked_fill(~shown, -torch.inf)
            q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
            k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
            out = torch.softmax(q @ k.transpose(-1, -2) * call.scale + bias, -1) @ v
            whole = dense_attention(call.query, call.key, call.value, is_causal=True, scale=call.scale)
            gap = (out.transpose(1, 2) - whole)[:, -steps:]
            errors.append(float(gap.square().sum() / whole[:, -steps:].square().sum()))
            return out.transpose(1, 2)

        with seam.attention(model, masked):
            changed = model(input_ids=ids).logits[0, -steps:].log_softmax(-1)
        divergence = (dense.exp() * (dense - changed)).sum(-1).mean()
        assert errors[0] > 1e-3 and found.output[layer] == pytest.approx(errors[0], rel=1e-3)
        assert found.divergence[layer] == pytest.approx(float(divergence), rel=1e-2, abs=1e-7)
    assert len(found.sensitive(0.25)) == 1


def test_what_has_no_profile_is_refused():
    model, ids = tiny(), text()
    for more, message in (
        ({"steps": 63}, "steps=63 of a text of 63"),
        ({"num_tokens": 3}, "at least one block"),
        ({"num_tokens": 56}, "Give 66 tokens or more"),
        ({"mass": 1.0}, "mass=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            reuse_profile(model, ids, **{**SETTINGS, **more})
    with pytest.raises(ValueError, match="Give one text"):
        reuse_profile(model, ids[0], **SETTINGS)
    with pytest.raises(NotImplementedError, match="no row of decoder layers"):
        reuse_profile(torch.nn.Linear(2, 2), ids, **SETTINGS)
    with pytest.raises(ValueError, match="Choose min or mean"):
        reuse_profile(model, ids, **SETTINGS).matrix("max")
    sliding = tiny("Mistral", sliding_window=16)
    with pytest.raises(NotImplementedError, match="window of their own"):
        distortion(sliding, ids, **SETTINGS)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model.layers.2.self_attn: queries or keys are not finite"):
        reuse_profile(model, ids, **SETTINGS)


def test_a_strip_shows_every_layer_once():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    draw_sources(axes, POLICY.sources)
    assert sorted(bar.get_center()[0] for bars in axes.containers for bar in bars) == list(range(6))
    assert [t.get_text() for t in axes.texts] == ["1", "3"]
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    assert labels == ["full (2)", "selects (2)", "reuses (2)"]
    reuse_profile(tiny(), text(), **SETTINGS).draw(
        pytest.importorskip("matplotlib.figure").Figure().subplots()
    )


def test_a_profile_of_the_wrong_rows_is_noticed(monkeypatch):
    model, ids = tiny(), text()
    monkeypatch.setattr(profiles, "_tail", lambda call, steps: call.query[:, :steps])
    _, overlap = by_loops(maps_of(model, ids), **SETTINGS, mass=0.9, parity=False)
    assert not torch.allclose(reuse_profile(model, ids, **SETTINGS).overlap, overlap)
