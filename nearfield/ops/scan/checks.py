"""What every scan does with its arguments first: refuse those that do not fit, one sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Dim = int | str


def check(name: str, value: Tensor | None, shape: tuple[Dim, ...], x: Tensor, *, exact: bool = False) -> None:
    """Refuse `value` unless it is absent or has `shape`, x's device and a floating dtype (`exact`: x's)."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}. Give a tensor of shape {list(shape)}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}. It must be {list(shape)} to fit the others.")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, x on {x.device}. Move them to one device.")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}. It must be a floating dtype.")
    if exact and value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name} has dtype {value.dtype}, x {x.dtype}. Cast one: what has tokens shares a dtype."
        )


def check_tokens(x: Tensor, layout: str, rank: int, *, inner: int) -> None:
    """Refuse `x` unless it is a floating tensor of `rank` dimensions, the last `inner` of at least 1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}. Give a tensor of shape {layout}.")
    if x.dim() != rank or 0 in x.shape[-inner:]:
        raise ValueError(f"x has shape {list(x.shape)}. It must be {layout}, with at least one channel.")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}. It must be a floating dtype.")


def in_groups(name: str, value: Tensor, channels: int, what: str) -> Tensor:
    """B or C with its axis of groups: [B, T, N] becomes [B, T, 1, N]."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}. Give a tensor [B, T, states] or [B, T, groups, states]."
        )
    if value.dim() not in (3, 4) or 0 in value.shape[2:]:
        raise ValueError(
            f"{name} has shape {list(value.shape)}. It must be [B, T, states] or [B, T, groups, states]."
        )
    value = value.unsqueeze(2) if value.dim() == 3 else value
    if channels % value.shape[2]:
        raise ValueError(
            f"{channels} {what} cannot share {value.shape[2]} groups of {name}. "
            "The first number must be a multiple of the second."
        )
    return value


def ends_of(cu_seqlens: Tensor | Sequence[int] | None, x: Tensor) -> list[int] | None:
    """Where packed sequences end, as numbers, 0 first."""
    if cu_seqlens is None:
        return None
    ends = [int(end) for end in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens with a batch of {x.shape[0]}. Pack the sequences into a batch of 1.")
    if not ends or ends[0] != 0 or ends[-1] != x.shape[1] or any(b < a for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens={ends} must rise from 0 to the {x.shape[1]} tokens given.")
    return ends
