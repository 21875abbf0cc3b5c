"""Laws of dense attention and its score functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.dense import SCORES, dense_attention
from nearfield.testing import assert_close, qkv

FAST = ("tiled", "native") if library.unavailable() is None else ("tiled",)


def loops(
    query: Tensor, key: Tensor, value: Tensor, score: str, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """The definition, one query at a time."""
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    batch, rows, heads, dim = query.shape
    late, group = key.shape[1] - rows, heads // key.shape[2]
    for b in range(batch):
        for i in range(rows):
            for h in range(heads):
                seen = [j for j in range(key.shape[1]) if not is_causal or j <= i + late]
                if mask is not None and mask.dtype == torch.bool:
                    seen = [j for j in seen if mask[b, 0, i, j]]
                if not seen:
                    continue
                scores = key[b, seen, h // group] @ query[b, i, h] * dim**-0.5
                if mask is not None and mask.dtype != torch.bool:
                    scores = scores + mask[b, 0, i, seen]
                positive = scores.clamp(min=0) / len(seen)
                weights = {
                    "softmax": scores.softmax(0),
                    "relu": positive,
                    "squared_relu": positive * scores.clamp(min=0),
                }
                out[b, i, h] = weights[score] @ value[b, seen, h // group]
    return out


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", [None, "bool", "float"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_backend_is_the_definition(score: str, kind: str | None, is_causal: bool) -> None:
    q, k, v = qkv(2, 5, 4, 6, num_kv_heads=2, value_dim=6, dtype=torch.float64)
    q = q[:, -3:]
    draw = torch.Generator().manual_seed(0)
    mask = {
        None: None,
        "bool": torch.rand(2, 1, 3, 5, generator=draw) < 0.4,
        "float": torch.randn(2, 1, 3, 5, generator=draw, dtype=torch.float64),
    }[kind]
    expected = loops(q, k, v, score, mask, is_causal)
    for backend in ("auto", "reference"):
        found = dense_attention(q, k, v, score=score, mask=mask, is_causal=is_causal, backend=backend)
        assert_close(found, expected)
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dense_attention(*tensors, score=score, mask=mask, is_causal=is_causal, backend=backend)
        for grad in torch.autograd.grad(out.sum(), tensors):
            assert grad.isfinite().all()


@pytest.mark.parametrize("score", SCORES)
def test_the_reference_has_all_derivatives(score: str) -> None:
    tensors = qkv(1, 3, 2, 2, num_kv_heads=1, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])

    def call(*inputs: Tensor) -> Tensor:
        return dense_attention(*inputs, score=score, mask=mask, backend="reference")

    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("kind", ["all", "causal", "last three", "padded", "padded, last three"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_equals_reference_in_output_and_gradients(dtype: torch.dtype, kind: str, fast: str) -> None:
    results = []
    mask = (torch.arange(33) >= torch.tensor([[0], [5]]))[:, None, None] if "padded" in kind else None
    options = {"is_causal": kind not in ("all", "padded"), "mask": mask}
    for backend, wide in ((fast, dtype), ("reference", torch.float64)):
        tensors = [x.to(wide).requires_grad_() for x in qkv(2, 33, 4, 12, num_kv_heads=2, dtype=dtype)]
        query = tensors[0][:, -3:] if "last" in kind else tensors[0]
        out = dense_attention(query, *tensors[1:], **options, backend=backend)
        pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
            wide
        )
        results.append([out, *torch.autograd.grad((out * pull).sum(), tensors)])
    for number, (a, e) in enumerate(zip(*results, strict=True)):
        assert_close(a, e, gradient=number > 0)


def test_native_says_what_it_cannot() -> None:
    q, k, v = qkv(1, 15, 2, 4)
    for options, says in (
        ({"score": "relu"}, "softmax"),
        ({"mask": torch.ones(15, 15, dtype=torch.bool)}, "mask of keys"),
        ({"mask": torch.zeros(15)}, "mask of keys"),
    ):
        with pytest.raises(BackendUnavailable, match=says):
            dense_attention(q, k, v, backend="native", **options)
    with pytest.raises(BackendUnavailable, match="as many queries as keys"):
        dense_attention(q[:, :12], k, v, backend="native")


@pytest.mark.skipif(library.kernels() is None, reason="no CPU kernels")
@pytest.mark.parametrize("queries", [1, 2])
def test_few_queries_read_the_keys_as_decoding_does(queries: int) -> None:
    q, k, v = qkv(2, 300, 6, 16, num_kv_heads=2, value_dim=10)
    q = q[:, -queries:]
    seen = torch.rand(2, 1, queries, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    for options in ({}, {"is_causal": True}, {"mask": seen}, {"mask": seen[:, :, :1], "is_causal": True}):
        expected = dense_attention(q, k, v, backend="reference", **options)
        assert_close(dense_attention(q, k, v, backend="native", **options), expected)
    grown = [x.clone().requires_grad_() for x in (q, k, v)]
    found = dense_attention(*grown, is_causal=True, backend="native")
    expected = dense_attention(*grown, is_causal=True, backend="reference")
    for a, b in zip(*(torch.autograd.grad(x.sum(), grown) for x in (found, expected)), strict=True):
        assert_close(a, b, gradient=True)


def test_softmax_of_shifted_scores_is_unchanged_and_relu_is_not() -> None:
    q, k, v = qkv(1, 6, 1, 4)
    shift = torch.full((6, 6), 2.0)
    assert_close(dense_attention(q, k, v, mask=shift), dense_attention(q, k, v))
    with pytest.raises(AssertionError):
        assert_close(
            dense_attention(q, k, v, score="relu", mask=shift), dense_attention(q, k, v, score="relu")
        )


def test_relu_forgets_how_often_the_keys_are_repeated() -> None:
    q, k, v = qkv(1, 6, 2, 4)
    once = dense_attention(q, k, v, score="relu")
    assert_close(dense_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), score="relu"), once)


@pytest.mark.parametrize("score", ["relu", "squared_relu"])
def test_relu_in_a_window_divides_by_the_keys_that_are_there(score: str) -> None:
    """Keys all alike answer the same at the edges, where a window holds fewer of them, as inside."""
    _, k, v = qkv(1, 1, 2, 4, dtype=torch.float64)
    keys, values = k.expand(-1, 9, -1, -1), v.expand(-1, 9, -1, -1)
    i = torch.arange(9)
    window = (i[:, None] - i).abs() <= 2
    positive = (keys * keys).sum(-1, keepdim=True)
    expected = values * (positive if score == "relu" else positive.square())
    found = dense_attention(keys, keys, values, score=score, mask=window, scale=1.0)
    assert_close(found, expected)


def test_relu_attention_to_a_set_is_the_mean_of_its_random_features() -> None:
    """(1/N) sum_i relu(x0' W x_i) x_i for each frozen W of a head, whatever the order of the set."""
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 1, 5, generator=draw, dtype=torch.float64)
    x = torch.randn(2, 7, 5, generator=draw, dtype=torch.float64)
    frozen = torch.randn(3, 5, 5, generator=draw, dtype=torch.float64)
    expected = torch.einsum("bqmn,bnd->bqmd", torch.einsum("bqd,mde,bne->bqmn", x0, frozen, x).relu(), x) / 7
    queries = torch.einsum("bqd,mde->bqme", x0, frozen)
    for order in (torch.arange(7), torch.randperm(7, generator=draw)):
        keys = x[:, order, None]
        assert_close(dense_attention(queries, keys, keys, score="relu", scale=1.0), expected)


