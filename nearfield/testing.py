"""What tests and users of the operators both need: inputs, comparisons, memory that betrays skipped work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nearfield.core.tolerance import tolerance

ALLOCATIONS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))


def qkv(
    *shape: int,
    num_kv_heads: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query, key and value of `shape = (batch, *grid, heads, head_dim)`, one draw for each seed."""
    *places, num_heads, head_dim = shape
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    draw = torch.Generator().manual_seed(seed)
    shapes = (shape, (*places, kv_heads, head_dim), (*places, kv_heads, value_dim or head_dim))
    query, key, value = (
        torch.randn(s, generator=draw, dtype=torch.float64).to(device, dtype).requires_grad_(requires_grad)
        for s in shapes
    )
    return query, key, value


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """rms(actual - expected) / rms(expected) over finite entries; infinite if they disagree on the others."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape:
        raise AssertionError(f"The shapes differ: {list(actual.shape)}, expected {list(expected.shape)}.")
    finite = expected.isfinite()
    if not torch.allclose(actual[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True):
        return float("inf")
    difference, size = (actual - expected)[finite], expected[finite]
    if not difference.isfinite().all():
        return float("inf")
    error = float(difference.square().sum().sqrt())
    return error / float(size.square().sum().sqrt()) if size.any() else error


def assert_close(
    actual: Tensor, expected: Tensor, *, gradient: bool = False, within: float | None = None
) -> None:
    """Fail unless the relative rms error is within the tolerance of `actual`'s dtype, or `within`."""
    allowed = tolerance(actual.dtype, gradient=gradient) if within is None else within
    error = relative_error(actual, expected)
    if not error <= allowed:
        raise AssertionError(f"The relative rms error is {error:.3g}; at most {allowed:.3g} is allowed.")


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, memory allocated without a value is NaN (-1 for whole numbers), so work left out is seen."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            result = allocate(*args, **kwargs)
            whole = not result.is_floating_point() and not result.is_complex()
            return result.fill_(-1 if whole else torch.nan)

        return call

    with ExitStack() as restore:
        for owner, name in ALLOCATIONS:
            restore.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield
