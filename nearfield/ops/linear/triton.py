"""Linear attention by Triton kernels: on a GPU, forward and backward, states and sums in float32.

The backward of the delta rule is computed by torch, from the states that the kernels keep.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nearfield.ops.linear import operator, stretches
from nearfield.ops.linear import triton_kernels as kernels

CHUNK = 64  # tokens; a power of two, at least 16
LEVELS = CHUNK.bit_length() - 1
STAGES = 1  # loads in flight: more take shared memory that smaller GPUs lack
STATES = 16  # the backward of the delta rule starts from every so many-th state
WIDEST_DELTA = 256  # channels of keys: all of them are in one block there
DEVICES = ("cuda", "xpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing(device: str) -> str | None:
    """Why the kernels cannot run on tensors of this kind of device, or None."""
    if device not in DEVICES and not interpreted():
        return f"the GPU kernels need tensors on a GPU, these are on {device!r}."
    if find_spec("triton") is None:
        return "the package triton is not installed: pip install triton."
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# to a trace the answers are constants
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unfit(query: Tensor, beta: Tensor | None) -> str | None:
    """Why the kernels could not run this even on a GPU, or None."""
    if query.dtype not in DTYPES:
        return f"the GPU kernels compute in float32, bfloat16 and float16, not in {query.dtype}."
    if beta is not None and query.shape[-1] > WIDEST_DELTA:
        return f"the delta rule takes up to {WIDEST_DELTA} channels of keys there, given {query.shape[-1]}."
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, T, H, V]` and the last state `[B, H, K, V]`, of checked arguments."""
    out, state, _ = _forward(query, key, value, g, beta, initial_state, scale, CHUNK, CHUNK)
    return out, state


