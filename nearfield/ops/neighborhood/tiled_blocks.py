"""One block of attention, many at a time: rows of queries against their keys, forward and backward.

Every piece of a tiled call ends here. On a CPU the fused kernel behind torch's own SDPA does the work; it
returns the log-sum-exp, and its backward takes *any* output and log-sum-exp. Handing it those of the whole
softmax, not of the piece, makes the gradients of pieces simply add up. Elsewhere plain matrix products do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Upstream(NamedTuple):
    """What a backward pass starts from: gradients of output and log-sum-exp, and the two themselves."""

    grad: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor  # finite: 0 for a row without keys

    def each(self, change: Callable[..., Tensor], *how: Any) -> Upstream:
        """`change(x, *how)` of all four, the log-sum-exps with a last dimension of one."""
        lse = change(self.lse.unsqueeze(-1), *how).squeeze(-1)
        grad_lse = self.grad_lse
        if grad_lse is not None:
            grad_lse = change(grad_lse.unsqueeze(-1), *how).squeeze(-1)
        return Upstream(change(self.grad, *how), grad_lse, change(self.out, *how), lse)


class Grads(NamedTuple):
    """Gradients of one piece; `scores` only where asked for."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor | None = None


def block_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of [n, h, r, d] queries on [n, h, c, d] keys; `mask` is added to the scores.

    `is_causal` shows row i the keys 0..i: aligned at the first key, whatever the lengths. A row whose mask is
    all -inf has an undefined log-sum-exp; `hidden_rows` finds such rows.
    """
    if query.device.type == "cpu":
        out, lse = FUSED(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
        return out, lse
    scores = _scores(query, key, mask, scale, is_causal)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    return weights.to(value.dtype) @ value, lse


def block_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    up: Upstream,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
    want_scores: bool = False,
) -> Grads:
    """Gradients through one piece, given what belongs to the whole softmax."""
    grad, grad_lse, out, lse = up
    if query.device.type == "cpu" and grad_lse is None and not want_scores:
        found = FUSED_BACKWARD(grad, query, key, value, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
        return Grads(*found)
    weights = torch.exp(_scores(query, key, mask, scale, is_causal).sub_(lse.unsqueeze(-1)))
    delta = (grad.to(lse.dtype) * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    grad_value = weights.to(grad.dtype).transpose(-1, -2) @ grad
    grad_scores = weights.mul_((grad @ value.transpose(-1, -2)).to(lse.dtype).sub_(delta))
    dense = grad_scores.to(query.dtype)
    return Grads(
        (dense @ key).mul_(scale),
        (dense.transpose(-1, -2) @ query).mul_(scale),
        grad_value,
        grad_scores if want_scores else None,
    )


def hidden_rows(mask: Tensor) -> Tensor:
    """Rows of an additive mask that show no key at all."""
    return mask.amax(-1) == -torch.inf


def merge_(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Adds a second set of keys to a softmax in place: `out` and `lse` become those of the union."""
    total = torch.logaddexp(lse, more_lse)
    share = torch.exp(more_lse - total).nan_to_num_(0.0).unsqueeze(-1)  # nan: neither set has a key
    lse.copy_(total)
    if out.dtype == share.dtype:
        out.lerp_(more, share)
    else:
        out.copy_(out.to(share.dtype).lerp_(more.to(share.dtype), share))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax statistics and summed gradients of a dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    scores = (query @ key.transpose(-1, -2)).to(sum_dtype(query.dtype)).mul_(scale)
    if mask is not None:
        scores.add_(mask)
    if is_causal:
        rows, keys = (torch.arange(n, device=scores.device) for n in scores.shape[-2:])
        scores.masked_fill_(keys > rows.unsqueeze(-1), -torch.inf)
    return scores
