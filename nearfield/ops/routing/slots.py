"""Tokens copied into slots, and slots summed back onto tokens: each the other's derivative.

A token may be in many slots, so plain indexing would add with atomics on a GPU, in an order that changes from
run to run. Here slots are sorted by token once, and each token's run of slots is summed by doubling steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.ops.routing.members import first_at_least


class Slots(NamedTuple):
    """Which token stands in each slot; `[B, H, S]` with the number of tokens for an empty slot."""

    token: Tensor
    order: Tensor  # [B, H, S]: slots sorted by token
    first: Tensor  # [B, H, N]: where in that order a token's slots begin
    counts: Tensor  # [B, H, N]: how many it has
    most: int  # slots that one token can have


def slots(token: Tensor, num_tokens: int, most: int) -> Slots:
    """The slots that hold `token`."""
    order = token.argsort(dim=-1, stable=True)
    bounds = first_at_least(token.gather(-1, order), torch.arange(num_tokens + 1, device=token.device))
    return Slots(token, order, bounds[..., :-1], bounds.diff(dim=-1), most)


def take(x: Tensor, at: Slots) -> Tensor:
    """`[B, H, S, D]`: in each slot the row of its token in `x [B, H, N, D]`; in an empty slot any row."""
    found: Tensor = _Take.apply(x, at.token, at.order, at.first, at.counts, at.most)
    return found


def add_up(y: Tensor, at: Slots) -> Tensor:
    """`[B, H, N, D]`: for each token the sum over its slots in `y [B, H, S, D]`; 0 if it has none."""
    found: Tensor = _AddUp.apply(y, at.token, at.order, at.first, at.counts, at.most)
    return found


def rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[..., index, :]`, each row of the batch by itself."""
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


class _Take(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, token: Tensor, order: Tensor, first: Tensor, counts: Tensor, most: int) -> Tensor:
        return rows(x, token.clamp(max=x.shape[-2] - 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, token, order, first, counts, ctx.most = inputs
        ctx.save_for_backward(token, order, first, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token, order, first, counts = ctx.saved_tensors
        found = _AddUp.apply(grad, token, order, first, counts, ctx.most)
        return found, None, None, None, None, None


class _AddUp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, token: Tensor, order: Tensor, first: Tensor, counts: Tensor, most: int) -> Tensor:
        y, token = rows(y, order), token.gather(-1, order)
        step = 1
        while step < most:  # then each slot holds the sum of the 2 * step slots of its token from it on
            same = token[..., step:] == token[..., :-step]
            more = torch.where(same[..., None], y[..., step:, :], 0)
            y = y + F.pad(more, (0, 0, 0, step))
            step *= 2
        found = rows(y, first.clamp(max=y.shape[-2] - 1))
        return found.masked_fill((counts == 0)[..., None], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, token, order, first, counts, ctx.most = inputs
        ctx.save_for_backward(token, order, first, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token, order, first, counts = ctx.saved_tensors
        found = _Take.apply(grad, token, order, first, counts, ctx.most)
        return found.masked_fill((token == grad.shape[-2])[..., None], 0), None, None, None, None, None