@torch.library.custom_op("nearfield::triton_linear", mutates_args=(), schema=operator.FORWARD)
def _forward(
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
    q, k, v = (_side_by_side(x) for x in (query, key, value))
    (batch, tokens, heads, dim), dv = q.shape, v.shape[-1]
    count, group = -(-tokens // chunk), heads // k.shape[2]
    kind, gate = _gate(q, g)
    out = v.new_empty(batch, tokens, heads, dv)
    states = q.new_empty(batch, heads, count + 1, dim, dv, dtype=torch.float32)
    first = states if initial_state is None else initial_state.to(torch.float32).contiguous()
    has_initial = initial_state is not None
    settings = {"KIND": kind, "C": chunk, "PRECISION": _precision(q), "num_stages": STAGES}
    bk, bv = _block(k), _block(v)
    sizes = (tokens, heads, group, dim, dv)
    with torch.cuda.device_of(q):
        written, share = v, group
        if beta is None:
            kernels.states_kernel[_split(dim, bk), _split(dv, bv), batch * heads](
                k, v, gate, first, states, *_strides(k), *_strides(v), *_strides(gate), *sizes, count,
                HAS_INITIAL=has_initial, BK=bk, BV=bv, **settings,
            )  # fmt: skip
        else:
            b = beta.unsqueeze(-1)
            written, share = q.new_empty(batch, tokens, heads, dv, dtype=torch.float32), 1
            forgotten = q.new_empty(q.shape, dtype=torch.float32)
            kernels.written_kernel[count, batch * heads](
                k, v, gate, b, written, forgotten, *_strides(k), *_strides(v), *_strides(gate), *_strides(b),
                *sizes, LEVELS=LEVELS, BK=bk, BV=bv, **settings,
            )  # fmt: skip
            wide = max(16, 1 << (dim - 1).bit_length())
            narrow = min(bv, 32)
            kernels.delta_states_kernel[_split(dv, narrow), batch * heads](
                k, gate, written, forgotten, first, states, *_strides(k), *_strides(gate), *sizes,
                count, HAS_INITIAL=has_initial, BK=wide, BV=narrow, **settings,
            )  # fmt: skip
        scores = _scores(q, k, gate, settings)
        kernels.outputs_kernel[_split(dv, bv), count, batch * heads](
            q, written, gate, scores, states, out, *_strides(q), *_strides(written), *_strides(gate),
            tokens, heads, share, dim, dv, count, scale, BK=bk, BV=bv, **settings,
        )  # fmt: skip
    return out, states[:, :, -1].clone(), states


@torch.library.custom_op("nearfield::triton_linear_backward", mutates_args=(), schema=operator.BACKWARD)
def _backward(
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
    if beta is not None:
        starts = states[:, :, :-1:STATES]
        starts = torch.cat([starts, states[:, :, -1:]], 2)
        tensors = (query, key, value, g, beta, initial_state)
        return stretches.backward(grad, grad_state, starts, *tensors, scale, chunk, STATES * stretch)
    q, k, v, pull = (_side_by_side(x) for x in (query, key, value, grad))
    (batch, tokens, heads, dim), dv, count = q.shape, v.shape[-1], states.shape[2] - 1
    group = heads // k.shape[2]
    kind, gate = _gate(q, g)
    settings = {"KIND": kind, "C": chunk, "PRECISION": _precision(q), "num_stages": STAGES}
    bk, bv = _block(k), _block(v)
    after, first = torch.empty_like(states), states.new_empty(batch, heads, dim, dv)
    d_scores = states.new_empty(batch, heads, count, chunk, chunk)
    dq = q.new_empty(q.shape)
    # keys and values that heads share get a part from each, to be added up
    dk, dv_heads = (
        q.new_empty(batch, tokens, heads, x.shape[-1], dtype=x.dtype if group == 1 else torch.float32)
        for x in (k, v)
    )
    dg = states.new_empty(0)
    if g is not None:
        dg = states.new_empty(g.shape if kind == 2 else (_split(dim, bk), *g.shape))
    last = grad_state.to(torch.float32).contiguous()
    with torch.cuda.device_of(q):
        scores = _scores(q, k, gate, settings)
        kernels.state_gradients_kernel[_split(dim, bk), _split(dv, bv), batch * heads](
            q, pull, gate, last, after, first, *_strides(q), *_strides(pull), *_strides(gate),
            tokens, heads, dim, dv, count, scale, BK=bk, BV=bv, **settings,
        )  # fmt: skip
        kernels.value_gradients_kernel[_split(dv, bv), count, batch * heads](
            k, pull, gate, scores, after, dv_heads, *_strides(k), *_strides(pull), *_strides(gate),
            tokens, heads, group, dim, dv, count, scale, BK=bk, BV=bv, **settings,
        )  # fmt: skip
        kernels.score_gradients_kernel[count, batch * heads](
            v, pull, d_scores, *_strides(v), *_strides(pull), tokens, heads, group, dv, count, scale,
            C=chunk, BV=bv, PRECISION=settings["PRECISION"], num_stages=STAGES,
        )  # fmt: skip
        kernels.gradients_kernel[_split(dim, bk), count, batch * heads](
            q, k, v, gate, pull, d_scores, states, after, dq, dk, dg, *_strides(q), *_strides(k),
            *_strides(v), *_strides(gate), *_strides(pull), tokens, heads, group, dim, dv, count, scale,
            LEVELS=LEVELS, BK=bk, BV=min(bv, 32), **settings,
        )  # fmt: skip
    if group > 1:
        dk, dv_heads = (x.unflatten(2, (-1, group)).sum(3).to(k.dtype) for x in (dk, dv_heads))
    if g is not None:
        dg = (dg if kind == 2 else dg.sum(0)).to(g.dtype)
    first = states.new_empty(0) if initial_state is None else first.to(initial_state.dtype)
    return dq, dk, dv_heads, dg, states.new_empty(0), first


operator.register("triton", _forward, _backward)


def _scores(q: Tensor, k: Tensor, gate: Tensor, settings: dict[str, Any]) -> Tensor:
    (batch, tokens, heads, dim), chunk = q.shape, settings["C"]
    count = -(-tokens // chunk)
    out = q.new_empty(batch, heads, count, chunk, chunk, dtype=torch.float32)
    kernels.scores_kernel[count, batch * heads](
        q, k, gate, out, *_strides(q), *_strides(k), *_strides(gate), tokens, heads, heads // k.shape[2], dim,
        count, LEVELS=LEVELS, BK=_block(k), **settings,
    )  # fmt: skip
    return out


def _gate(q: Tensor, g: Tensor | None) -> tuple[int, Tensor]:
    """The kind of decay, and a tensor to point at: without decay nobody reads it."""
    if g is None:
        return 0, q
    return (1, g.unsqueeze(-1)) if g.dim() == 3 else (2, _side_by_side(g))


def _side_by_side(x: Tensor) -> Tensor:
    """`x` with its channels next to one another, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """From batch to batch, token to token and head to head."""
    return x.stride()[:3]


def _split(size: int, block: int) -> int:
    return -(-size // block)


def _block(x: Tensor) -> int:
    """Channels of `x` that a program takes at once: fewer where no tensor core multiplies."""
    return min(32 if x.dtype == torch.float32 else 64, max(16, 1 << (x.shape[-1] - 1).bit_length()))


def _precision(q: Tensor) -> str:
    """Products of float32 are exact to float32; those of halves keep more bits than their inputs have."""
    return "ieee" if q.dtype == torch.float32 else "tf32"
