"""What else computes the same problem, each in the layout it likes best and as its own guide says to use it.

A rival that cannot run here raises `Unfit` with the reason, which the result carries in its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F

from nearfield.bench.cases import Case, Direction
from nearfield.bench.timing import Timing, timed
from nearfield.core.errors import MissingPackage, require
from nearfield.ops.neighborhood import neighborhood_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
LONGEST = 20.0  # seconds that one head of a rival may take in one call
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}  # rms(difference) / rms(ours)


class Unfit(Exception):
    """A rival cannot run this problem here; the message is the reason in words."""


def _nothing(case: Case, size: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Rival:
    """One other way to compute a case.

    `build(case, like)` gives the function to time and is not timed itself. `rate` is a low guess of its speed
    as a share of GEMM, on dense FLOPs (`is_dense`) or useful ones; with the two estimates of memory, for a
    case and an element size, it decides how many heads fit the bounds. `is_same` says that it computes the
    very same function, which is then checked.
    """

    name: str
    build: Callable[[Case, Tensor], Attend]
    rate: float
    bytes_per_head: Callable[[Case, int], float] = _nothing
    fixed_bytes: Callable[[Case, int], float] = _nothing
    heads_first: bool = False
    is_dense: bool = True
    is_same: bool = True
    has_cpu_backward: bool = True
    compiles: bool = False


@dataclass(frozen=True)
class RivalRow:
    """A rival's timing on a row, with what a reader must know about it."""

    seconds: float
    note: str | None = None
    compile_seconds: float | None = None


def step(attend: Attend, tensors: Sequence[Tensor], direction: Direction) -> Callable[[], object]:
    """The call to time: the forward without a graph, or the gradients of all three inputs alone.

    The backward call walks one retained graph again and again, so no forward is inside it.
    """
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return attend(*tensors)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def free_bytes(device: str) -> float:
    """Bytes of memory that a rival may take: half of what is free."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0]) / 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, OSError, ValueError):
        return 4e9  # no such counter on this system: a small machine's share


def dense_mask(case: Case, device: torch.device) -> Tensor:
    """The case's pattern as a boolean matrix [queries, keys]."""
    grid = case.grid
    mask = torch.ones((1,) * (2 * len(grid)), dtype=torch.bool, device=device)
    for at, axis in enumerate(case.bound.axes):
        i = torch.arange(axis.size, device=device)
        group, position = i % axis.dilation, i // axis.dilation
        start, end = axis.interval(position, group)
        seen = (group[:, None] == group) & (start[:, None] <= position) & (position < end[:, None])
        shape = [1] * (2 * len(grid))
        shape[at] = shape[len(grid) + at] = axis.size
        mask = mask & seen.reshape(shape)
    return mask.reshape(prod(grid), prod(grid))


def _sdpa(case: Case, like: Tensor) -> Attend:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=case.is_causal)


