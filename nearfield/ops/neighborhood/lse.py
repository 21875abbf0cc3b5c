"""The gradient of the log-sum-exp for kernels that have none, by what they can do.

    d lse_i / d q_i = scale * sum_j p_ij k_j        d lse_i / d k_j = scale * p_ij q_i

Both are attention once more with the keys for values: its output, and the gradient of its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# query, key, value, additional keys, additional values -> output
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def differentiable(
    lse: Tensor, query: Tensor, key: Tensor, more_keys: Tensor | None, scale: float, attend: Attend
) -> Tensor:
    """`lse`, whose gradient reaches the query and all keys; costs nothing where the loss does not use it."""
    wanted = any(x is not None and x.requires_grad for x in (query, key, more_keys))
    if not (torch.is_grad_enabled() and wanted):
        return lse.detach()
    if torch.compiler.is_compiling():  # a compiler drops the second attention itself where nobody uses it
        fixed = (query.detach(), key.detach(), key, None if more_keys is None else more_keys.detach())
        score = scale * (query * attend(*fixed, more_keys)).sum(-1, dtype=lse.dtype)
        return lse.detach() + (score - score.detach())
    found: Tensor = _LogSumExp.apply(lse.detach(), query, key, more_keys, scale, attend)
    return found


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lse: Tensor, query: Tensor, key: Tensor, more_keys: Any, *rest: Any) -> Tensor:
        ctx.save_for_backward(query, key, more_keys)
        ctx.rest = rest
        return lse.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, more_keys = ctx.saved_tensors
        scale, attend = ctx.rest
        values = [x if x is None else x.detach().requires_grad_() for x in (key, more_keys)]
        with torch.enable_grad():
            mean_key = attend(query.detach(), key.detach(), values[0], more_keys, values[1])
        grad = (scale * grad).unsqueeze(-1)
        leaves = [x for x in values if x is not None]
        of_keys = torch.autograd.grad(mean_key, leaves, (grad * query).to(query.dtype))
        return (
            None,
            (grad * mean_key.detach()).to(query.dtype),
            of_keys[0],
            of_keys[1] if more_keys is not None else None,
            None,
            None,
        )
