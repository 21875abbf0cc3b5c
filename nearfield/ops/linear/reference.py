"""Linear attention by its definitions: all pairs at once, piece by piece, or one position after another.

With a state S [K, V] for each head, log decays g [T, K] and strengths beta [T]:

    S <- diag(exp(g_t)) S
    S <- S + k_t^T v_t                        or, by the delta rule,  S + beta_t k_t^T (v_t - k_t S)
    o_t = scale * q_t S

Runs on every device and in float64, and supports everything torch can do: double backward, forward-mode
derivatives, vmap, tracing.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 64  # positions of a chunk


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
    """Output `[B, T, H, V]` and the last state `[B, H, K, V]`; every position sees itself and the past."""
    q, k, v = _by_head(query, key, value)
    tokens = q.shape[2]
    if g is None:
        g = q.new_zeros(*q.shape[:3], 1)
    else:
        g = (g if g.dim() == 4 else g.unsqueeze(-1)).to(q.dtype).transpose(1, 2)  # [B, H, T, K or 1]
    if beta is not None:
        beta = beta.to(q.dtype).transpose(1, 2)  # [B, H, T]
    state = _first(q, v, initial_state)
    advance = _step if form == "recurrent" else _all_pairs
    length = {"recurrent": 1, "chunk": PIECE, "parallel": max(tokens, 1)}[form]
    outs = [v[:, :, :0]]
    for start in range(0, tokens, length):
        piece = slice(start, start + length)
        strength = None if beta is None else beta[:, :, piece]
        out, state = advance(q[:, :, piece], k[:, :, piece], v[:, :, piece], g[:, :, piece], strength, state)
        outs.append(out * scale)
    return torch.cat(outs, 2).transpose(1, 2).to(value.dtype), state


def attend_everywhere(
    query: Tensor, key: Tensor, value: Tensor, initial_state: Tensor | None, *, scale: float, form: str
) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, V]` and the state `[B, H, K, V]` when every query sees every key."""
    q, k, v = _by_head(query, key, value)
    before = state = _first(q, v, initial_state)
    length = {"recurrent": 1, "chunk": PIECE, "parallel": max(k.shape[2], 1)}[form]
    for start in range(0, k.shape[2], length):
        state = state + k[:, :, start : start + length].mT @ v[:, :, start : start + length]
    out = (q @ k.mT) @ v + q @ before if form == "parallel" else q @ state
    return (out * scale).transpose(1, 2).to(value.dtype), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One position."""
    state = state * g.exp().mT
    if beta is not None:
        v = beta.unsqueeze(-1) * (v - k @ state)
    state = state + k.mT @ v
    return q @ state, state


def _all_pairs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Several positions by the matrix of all their pairs."""
    tokens = q.shape[2]
    past = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril(-1)
    now = torch.eye(tokens, dtype=torch.bool, device=q.device)
    # what key s has decayed by at query t: the sum of g after s up to t, term by term, so nothing cancels
    fade = g.unsqueeze(3).masked_fill(~past.unsqueeze(-1), 0).cumsum(2)  # [B, H, t, s, K or 1]
    fade = fade.masked_fill(~(past | now).unsqueeze(-1), -torch.inf).exp()
    since_start = g.cumsum(2).exp()  # [B, H, T, K or 1]
    if beta is not None:
        strength = beta.unsqueeze(-1)
        overlap = torch.einsum("bhtk,bhsk,bhtsk->bhts", k, k, fade.expand(*fade.shape[:4], k.shape[-1]))
        system = (strength * overlap).masked_fill(~past, 0) + now.to(q.dtype)
        wanted = strength * (v - (k * since_start) @ state)
        v = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    weights = torch.einsum("bhtk,bhsk,bhtsk->bhts", q, k, fade.expand(*fade.shape[:4], q.shape[-1]))
    out = weights @ v + (q * since_start) @ state
    state = state * since_start[:, :, -1:].mT + (k * fade[:, :, -1]).mT @ v
    return out, state


def _by_head(*tensors: Tensor) -> list[Tensor]:
    """`[B, T, heads, D]` as `[B, H, T, D]` with as many heads as the first, in float32 at least."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    heads = tensors[0].shape[2]
    return [x.to(wide).repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in tensors]


def _first(q: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    return initial_state.to(q.dtype)
