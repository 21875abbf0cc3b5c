"""Selective scans by Triton kernels: on a GPU, forward and backward, states and sums in float32."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nearfield.ops.scan import operator
from nearfield.ops.scan import triton_kernels as kernels
from nearfield.ops.scan.operator import BACKWARD, FORWARD, NUM_TENSORS

NAME = "nearfield::triton_scan"
ROWS, LANES = 64, 16  # tokens of a chunk and channels of a program; both powers of two
WARPS, BACKWARD_WARPS = 4, 8  # as few as keep the tiles of a chunk in registers
WIDEST = 256  # states of a channel
DEVICES = ("cuda", "xpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(x: Tensor, A: Tensor) -> str | None:
    """Why the kernels cannot run this, or None."""
    if x.device.type not in DEVICES and not interpreted():
        return f"the GPU kernels need tensors on a GPU, these are on {x.device.type!r}."
    if x.dtype not in DTYPES:
        return f"the GPU kernels compute in float32, bfloat16 and float16, not in {x.dtype}."
    if A.shape[-1] > WIDEST:
        return f"the GPU kernels take 1 to {WIDEST} states, given {A.shape[-1]}."
    return None if installed() else "the package triton is not installed: pip install triton."


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    """Whether there is a Triton."""
    return find_spec("triton") is not None


# to a trace the answers are constants
interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]
installed._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    """Shape of the states that the forward keeps: those at the start of each chunk."""
    return x.shape[0] * x.shape[1] // ROWS + operator.num_sequences(x, cu_seqlens), *A.shape


@torch.library.custom_op(NAME, mutates_args=(), schema=FORWARD)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, (cu_seqlens, dt_softplus, reverse, keep) = _tidy(arguments), arguments[NUM_TENSORS:]
    x, dt, A, B, C, skip, z, bias, initial = given
    kept = chunk_states(x, A, B, cu_seqlens) if keep else (0,)
    out, final, states = operator.results(x, A, kept, cu_seqlens)
    if not len(final):
        return out, final, states
    settings = _settings(given, dt_softplus, reverse, cu_seqlens)
    with torch.cuda.device_of(x):
        kernels.scan_kernel[_grid(x, B, final)](
            x, dt, A, B, C, *(_or(m, x) for m in (skip, z, bias, initial)), _ends(cu_seqlens, x),
            out, final, states, *_strides(given), *_sizes(x, B),
            HAS_INITIAL=initial is not None, KEEP=keep, num_warps=WARPS, **settings,
        )  # fmt: skip
    return out, final, states


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), schema=BACKWARD)
def _backward(
    grad: Tensor | None, grad_state: Tensor | None, kept: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    given, (cu_seqlens, dt_softplus, reverse) = _tidy(arguments), arguments[NUM_TENSORS:]
    x, dt, A, B, C, skip, z, bias, _ = given
    grad = torch.zeros_like(x) if grad is None else _side_by_side(grad)
    found = list(operator.gradients(arguments))
    sequences = operator.num_sequences(x, cu_seqlens)
    grid = _grid(x, B, range(sequences))
    batch, tokens, channels = x.shape
    groups, states = B.shape[2:]
    # a share from each block of channels, and of tables from each sequence, to be added up
    shares = [x.new_empty((grid[0], batch, tokens, states), dtype=torch.float32) for _ in range(2)]
    tables = [
        x.new_empty((sequences, *shape), dtype=torch.float32)
        for shape in ((channels, states), (channels,), (channels,), (channels, states))
    ]
    if grad_state is not None:
        grad_state = grad_state.to(torch.float32).contiguous()
    settings = _settings(given, dt_softplus, reverse, cu_seqlens)
    if sequences:
        with torch.cuda.device_of(x):
            kernels.scan_backward_kernel[grid](
                x, dt, A, B, C, *(_or(m, x) for m in (skip, z, bias)), _ends(cu_seqlens, x), kept,
                grad, _or(grad_state, x), found[0], found[1], found[operator.Z], *shares, *tables,
                *_strides(given), *grad.stride()[:2], *_sizes(x, B),
                HAS_FINAL=grad_state is not None, num_warps=BACKWARD_WARPS, **settings,
            )  # fmt: skip
    found[3], found[4] = (m.unflatten(0, (groups, -1)).sum(1).permute(1, 2, 0, 3) for m in shares)
    found[2], found[operator.D], found[operator.DT_BIAS] = (m.sum(0) for m in tables[:3])
    found[operator.INITIAL_STATE] = tables[3]
    return tuple(
        x.new_empty(0) if m is None else to.to(m.dtype).contiguous()
        for to, m in zip(found, arguments[:NUM_TENSORS], strict=True)
    )


operator.register("triton", _forward, _backward, chunk_states)


def _tidy(arguments: tuple[Any, ...]) -> list[Any]:
    """The tensors of a call as the kernels read them; most are left as they are."""
    x, dt, A, B, C, skip, z, bias, initial = arguments[:NUM_TENSORS]
    tables = (None if m is None else m.to(torch.float32).contiguous() for m in (A, skip, bias, initial))
    A, skip, bias, initial = tables
    x, dt, B, C, z = (None if m is None else _side_by_side(m) for m in (x, dt, B, C, z))
    return [x, dt, A, B, C, skip, z, bias, initial]


def _side_by_side(x: Tensor) -> Tensor:
    """`x` with its channels next to one another, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _or(x: Tensor | None, anything: Tensor) -> Tensor:
    """`x`, or something to point at that nobody reads."""
    return anything if x is None else x


def _ends(cu_seqlens: list[int] | None, x: Tensor) -> Tensor:
    return x if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int64, device=x.device)


def _strides(given: list[Any]) -> list[int]:
    """From batch to batch and token to token, in B and C also from group to group."""
    x, dt, _, B, C, _, z, *_ = given
    return [*x.stride()[:2], *dt.stride()[:2], *B.stride()[:3], *C.stride()[:3], *_or(z, x).stride()[:2]]


def _sizes(x: Tensor, B: Tensor) -> tuple[int, ...]:
    return x.shape[1], x.shape[2], *B.shape[2:]


def _grid(x: Tensor, B: Tensor, sequences: Any) -> tuple[int, int]:
    """Blocks of channels, none across groups, and sequences."""
    groups = B.shape[2]
    return groups * -(-(x.shape[2] // groups) // LANES), len(sequences)


def _settings(given: list[Any], dt_softplus: bool, reverse: bool, cu_seqlens: Any) -> dict[str, Any]:
    _, _, A, _, _, skip, z, bias, _ = given
    return {
        "SOFTPLUS": dt_softplus,
        "REVERSE": reverse,
        "HAS_D": skip is not None,
        "HAS_Z": z is not None,
        "HAS_BIAS": bias is not None,
        "HAS_ENDS": cu_seqlens is not None,
        "R": ROWS,
        "L": LANES,
        "W": max(2, 1 << (A.shape[-1] - 1).bit_length()),
    }
