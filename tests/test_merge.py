"""Laws of token merging."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.dense import dense_attention
from nearfield.ops.merge import (
    adjacent,
    bipartite_merge,
    bipartite_unmerge,
    lengths,
    merge_adjacent,
    num_pairs,
    proportional_bias,
    sample_informative,
    span_mass,
    span_sources,
    unmerge,
)
from nearfield.ops.routing.members import largest
from nearfield.testing import assert_close, poisoned_empty

BACKENDS = ("reference", "tiled")


def draws(*shape: int, features: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal tokens and their metric in float64."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    return x, torch.randn(*shape[:-1], features, generator=draw, dtype=torch.float64)


def loops(
    x: Tensor, metric: Tensor, count: int, window: int | None, parity: int, weights: Tensor
) -> tuple[Tensor, list[int]]:
    """Merging of neighbours in one row, pair by pair."""
    tokens = len(x)
    unit = F.normalize(metric, dim=-1)
    pairs = [i for i in range(parity, tokens - 1, 2) if window is None or i // window == (i + 1) // window]
    chosen = sorted(pairs, key=lambda i: (-float(unit[i] @ unit[i + 1]), i))[:count]
    out, spans, i = [], [], 0
    while i < tokens:
        if i in chosen:
            a, b = weights[i], weights[i + 1]
            out.append((a * x[i] + b * x[i + 1]) / (a + b))
        else:
            out.append(x[i])
        spans.append(1 + (i in chosen))
        i += spans[-1]
    return torch.stack(out), spans


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "window", "parity"), [(12, None, 0), (13, 4, 0), (13, 4, 1), (15, 3, 1)])
@pytest.mark.parametrize("weight", ["norm", "mean"])
def test_every_backend_is_the_definition(
    tokens: int, window: int | None, parity: int, weight: str, backend: str
) -> None:
    x, metric = draws(2, tokens, 3)
    count = num_pairs(tokens, window, parity) - 1
    with poisoned_empty():
        merged = merge_adjacent(
            x, metric, count, window_size=window, parity=parity, weight=weight, backend=backend
        )
    for b in range(2):
        weights = metric[b].norm(dim=-1) if weight == "norm" else torch.ones(tokens)
        expected, spans = loops(x[b], metric[b], count, window, parity, weights)
        assert_close(merged.tokens[b], expected)
        assert merged.spans[b].tolist() == spans and merged.spans.dtype == torch.int32


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(2, 40),
    window=st.sampled_from([None, 2, 3, 4, 5, 16]),
    parity=st.integers(0, 1),
    weight=st.sampled_from(["norm", "span", "mean"]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_spans_cover_every_position_once(
    tokens: int, window: int | None, parity: int, weight: str, masked: bool, seed: int
) -> None:
    x, metric = draws(2, tokens, 3, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    most = num_pairs(tokens, window, parity)
    count = int(torch.randint(most + 1, (), generator=draw))
    spans = torch.randint(1, 5, (2, tokens), generator=draw, dtype=torch.int32)
    key_mask = torch.rand(2, tokens, generator=draw) < 0.6 if masked else None
    options = {
        "window_size": window,
        "parity": parity,
        "weight": weight,
        "spans": spans,
        "key_mask": key_mask,
    }
    ours, theirs = (merge_adjacent(x, metric, count, backend=b, **options) for b in ("tiled", "reference"))
    assert_close(ours.tokens, theirs.tokens)
    assert torch.equal(ours.spans, theirs.spans)
    assert ours.tokens.shape == (2, tokens - count, 3)
    assert torch.equal(ours.spans.sum(1), spans.sum(1)) and (ours.spans > 0).all()
    if key_mask is not None:
        assert torch.equal(ours.key_mask, theirs.key_mask)
        assert not ours.tokens[~ours.key_mask].any()
    total = int(spans.sum(1).max())
    source = span_sources(ours.spans, total)
    assert (source.diff(dim=1) >= 0).all() and (source.diff(dim=1) <= 1).all()  # contiguous, in order


@pytest.mark.parametrize(
    ("tokens", "window"), [(31, None), (31, 1), (31, 4), (31, 5), (0, 3), (1, 2), (16, 16)]
)
def test_pairs_are_counted_as_they_are(tokens: int, window: int | None) -> None:
    for parity in (0, 1):
        lefts = range(parity, tokens - 1, 2)
        inside = [i for i in lefts if window is None or i // window == (i + 1) // window]
        assert num_pairs(tokens, window, parity) == len(inside)


def test_nothing_merged_is_nothing_changed() -> None:
    x, metric = draws(2, 9, 3)
    for backend in BACKENDS:
        merged = merge_adjacent(x, metric, 0, window_size=4, backend=backend)
        assert_close(merged.tokens, x)
        assert (merged.spans == 1).all()
        groups = bipartite_merge(x, metric, 0, backend=backend)
        assert torch.equal(groups.tokens, x) and (groups.sizes == 1).all()


def test_two_layers_down_and_up_again_is_constant_within_spans() -> None:
    x, metric = draws(2, 24, 3)
    one = merge_adjacent(x, metric, 6, window_size=8)
    two = merge_adjacent(one.tokens, one.tokens, 5, window_size=8, parity=1, spans=one.spans, weight="span")
    back = unmerge(two.tokens, two.spans, 24)
    for b in range(2):
        expected = two.tokens[b].repeat_interleave(two.spans[b], 0)
        assert torch.equal(back[b], expected)
    # weights by span keep the mean over all positions
    flat = merge_adjacent(x, metric, 6, weight="span")
    assert_close(unmerge(flat.tokens, flat.spans, 24).mean(1), x.mean(1))


def test_spans_equal_products_with_the_dense_matrix() -> None:
    x, metric = draws(2, 14, 3)
    merged = merge_adjacent(x, metric, 5, weight="mean")
    source = span_sources(merged.spans, 14)
    matrix = (source[:, None] == torch.arange(9)[:, None]).double()  # [B, L, N]
    assert_close(merged.tokens, matrix @ x / matrix.sum(-1, keepdim=True))
    assert_close(unmerge(merged.tokens, merged.spans, 14), matrix.transpose(1, 2) @ merged.tokens)


def test_the_choice_has_the_largest_sum_of_likeness() -> None:
    x, metric = draws(1, 10, 2)
    unit = F.normalize(metric[0], dim=-1)
    score = [float(unit[i] @ unit[i + 1]) for i in range(0, 10, 2)]
    best = max(combinations(range(5), 3), key=lambda chosen: sum(score[p] for p in chosen))
    spans = merge_adjacent(x, metric, 3).spans[0]
    starts = (spans.cumsum(0) - spans)[spans == 2]
    assert starts.tolist() == [2 * p for p in best]


def test_equal_pairs_merge_from_the_left() -> None:
    x = torch.ones(1, 8, 2)
    for backend in BACKENDS:
        assert merge_adjacent(x, x, 2, backend=backend).spans.tolist() == [[2, 2, 1, 1, 1, 1]]
        assert bipartite_merge(x, x, 2, backend=backend).source.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pad_never_flows_into_a_token(backend: str) -> None:
    x, metric = draws(2, 13, 3)
    longer = [F.pad(y, (0, 0, 0, 6), value=torch.nan) for y in (x, metric)]
    mask = (torch.arange(19) < 13).expand(2, 19)
    alone = merge_adjacent(x, metric, 4, backend=backend)
    padded = merge_adjacent(*longer, 4, key_mask=mask, backend=backend)
    assert_close(padded.tokens[:, :9], alone.tokens)
    assert torch.equal(padded.spans[:, :9], alone.spans) and (padded.spans[:, 9:] == 1).all()
    assert torch.equal(padded.key_mask, (torch.arange(15) < 9).expand(2, 15))

    full = merge_adjacent(*longer, 9, key_mask=mask, backend=backend)  # more than there are real pairs
    most = merge_adjacent(x, metric, 6, backend=backend)
    assert_close(full.tokens[:, :7], most.tokens)
    assert torch.equal(span_mass(full.spans, mask)[:, :7], most.spans)
    assert torch.equal(span_mass(full.spans, mask) > 0, full.key_mask)

    groups = bipartite_merge(*longer, 8, key_mask=mask, backend=backend)
    assert groups.tokens.isfinite().all()
    assert (groups.sizes.sum(1) == 13).all()
    assert_close((groups.tokens * groups.sizes[..., None]).sum(1), x.sum(1))


@pytest.mark.parametrize("weight", ["norm", "span"])
def test_gradients_of_the_backends_agree_and_reach_the_metric_by_norms_only(weight: str) -> None:
    x, metric = (y.requires_grad_() for y in draws(2, 21, 3))
    found = []
    for backend in BACKENDS:
        merged = merge_adjacent(x, metric, 7, window_size=6, weight=weight, backend=backend)
        found.append(torch.autograd.grad(merged.tokens.square().sum(), (x, metric), allow_unused=True))
    assert_close(found[1][0], found[0][0], gradient=True)
    if weight == "norm":
        assert found[1][1].any()
        assert_close(found[1][1], found[0][1], gradient=True)
    else:
        assert found[1][1] is None and found[0][1] is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_are_right(backend: str) -> None:
    x, metric = (y.requires_grad_() for y in draws(1, 7, 2, features=2))

    def down_and_up(x: Tensor, metric: Tensor) -> Tensor:
        merged = merge_adjacent(x, metric, 2, backend=backend)
        return unmerge(merged.tokens, merged.spans, 7)

    assert torch.autograd.gradcheck(down_and_up, (x, metric))
    assert torch.autograd.gradcheck(
        lambda x: bipartite_merge(x, metric, 2, backend=backend).tokens,
        (x,),
        check_forward_ad=backend != "tiled",
    )


def loops_bipartite(x: Tensor, metric: Tensor, count: int, sizes: Tensor) -> tuple[Tensor, list[int]]:
    """Merging of even tokens of one row into odd ones, one at a time."""
    tokens = len(x)
    unit = F.normalize(metric, dim=-1)
    best = {i: max(range(1, tokens, 2), key=lambda j: float(unit[i] @ unit[j])) for i in range(0, tokens, 2)}
    going = sorted(best, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))[:count]
    stays = [i for i in range(tokens) if i not in going]
    source = [stays.index(best[i] if i in going else i) for i in range(tokens)]
    out = []
    for group in range(len(stays)):
        inside = [i for i in range(tokens) if source[i] == group]
        out.append((sizes[inside, None] * x[inside]).sum(0) / sizes[inside].sum())
    return torch.stack(out), source


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "count"), [(12, 4), (13, 7), (2, 1), (9, 0)])
def test_bipartite_merging_is_the_definition(tokens: int, count: int, backend: str) -> None:
    x, metric = draws(2, tokens, 3)
    metric[:, ::2] = metric[:, 1:2] + 0.5 * metric[:, ::2]  # several go into the same one
    sizes = torch.randint(1, 4, (2, tokens), generator=torch.Generator().manual_seed(0))
    with poisoned_empty():
        groups = bipartite_merge(x, metric, count, sizes=sizes, backend=backend)
    for b in range(2):
        expected, source = loops_bipartite(x[b], metric[b], count, sizes[b])
        assert_close(groups.tokens[b], expected)
        assert groups.source[b].tolist() == source
    assert torch.equal(groups.sizes.sum(1), sizes.sum(1))
    assert torch.equal(bipartite_unmerge(groups.tokens, groups.source)[0], groups.tokens[0, groups.source[0]])


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(2, 40), masked=st.booleans(), seed=st.integers(0, 1000))
def test_bipartite_backends_agree_in_gradients_too(tokens: int, masked: bool, seed: int) -> None:
    x, metric = draws(2, tokens, 3, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, (tokens + 1) // 2 + 1, (), generator=draw))
    key_mask = torch.rand(2, tokens, generator=draw) < 0.7 if masked else None
    results = []
    for backend in BACKENDS:
        y = x.clone().requires_grad_()
        groups = bipartite_merge(y, metric, count, key_mask=key_mask, backend=backend)
        results.append((groups, torch.autograd.grad(groups.tokens.square().sum(), y)[0]))
    (theirs, expected), (ours, found) = results
    assert torch.equal(ours.source, theirs.source) and torch.equal(ours.sizes, theirs.sizes)
    assert_close(ours.tokens, theirs.tokens)
    assert_close(found, expected, gradient=True)


def test_proportional_attention_to_equal_tokens_is_attention_to_all_of_them() -> None:
    """Runs of equal tokens, merged and weighed by log(size), answer as the runs did."""
    spans = torch.tensor([[3, 1, 2, 4]], dtype=torch.int32)
    key, value, query = (draws(1, 4, 6, seed=s)[0][:, :, None] for s in range(3))
    long = [unmerge(y[:, :, 0], spans, 10)[:, :, None] for y in (key, value)]
    expected = dense_attention(query, *long)
    assert_close(dense_attention(query, key, value, mask=proportional_bias(spans)), expected, within=1e-6)
    assert proportional_bias(torch.tensor([[0, 1]])).tolist() == [[[[-torch.inf, 0.0]]]]


def test_informative_tokens_are_drawn_by_the_inverse_square_without_replacement() -> None:
    sizes = torch.tensor([1, 2, 2, 4, 4, 4, 4]).expand(4000, 7)
    draw = torch.Generator().manual_seed(0)
    one = sample_informative(sizes, 1, generator=draw)
    weights = 1 / torch.tensor([1.0, 2, 2, 4, 4, 4, 4]).square()
    assert (one.sum(1) == 1).all()
    assert (one.float().mean(0) - weights / weights.sum()).abs().max() < 0.03  # 4 standard deviations
    assert (sample_informative(sizes, 5, generator=draw).sum(1) == 5).all()
    assert sample_informative(sizes, 7, generator=draw).all()
    even = sample_informative(sizes, 1, smallest=4, generator=draw).float().mean(0)
    assert (even - 1 / 7).abs().max() < 0.03
    mask = torch.tensor([False, True, True, True, False, False, False]).expand(4000, 7)
    masked = sample_informative(sizes, 5, key_mask=mask, generator=draw)
    assert torch.equal(masked, mask)
    again = [sample_informative(sizes, 2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)


def test_lengths_share_the_merges_among_layers() -> None:
    assert lengths(4096, 0.5, 4) == (3584, 3072, 2560, 2048)
    assert lengths(10, 7, 2) == (9, 7)
    assert lengths(10, 1.0, 3) == (10, 10, 10)
    with pytest.raises(ValueError, match="at most half"):
        lengths(16, 4, 1)
    with pytest.raises(ValueError, match="at least one layer"):
        lengths(16, 0.0, 1)


def test_the_comparison_notices_a_backend_off_by_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    x, metric = draws(2, 16, 3)
    expected = merge_adjacent(x, metric, 3, backend="reference")
    monkeypatch.setattr(adjacent, "largest", lambda scores, count: largest(scores, count).roll(1, -1))
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(merge_adjacent(x, metric, 3, backend="tiled").tokens, expected.tokens)


def test_autocast_and_low_precision_do_not_change_who_merges() -> None:
    x, metric = (y.float() for y in draws(2, 16, 3))
    for call in (merge_adjacent, bipartite_merge):
        for backend in BACKENDS:
            with torch.autocast("cpu", torch.bfloat16):
                inside = call(x, metric, 5, backend=backend)
            for a, b in zip(inside, call(x, metric, 5, backend=backend), strict=True):
                assert a is b is None or torch.equal(a, b)
    half = merge_adjacent(x.bfloat16(), metric, 5)
    assert half.tokens.dtype == torch.bfloat16
    assert torch.equal(half.spans, merge_adjacent(x, metric, 5).spans)
    assert_close(half.tokens, merge_adjacent(x, metric, 5).tokens)


def test_vmap_is_a_batch() -> None:
    x, metric = draws(3, 2, 12, 3)

    def adjacent_tokens(x: Tensor, metric: Tensor) -> Tensor:
        merged = merge_adjacent(x, metric, 3, window_size=4)
        return unmerge(merged.tokens, merged.spans, 12)

    def bipartite_tokens(x: Tensor, metric: Tensor) -> Tensor:
        return bipartite_merge(x, metric, 3).tokens

    for call in (adjacent_tokens, bipartite_tokens):
        assert_close(torch.vmap(call)(x, metric), torch.stack([call(x[i], metric[i]) for i in range(3)]))


@pytest.mark.compile
@pytest.mark.parametrize("call", [merge_adjacent, bipartite_merge])
def test_it_compiles_whole_with_moving_sizes(call: object) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (10, 23):
        results = []
        for run in (compiled, call):
            x, metric = (y.requires_grad_() for y in draws(1, tokens, 3))
            out = run(x, metric, 3)
            results.append([out.tokens, *torch.autograd.grad(out.tokens.square().sum(), x)])
            counts = out[1]
        assert torch.equal(counts, call(x, metric, 3)[1])
        for number, (a, e) in enumerate(zip(*results, strict=True)):
            assert_close(a, e, gradient=number > 0)


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    x, metric = draws(1, 8, 3)
    with pytest.raises(ValueError, match="have 4 pairs"):
        merge_adjacent(x, metric, 5)
    with pytest.raises(ValueError, match="have 2 pairs"):
        merge_adjacent(x, metric, 3, window_size=4, parity=1)
    with pytest.raises(ValueError, match="'norm'"):
        merge_adjacent(x, metric, 1, weight="nrm")
    with pytest.raises(ValueError, match="parity=2"):
        merge_adjacent(x, metric, 1, parity=2)
    with pytest.raises(ValueError, match="window_size=0"):
        merge_adjacent(x, metric, 1, window_size=0)
    with pytest.raises(ValueError, match="metric has shape"):
        merge_adjacent(x, metric[:, :7], 1)
    with pytest.raises(ValueError, match="spans has shape"):
        merge_adjacent(x, metric, 1, spans=torch.ones(1, 8))
    with pytest.raises(TypeError, match="floating"):
        bipartite_merge(x.long(), metric, 1)
    with pytest.raises(ValueError, match="Give between 0 and 4"):
        bipartite_merge(x, metric, 5)
    with pytest.raises(BackendUnavailable, match="no such backend"):
        merge_adjacent(x, metric, 1, backend="native")
    with pytest.raises(ValueError, match="num_samples=9"):
        sample_informative(torch.ones(1, 8, dtype=torch.int64), 9)
