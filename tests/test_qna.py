"""Laws of query-and-attend."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.ops.qna import qna_attention, tiled
from nearfield.testing import assert_close, poisoned_empty

FAST = ("tiled", "native") if library.unavailable() is None else ("tiled",)
BACKENDS = ("reference", *FAST)
GEOMETRIES = [
    ((7,), (3,)),
    ((2,), (5,)),
    ((1,), (3,)),
    ((5, 4), (3, 5)),
    ((6,), (1,)),
    ((3, 4, 2), (3, 3, 3)),
]


def problem(
    grid: tuple[int, ...], kernel: tuple[int, ...], dtype: torch.dtype = torch.float64, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of 3 heads, values of 4 channels, a bias for each offset."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((batch, *grid, 3), (batch, *grid, 3, 4), (3, *kernel))
    score, value, bias = (torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes)
    return score, value, bias


def loops(score: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The definition, one token at a time."""
    out = torch.zeros_like(value)
    grid, kernel = score.shape[1:-1], bias.shape[1:]
    for b, h in product(range(len(score)), range(len(bias))):
        for place in product(*map(range, grid)):
            logits, values = [], []
            for offset in product(*map(range, kernel)):
                at = tuple(p + o - k // 2 for p, o, k in zip(place, offset, kernel, strict=True))
                if all(0 <= a < side for a, side in zip(at, grid, strict=True)):
                    logits.append(score[(b, *at, h)] + bias[(h, *offset)])
                    values.append(value[(b, *at, h)])
            out[(b, *place, h)] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def results(
    backend: str, tensors: tuple[Tensor, ...], kernel: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    """Output and the gradient of every tensor."""
    inputs = [x.to(dtype).requires_grad_() for x in tensors]
    out = qna_attention(*inputs, kernel_size=kernel, backend=backend)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * pull.to(dtype)).sum(), inputs)]


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize(("grid", "kernel"), GEOMETRIES)
def test_it_is_the_definition(grid: tuple[int, ...], kernel: tuple[int, ...], backend: str) -> None:
    tensors = problem(grid, kernel)
    assert_close(qna_attention(*tensors, kernel_size=kernel, backend=backend), loops(*tensors))


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("grid", "kernel"), GEOMETRIES)
def test_fast_equals_reference_in_output_and_gradients(
    grid: tuple[int, ...], kernel: tuple[int, ...], with_bias: bool, fast: str
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = problem(grid, kernel, dtype)[: 3 if with_bias else 2]
        pairs = zip(
            results(fast, tensors, kernel, dtype),
            results("reference", tensors, kernel, torch.float64),
            strict=True,
        )
        for number, (a, e) in enumerate(pairs):
            if min(max(grid), max(kernel)) == 1 and number in (1, 3):  # one key: the score means nothing
                assert a.abs().max() <= (1e-6 if dtype == torch.float32 else 2e-2)
            else:
                assert_close(a, e, gradient=number > 0)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_derivatives(backend: str) -> None:
    inputs = [x.requires_grad_() for x in problem((3, 2), (3, 1), batch=1)]

    def call(*tensors: Tensor) -> Tensor:
        return qna_attention(*tensors, kernel_size=(3, 1), backend=backend)

    is_plain = backend == "reference"
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=is_plain, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_a_thousand_apart_neither_overflow_nor_vanish(backend: str) -> None:
    _, value, _ = problem((12,), (3,), torch.float32)
    score = torch.full(value.shape[:-1], 1000.0)
    score[:, 6:] = -1000
    inputs = [x.requires_grad_() for x in (score, value)]
    out = qna_attention(*inputs, kernel_size=3, backend=backend)
    means = value.unfold(1, 3, 1).mean(-1)  # of token 1 to token 10
    for token in (1, 4, 7, 10):  # equal scores in the window, high ones as well as low ones
        assert_close(out[:, token], means[:, token - 1])
    assert_close(out[:, 6], value[:, 5])  # one neighbour outweighs all
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_neighborhood_attention_of_one_query(backend: str) -> None:
    draw = torch.Generator().manual_seed(3)
    key, value = (torch.randn(2, 9, 3, 4, generator=draw) for _ in range(2))
    query = torch.randn(3, 4, generator=draw)
    score = torch.einsum("hd,bnhd->bnh", query, key)
    expected = neighborhood_attention(
        query.expand_as(key), key, value, Neighborhood(5, border="truncate"), scale=1.0, backend="reference"
    )
    assert_close(qna_attention(score, value, kernel_size=5, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_added_to_all_scores_changes_nothing(backend: str) -> None:
    score, value, bias = problem((5, 4), (3, 5), torch.float32)
    options: dict[str, Any] = {"kernel_size": (3, 5), "backend": backend}
    out = qna_attention(score, value, bias, **options)
    assert_close(
        qna_attention(score + 8, value, bias - 4, **options), out, within=5e-6
    )  # 8 + x loses bits of x
    ones = torch.ones_like(value)
    assert_close(qna_attention(score, ones, bias, **options), ones)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_fast_equals_reference_on_any_geometry(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    grid = tuple(data.draw(st.integers(1, 5)) for _ in range(rank))
    kernel = tuple(data.draw(st.sampled_from((1, 3, 5))) for _ in range(rank))
    tensors = problem(grid, kernel, torch.float32)
    expected = qna_attention(*tensors, kernel_size=kernel, backend="reference")
    for backend in FAST:
        assert_close(qna_attention(*tensors, kernel_size=kernel, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_outside_the_window_are_unseen(backend: str) -> None:
    score, value, bias = problem((9,), (3,), torch.float32)
    before = qna_attention(score, value, bias, kernel_size=3, backend=backend)
    score[:, 6:], value[:, 6:] = 1e4, 1e30
    after = qna_attention(score, value, bias, kernel_size=3, backend=backend)
    assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5], before[:, 5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_strides(backend: str) -> None:
    score, value, bias = problem((5, 4), (3, 5), torch.float32)
    odd = (score.transpose(1, 2).contiguous().transpose(1, 2), value[:, :, :1].expand_as(value))
    expected = qna_attention(score, odd[1].contiguous(), bias, kernel_size=(3, 5), backend="reference")
    assert_close(qna_attention(*odd, bias, kernel_size=(3, 5), backend=backend), expected)


@pytest.mark.parametrize("backend", FAST)
def test_no_memory_is_left_unwritten(backend: str) -> None:
    tensors = problem((5, 4), (3, 5), torch.float32)
    clean = results(backend, tensors, (3, 5), torch.float32)
    with poisoned_empty():
        poisoned = results(backend, tensors, (3, 5), torch.float32)
    for a, e in zip(poisoned, clean, strict=True):
        assert_close(a, e, within=1e-6)


def test_an_offset_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = problem((7,), (3,), torch.float32)
    expected = qna_attention(*tensors, kernel_size=3, backend="reference")
    monkeypatch.setattr(tiled, "_offsets", lambda size: [(0,), (1,), (1,)])
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(qna_attention(*tensors, kernel_size=3, backend="tiled"), expected)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_it_compiles_whole_with_moving_sizes(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(qna_attention, fullgraph=True, dynamic=True, backend="eager")
    for side in (5, 9):
        inputs = [x.requires_grad_() for x in problem((side,), (3,), torch.float32)]
        pairs = []
        for call in (compiled, qna_attention):
            out = call(*inputs, kernel_size=3, backend=backend)
            pairs.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for a, e in zip(*pairs, strict=True):
            assert_close(a, e, gradient=True)


@pytest.mark.compile
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_exports_with_a_side_that_may_change(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, score: Tensor, value: Tensor) -> Tensor:
            return qna_attention(score, value, kernel_size=3, backend=backend)

    side = {1: torch.export.Dim("side", min=2, max=64)}
    made = problem((16,), (3,), torch.float32)[:2]
    program = torch.export.export(Layer(), made, dynamic_shapes=(side, side), strict=False)
    other = problem((24,), (3,), torch.float32)[:2]
    assert_close(program.module()(*other), Layer()(*other))


@pytest.mark.compile
def test_its_derivatives_survive_functionalization() -> None:
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in problem((4, 3), (3, 3), torch.float32)]
    compiled = torch.compile(qna_attention, fullgraph=True, backend="aot_eager")
    pairs = [
        torch.autograd.grad(call(*inputs, kernel_size=3, backend="tiled").square().sum(), inputs)
        for call in (compiled, qna_attention)
    ]
    for a, e in zip(*pairs, strict=True):
        assert_close(a, e, gradient=True)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_vmap_is_a_batch(backend: str) -> None:
    score, value, bias = problem((5, 4), (3, 3), torch.float32, batch=3)

    def call(score: Tensor, value: Tensor) -> Tensor:
        return qna_attention(score, value, bias, kernel_size=3, backend=backend)

    expected = call(score, value)
    assert_close(torch.vmap(call)(score.unsqueeze(1), value.unsqueeze(1)).squeeze(1), expected)
    found = torch.vmap(call, in_dims=(None, -1), out_dims=-1)(score, torch.stack([value, 2 * value], -1))
    assert_close(found, torch.stack([expected, 2 * expected], -1))


def test_transforms_take_a_backend_that_has_them() -> None:
    score, value, bias = problem((5,), (3,))

    def loss(score: Tensor, backend: str) -> Tensor:
        return qna_attention(score, value, bias, kernel_size=3, backend=backend).square().sum()

    pull = torch.func.grad(loss)
    for backend in ("auto", "tiled"):
        assert_close(pull(score, backend), pull(score, "reference"), gradient=True)
    along = [torch.func.jvp(lambda s, b=b: loss(s, b), (score,), (score,))[1] for b in ("auto", "reference")]
    assert_close(*along)
    with pytest.raises(BackendUnavailable, match="forward-mode"):
        torch.func.jvp(lambda s: loss(s, "tiled"), (score,), (score,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_the_lower_precision(backend: str) -> None:
    score, value, bias = problem((5,), (3,), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = qna_attention(score, value, bias, kernel_size=3, backend=backend)
    half = qna_attention(score.bfloat16(), value.bfloat16(), bias, kernel_size=3, backend=backend)
    assert torch.equal(out, half)


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    score, value, bias = problem((5,), (3,), torch.float32)
    for arguments, kernel, says in (
        ((score, value), 4, "odd numbers"),
        ((score, value), 0, "odd numbers"),
        ((score, value), (3, 3), "2 entries for 1 dimensions"),
        ((score, value, bias), 5, r"It must be \[3, 5\]"),
        ((score, value[:, :4]), 3, r"It must be \[2, 5, 3, 4\]"),
        ((score, score), 3, "and channels"),
        ((score[0], value), 3, "one to three grid sides"),
    ):
        with pytest.raises(ValueError, match=says):
            qna_attention(*arguments, kernel_size=kernel)
    with pytest.raises(TypeError, match="float32"):
        qna_attention(score, value.double(), kernel_size=3)
    with pytest.raises(BackendUnavailable, match="no such backend"):
        qna_attention(score, value, kernel_size=3, backend="triton")
