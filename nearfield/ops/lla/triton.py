"""Local linear attention by Triton kernels on a GPU; Triton itself is imported when they first run."""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nearfield.ops.lla import operator
from nearfield.ops.lla.operator import BACKWARD, FORWARD, NUM_TENSORS, Options
from nearfield.ops.lla.solver import Settled
from nearfield.ops.neighborhood.geometry import Bound

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128  # channels of which a tile fits the registers
SMALLEST = 16  # side of a matrix that tl.dot takes
COLUMNS = 64
# queries of a tile by padded channels: the solve keeps six [rows, channels] in registers, its backward nine
ROWS = {16: 64, 32: 64, 64: 32, 128: 32}
WARPS = {16: 4, 32: 4, 64: 4, 128: 8}


def unfit(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot run this, or None."""
    if query.device.type != "cuda" and not is_interpreted():
        return f"the Triton kernels need tensors on a GPU, given {query.device.type!r}."
    if _absent():
        return "the package triton is not installed: pip install triton."
    if query.dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, given {query.dtype}."
    if query.shape[-1] > WIDEST or not 1 <= value.shape[-1] <= WIDEST:
        return f"the Triton kernels take 1 to {WIDEST} channels, given {query.shape[-1]}, {value.shape[-1]}."
    return None


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, which is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _absent() -> bool:
    return find_spec("triton") is None


_absent._dynamo_marked_constant = True  # type: ignore[attr-defined]  # to a trace a constant


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    *,
    ridge: Tensor | None = None,
    correction: Tensor | None = None,
    key_mask: Tensor | None = None,
    how: Settled,
    detached: bool = False,
    scale: float,
) -> Tensor:
    """Output `[B, N, H, Dv]`; a `ridge` is `[B, N, H]`, masked keys hold finite numbers."""
    given = (query, key, value, ridge, correction, key_mask)
    return _forward(*given, *operator.options(bound, how, detached, scale))[0]


@torch.library.custom_op("nearfield::triton_local_linear", mutates_args=(), schema=FORWARD)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ridge: Tensor | None,
    correction: Tensor | None,
    key_mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    from nearfield.ops.lla import triton_kernels

    options = Options(*rest)
    query, key, value = (_dense_channels(x) for x in (query, key, value))
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    key_mean = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    value_mean = torch.empty(out.shape, dtype=torch.float32, device=query.device)
    lse = key_mean.new_empty(query.shape[:-1])
    solved = query.new_empty(0) if ridge is None else torch.empty_like(key_mean)
    common, settings = _problem(query, key, value, options, key_mask, ridge is not None)
    rows = settings["BLOCK_M"]
    with _on(query):
        triton_kernels.forward[_grid(query.shape[1], rows, query.shape[0] * query.shape[2])](
            query, key, value, _contiguous(ridge, lse), _contiguous(correction, lse), _mask(key_mask, lse),
            out, solved, lse, key_mean, value_mean,
            *common[:13], *common[14:], options.max_iterations, options.tolerance, options.scale, **settings,
        )  # fmt: skip
    return out, solved, lse, key_mean, value_mean


@torch.library.custom_op("nearfield::triton_local_linear_backward", mutates_args=(), schema=BACKWARD)
def _backward(
    grad: Tensor, solved: Tensor, lse: Tensor, key_mean: Tensor, value_mean: Tensor, *problem: Any
) -> tuple[Tensor, ...]:
    from nearfield.ops.lla import triton_kernels

    query, key, value, ridge, correction, key_mask = problem[:NUM_TENSORS]
    options = Options(*problem[NUM_TENSORS:])
    query, key, value = (_dense_channels(x) for x in (query, key, value))
    grad = grad.contiguous()
    r = solved if ridge is not None else correction.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    d_ridge, result = torch.empty_like(lse), torch.empty_like(key_mean)
    levels = lse.new_empty(4, *lse.shape)
    common, settings = _problem(query, key, value, options, key_mask, ridge is not None)
    mask = _mask(key_mask, lse)
    batch, num_queries, heads, _ = query.shape
    with _on(query):
        triton_kernels.backward_rows[_grid(num_queries, settings["BLOCK_M"], batch * heads)](
            query, key, value, grad, _contiguous(ridge, lse), r, mask, lse, key_mean, value_mean,
            dq, d_ridge, result, levels,
            *common, options.max_iterations, options.tolerance, options.scale,
            DETACHED=options.detached, **settings,
        )  # fmt: skip
        triton_kernels.backward_columns[_grid(key.shape[1], settings["BLOCK_N"], batch * key.shape[2])](
            query, key, value, grad, r, result, mask, lse, levels, dk, dv,
            *common, options.scale, **settings,
        )  # fmt: skip
    nothing = query.new_empty(0)
    return (
        dq,
        dk,
        dv,
        nothing if ridge is None else d_ridge.to(ridge.dtype),
        nothing if correction is None else result.to(correction.dtype),
    )


operator.register(_forward, _backward)


def _problem(
    query: Tensor, key: Tensor, value: Tensor, options: Options, key_mask: Tensor | None, solve: bool
) -> tuple[list[int], dict[str, Any]]:
    """The numbers that all kernels take, and what is fixed when they are compiled."""
    num_keys = key.shape[1]
    widths = [max(SMALLEST, 1 << (x.shape[-1] - 1).bit_length()) for x in (query, value)]
    common = [
        *(stride for x in (query, key, value) for stride in x.stride()[:3]),
        query.shape[2],
        query.shape[2] // key.shape[2],
        query.shape[1],
        num_keys,
        query.shape[:3].numel(),
        query.shape[3],
        value.shape[3],
        min(options.kernel_size, 2 * num_keys + 2),  # 32 bits hold it; no window reaches further
    ]
    settings = {
        "D": widths[0],
        "DV": widths[1],
        "BLOCK_M": ROWS[max(widths)],
        "BLOCK_N": COLUMNS,
        "CAUSAL": options.is_causal,
        "SHIFT": options.border == "shift",
        "HAS_MASK": key_mask is not None,
        "SOLVE": solve,
        # tf32 holds every float16 and bfloat16; what it rounds are the corrections, to eleven bits
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": WARPS[max(widths)],
        "num_stages": 1,
    }
    return common, settings


def _grid(rows: int, tile: int, problems: int) -> tuple[int, int]:
    return -(-rows // tile), problems


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None, absent: Tensor) -> Tensor:
    """`absent` stands for a tensor that the kernel will not read."""
    return absent if x is None else x.contiguous()


def _mask(key_mask: Tensor | None, absent: Tensor) -> Tensor:
    return absent if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _on(query: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(query.device) if query.device.type == "cuda" else nullcontext()
