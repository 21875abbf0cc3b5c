"""What every attention function does with its arguments first: refuse wrong ones, heed autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, dtype
from torch.autograd import forward_ad

T = TypeVar("T")


def check(
    name: str, x: Tensor, shape: tuple[int | str, ...], like: Tensor, kind: dtype | None = None
) -> None:
    """Refuse `x` unless it has `shape`, the device of `like` and dtype `kind` (None: any floating one)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}. Give a tensor of shape {list(shape)}.")
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{name} has shape {list(x.shape)}. It must be {list(shape)} to fit the other tensors."
        )
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the query on {like.device}. Move them to one device.")
    if not x.is_floating_point() if kind is None else x.dtype != kind:
        raise TypeError(f"{name} has dtype {x.dtype}. It must be {kind or 'a floating dtype'}.")


def check_heads(query: Tensor, key: Tensor, value: Tensor, *, rank: tuple[int, ...], layout: str) -> None:
    """Refuse query, key and value of `[batch, tokens ..., heads, head_dim]` that do not fit one another."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}. Give a tensor of shape {layout}.")
        if x.dim() not in rank or x.dim() != query.dim():
            raise ValueError(
                f"{name} has shape {list(x.shape)}, query {list(query.shape)}. Both must be {layout}."
            )
    if not query.is_floating_point():
        raise TypeError(f"query has dtype {query.dtype}. It must be a floating dtype.")
    if query.shape[-1] < 1 or query.shape[-2] < 1 or key.shape[-2] < 1:
        raise ValueError(
            f"query has shape {list(query.shape)}, key {list(key.shape)}. "
            "Heads and head_dim must be at least 1."
        )
    check("key", key, (query.shape[0], *key.shape[1:-1], query.shape[-1]), query, query.dtype)
    check("value", value, (*key.shape[:-1], value.shape[-1]), query, query.dtype)
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{query.shape[-2]} query heads cannot share {key.shape[-2]} key/value heads. "
            "The first number must be a multiple of the second."
        )


def scale_or_default(scale: float | None, head_dim: int) -> float:
    """The factor on the scores: `scale`, or `head_dim ** -0.5`."""
    if isinstance(scale, Tensor):
        raise TypeError(
            "scale is a tensor. Give a number; multiply the query by a learned scale and pass scale=1.0."
        )
    return head_dim**-0.5 if scale is None else scale


def no_transform() -> str | None:
    """Why an operator that is opaque to torch cannot run inside the transform that is on, or None.

    Forward-mode derivatives would silently be zero there: torch does not ask an operator whether it has any.
    """
    if torch.compiler.is_compiling():
        return None
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack):
        return "it has no derivatives inside torch.func transforms (grad, jvp, hessian ...)."
    return no_forward_mode()


def no_forward_mode() -> str | None:
    """Why a backend that has no forward-mode derivatives cannot run here, or None."""
    is_forward = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    return "it has no forward-mode derivatives." if is_forward else None


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for the device of `x`; torch knows none of meta tensors."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def under_autocast(run: Callable[..., T], query: Tensor, *others: Tensor | None) -> T:
    """`run(query, *others)`: when autocast is on, with the tensors in its dtype and autocast off inside."""
    device = query.device.type
    if query.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return run(query, *others)  # torch knows no autocast of meta tensors
    half = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return run(query.to(half), *(None if x is None else x.to(half) for x in others))