def test_a_function_may_be_the_score() -> None:
    q, k, v = qkv(1, 6, 2, 4)

    def uniform(scores: Tensor, visible: Tensor) -> Tensor:
        return visible.to(scores.dtype) / visible.sum(-1, keepdim=True)

    assert_close(dense_attention(q, k, v, score=uniform), v.mean(1, keepdim=True).expand_as(v))


def test_causal_output_ignores_a_poisoned_future() -> None:
    q, k, v = qkv(1, 6, 1, 4)
    for score in SCORES:
        before = dense_attention(q, k, v, score=score, is_causal=True)[:, :4]
        k2, v2 = k.clone(), v.clone()
        k2[:, 4:], v2[:, 4:] = 1e30, 1e30
        assert_close(dense_attention(q, k2, v2, score=score, is_causal=True)[:, :4], before)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["auto", "reference", *FAST])
def test_it_compiles_whole_with_moving_sizes(backend: str) -> None:
    torch._dynamo.reset()
    for score in ("softmax", "relu") if backend in ("auto", "reference") else ("softmax",):
        compiled = torch.compile(dense_attention, fullgraph=True, dynamic=True, backend="eager")
        for tokens in (5, 9):
            tensors = qkv(1, tokens, 2, 4)
            options = {"score": score, "is_causal": True, "backend": backend}
            assert_close(compiled(*tensors, **options), dense_attention(*tensors, **options))


def test_autocast_computes_in_the_lower_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert dense_attention(*qkv(1, 5, 2, 4), score="relu").dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's fused attention under vmap
def test_vmap_is_a_batch() -> None:
    tensors = qkv(3, 2, 5, 2, 4)
    for score in ("softmax", "relu"):
        found = torch.vmap(lambda q, k, v, score=score: dense_attention(q, k, v, score=score))(*tensors)
        expected = [dense_attention(*parts, score=score) for parts in zip(*tensors, strict=True)]
        assert_close(found, torch.stack(expected))


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    q, k, v = qkv(1, 5, 2, 4)
    with pytest.raises(ValueError, match="'softmax'"):
        dense_attention(q, k, v, score="softmx")
    with pytest.raises(ValueError, match="broadcast"):
        dense_attention(q, k, v, mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="booleans"):
        dense_attention(q, k, v, mask=torch.ones(5, 5, dtype=torch.int64))
    with pytest.raises(BackendUnavailable, match="softmax"):
        dense_attention(q, k, v, score="relu", backend="tiled")
    with pytest.raises(ValueError, match="causal queries"):
        dense_attention(q, k[:, :3], v[:, :3], is_causal=True)
