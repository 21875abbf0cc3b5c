"""Laws of HiLo attention and its pooling."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nearfield.ops.hilo as hilo
from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.dense import dense_attention
from nearfield.ops.hilo import average_pool, hilo_attention
from nearfield.ops.window import window_attention
from nearfield.testing import assert_close, poisoned_empty, qkv

BACKENDS = ("auto", "tiled", "reference")
FAST = ("auto", "tiled", *(("native",) if library.unavailable() is None else ()))


def problem(
    grid: tuple[int, ...], window: int, *, dtype: torch.dtype = torch.float64, batch: int = 2
) -> tuple[Tensor, ...]:
    """Two high heads and three low ones, with 5 channels and values of 6."""
    high = qkv(batch, *grid, 2, 5, value_dim=6, dtype=dtype)
    query, key, value = qkv(batch, *grid, 3, 5, value_dim=6, dtype=dtype, seed=1)
    few = (slice(None), *(slice(None, None, window) for _ in grid))
    return *high, query, key[few], value[few]


def loops(tensors: tuple[Tensor, ...], window: int, scale: float) -> Tensor:
    """The definition on a grid of two axes, one query at a time."""
    high_query, high_key, high_value, low_query, low_key, low_value = tensors
    batch, side_y, side_x, heads, _ = high_query.shape
    out = high_query.new_zeros(batch, side_y, side_x, heads + low_query.shape[-2], high_value.shape[-1])
    for b, y, x in product(range(batch), range(side_y), range(side_x)):
        top, left = y // window * window, x // window * window
        tile = (b, slice(top, top + window), slice(left, left + window))
        for h in range(heads):
            keys, values = (t[tile][:, :, h].flatten(0, 1) for t in (high_key, high_value))
            out[b, y, x, h] = (keys @ high_query[b, y, x, h] * scale).softmax(0) @ values
        for h in range(low_query.shape[-2]):
            keys, values = (t[b, :, :, h].flatten(0, 1) for t in (low_key, low_value))
            out[b, y, x, heads + h] = (keys @ low_query[b, y, x, h] * scale).softmax(0) @ values
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_definition(backend: str) -> None:
    tensors = problem((4, 6), 2)
    expected = loops(tensors, 2, 0.3)
    assert_close(hilo_attention(*tensors, window_size=2, scale=0.3, backend=backend), expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(9,), (6, 9), (3, 6, 3)])
def test_fast_equals_reference_in_output_and_gradients(
    grid: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    results = []
    for name, wide in ((backend, dtype), ("reference", torch.float64)):
        tensors = [x.to(wide).requires_grad_() for x in problem(grid, 3, dtype=dtype)]
        out = hilo_attention(*tensors, window_size=3, backend=name)
        pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        results.append([out, *torch.autograd.grad((out * pull.to(wide)).sum(), tensors)])
    for number, (a, e) in enumerate(zip(*results, strict=True)):
        assert_close(a, e, gradient=number > 0)


def test_the_reference_has_all_derivatives() -> None:
    inputs = [x[..., :2].clone().requires_grad_() for x in problem((2, 2), 2, batch=1)]

    def call(*tensors: Tensor) -> Tensor:
        return hilo_attention(*tensors, window_size=2, backend="reference")

    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_either_group_may_be_absent(backend: str) -> None:
    tensors = problem((4, 6), 2, dtype=torch.float32)
    options: dict[str, Any] = {"window_size": 2, "backend": backend}
    both = hilo_attention(*tensors, **options)
    nothing = (None, None, None)
    high = hilo_attention(*tensors[:3], *nothing, **options)
    low = hilo_attention(*nothing, *tensors[3:], **options)
    assert torch.equal(torch.cat([high, low], -2), both)
    assert_close(high, window_attention(*tensors[:3], window_size=2))
    flat = (x.flatten(1, 2) for x in tensors[3:])
    assert_close(low.flatten(1, 2), dense_attention(*flat))


@pytest.mark.skipif(library.kernels() is None, reason="no CPU kernels")
def test_windows_of_one_token_make_the_low_heads_ordinary_attention() -> None:
    tensors = problem((4, 3), 1, dtype=torch.float32)
    out = hilo_attention(*tensors, window_size=1, backend="native")
    flat = (x.flatten(1, 2) for x in tensors[3:])
    assert_close(out[..., 2:, :].flatten(1, 2), dense_attention(*flat, backend="reference"))
    assert_close(out[..., :2, :], tensors[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_high_heads_see_their_window_and_low_heads_see_all(backend: str) -> None:
    tensors = list(problem((4, 6), 2, dtype=torch.float32))
    before = hilo_attention(*tensors, window_size=2, backend=backend)
    for i in (1, 2):
        tensors[i] = tensors[i].clone()
        tensors[i][:, 2:] = 1e30
    after = hilo_attention(*tensors, window_size=2, backend=backend)
    assert torch.equal(after[:, :2], before[:, :2])
    tensors[5] = tensors[5].clone()
    tensors[5][:, -1, -1] += 1
    moved = hilo_attention(*tensors, window_size=2, backend=backend)
    assert (moved[..., 2:, :] > after[..., 2:, :]).all()


def test_no_memory_is_left_unwritten() -> None:
    tensors = problem((4, 6), 2, dtype=torch.float32)
    clean = hilo_attention(*tensors, window_size=2)
    with poisoned_empty():
        assert_close(hilo_attention(*tensors, window_size=2), clean)
        assert average_pool(torch.ones(1, 5, 3, 2), 2, partial=True).isfinite().all()


def test_groups_the_other_way_around_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = problem((4, 6), 2, dtype=torch.float32)
    expected = hilo_attention(*tensors, window_size=2, backend="reference")
    dense = hilo.dense_attention
    monkeypatch.setattr(hilo, "dense_attention", lambda q, k, v, **o: dense(q, k.roll(1, 1), v, **o))
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(hilo_attention(*tensors, window_size=2), expected)


@pytest.mark.parametrize("sides", [(7,), (4, 6), (5, 7), (3, 4, 5)])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_pooling_counts_the_tokens_that_are_there(sides: tuple[int, ...], window: int) -> None:
    x = torch.randn(2, *sides, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(sides) - 1]
    expected = pool(x.movedim(-1, 1), window, ceil_mode=True, count_include_pad=False).movedim(1, -1)
    assert_close(average_pool(x, window, partial=True), expected)
    if all(side % window == 0 for side in sides):
        assert_close(average_pool(x, window), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    side=st.integers(1, 9), window=st.integers(1, 4), size=st.sampled_from((torch.float32, torch.bfloat16))
)
def test_pooling_leaves_constants_as_they_are(side: int, window: int, size: torch.dtype) -> None:
    x = torch.full((1, side, 4, 2), 3.0, dtype=size)
    pooled = average_pool(x, window, partial=True)
    assert pooled.dtype == size and (pooled == 3).all()
    assert pooled.shape == (1, -(-side // window), -(-4 // window), 2)


def test_pooling_has_derivatives() -> None:
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: average_pool(x, 2, partial=True), x, check_forward_ad=True)


@pytest.mark.compile
def test_it_compiles_whole_with_moving_sizes() -> None:
    torch._dynamo.reset()

    def call(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return hilo_attention(*tensors, window_size=2), average_pool(x, 2)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for grid in ((4, 6), (8, 10)):
        inputs = (torch.ones(2, *grid, 3), *problem(grid, 2, dtype=torch.float32))
        for a, e in zip(compiled(*inputs), call(*inputs), strict=True):
            assert_close(a, e)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's fused attention under vmap
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_a_batch(backend: str) -> None:
    tensors = problem((2, 4), 2, dtype=torch.float32, batch=3)
    found = torch.vmap(lambda *x: hilo_attention(*x, window_size=2, backend=backend))(
        *(x.unsqueeze(1) for x in tensors)
    )
    assert_close(found.squeeze(1), hilo_attention(*tensors, window_size=2, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_the_lower_precision(backend: str) -> None:
    tensors = problem((2, 4), 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = hilo_attention(*tensors, window_size=2, backend=backend)
    half = [x.bfloat16() for x in tensors]
    assert torch.equal(out, hilo_attention(*half, window_size=2, backend=backend))


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    tensors = problem((4, 6), 2, dtype=torch.float32)
    nothing = (None, None, None)
    with pytest.raises(ValueError, match="at least one"):
        hilo_attention(*nothing, *nothing, window_size=2)
    with pytest.raises(ValueError, match="low_query, low_key and low_value belong together"):
        hilo_attention(*tensors[:4], None, None, window_size=2)
    with pytest.raises(ValueError, match=r"on a grid of \(2, 3\)"):
        hilo_attention(*tensors[:4], *(x[:, :1] for x in tensors[4:]), window_size=2)
    with pytest.raises(ValueError, match="at least 1"):
        hilo_attention(*nothing, *tensors[3:], window_size=0)
    with pytest.raises(ValueError, match="These must agree"):
        hilo_attention(*tensors[:5], tensors[5][..., :3], window_size=2)
    with pytest.raises(BackendUnavailable):
        hilo_attention(*tensors, window_size=2, backend="flex")
    with pytest.raises(ValueError, match=r"Pad the tokens to \(6, 6\), or give partial=True"):
        average_pool(torch.ones(1, 5, 6, 2), 2)
    with pytest.raises(ValueError, match="flatten heads"):
        average_pool(torch.ones(5, 6), 2)
    with pytest.raises(ValueError, match="at least 1"):
        average_pool(torch.ones(1, 5, 6, 2), 0)
