"""Tokens cut into stretches of chunks: forward, and backward from the states kept before each stretch.

Kept besides the inputs is one state a stretch; what a stretch needs besides is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.ops.checks import no_autocast
from nearfield.ops.linear.chunks import Stretch
from nearfield.ops.linear.operator import state_dtype


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk: int,
    stretch: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, V], last state [B, H, K, V], and the states before each stretch and at the end."""
    (batch, tokens, heads, dim), dv, wide = query.shape, value.shape[-1], state_dtype(query)
    out = value.new_empty(batch, tokens, heads, dv)
    states = query.new_empty(batch, heads, -(-tokens // stretch) + 1, dim, dv, dtype=wide)
    if initial_state is None:
        state = query.new_zeros(batch, heads, dim, dv, dtype=wide)
    else:
        state = initial_state.to(wide, copy=True)
    for number, start in enumerate(range(0, tokens, stretch)):
        piece = slice(start, start + stretch)
        states[:, :, number] = state
        found, state = _stretch(query, key, value, g, beta, scale, chunk, piece).run(state)
        place = out[:, piece]
        place.copy_(found.flatten(2, 3)[:, :, : place.shape[1]].transpose(1, 2))
    states[:, :, -1] = state
    return out, state, states


def backward(
    grad: Tensor,
    grad_state: Tensor,
    states: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk: int,
    stretch: int,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors, empty for those that are None."""
    inputs = (query, key, value, g, beta)
    # not empty_like: an expanded input has a gradient of its own in every place
    found = [states.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]
    grad_state = grad_state.to(states.dtype, copy=True)
    with no_autocast(query):
        for number in reversed(range(states.shape[2] - 1)):
            piece = slice(number * stretch, (number + 1) * stretch)
            pull = _chunks(grad, piece, chunk, query.shape[2], states.dtype)
            part = _stretch(query, key, value, g, beta, scale, chunk, piece)
            dq, *others, grad_state = part.backward(states[:, :, number], pull, grad_state)
            for total, own in zip(found, (dq * scale, *others), strict=True):
                if own is not None:
                    _put_back(total, own, piece)
    first = states.new_empty(0) if initial_state is None else grad_state.to(initial_state.dtype)
    return (*found, first)


def _stretch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    chunk: int,
    piece: slice,
) -> Stretch:
    def cut(x: Tensor) -> Tensor:
        return _chunks(x, piece, chunk, query.shape[2], state_dtype(query))

    gates: list[Any] = [x if x is None else cut(x if x.dim() == 4 else x.unsqueeze(-1)) for x in (g, beta)]
    return Stretch(cut(query) * scale, cut(key), cut(value), *gates)


def _chunks(x: Tensor, piece: slice, chunk: int, heads: int, wide: torch.dtype) -> Tensor:
    """Tokens of [B, T, heads or fewer, D] as [B, heads, chunks, C, D], the last chunk filled up by zeros."""
    x = x[:, piece].transpose(1, 2).to(wide)
    if x.shape[1] != heads:
        x = x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)
    size = 1 << (min(chunk, x.shape[2]) - 1).bit_length()  # a power of two
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def _put_back(total: Tensor, part: Tensor, piece: slice) -> None:
    """Write gradients [B, H, chunks, C, D] where `_chunks` took the tokens from."""
    place = total[:, piece]
    part = part.flatten(2, 3)[:, :, : place.shape[1]].transpose(1, 2)  # [B, T, H, D]
    if place.shape[2] != part.shape[2]:
        part = part.unflatten(2, (place.shape[2], -1)).sum(3)
    place.copy_(part if place.dim() == 4 else part.squeeze(-1))
