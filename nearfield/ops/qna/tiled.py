"""Query-and-attend in pure torch: values are never unfolded, but shifted and added, one offset at a time.

The fused form of the paper divides two convolutions of exp(score). Their windows share one factor, so scores
that differ by 90 between two ends of a grid leave nothing of the lower end. A softmax for each window costs
one number per token, head and offset, and holds for any scores.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    score: Tensor, value: Tensor, position_bias: Tensor | None, kernel_size: tuple[int, ...]
) -> Tensor:
    """Output `[B, *grid, H, D]` of checked arguments."""
    wide = torch.promote_types(value.dtype, torch.float32)
    grid = score.shape[1:-1]
    scores = F.pad(score.to(wide), [0, 0, *_halo(kernel_size)], value=-torch.inf)
    scores = torch.stack([_shifted(scores, at, grid) for at in _offsets(kernel_size)])  # [K, B, *grid, H]
    if position_bias is not None:
        bias = position_bias.to(wide).flatten(1).t()  # [K, H]
        scores = scores + bias.reshape(-1, *(1,) * (score.dim() - 1), bias.shape[-1])
    return _WeightedSum.apply(scores.softmax(0), value.to(wide), kernel_size).to(value.dtype)


def _offsets(kernel_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Starts of the shifted grid inside the padded one, in the order of a flat kernel."""
    return list(product(*map(range, kernel_size)))


def _halo(kernel_size: tuple[int, ...]) -> list[int]:
    return [size // 2 for size in reversed(kernel_size) for _ in range(2)]


def _shifted(padded: Tensor, at: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """The view of a padded tensor `[B, *padded grid, ...]` that begins `at`."""
    for axis, (start, side) in enumerate(zip(at, grid, strict=True)):
        padded = padded.narrow(1 + axis, start, side)
    return padded


class _WeightedSum(torch.autograd.Function):
    """`sum over offsets o of weights[o, l] * value[l + o]`, of `[K, B, *grid, H]` and `[B, *grid, H, D]`.

    torch's derivative of a shift fills a whole grid with zeros, once for each offset. This one gathers: the
    value at j was used by the tokens at j - o.
    """

    @staticmethod
    def forward(weights: Tensor, value: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
        grid, padded = value.shape[1:-2], F.pad(value, [0, 0, 0, 0, *_halo(kernel_size)])
        out = torch.zeros_like(value)
        for weight, at in zip(weights.unbind(), _offsets(kernel_size), strict=True):
            out.addcmul_(weight.unsqueeze(-1), _shifted(padded, at, grid))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, value, ctx.kernel_size = inputs
        ctx.save_for_backward(weights, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, value = ctx.saved_tensors
        grid, halo, offsets = value.shape[1:-2], _halo(ctx.kernel_size), _offsets(ctx.kernel_size)
        padded = F.pad(value, [0, 0, 0, 0, *halo])
        grad_weights = torch.stack([(grad * _shifted(padded, at, grid)).sum(-1) for at in offsets])
        shares = F.pad(weights.flip(0), [0, 0, *halo])  # [K, B, *padded grid, H]
        used = torch.stack([_shifted(x, at, grid) for x, at in zip(shares.unbind(), offsets, strict=True)])
        return grad_weights, _WeightedSum.apply(used, grad, ctx.kernel_size), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], weights: Tensor, value: Tensor, kernel_size: tuple[int, ...]
    ) -> tuple[Tensor, int]:
        """One larger batch."""
        count = info.batch_size
        weights, value = (
            x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((weights, value), in_dims, strict=False)
        )
        weights = weights.movedim(0, 1).flatten(1, 2)
        out = _WeightedSum.apply(weights, value.flatten(0, 1), kernel_size)
        return out.unflatten(0, (count, -1)), 0
