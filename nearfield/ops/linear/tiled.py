"""Linear attention in chunks: pure torch, any device, forward and backward, memory linear in tokens.

A chunk of one token is the recurrence, one of all tokens the quadratic form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfield.ops.linear import operator, stretches
from nearfield.ops.linear.operator import state_dtype

CHUNK = 32  # tokens; a power of two. Measured: 64 takes a quarter longer on a CPU
CHUNKS = 16  # in a stretch


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    *,
    scale: float,
    form: str,
) -> tuple[Tensor, Tensor]:
    """Output `[B, T, H, V]` and the last state `[B, H, K, V]`, of checked arguments."""
    if form == "parallel":
        chunk = stretch = max(query.shape[1], 1)
    else:
        chunk = CHUNK if form == "chunk" else 1
        stretch = chunk * CHUNKS
    out, state, _ = _forward(query, key, value, g, beta, initial_state, scale, chunk, stretch)
    return out, state


def attend_everywhere(
    query: Tensor, key: Tensor, value: Tensor, initial_state: Tensor | None, *, scale: float, form: str
) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, V]` and the state `[B, H, K, V]` when every query sees every key."""
    wide = state_dtype(query)
    heads, kv_heads = query.shape[2], key.shape[2]
    q, k, v = (x.to(wide).transpose(1, 2) for x in (query, key, value))  # [B, heads, N, D]
    q = q.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, N, K]: heads that share keys share their state
    state = (k.mT @ v).unsqueeze(2)  # [B, Hkv, 1, K, V]
    if initial_state is not None:
        state = state + initial_state.to(wide).unflatten(1, (kv_heads, -1))
    if form == "parallel":
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        out = (q @ k.mT) @ v
        if initial_state is not None:
            out = out + q @ initial_state.to(wide).unflatten(1, (kv_heads, -1))
    else:
        out = q @ state
    state = state.expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2)
    return (out * scale).flatten(1, 2).transpose(1, 2).to(value.dtype), state


@torch.library.custom_op("nearfield::tiled_linear", mutates_args=(), schema=operator.FORWARD)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return stretches.forward(*arguments)


@torch.library.custom_op("nearfield::tiled_linear_backward", mutates_args=(), schema=operator.BACKWARD)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    return stretches.backward(*arguments)


operator.register("tiled", _forward, _backward)
