"""Dense attention with a choice of score function: what turns scores into weights."""

from __future__ import annotations

from difflib import get_close_matches

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import check_heads, no_transform, scale_or_default, under_autocast
from nearfield.ops.dense import native, reference
from nearfield.ops.dense.reference import SCORES, Score
from nearfield.ops.kernels import missing, unfit
from nearfield.ops.neighborhood.native import decode

__all__ = ["SCORES", "Score", "dense_attention"]

OP = "dense_attention"
# Keys and products from which the native kernels are faster than torch's, which has less to do around them.
LIMITS = {torch.float32: (256, 6e7), torch.bfloat16: (32, 4e6), torch.float16: (16, 1e6)}
FEW = 8  # rows (queries times heads that share a key head) up to which reading the keys is what takes time


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
    if mask is not None:
        full = (batch, num_heads, num_queries, num_keys)
        if mask.dim() > 4 or any(
            a not in (1, b) for a, b in zip(reversed(mask.shape), reversed(full), strict=False)
        ):
            raise ValueError(f"mask has shape {list(mask.shape)}. It must broadcast to {list(full)}.")
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"mask has dtype {mask.dtype}. Give booleans, True where a key is seen, or numbers to add."
            )
    if is_causal and num_queries > num_keys:
        raise ValueError(
            f"{num_queries} causal queries for {num_keys} keys. Queries are the last of the keys."
        )
    factor = scale_or_default(scale, head_dim)

    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    is_few = not needs_grad and num_queries * (num_heads // key.shape[2]) <= FEW

    def ask_native() -> Verdict:
        if score != "softmax":
            return Verdict("the CPU kernels know only the softmax.")
        if is_few and num_keys and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)):
            return Verdict(no_transform() or unfit(query, value, factor) or missing())
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] != 1):
            return Verdict("the CPU kernels take a mask of keys, the same for all heads and queries.")
        if num_keys == 0:
            return Verdict("the CPU kernels need at least one key.")
        reason = no_transform() or unfit(query, value, factor) or missing()
        if reason is None and not is_causal and num_queries != num_keys and not is_worth_it():
            return Verdict(None, "torch's fused attention is faster on so few keys, or so little work.")
        return Verdict(reason)

    def is_worth_it() -> bool:
        if torch.compiler.is_exporting():
            return False  # sizes may move there, and would be held to this side of the limits
        few, little = LIMITS[query.dtype]
        products = batch * num_heads * num_queries * num_keys * (head_dim + value.shape[-1])
        return num_keys >= few and products >= little

    def ask_tiled() -> Verdict:
        return Verdict(None if score == "softmax" else "torch's fused attention knows only the softmax.")

    name = choose(OP, backend, {"native": ask_native, "tiled": ask_tiled, "reference": Verdict})

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name == "reference":
            weigh = SCORES[score] if isinstance(score, str) else score
            visible, addend = _seen(query, key, mask, is_causal)
            return reference.attend(
                query, key, value, score=weigh, visible=visible, addend=addend, scale=factor
            )
        if name == "native" and is_few:
            visible, _ = _seen(query, key, mask, is_causal and num_queries > 1)
            if visible is not None:
                visible = visible[:, 0].expand(-1, num_queries, num_keys)
            return decode(query, key, value, visible, None, factor)[0]
        if name == "native":
            key_mask = None if mask is None else mask[:, 0, 0].expand(batch, num_keys)
            return native.attend(query, key, value, key_mask, is_causal, factor)
        return _fused(query, key, value, mask, is_causal, factor)

    return under_autocast(attend, query, key, value)


def _seen(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Which keys each query sees, and what is added to its scores; both broadcast to `[B, H, N, M]`."""
    visible = mask if mask is not None and mask.dtype == torch.bool else None
    addend = mask if visible is None else None
    if is_causal:
        num_queries, num_keys = query.shape[1], key.shape[1]
        rows = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
        past = torch.arange(num_keys, device=query.device) <= rows
        visible = past[None, None] if visible is None else visible & past
    return visible, addend


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    square = grouped = False  # branches, because a trace would make comparisons symbols, which torch refuses
    if mask is None and is_causal and query.shape[1] == key.shape[1]:
        square = True
    if query.shape[2] != key.shape[2]:
        grouped = True
    visible, addend = (None, None) if square else _seen(query, key, mask, is_causal)
    bias = visible
    if addend is not None:
        bias = addend.to(query.dtype)
        bias = bias if visible is None else bias.masked_fill(~visible, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=square, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
