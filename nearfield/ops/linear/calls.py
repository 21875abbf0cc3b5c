"""What every linear attention does around its mathematics: checks, states, packing, autocast, sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nearfield.ops.checks import check, check_heads, under_autocast
from nearfield.ops.linear.dispatch import check_form
from nearfield.ops.linear.packed import Run, States, Tensors, ends_of, run_packed

LAYOUT = "[batch, tokens, heads, head_dim]"
GRID_LAYOUT = "[batch, one to three grid sides, heads, head_dim]"
EPSILON = 1e-10  # added to a sum that is divided by, as in flash-linear-attention

State = Tensor | tuple[Tensor, ...] | None
Attend = Callable[..., tuple[Tensor, Tensor]]


class LinearResult(NamedTuple):
    """The output and, if it was asked for, what continues the sequence as the next call's `initial_state`."""

    output: Tensor
    final_state: State


def check_call(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, form: str) -> None:
    """Refuse tensors that do not fit one another or the order asked for."""
    check_form(form)
    if is_causal and isinstance(query, Tensor) and query.dim() in (5, 6):
        raise ValueError(
            f"query has shape {list(query.shape)}: a grid has no causal order. "
            "Flatten it in the order that you mean, or pass is_causal=False."
        )
    rank, layout = ((4,), LAYOUT) if is_causal else ((4, 5, 6), GRID_LAYOUT)
    check_heads(query, key, value, rank=rank, layout=layout)
    if is_causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} causal queries for {key.shape[1]} keys. Give as many of both; "
            "what came before is in initial_state."
        )


def state_shapes(query: Tensor, value: Tensor, normalize: bool) -> list[tuple[int, ...]]:
    """Of S and, with `normalize`, of the sum of keys, without their batch."""
    heads, dim, dv = query.shape[-2], query.shape[-1], value.shape[-1]
    return [(heads, dim, dv), (heads, dim)] if normalize else [(heads, dim, dv)]


def call(
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensors,
    initial_state: State,
    shapes: Sequence[tuple[int, ...]],
    cu_seqlens: Tensor | Sequence[int] | None,
    output_final_state: bool,
) -> LinearResult:
    """`run` on tokens in one row, sequence by sequence if they are packed, in the dtype of autocast."""
    places = query.shape[1:-2]
    ends = None
    if cu_seqlens is not None:
        if query.dim() != 4 or query.shape[1] != key.shape[1]:
            raise ValueError(
                f"query has shape {list(query.shape)}, key {list(key.shape)}. "
                "Packed, both are [1, all tokens, heads, head_dim]."
            )
        ends = ends_of(cu_seqlens, query.shape[0], query.shape[1])
    state = _checked(initial_state, query.shape[0] if ends is None else len(ends) - 1, shapes, query)

    def solve(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if ends is not None:
            out, last = run_packed(run, ends, query, key, value, gates, state)
        else:
            q, k, v = (x.flatten(1, -3) for x in (query, key, value))
            out, last = run(q, k, v, gates, state)
        return out.unflatten(1, places).to(query.dtype), last

    out, last = under_autocast(solve, query, key, value)
    if not output_final_state:
        return LinearResult(out, None)
    return LinearResult(out, last if len(last) > 1 else last[0])


def plain(attend: Attend) -> Run:
    """The products alone; the state is S."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, gates: Tensors, state: States
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, last = attend(query, key, value, **gates, initial_state=None if state is None else state[0])
        return out, (last,)

    return run


def divided(attend: Attend) -> Run:
    """The products divided by the sum of their weights; the state is (S, z)."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, gates: Tensors, state: States
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        products, weights, last = with_weights(attend, query, key, value, gates, state)
        return products / (weights + EPSILON), last

    return run


def with_weights(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, gates: Tensors, state: States
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The products [B, T, H, V], the sums of their weights [B, T, H, 1], and the state (S, z).

    The sums are the products with one channel more of the values, which is 1. In float32 at least: a quotient
    of sums would show how these were rounded, and in float16 they soon overflow.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    value = torch.cat([value, value.new_ones(()).expand(*value.shape[:-1], 1)], -1)
    first = None if state is None else torch.cat([state[0], state[1].unsqueeze(-1)], -1)
    out, last = attend(query.to(wide), key.to(wide), value.to(wide), **gates, initial_state=first)
    return out[..., :-1], out[..., -1:], (last[..., :-1], last[..., -1])


def _checked(initial_state: State, rows: int, shapes: Sequence[tuple[int, ...]], query: Tensor) -> States:
    """The initial state as a tuple in the dtype of states, if its parts have `shapes` behind a batch."""
    if initial_state is None:
        return None
    parts = (initial_state,) if isinstance(initial_state, Tensor) else tuple(initial_state)
    if len(parts) != len(shapes):
        wanted = ", ".join(str([rows, *shape]) for shape in shapes)
        raise ValueError(f"initial_state holds {len(parts)} tensors. It must hold {len(shapes)}: {wanted}.")
    for part, shape in zip(parts, shapes, strict=True):
        check("initial_state", part, (rows, *shape), query)
    return tuple(part.to(torch.promote_types(query.dtype, torch.float32)) for part in parts)
