"""Selective scans by the C++ kernels of csrc/scan.h: on a CPU, forward and backward, any strides."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from nearfield.core import library
from nearfield.ops.kernels import DTYPES, call, missing, side_by_side
from nearfield.ops.scan import operator
from nearfield.ops.scan.operator import BACKWARD, DT_BIAS, FORWARD, INITIAL_STATE, NUM_TENSORS, D

NAME = "nearfield::native_scan"
LANES = 16
WIDEST = 256  # states of a channel
MISFIT = (
    "The tensors do not fit one another. Call the functions of nearfield.ops.scan, which say what is wrong."
)
TOKENS = ("x", "dt", "z", "B", "C")  # fields of tensors with tokens


def supports(x: Tensor, A: Tensor) -> str | None:
    """Why the kernels cannot run this, or None."""
    if x.device.type != "cpu":
        return f"the CPU kernels cannot read tensors on {x.device.type!r}."
    if x.dtype not in DTYPES:
        return f"the CPU kernels compute in float32, bfloat16 and float16, not in {x.dtype}."
    if A.shape[-1] > WIDEST:
        return f"the CPU kernels take 1 to {WIDEST} states, given {A.shape[-1]}."
    return missing()


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: list[int] | None,
    dt_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, C] and last states [sequences, C, N] for B and C of [B, T, G, N]."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in tensors)
    out, state, _ = _forward(*tensors, cu_seqlens, dt_softplus, reverse, keep)
    return out, state


def chunk_states(x: Tensor, A: Tensor, B: Tensor, cu_seqlens: Any) -> tuple[int, ...]:
    """Shape of the states that the forward keeps: at the start of each chunk, in whole lanes of a group."""
    (batch, tokens, channels), (groups, state) = x.shape, B.shape[2:]
    rows = max(8, min(64, 1024 // state))  # as csrc/scan.h has it
    chunks = batch * tokens // rows + operator.num_sequences(x, cu_seqlens)
    return chunks, groups * -(-(channels // groups) // LANES), state, LANES


@torch.library.custom_op(NAME, mutates_args=(), device_types="cpu", schema=FORWARD)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, (cu_seqlens, dt_softplus, reverse, keep) = _tidy(arguments), arguments[NUM_TENSORS:]
    x, _, A, B, *_ = arguments
    kept = chunk_states(x, A, B, cu_seqlens) if keep else (0,)
    out, state, states = operator.results(x, A, kept, cu_seqlens)
    problem = _describe(given, cu_seqlens, dt_softplus, reverse)
    problem.out, problem.final_state = _place(out), state.data_ptr()
    problem.chunk_states = states.data_ptr() if keep else None
    call("nearfield_scan_forward", problem)
    return out, state, states


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), device_types="cpu", schema=BACKWARD)
def _backward(
    grad: Tensor | None, grad_state: Tensor | None, kept: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    given, (cu_seqlens, dt_softplus, reverse) = _tidy(arguments), arguments[NUM_TENSORS:]
    x, _, A, B, *_ = arguments
    grad = torch.zeros_like(x) if grad is None else grad
    wanted = chunk_states(x, A, B, cu_seqlens)
    if grad.shape != x.shape or grad.dtype != x.dtype or kept.shape != wanted or kept.dtype != torch.float32:
        raise ValueError(MISFIT)
    found = list(operator.gradients(arguments))
    for i in (2, D, DT_BIAS, INITIAL_STATE):  # the kernels write float
        found[i] = found[i].to(torch.float32)
    problem = _describe(given, cu_seqlens, dt_softplus, reverse)
    grad, kept = side_by_side(grad), kept.contiguous()
    problem.grad_out, problem.chunk_states = _place(grad), kept.data_ptr()
    if grad_state is not None:
        grad_state = grad_state.to(torch.float32).contiguous()
        if grad_state.shape != (operator.num_sequences(x, cu_seqlens), *A.shape):
            raise ValueError(MISFIT)
        problem.grad_final_state = grad_state.data_ptr()
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    for name, tensor, to in zip(names, given, found, strict=True):
        if tensor is not None:
            setattr(problem, f"grad_{name}", _place(to) if name in TOKENS else to.data_ptr())
    call("nearfield_scan_backward", problem)
    return tuple(
        to if tensor is None else to.to(tensor.dtype)
        for to, tensor in zip(found, arguments[:NUM_TENSORS], strict=True)
    )


operator.register("native", _forward, _backward, chunk_states)


def _tidy(arguments: tuple[Any, ...]) -> list[Tensor | None]:
    """The tensors of a call as the kernels read them, most as they are; checked, for kernels trust them."""
    x, dt, A, B, C, skip, z, bias, initial = arguments[:NUM_TENSORS]
    (batch, tokens, channels), (*_, groups, state) = x.shape, B.shape
    sequences = operator.num_sequences(x, arguments[NUM_TENSORS])
    shapes = (x.shape, x.shape, (channels, state), (batch, tokens, groups, state))
    fits = all(
        m is None or m.shape == shape
        for m, shape in zip(
            (dt, z, A, B, C, skip, bias, initial),
            (*shapes, shapes[-1], (channels,), (channels,), (sequences, channels, state)),
            strict=True,
        )
    )
    kinds = {m.dtype for m in (x, dt, B, C, z) if m is not None}
    if not fits or len(kinds) > 1 or not 1 <= state <= WIDEST or groups < 1 or channels % groups:
        raise ValueError(MISFIT)
    tables = (None if m is None else m.to(torch.float32).contiguous() for m in (A, skip, bias, initial))
    A, skip, bias, initial = tables
    x, dt, B, C, z = (None if m is None else side_by_side(m) for m in (x, dt, B, C, z))
    return [x, dt, A, B, C, skip, z, bias, initial]


def _describe(given: list[Tensor | None], cu_seqlens: Any, dt_softplus: bool, reverse: bool) -> library.Scan:
    """A problem without its results."""
    x, dt, A, B, C, skip, z, bias, initial = given
    assert x is not None and B is not None
    problem = library.Scan(DTYPES[x.dtype], *x.shape, *B.shape[2:], 0, dt_softplus, reverse)
    if cu_seqlens is not None:
        ends = array("q", cu_seqlens)
        problem.keeps = ends  # as long as the problem
        problem.sequences, problem.cu_seqlens = len(ends) - 1, ends.buffer_info()[0]
    for name, m in (("x", x), ("dt", dt), ("z", z), ("B", B), ("C", C)):
        if m is not None:
            setattr(problem, name, _place(m))
    for name, m in (("A", A), ("D", skip), ("dt_bias", bias), ("initial_state", initial)):
        if m is not None:
            setattr(problem, name, m.data_ptr())
    return problem


def _place(x: Tensor) -> tuple[int, tuple[int, ...]]:
    """A tensor as nearfield_tensor: tokens on axis x, groups on that of heads."""
    batch, token, *rest = x.stride()
    return x.data_ptr(), (batch, 0, 0, token, rest[0] if x.dim() == 4 else 0)