def _sdpa_mask(case: Case, like: Tensor) -> Attend:
    seen = dense_mask(case, like.device)
    # additive and in the inputs' dtype: a boolean mask would be converted again in every call
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _flex(case: Case, like: Tensor) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # shapes seen before would make this one dynamic, which fails to compile on the CPU
    tokens = prod(case.grid)
    block_mask = create_block_mask(
        case.bound.mask_mod, None, None, tokens, tokens, device=like.device.type, _compile=like.is_cuda
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def _tiled(case: Case, like: Tensor) -> Attend:
    return lambda q, k, v: neighborhood_attention(q, k, v, case.pattern, backend="tiled")


def _natten(case: Case, like: Tensor) -> Attend:
    try:
        natten = require("natten", package="natten")
    except MissingPackage:
        raise Unfit("NATTEN is not installed here") from None
    attend = getattr(natten, f"na{len(case.grid)}d")
    axes = case.bound.axes
    options = {
        name: tuple(getattr(axis, name) for axis in axes)
        for name in ("kernel_size", "stride", "dilation", "is_causal")
    }
    return lambda q, k, v: attend(q, k, v, **options)


def _gather(case: Case, like: Tensor) -> Attend:
    """Every query's keys and values copied side by side, then two small products: what `unfold` code does."""
    tokens = prod(case.grid)
    rows = [case.bound.keys(query) for query in range(tokens)]
    width = max(len(row) for row in rows)
    index = torch.tensor([row + row[:1] * (width - len(row)) for row in rows], device=like.device)
    counts = torch.tensor([len(row) for row in rows], device=like.device)
    unseen = torch.arange(width, device=like.device) >= counts[:, None]  # [N, K]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near_k, near_v = k[:, :, index], v[:, :, index]  # [B, H, N, K, D]
        scores = (near_k @ q.unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return (weights.unsqueeze(-2) @ near_v).squeeze(-2)

    return attend


def _pairs(case: Case) -> float:
    """All query-key pairs of one head."""
    return float(prod(case.grid)) ** 2


RIVALS: tuple[Rival, ...] = (
    Rival("tiled", _tiled, rate=0.05, is_dense=False),
    Rival("sdpa", _sdpa, rate=0.3, heads_first=True, is_same=False),
    Rival(
        "sdpa-mask",
        _sdpa_mask,
        rate=0.2,
        fixed_bytes=lambda case, size: (size + 3) * _pairs(case),
        heads_first=True,
    ),
    Rival(
        "flex",
        _flex,
        rate=0.004,
        fixed_bytes=lambda case, size: 12 * _pairs(case),
        heads_first=True,
        is_dense=False,
        has_cpu_backward=False,
        compiles=True,
    ),
    Rival(
        "natten",
        _natten,
        rate=0.02,
        bytes_per_head=lambda case, size: 16 * _pairs(case),
        has_cpu_backward=False,
    ),
    Rival(
        "gather",
        _gather,
        rate=0.003,
        bytes_per_head=lambda case, size: 3.0 * size * case.batch * case.bound.num_pairs * case.head_dim,
        fixed_bytes=lambda case, size: 80.0 * case.bound.num_pairs,
        heads_first=True,
        is_dense=False,
    ),
)


def measure(
    rival: Rival,
    case: Case,
    tensors: Sequence[Tensor],
    direction: Direction,
    *,
    ours: Tensor,
    gemm_gflops: float,
    limit: float,
) -> RivalRow:
    """The rival's seconds on a case, or `Unfit`.

    One that would take longer than `limit` seconds a call, or more than half the free memory, is timed on
    fewer heads and scaled to all of them, and the note says so: heads are separate work of equal size.
    """
    device = ours.device.type
    dtype = str(ours.dtype).removeprefix("torch.")
    if direction == "backward" and device == "cpu" and not rival.has_cpu_backward:
        raise Unfit("no backward pass on the CPU: FlexAttention refuses it")
    heads = _affordable_heads(rival, case, direction, ours, gemm_gflops, limit)
    inputs = [tensor[..., :heads, :].detach() for tensor in tensors]
    if rival.heads_first:
        inputs = [tensor.flatten(1, -3).transpose(1, 2) for tensor in inputs]
    inputs = [tensor.contiguous() for tensor in inputs]
    try:
        begin = perf_counter()
        attend = rival.build(case, ours)
        with torch.no_grad():
            found = attend(*inputs)
        compile_seconds = perf_counter() - begin if rival.compiles else None
        if rival.is_same:
            _require_agreement(found, ours[..., :heads, :], rival, dtype)
        del found
        timing: Timing = timed(step(attend, inputs, direction), device, budget=limit / 2, least=1)
    except Unfit:
        raise
    except Exception as error:  # foreign code may fail in any way; the table says how and goes on
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise Unfit(f"{type(error).__name__}: {first_line[:200]}") from error
    scaled = case.num_heads / heads
    note = f"timed on {heads} of {case.num_heads} heads, scaled" if heads < case.num_heads else None
    return RivalRow(timing.seconds * scaled, note, compile_seconds)


def _affordable_heads(
    rival: Rival, case: Case, direction: Direction, like: Tensor, gemm_gflops: float, limit: float
) -> int:
    flops = case.dense_flops(direction) if rival.is_dense else case.useful_flops(direction)
    seconds = flops / (rival.rate * gemm_gflops * 1e9)
    size = like.element_size()
    twice = 2 if direction == "backward" else 1
    free, fixed = free_bytes(like.device.type), rival.fixed_bytes(case, size)
    each = twice * rival.bytes_per_head(case, size)
    if fixed + each > free:
        needed = f"{(fixed + each) / 1e9:.1f} GB for one head"
        raise Unfit(f"too large: about {needed}, above half the free memory ({free / 1e9:.1f} GB)")
    heads = case.num_heads if each == 0 else min(case.num_heads, int((free - fixed) // each))
    if rival.compiles:
        return heads  # compiled for its shape: always whole
    if seconds > limit:
        if seconds / case.num_heads > LONGEST:
            needed = f"{seconds / case.num_heads:.0f} s for one head"
            raise Unfit(f"too slow: about {needed}, above the bound of {LONGEST:.0f} s")
        heads = min(heads, max(1, int(case.num_heads * limit / seconds)))
    return heads


def _require_agreement(found: Tensor, ours: Tensor, rival: Rival, dtype: str) -> None:
    if rival.heads_first:
        ours = ours.flatten(1, -3).transpose(1, 2)
    else:
        found = found.reshape(ours.shape)
    error = ((found.float() - ours.float()).square().mean() / ours.float().square().mean()).sqrt().item()
    if not error <= TOLERANCE[dtype]:
        raise Unfit(f"its output differs from ours by {error:.1e} (rms), so the two are not the same problem")
