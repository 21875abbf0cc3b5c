"""Query-and-attend by the CPU kernels: neighborhood attention of one channel in which every query is 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.ops.neighborhood import native


def supports(score: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot run this, or None."""
    return native.unfit(score.unsqueeze(-1), value, 1.0) or native.missing()


def attend(
    score: Tensor, value: Tensor, position_bias: Tensor | None, kernel_size: tuple[int, ...]
) -> Tensor:
    """Output `[B, *grid, H, D]` of checked arguments."""
    key = score.unsqueeze(-1)
    bias = position_bias
    if bias is not None:  # theirs has room for windows that are shifted inwards
        bias = F.pad(bias, [size // 2 for size in reversed(kernel_size) for _ in range(2)])
    ones = [1] * len(kernel_size)
    query = torch.ones_like(key)
    return native.attend_numbers(query, key, value, kernel_size, ones, "truncate", bias=bias, scale=1.0)[0]
