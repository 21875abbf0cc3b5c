"""Laws of dense attention and its score functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops import dense
from nearfield.ops.dense import SCORES, dense_attention, native
from nearfield.testing import assert_close, poisoned_empty, qkv

compiled = pytest.mark.skipif(library.unavailable() is not None, reason="no compiled CPU kernels")
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
    with pytest.raises(BackendUnavailable, match="at least one key"):
        dense_attention(q, k[:, :0], v[:, :0], backend="native")


def unequal(
    queries: int, keys: int, dtype: torch.dtype = torch.float32, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Two key heads of 12 channels, values of 5."""
    q, k, v = qkv(batch, max(queries, keys), 4, 12, num_kv_heads=2, value_dim=5, dtype=dtype)
    return q[:, :queries], k[:, :keys], v[:, :keys]


def outcomes(
    tensors: tuple[Tensor, ...], dtype: torch.dtype, backend: str, mask: Tensor | None = None
) -> list[Tensor]:
    """The output and every gradient, from leaves with the strides of `tensors`."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    out = dense_attention(*leaves, mask=mask, backend=backend)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, pull.to(tensors[0].dtype).to(dtype))]


def check_unequal(queries: int, keys: int, dtype: torch.dtype = torch.float32, masked: bool = False) -> None:
    tensors = unequal(queries, keys, dtype)
    draw = torch.Generator().manual_seed(2)
    mask = (torch.rand(2, 1, 1, keys, generator=draw) < 0.6) if masked else None
    found = outcomes(tensors, dtype, "native", mask)
    expected = outcomes(tensors, torch.float64, "reference", mask)
    for number, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert_close(a, e, gradient=number > 0)


MANY = 520  # queries that a backward takes in two pieces, of unequal sizes if there is one more


@compiled
@pytest.mark.parametrize(
    ("dtype", "masked"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, True)],
)
@pytest.mark.parametrize(("queries", "keys"), [(5, 17), (17, 5), (49, 300), (MANY + 1, 7), (67, 1)])
def test_any_number_of_queries_see_all_keys(
    queries: int, keys: int, dtype: torch.dtype, masked: bool
) -> None:
    with poisoned_empty():
        check_unequal(queries, keys, dtype, masked)


@compiled
@pytest.mark.parametrize("isa", library.isas())
def test_unequal_numbers_in_every_instruction_set(isa: str) -> None:
    with library.use(isa), poisoned_empty():
        check_unequal(MANY, 7)
        check_unequal(21, 70, torch.bfloat16, masked=True)


@compiled
def test_strides_of_unequal_tensors_change_nothing() -> None:
    views: list[Callable[[Tensor], Tensor]] = [
        Tensor.contiguous,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: torch.cat([x, x], -2)[:, :, : x.shape[2]],
    ]
    for queries, keys in ((MANY, 9), (9, 40)):
        tensors = unequal(queries, keys)
        first, *others = (outcomes(tuple(map(view, tensors)), torch.float32, "native") for view in views)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(MANY, 9), (20, 700)])
def test_threads_change_no_bit_of_unequal_numbers(queries: int, keys: int, dtype: torch.dtype) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with library.grain(0):
                results.append(outcomes(unequal(queries, keys, dtype), dtype, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_hidden_keys_may_hold_anything_whatever_the_number_of_queries() -> None:
    q, k, v = unequal(MANY, 9)
    seen = torch.arange(9) % 4 != 1
    dirty = [x.masked_fill(~seen[:, None, None], torch.nan).requires_grad_() for x in (k, v)]
    out = dense_attention(q, *dirty, mask=seen, backend="native")
    assert torch.equal(out, dense_attention(q, k, v, mask=seen, backend="native"))
    for grad in torch.autograd.grad(out.sum(), dirty):
        assert (grad[:, ~seen] == 0).all()
        assert grad.isfinite().all()
    nothing = dense_attention(q, k, v, mask=torch.zeros(9, dtype=torch.bool), backend="native")
    assert (nothing == 0).all()


@compiled
def test_no_queries_leave_keys_without_a_gradient() -> None:
    for batch, queries in ((2, 0), (0, 5)):
        tensors = [x.requires_grad_() for x in unequal(queries, 9, batch=batch)]
        with poisoned_empty():
            out = dense_attention(*tensors, backend="native")
            assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), tensors))


@compiled
def test_only_what_is_asked_for_gets_a_gradient() -> None:
    for wanted in range(3):
        tensors = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(unequal(30, 9))]
        dense_attention(*tensors, backend="native").sum().backward()
        assert [x.grad is not None for x in tensors] == [i == wanted for i in range(3)]


@compiled
def test_the_operator_passes_torchs_own_checks() -> None:
    forward, backward = torch.ops.nearfield.native_dense, torch.ops.nearfield.native_dense_backward
    for queries, mask, is_causal in ((MANY, torch.rand(2, 9) < 0.7, False), (5, None, True)):
        tensors, rest = unequal(queries, 9), (mask, is_causal, 0.5)
        torch.library.opcheck(forward, (*(x.clone().requires_grad_() for x in tensors), *rest))
        out, lse = forward(*tensors, *rest)
        torch.library.opcheck(backward, (out, out, lse, *tensors, *rest))


@compiled
def test_the_operator_called_by_hand_refuses_what_does_not_fit() -> None:
    forward, backward = torch.ops.nearfield.native_dense, torch.ops.nearfield.native_dense_backward
    q, k, v = unequal(12, 9)
    rest = (None, False, 0.5)
    out, lse = forward(q, k, v, *rest)
    for wrong in (
        lambda: forward(q, k, v, None, True, 0.5),  # more causal queries than keys
        lambda: forward(q, k[:, :0], v[:, :0], *rest),
        lambda: forward(q, k[:, :8], v, *rest),
        lambda: forward(q[:, :, :3], k, v, *rest),
        lambda: forward(q, k, v.double(), *rest),
        lambda: forward(q, k, v, torch.ones(1, 9, dtype=torch.bool), False, 0.5),
        lambda: forward(q, k, v, torch.ones(2, 9), False, 0.5),
        lambda: backward(out[:, 1:], out, lse, q, k, v, *rest),
        lambda: backward(out.double(), out, lse, q, k, v, *rest),
        lambda: backward(out, out.bfloat16(), lse, q, k, v, *rest),
        lambda: backward(out, out, lse[:, 1:], q, k, v, *rest),
        lambda: backward(out, out, lse.double(), q, k, v, *rest),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            wrong()


@compiled
def test_second_derivatives_of_unequal_numbers_are_refused() -> None:
    tensors = [x.requires_grad_() for x in unequal(12, 9)]
    (grad,) = torch.autograd.grad(
        dense_attention(*tensors, backend="native").sum(), tensors[0], create_graph=True
    )
    with pytest.raises(NotImplementedError, match='"native" .* backend="reference"'):
        grad.sum().backward()


@compiled
@pytest.mark.compile
def test_unequal_numbers_compile_whole_and_may_move() -> None:
    torch._dynamo.reset()

    def call(*tensors: Tensor) -> Tensor:
        return dense_attention(*tensors, backend="native")

    whole = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((12, 9), (30, 11), (10, 40)):
        results = []
        for function in (whole, call):
            leaves = [x.clone().requires_grad_() for x in unequal(queries, keys)]
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.compile
def test_unequal_numbers_that_move_are_exported() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dense_attention(q, k, v)

    queries, keys = (torch.export.Dim(name, min=10, max=5000) for name in ("queries", "keys"))
    shapes = ({1: queries}, {1: keys}, {1: keys})
    example = tuple(x.contiguous() for x in unequal(30, 12))
    program = torch.export.export(Module(), example, dynamic_shapes=shapes)
    for sizes in ((400, 300), (12, 40)):
        assert_close(program.module()(*unequal(*sizes)), dense_attention(*unequal(*sizes)))


@compiled
def test_vmap_of_unequal_numbers_is_a_batch() -> None:
    q, k, v = (torch.stack([x, x.flip(1), x + 1]) for x in unequal(30, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5], [1]])

    def call(*tensors: Tensor) -> Tensor:
        return dense_attention(*tensors[:3], mask=tensors[3], backend="native")

    expected = torch.stack([call(*parts) for parts in zip(q, k, v, mask, strict=True)])
    assert torch.equal(torch.vmap(call)(q, k, v, mask), expected)
    expected = torch.stack([call(x, k[0], v[0], mask[0]) for x in q])
    assert torch.equal(torch.vmap(call, (0, None, None, None))(q, k[0], v[0], mask[0]), expected)


def spoil(problem: library.Attention, how: str) -> None:
    if how == "one key too few":
        problem.axis[2].size -= 1
        problem.axis[2].kernel_size -= 1
        problem.first_query -= 1
    elif how == "one query too few":
        problem.first_query += 1
    else:
        problem.scale *= 1.1


@compiled
@pytest.mark.parametrize("how", ["one key too few", "one query too few", "another scale"])
def test_a_kernel_that_does_something_else_is_caught(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = native._blank

    def wrong(*given: Any) -> bytes:
        problem = library.Attention.from_buffer_copy(right(*given))
        spoil(problem, how)
        return bytes(problem)

    monkeypatch.setattr(native, "_blank", wrong)
    for queries in (60, MANY):
        with poisoned_empty(), pytest.raises(AssertionError, match="relative rms error"):
            check_unequal(queries, 9)


@compiled
def test_a_backward_that_forgets_a_piece_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.call

    def forgetful(name: str, problems: Any, count: int) -> None:
        right(name, problems, max(count - 1, 1))

    check_unequal(MANY, 9)
    monkeypatch.setattr(native, "call", forgetful)
    with poisoned_empty(), pytest.raises(AssertionError, match="relative rms error"):
        check_unequal(MANY, 9)


@compiled
def test_auto_leaves_to_torch_what_torch_does_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    right = native.attend
    monkeypatch.setattr(native, "attend", lambda *given: calls.append(1) or right(*given))
    tensors = unequal(300, 20)
    dense_attention(*tensors)
    assert not calls
    monkeypatch.setitem(dense.LIMITS, torch.float32, (20, 1e5))
    dense_attention(*tensors)
    assert calls


@compiled
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
