"""Laws of window attention."""

from __future__ import annotations

import pytest
import torch

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.ops.window import window_attention
from nearfield.testing import assert_close, qkv

BACKENDS = ("reference", "tiled", "native") if library.unavailable() is None else ("reference", "tiled")


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    ("grid", "window"), [((12,), 4), ((6, 8), (3, 2)), ((2, 4, 6), (1, 2, 3)), ((5, 5), 5)]
)
def test_it_is_a_neighborhood_whose_stride_is_its_size(
    grid: tuple[int, ...], window: int | tuple[int, ...], backend: str
) -> None:
    q, k, v = qkv(2, *grid, 4, 8, num_kv_heads=2, value_dim=5)
    out = window_attention(q, k, v, window_size=window, scale=0.3, backend=backend)
    expected = neighborhood_attention(
        q, k, v, Neighborhood(window, stride=window), scale=0.3, backend="reference"
    )
    assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_do_not_see_each_other(backend: str) -> None:
    q, k, v = qkv(1, 4, 4, 2, 8)
    clean = window_attention(q, k, v, window_size=2, backend=backend)
    # Weights of 0 times NaN are NaN: a backend that computes several windows at once spreads it, not numbers.
    for poison in (1e30, torch.nan) if backend != "native" else (1e30,):
        k[:, 2:], v[:, 2:] = poison, poison  # the lower windows
        out = window_attention(q, k, v, window_size=2, backend=backend)
        assert torch.equal(out[:, :2], clean[:, :2])
        assert (out[:, 2:] != clean[:, 2:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_neighborhood(backend: str) -> None:
    dtype = torch.float32 if backend == "native" else torch.float64
    tensors = qkv(1, 4, 6, 2, 4, dtype=dtype, requires_grad=True)
    ours = window_attention(*tensors, window_size=2, backend=backend)
    theirs = neighborhood_attention(*tensors, Neighborhood(2, stride=2), backend="reference")
    for a, e in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (ours, theirs)), strict=True):
        assert_close(a, e, gradient=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_the_lower_precision(backend: str) -> None:
    tensors = qkv(1, 4, 6, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = window_attention(*tensors, window_size=2, backend=backend)
    assert torch.equal(
        out, window_attention(*(x.bfloat16() for x in tensors), window_size=2, backend=backend)
    )


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_it_compiles_whole_with_moving_sizes(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(window_attention, fullgraph=True, dynamic=True, backend="eager")
    for grid in ((4, 6), (8, 10)):
        tensors = qkv(1, *grid, 2, 4)
        options = {"window_size": 2, "backend": backend}
        assert_close(compiled(*tensors, **options), window_attention(*tensors, **options))


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    tensors = qkv(1, 7, 6, 2, 4)
    with pytest.raises(ValueError, match=r"Pad the tokens to \(8, 8\)"):
        window_attention(*tensors, window_size=4)
    with pytest.raises(ValueError, match="at least 1"):
        window_attention(*tensors, window_size=0)
    with pytest.raises(ValueError, match="2 dimensions"):
        window_attention(*tensors, window_size=(2, 2, 2))
    with pytest.raises(BackendUnavailable, match="no such backend"):
        window_attention(*(x[:, :6] for x in tensors), window_size=2, backend="flex")
