"""Dense attention with a choice of score function: what turns scores into weights."""

from __future__ import annotations

from difflib import get_close_matches

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import check_heads, scale_or_default, under_autocast
from nearfield.ops.dense import reference
from nearfield.ops.dense.reference import SCORES, Score

__all__ = ["SCORES", "Score", "dense_attention"]

OP = "dense_attention"


def dense_attention(
    query: Float[Tensor, "b n heads dim"],
    key: Float[Tensor, "b m kv_heads dim"],
    value: Float[Tensor, "b m kv_heads dv"],
    *,
    score: str | Score = "softmax",
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b n heads dv"]:
    """Attention of every query to every key, with weights made from the scores by `score`.

        dense_attention(q, k, v)                      # softmax: weights sum to one
        dense_attention(q, k, v, score="relu")        # relu(scale * q k) / number of visible keys

    `score` may also be a function `(scores, visible) -> weights` over `[B, H, N, M]`. `mask` broadcasts to
    that shape: boolean, True where the query sees the key, or numbers added to the scores. Causal queries
    fewer than the keys are the last ones. A query that sees nothing gets 0.
    """
    check_heads(query, key, value, rank=(4,), layout="[batch, tokens, heads, head_dim]")
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys = key.shape[1]
    if isinstance(score, str) and score not in SCORES:
        near = get_close_matches(score, SCORES, n=1) or list(SCORES)
        raise ValueError(
            f"score={score!r} is unknown. Did you mean {near[0]!r}? "
            f"Give one of {', '.join(SCORES)}, or a function."
        )
    visible, addend = None, None
    if mask is not None:
        full = (batch, num_heads, num_queries, num_keys)
        if mask.dim() > 4 or any(
            a not in (1, b) for a, b in zip(reversed(mask.shape), reversed(full), strict=False)
        ):
            raise ValueError(f"mask has shape {list(mask.shape)}. It must broadcast to {list(full)}.")
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.dtype == torch.bool:
            visible = mask
        elif mask.is_floating_point():
            addend = mask
        else:
            raise TypeError(
                f"mask has dtype {mask.dtype}. Give booleans, True where a key is seen, or numbers to add."
            )
    if is_causal:
        if num_queries > num_keys:
            raise ValueError(
                f"{num_queries} causal queries for {num_keys} keys. Queries are the last of the keys."
            )
        rows = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
        past = torch.arange(num_keys, device=query.device) <= rows
        visible = past[None, None] if visible is None else visible & past
    factor = scale_or_default(scale, head_dim)
    name = choose(OP, backend, {"tiled": lambda: _fused_verdict(score), "reference": Verdict})

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name == "reference":
            weigh = SCORES[score] if isinstance(score, str) else score
            return reference.attend(
                query, key, value, score=weigh, visible=visible, addend=addend, scale=factor
            )
        return _fused(query, key, value, mask, visible, addend, is_causal, factor)

    return under_autocast(attend, query, key, value)


def _fused_verdict(score: str | Score) -> Verdict:
    return Verdict(None if score == "softmax" else "torch's fused attention knows only the softmax.")


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    visible: Tensor | None,
    addend: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    square = grouped = False  # branches, because a trace would make comparisons symbols, which torch refuses
    if mask is None and is_causal and query.shape[1] == key.shape[1]:
        square, visible = True, None
    if query.shape[2] != key.shape[2]:
        grouped = True
    bias = visible
    if addend is not None:
        bias = addend.to(query.dtype)
        bias = bias if visible is None else bias.masked_fill(~visible, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=square, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
