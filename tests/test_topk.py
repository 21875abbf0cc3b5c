"""Laws of attention to chosen blocks of keys, of their scores and of the choice."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.dense import dense_attention
from nearfield.ops.topk import (
    SCORES,
    block_scores,
    choose_blocks,
    extend_blocks,
    native,
    summarize_blocks,
    tiled,
    topk_block_attention,
)
from nearfield.ops.topk.summary import rotation
from nearfield.testing import assert_close, poisoned_empty, qkv

compiled = pytest.mark.skipif(library.unavailable() is not None, reason="no compiled CPU kernels")
FAST = ("tiled", "native") if library.unavailable() is None else ("tiled",)
SIZE = 4  # keys of a block
GUESSES = ("mean", "bound")


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(
    rows: int = 3,
    keys: int = 14,
    lists: int | None = None,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    length: int = 3,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two key heads of six channels, values of five, and lists with repetitions, none and a ragged block."""
    q, k, v = qkv(batch, keys, 4, 6, num_kv_heads=2, value_dim=5, dtype=dtype)
    blocks = -(-keys // SIZE)
    index = torch.randint(-2, blocks, (batch, lists or rows, 2, length), generator=draw(1))
    index[0, 0, 0] = torch.tensor([blocks - 1, -1, blocks - 1])[:length]
    return q[:, keys - rows :], k, v, index


def loops(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The definition, one query at a time."""
    (batch, rows, heads, dim), keys = q.shape, k.shape[1]
    out, lse = q.new_zeros(batch, rows, heads, v.shape[-1]), q.new_full((batch, rows, heads), -torch.inf)
    for b, i, h in product(range(batch), range(rows), range(heads)):
        kv = h // (heads // k.shape[2])
        named = {int(x) for x in index[b, i if index.shape[1] > 1 else 0, kv]}
        seen = [
            j
            for j in range(keys)
            if j // SIZE in named
            and not (is_causal and j > keys - rows + i)
            and (mask is None or mask[b if len(mask) > 1 else 0, j])
        ]
        if seen:
            scores = k[b, seen, kv] @ q[b, i, h] * dim**-0.5
            out[b, i, h], lse[b, i, h] = scores.softmax(0) @ v[b, seen, kv], scores.logsumexp(0)
    return out, lse


def masks(keys: int = 14) -> list[Tensor | None]:
    return [None, torch.rand(2, keys, generator=draw(2)) < 0.6, torch.rand(1, keys, generator=draw(3)) < 0.6]


CASES = [(rows, lists) for rows in (1, 3, 14) for lists in (1, rows)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("rows", "lists"), CASES)
def test_every_backend_is_the_definition(rows: int, lists: int, is_causal: bool) -> None:
    for mask in masks():
        tensors = problem(rows, lists=lists)
        expected = loops(*tensors, mask, is_causal)
        options = {"block_size": SIZE, "key_mask": mask, "is_causal": is_causal, "return_lse": True}
        for backend in ("reference", "tiled", "auto"):
            for a, e in zip(
                topk_block_attention(*tensors, **options, backend=backend), expected, strict=True
            ):
                assert_close(a, e)
        q, k, v, index = tensors
        for dtype in (torch.float32, torch.bfloat16) if "native" in FAST else ():
            low = [x.to(dtype) for x in (q, k, v)]
            with poisoned_empty():
                found = topk_block_attention(*low, index, **options, backend="native")
            for a, e in zip(found, loops(*(x.double() for x in low), index, mask, is_causal), strict=True):
                assert_close(a, e, within=1e-2 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_derivatives_are_those_of_the_definition(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "AT_ONCE", 1)  # each query by itself, its keys gathered again in the backward
    q, k, v, index = problem(2, 6, batch=1)
    index[0, 1, 1] = -1  # a query that sees nothing
    mask = torch.tensor([[True, True, False, True, True, True]])

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = topk_block_attention(
            *tensors, index, block_size=SIZE, key_mask=mask, return_lse=True, backend=backend
        )
        return out, lse.masked_fill(lse == -torch.inf, 0)

    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=backend == "reference")
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "lists"), [(63, 63), (63, 1), (1, 1)])
@pytest.mark.parametrize("at_once", [1 << 22, 5000])
def test_gathering_equals_the_reference_in_output_and_gradients(
    rows: int, lists: int, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "AT_ONCE", at_once)
    *tensors, index = problem(rows, 125, lists=lists, dtype=dtype)
    results = []
    for backend, wide in (("tiled", dtype), ("reference", torch.float64)):
        leaves = [x.to(wide).requires_grad_() for x in tensors]
        with poisoned_empty():
            out = topk_block_attention(*leaves, index, block_size=SIZE, backend=backend)
        pull = torch.randn(out.shape, generator=draw(4), dtype=torch.float64).to(wide)
        results.append([out, *torch.autograd.grad(out, leaves, pull)])
    for number, (a, e) in enumerate(zip(*results, strict=True)):
        assert_close(a, e, gradient=number > 0)


@settings(max_examples=40, deadline=None)
@given(
    keys=st.integers(1, 90),
    rows=st.integers(1, 4),
    size=st.integers(1, 100),
    is_causal=st.booleans(),
    backend=st.sampled_from(["reference", *FAST]),
)
def test_all_blocks_are_dense_attention(
    keys: int, rows: int, size: int, is_causal: bool, backend: str
) -> None:
    rows = min(rows, keys)
    q, k, v = qkv(1, keys, 2, 4, num_kv_heads=1)
    index = torch.randperm(-(-keys // size), generator=draw())[None, None, None]
    found = topk_block_attention(
        q[:, -rows:], k, v, index, block_size=size, is_causal=is_causal, backend=backend
    )
    expected = dense_attention(q[:, -rows:], k, v, is_causal=is_causal, backend="reference")
    assert_close(found, expected)


@pytest.mark.parametrize("backend", FAST)
def test_order_and_repetition_change_nothing(backend: str) -> None:
    q, k, v, _ = problem(5, 700, dtype=torch.float32)
    index = torch.randint(0, 175, (2, 5, 2, 30), generator=draw(5))

    def call(index: Tensor) -> Tensor:
        return topk_block_attention(q, k, v, index, block_size=SIZE, backend=backend)

    out = call(index)
    assert torch.equal(call(index.flip(-1)), out)
    assert torch.equal(call(index.sort(-1).values), out)
    assert torch.equal(call(index.to(torch.int32)), out)
    assert_close(call(torch.cat([index, -torch.ones_like(index), index[..., :7]], -1)), out)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_disjoint_lists_are_merged_by_their_log_sum_exp(backend: str) -> None:
    q, k, v, _ = problem(3, 40, dtype=torch.float32)
    options = {"block_size": SIZE, "return_lse": True, "backend": backend}
    index = torch.randperm(10, generator=draw()).expand(2, 1, 2, 10)
    whole, total = topk_block_attention(q, k, v, index, **options)
    parts = [topk_block_attention(q, k, v, part, **options) for part in index.split(5, -1)]
    merged = sum(out * (lse - total).exp()[..., None] for out, lse in parts)
    assert_close(merged, whole)
    assert_close(torch.logaddexp(parts[0][1], parts[1][1]), total)


@pytest.mark.parametrize("backend", FAST)
def test_keys_of_other_blocks_and_of_the_future_are_not_read(backend: str) -> None:
    q, k, v, _ = problem(6, 40, dtype=torch.float32)
    index = torch.tensor([0, 3, 9]).expand(2, 6, 2, 3)
    before = topk_block_attention(q, k, v, index, block_size=SIZE, backend=backend)
    unread = [j for j in range(40) if j // SIZE not in (0, 3, 9)]
    for x in (k, v):
        x[:, unread] = torch.nan
        x[:, 37:] = 1e30  # what the first queries do not see yet
    after = topk_block_attention(q, k, v, index, block_size=SIZE, backend=backend)
    assert torch.equal(after[:, :3], before[:, :3])


@compiled
def test_strides_are_honoured_and_lists_may_be_shared() -> None:
    q, k, v, _ = problem(4, 300, dtype=torch.float32)
    index = torch.randint(0, 75, (2, 1, 2, 9), generator=draw(6))
    options = {"block_size": SIZE, "backend": "native"}
    out = topk_block_attention(q, k, v, index, **options)
    assert out.is_contiguous()
    cache = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    roomy = [torch.cat([x, x], 1)[:, :300] for x in (k, v)]
    turned = [x.movedim(-1, 1).contiguous().movedim(1, -1) for x in (k, v)]
    for other in (cache, roomy, turned):
        assert torch.equal(topk_block_attention(q, *other, index, **options), out)
    for shared in (index.expand(2, 4, 2, 9), index.repeat(1, 4, 1, 1)):
        assert_close(topk_block_attention(q, k, v, shared, **options), out)
    assert torch.equal(
        topk_block_attention(q.movedim(1, 2).contiguous().movedim(2, 1), k, v, index, **options), out
    )


@compiled
@pytest.mark.parametrize("isa", library.isas())
def test_every_instruction_set_and_number_of_threads(isa: str) -> None:
    for rows, size in ((1, 64), (5, 100), (3, 1), (2, 24)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k, v = qkv(2, 1300, 6, 40, num_kv_heads=2, value_dim=33, dtype=dtype)
            q, blocks = q[:, -rows:], -(-1300 // size)
            index = torch.randint(-1, blocks, (2, rows, 2, 7), generator=draw(7))
            mask = torch.rand(2, 1300, generator=draw(8)) < 0.8
            options = {"block_size": size, "key_mask": mask}
            results = []
            with library.use(isa), library.grain(0), poisoned_empty():
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    out = topk_block_attention(q, k, v, index, **options, backend="native")
                    shares = block_scores(q, k, **options, backend="native")
                    guesses = [
                        block_scores(q[:, -1:], k, block_size=size, score=score, backend="native")
                        for score in GUESSES
                    ]
                    results.append([out, shares, *guesses])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            wide = [x.double() for x in (q, k, v)]
            expected = [
                topk_block_attention(*wide, index, **options, backend="reference"),
                block_scores(*wide[:2], **options, backend="reference"),
                *(
                    block_scores(wide[0][:, -1:], wide[1], block_size=size, score=score, backend="reference")
                    for score in GUESSES
                ),
            ]
            assert_close(results[0][0], expected[0])
            for a, e in zip(results[0][1:], expected[1:], strict=True):
                assert_close(
                    a, e, within=2e-5 if dtype == torch.float32 else 1e-2
                )  # exp of sums of 40 products


# ---- scores
def shares_by_loops(q: Tensor, k: Tensor, score: str, mask: Tensor | None, is_causal: bool) -> Tensor:
    (batch, rows, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    blocks, group = -(-keys // SIZE), heads // kv_heads
    out = q.new_zeros(batch, rows, kv_heads, blocks)
    for b, i, h in product(range(batch), range(rows), range(kv_heads)):
        seen = [
            [
                j
                for j in range(c * SIZE, min(keys, (c + 1) * SIZE))
                if not (is_causal and j > keys - rows + i)
                and (mask is None or mask[b if len(mask) > 1 else 0, j])
            ]
            for c in range(blocks)
        ]
        some = [c for c in range(blocks) if seen[c]]
        queries = q[b, i, h * group : (h + 1) * group]
        if score == "hash" and some:
            signs = [(x.float() @ rotation(dim, x.device)) > 0 for x in (queries.mean(0), k[b, :, h])]
            for c in some:
                unlike = min(int((signs[0] != signs[1][j]).sum()) for j in seen[c])
                out[b, i, h, c] = (dim + 1 - unlike) / (dim + 1)
        for one in queries if score != "hash" and some else ():
            x = one * dim**-0.5
            logits = []
            for c in some:
                keys_of = k[b, seen[c], h]
                logits.append(
                    {
                        "mass": lambda y, x=x: (y @ x).logsumexp(0),
                        "mean": lambda y, x=x: y.mean(0) @ x + math.log(len(y)),
                        "bound": lambda y, x=x: (
                            torch.maximum(x * y.amin(0), x * y.amax(0)).sum() + math.log(len(y))
                        ),
                    }[score](keys_of)
                )
            out[b, i, h, some] += torch.stack(logits).softmax(0) / group
    return out


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_scores_are_the_definition_with_and_without_a_summary(score: str, is_causal: bool) -> None:
    q, k, _ = qkv(2, 14, 4, 6, num_kv_heads=2, dtype=torch.float64)
    for rows, mask in product((1, 3, 14), masks()):
        options = {"block_size": SIZE, "score": score, "key_mask": mask, "is_causal": is_causal}
        expected = shares_by_loops(q[:, -rows:], k, score, mask, is_causal)
        found = block_scores(q[:, -rows:], k, **options)
        assert_close(found, expected)
        assert torch.equal(found > 0, expected > 0)
        summary = summarize_blocks(k, block_size=SIZE, score=score, key_mask=mask)
        assert torch.equal(block_scores(q[:, -rows:], k, **options, summary=summary), found)
        with poisoned_empty():
            low = block_scores(q[:, -rows:].float(), k.float(), **options)
        assert_close(low, expected, within=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_a_chunk_of_queries_scores_and_chooses_as_single_steps(score: str) -> None:
    q, k, _ = qkv(2, 30, 4, 6, num_kv_heads=2)
    chunk = block_scores(q[:, -9:], k, block_size=SIZE, score=score)
    chosen = choose_blocks(chunk, 3, block_size=SIZE, num_keys=30, num_sinks=1, num_recent=5)
    for i in range(9):
        keys = 22 + i
        step = block_scores(q[:, keys - 1 : keys], k[:, :keys], block_size=SIZE, score=score)
        assert_close(chunk[:, i : i + 1, :, : step.shape[-1]], step)
        assert not chunk[:, i, :, step.shape[-1] :].any()
        one = choose_blocks(step, 3, block_size=SIZE, num_keys=keys, num_sinks=1, num_recent=5)
        both = [x.masked_fill(x < 0, 99).sort(-1).values for x in (chosen[:, i : i + 1], one)]
        width = min(x.shape[-1] for x in both)
        assert torch.equal(both[0][..., :width], both[1][..., :width])
        assert all((x[..., width:] == 99).all() for x in both)


@pytest.mark.parametrize("score", SCORES)
def test_a_summary_that_grows_or_is_cropped_is_that_of_the_keys(score: str) -> None:
    _, k, _ = qkv(2, 70, 2, 6)
    mask = torch.rand(2, 70, generator=draw(9)) < 0.8
    for key_mask in (None, mask):

        def part(end: int, key_mask: Tensor | None = key_mask) -> Tensor | None:
            return None if key_mask is None else key_mask[:, :end]

        summary = summarize_blocks(k[:, :5], block_size=SIZE, score=score, key_mask=part(5))
        for first, end in ((5, 6), (6, 30), (17, 17), (17, 18), (12, 12), (12, 70)):
            summary = extend_blocks(summary, k[:, :end], first=first, key_mask=part(end))
            fresh = summarize_blocks(k[:, :end], block_size=SIZE, score=score, key_mask=part(end)).table
            assert torch.equal(summary.table[:, :, : fresh.shape[2]], fresh)


def test_the_bound_is_one_and_tight_for_a_single_key() -> None:
    q, k, _ = qkv(1, 40, 1, 6, dtype=torch.float64)
    table = summarize_blocks(k, block_size=SIZE, score="bound").table[0, 0]
    most, least = table.split(6, -1)
    bound = torch.maximum(q[0, :, 0, None] * most, q[0, :, 0, None] * least).sum(-1)
    scores = (q[0, :, 0] @ k[0, :, 0].T).unflatten(-1, (-1, SIZE))
    assert (bound >= scores.amax(-1) - 1e-12).all()
    single = [block_scores(q, k, block_size=1, score=score) for score in ("mass", *GUESSES)]
    assert_close(single[1], single[0])
    assert_close(single[2], single[0])


def test_a_seen_block_has_a_share_however_small() -> None:
    k = torch.zeros(1, 12, 1, 2)
    k[:, :4] = 1e4
    for score, backend in product(("mass", *GUESSES), ("auto", "reference")):
        shares = block_scores(k[:, -1:] + 1, k, block_size=SIZE, score=score, backend=backend)
        assert (shares > 0).all()
        assert_close(shares[0, 0, 0], torch.tensor([1.0, 0, 0]))


# ---- choice
@settings(max_examples=60, deadline=None)
@given(
    keys=st.integers(1, 200),
    rows=st.integers(1, 5),
    size=st.integers(1, 40),
    wanted=st.integers(1, 12),
    sinks=st.integers(0, 60),
    recent=st.integers(0, 90),
    backend=st.sampled_from(["auto", "reference"]),
)
def test_the_choice_is_forced_blocks_then_the_best(
    keys: int, rows: int, size: int, wanted: int, sinks: int, recent: int, backend: str
) -> None:
    rows, blocks = min(rows, keys), -(-keys // size)
    scores = torch.rand(1, rows, 2, blocks, generator=draw(keys)).mul(4).ceil() / 4  # ties
    scores[torch.rand(scores.shape, generator=draw(rows)) < 0.2] = 0
    chosen = choose_blocks(
        scores, wanted, block_size=size, num_keys=keys, num_sinks=sinks, num_recent=recent, backend=backend
    )
    for i, h in product(range(rows), range(2)):
        at, row = keys - rows + i, scores[0, i, h].tolist()
        seen = [c for c in range(blocks) if row[c] > 0]
        late = [c for c in seen if recent and (at - recent + 1) // size <= c <= at // size]
        forced = {*seen[: -(-sinks // size)], *late}
        rest = sorted((c for c in seen if c not in forced), key=lambda c: (-row[c], c))
        expected = sorted([*forced, *rest[: max(0, wanted - len(forced))]])
        found = chosen[0, i, h].tolist()
        assert found == expected + [-1] * (len(found) - len(expected))


@compiled
def test_halves_and_doubles_are_chosen_by_as_well() -> None:
    scores = torch.rand(2, 1, 3, 9, generator=draw())
    expected = choose_blocks(scores, 4, block_size=SIZE, num_keys=35)
    assert torch.equal(choose_blocks(scores.double(), 4, block_size=SIZE, num_keys=35), expected)
    with pytest.raises(BackendUnavailable, match="float32"):
        choose_blocks(scores.double(), 4, block_size=SIZE, num_keys=35, backend="native")


# ---- torch
@compiled
def test_the_operators_pass_torchs_own_checks() -> None:
    q, k, v, index = problem(3, 14, dtype=torch.float32)
    ops, (mask, scores) = torch.ops.nearfield, (masks()[1], torch.rand(2, 3, 2, 4))
    torch.library.opcheck(ops.native_topk, (q, k, v, index, mask, SIZE, True, 0.5))
    torch.library.opcheck(ops.native_topk, (q, k, v, index[:, :1], None, SIZE, False, 0.5))
    torch.library.opcheck(ops.native_block_shares, (q, k, mask, 14, SIZE, False, True, 0.5, 1.0))
    torch.library.opcheck(ops.native_choose_blocks, (scores, 2, SIZE, 14, 1, 5, 3))


@compiled
def test_operators_called_by_hand_refuse_what_does_not_fit() -> None:
    q, k, v, index = problem(3, 14, dtype=torch.float32)
    ops, mask = torch.ops.nearfield, torch.ones(2, 14, dtype=torch.bool)
    topk, shares, choose = ops.native_topk, ops.native_block_shares, ops.native_choose_blocks
    for wrong in (
        lambda: topk(q, k[:, :13], v, index, None, SIZE, True, 0.5),
        lambda: topk(q, k, v, index[:, :2], None, SIZE, True, 0.5),
        lambda: topk(q, k, v, index.int(), None, SIZE, True, 0.5),
        lambda: topk(q, k, v, index, mask[:1], SIZE, True, 0.5),
        lambda: topk(q, k, v, index, None, 0, True, 0.5),
        lambda: topk(q, k[:, :2], v[:, :2], index, None, SIZE, True, 0.5),
        lambda: shares(q, k, None, 15, SIZE, False, True, 0.5, 1.0),
        lambda: shares(q, k, None, 14, SIZE, True, True, 0.5, 1.0),
        lambda: shares(q, k, mask, 13, SIZE, False, True, 0.5, 1.0),
        lambda: choose(torch.rand(2, 3, 2, 5), 2, SIZE, 14, 1, 5, 3),
        lambda: choose(torch.rand(2, 3, 2, 4).double(), 2, SIZE, 14, 1, 5, 3),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            wrong()


def steps(q: Tensor, k: Tensor, v: Tensor, score: str = "bound", backend: str = "auto") -> Tensor:
    """Score, choose, attend: a step of a decoder."""
    scores = block_scores(q, k, block_size=SIZE, score=score, backend=backend)
    index = choose_blocks(scores, 2, block_size=SIZE, num_keys=k.shape[1], num_recent=2, backend=backend)
    return topk_block_attention(q, k, v, index, block_size=SIZE, backend=backend)


@pytest.mark.compile
@pytest.mark.parametrize(("score", "rows"), [("bound", 1), ("mass", 3)])
def test_a_step_compiles_whole_with_moving_sizes(score: str, rows: int) -> None:
    torch._dynamo.reset()
    whole = torch.compile(steps, fullgraph=True, dynamic=True, backend="eager")
    for keys in (21, 30):
        q, k, v, _ = problem(rows, keys, dtype=torch.float32)
        assert_close(whole(q, k, v, score), steps(q, k, v, score))


@pytest.mark.compile
def test_the_definition_compiles_whole() -> None:
    torch._dynamo.reset()
    q, k, v, _ = problem(3, 14, dtype=torch.float32)
    whole = torch.compile(steps, fullgraph=True, backend="eager")
    assert_close(whole(q, k, v, "bound", "reference"), steps(q, k, v, "bound", "reference"))


@pytest.mark.compile
def test_gathering_compiles_whole() -> None:
    torch._dynamo.reset()
    q, k, v, index = problem(3, 14, dtype=torch.float32)
    options = {"block_size": SIZE, "backend": "tiled"}
    whole = torch.compile(topk_block_attention, fullgraph=True, backend="eager")
    assert_close(whole(q, k, v, index, **options), topk_block_attention(q, k, v, index, **options))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_vmap_is_a_batch(backend: str) -> None:
    q, k, v, index = problem(3, 14, dtype=torch.float32)
    mask = masks()[1]

    def call(q: Tensor, k: Tensor, v: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        tensors = [x[None] for x in (q, k, v, index)]
        return topk_block_attention(*tensors, block_size=SIZE, key_mask=mask[None], backend=backend)[0]

    expected = topk_block_attention(q, k, v, index, block_size=SIZE, key_mask=mask, backend=backend)
    assert_close(torch.vmap(call)(q, k, v, index, mask), expected)
    for score in ("mass", "bound"):
        found = torch.vmap(lambda q, k, v, s=score: steps(q[None], k[None], v[None], s)[0])(q[:, -1:], k, v)
        assert_close(found, steps(q[:, -1:], k, v, score))


def test_autocast_computes_in_the_lower_precision() -> None:
    q, k, v, index = problem(3, 14, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = topk_block_attention(q, k, v, index, block_size=SIZE)
        assert block_scores(q, k, block_size=SIZE).dtype == torch.float32
    assert out.dtype == torch.bfloat16


def test_gradients_are_left_to_torch() -> None:
    q, k, v, index = problem(3, 14, dtype=torch.float32)
    q.requires_grad_()
    assert topk_block_attention(q, k, v, index, block_size=SIZE).requires_grad
    with pytest.raises(BackendUnavailable, match="no gradients"):
        topk_block_attention(q, k, v, index, block_size=SIZE, backend="native")
    with pytest.raises(BackendUnavailable, match="without gradients"):
        block_scores(q, k, block_size=SIZE, backend="native")
    assert not choose_blocks(
        block_scores(q, k, block_size=SIZE), 2, block_size=SIZE, num_keys=14
    ).requires_grad


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_to_read_gives_nothing(backend: str) -> None:
    q, k, v, index = problem(3, 14, dtype=torch.float32)
    options = {"block_size": SIZE, "return_lse": True, "backend": backend}
    empty = (index[..., :0], torch.full_like(index, -1))
    for index in empty:
        out, lse = topk_block_attention(q, k, v, index, **options)
        assert not out.any()
        assert (lse == -torch.inf).all()
    out, _ = topk_block_attention(q, k[:, :0], v[:, :0], empty[0], is_causal=False, **options)
    assert out.shape == (2, 3, 4, 5)
    assert not out.any()
    assert topk_block_attention(q[:, :0], k, v, index[:, :1], **options)[0].shape == (2, 0, 4, 5)
    assert block_scores(q, k[:, :0], block_size=SIZE, is_causal=False, backend=backend).shape == (2, 3, 2, 0)


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    q, k, v, index = problem(3, 14, dtype=torch.float32)
    scores = block_scores(q, k, block_size=SIZE)
    summary = summarize_blocks(k, block_size=SIZE, score="mean")
    short = summarize_blocks(k[:, :7], block_size=SIZE, score="bound")

    def attend(index: Any = index, size: Any = SIZE, keys: int = 14, **options: Any) -> Tensor:
        return topk_block_attention(q, k[:, :keys], v[:, :keys], index, block_size=size, **options)

    for error, says, call in (
        (TypeError, "whole numbers", lambda: attend(index.float())),
        (ValueError, "one row for all", lambda: attend(index[:, :2])),
        (ValueError, "at least 1", lambda: attend(size=0)),
        (TypeError, "such as 64", lambda: attend(size=4.0)),
        (ValueError, "last of the keys", lambda: attend(index, keys=2)),
        (ValueError, "key_mask", lambda: attend(key_mask=torch.ones(2, 9, dtype=torch.bool))),
        (ValueError, "Did you mean 'mass'", lambda: block_scores(q, k, block_size=SIZE, score="mas")),
        (ValueError, "Make another", lambda: block_scores(q, k, block_size=SIZE, summary=summary)),
        (
            ValueError,
            "2 rows, 14 keys need 4",
            lambda: block_scores(q, k, block_size=SIZE, score="bound", summary=short),
        ),
        (ValueError, "cannot share", lambda: block_scores(q[:, :, :3], k, block_size=SIZE)),
        (ValueError, "last of the keys", lambda: block_scores(q, k[:, :2], block_size=SIZE)),
        (ValueError, r"are 5: give \[", lambda: choose_blocks(scores, 2, block_size=SIZE, num_keys=20)),
        (ValueError, "at least one block", lambda: choose_blocks(scores, 0, block_size=SIZE, num_keys=14)),
        (ValueError, "floating numbers", lambda: summarize_blocks(k.long(), block_size=1, score="mean")),
    ):
        with pytest.raises(error, match=says):
            call()
    for backend in FAST:
        with pytest.raises(ValueError, match="name block 7. There are 4"):
            attend(index + 4 * (index == 3), backend=backend)


@compiled
@pytest.mark.parametrize("how", ["one block less", "a longer block", "one list for all"])
def test_a_kernel_that_reads_something_else_is_noticed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.call

    def wrong(name: str, problem: library.Decode) -> None:
        if how == "one block less":
            problem.list_length -= 1
        elif how == "a longer block":
            problem.block_size += 1
        else:
            problem.block_stride[1] = 0
        right(name, problem)

    q, k, v, _ = problem(3, 40, dtype=torch.float32)
    index = torch.stack([torch.randperm(8, generator=draw(i))[:3] for i in range(12)]).view(2, 3, 2, 3)
    check = [
        topk_block_attention(q, k, v, index, block_size=SIZE, backend=b) for b in ("native", "reference")
    ]
    assert_close(*check)
    monkeypatch.setattr(native, "call", wrong)
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(topk_block_attention(q, k, v, index, block_size=SIZE, backend="native"), check[1])


@compiled
def test_a_gather_that_loses_a_key_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, index = problem(3, 14)
    right = tiled._tokens

    def wrong(*given: Any) -> tuple[Tensor, Tensor]:
        tokens, known = right(*given)
        return tokens, known & (tokens != 13)

    monkeypatch.setattr(tiled, "_tokens", wrong)
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(
            topk_block_attention(q, k, v, index, block_size=SIZE, backend="tiled"),
            topk_block_attention(q, k, v, index, block_size=SIZE, backend="reference"),
        )
