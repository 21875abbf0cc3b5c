"""Laws of window attention."""

from __future__ import annotations

import pytest
import torch

from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.ops.window import window_attention
from nearfield.testing import assert_close, qkv


@pytest.mark.parametrize(
    ("grid", "window"), [((12,), 4), ((6, 8), (3, 2)), ((2, 4, 6), (1, 2, 3)), ((5, 5), 5)]
)
def test_it_is_a_neighborhood_whose_stride_is_its_size(
    grid: tuple[int, ...], window: int | tuple[int, ...]
) -> None:
    q, k, v = qkv(2, *grid, 4, 8, num_kv_heads=2, value_dim=5)
    out = window_attention(q, k, v, window_size=window, scale=0.3)
    expected = neighborhood_attention(
        q, k, v, Neighborhood(window, stride=window), scale=0.3, backend="reference"
    )
    assert_close(out, expected)


def test_windows_do_not_see_each_other() -> None:
    q, k, v = qkv(1, 4, 4, 2, 8)
    v[:, 2:] = torch.nan  # poison the lower windows
    out = window_attention(q, k, v, window_size=2)
    assert out[:, :2].isfinite().all()
    assert out[:, 2:].isnan().all()


def test_gradients_are_those_of_the_neighborhood() -> None:
    tensors = qkv(1, 4, 6, 2, 4, dtype=torch.float64, requires_grad=True)
    ours = window_attention(*tensors, window_size=2)
    theirs = neighborhood_attention(*tensors, Neighborhood(2, stride=2), backend="reference")
    for a, e in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (ours, theirs)), strict=True):
        assert_close(a, e, gradient=True)


@pytest.mark.compile
def test_it_compiles_whole_with_moving_sizes() -> None:
    compiled = torch.compile(window_attention, fullgraph=True, dynamic=True, backend="eager")
    for grid in ((4, 6), (8, 10)):
        tensors = qkv(1, *grid, 2, 4)
        assert_close(compiled(*tensors, window_size=2), window_attention(*tensors, window_size=2))


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    tensors = qkv(1, 7, 6, 2, 4)
    with pytest.raises(ValueError, match=r"Pad the tokens to \(8, 8\)"):
        window_attention(*tensors, window_size=4)
    with pytest.raises(ValueError, match="at least 1"):
        window_attention(*tensors, window_size=0)
    with pytest.raises(ValueError, match="2 dimensions"):
        window_attention(*tensors, window_size=(2, 2, 2))
