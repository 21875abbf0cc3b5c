"""What else computes the same problem, each in the layout it likes best and as its own guide says to use it.

A rival that cannot run here raises `Unfit` with the reason, which the result carries in its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from nearfield.bench import builds
from nearfield.bench.builds import Attend, Unfit
from nearfield.bench.cases import Case, Direction
from nearfield.bench.timing import Timing, timed

LONGEST = 20.0  # seconds that one head of a rival may take in one call
GPU_RATE = 0.1
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}  # rms(difference) / rms(ours)


def _nothing(case: Case, size: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Rival:
    """One other way to compute a case.

    `build(case, like)` gives the function to time and is not timed itself; several by name are all tried and
    the fastest stands for them. `setup` is what a new geometry costs it, part of a forward's time on a GPU.
    `rate` is a low guess of its speed as a share of GEMM, on dense FLOPs (`is_dense`) or useful ones; with
    the two estimates of memory, for a case and an element size, it decides how many heads fit the bounds.
    `has_kernels`: on a GPU it skips what is not seen, at `GPU_RATE`, and keeps no scores. `is_same` says that
    it computes the very same function, which is then checked. `devices` are those where it stands in the
    table unasked.
    """

    name: str
    build: Callable[[Case, Tensor], Attend | Mapping[str, Attend]]
    rate: float
    devices: tuple[str, ...] = ("cpu", "cuda")
    setup: Callable[[Case, Tensor], object] | None = None
    has_kernels: bool = False
    bytes_per_head: Callable[[Case, int], float] = _nothing
    fixed_bytes: Callable[[Case, int], float] = _nothing
    heads_first: bool = False
    is_dense: bool = True
    is_same: bool = True
    has_backward: bool = True
    has_cpu_backward: bool = True
    compiles: bool = False


@dataclass(frozen=True)
class RivalRow:
    """A rival's timing on a row, with what a reader must know about it; `seconds` hold `setup_seconds`."""

    seconds: float
    note: str | None = None
    compile_seconds: float | None = None
    setup_seconds: float | None = None
    variant: str | None = None


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
    with functorch_config.patch(donated_buffer=False):  # else what is compiled here walks its graph but once
        out = attend(*leaves)
    draw = torch.Generator(out.device).manual_seed(1)
    grad = torch.randn(out.shape, generator=draw, device=out.device).to(out.dtype)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def free_bytes(device: str) -> float:
    """Bytes of memory that a rival may take: half of what is free."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0]) / 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, OSError, ValueError):
        return 4e9  # no such counter on this system: a small machine's share


def _pairs(case: Case) -> float:
    """All query-key pairs of one head."""
    return float(prod(case.grid)) ** 2


RIVALS: tuple[Rival, ...] = (
    Rival("triton", builds.ours("triton"), rate=0.1, devices=("cuda",), is_dense=False),
    Rival("flash", builds.ours("flash"), rate=0.1, devices=("cuda",), is_dense=False, compiles=True),
    Rival("tiled", builds.ours("tiled"), rate=0.05, devices=("cpu",), is_dense=False),
    Rival("sdpa", builds.sdpa, rate=0.3, heads_first=True, is_same=False),
    Rival(
        "sdpa-mask",
        builds.sdpa_mask,
        rate=0.2,
        devices=("cpu",),
        fixed_bytes=lambda case, size: (size + 3) * _pairs(case),
        heads_first=True,
    ),
    Rival(
        "flex",
        builds.flex,
        rate=0.004,
        setup=builds.flex_mask,
        has_kernels=True,
        fixed_bytes=lambda case, size: 12 * _pairs(case),
        heads_first=True,
        is_dense=False,
        has_cpu_backward=False,
        compiles=True,
    ),
    Rival(
        "natten",
        builds.natten,
        rate=0.02,
        has_kernels=True,
        bytes_per_head=lambda case, size: 16 * _pairs(case),
        has_cpu_backward=False,
    ),
    Rival(
        "sparge",
        builds.sparge,
        rate=0.1,
        devices=("cuda",),
        is_dense=False,
        is_same=False,
        has_backward=False,
    ),
    Rival(
        "gather",
        builds.gather,
        rate=0.003,
        devices=("cpu",),
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
    budget: float | None = None,
) -> RivalRow:
    """The rival's seconds on a case, or `Unfit`.

    One that would take longer than `limit` seconds a call, or more than half the free memory, is timed on
    fewer heads and scaled to all of them, and the note says so: heads are separate work of equal size.
    `budget` seconds go to its repeats, half the limit if None. On a GPU all get their tensors as ours, and
    what they do to the layout is timed; on a CPU that is done before.
    """
    device = ours.device.type
    dtype = str(ours.dtype).removeprefix("torch.")
    budget = limit / 2 if budget is None else budget
    if direction == "backward" and not rival.has_backward:
        raise Unfit("no backward pass")
    if direction == "backward" and device == "cpu" and not rival.has_cpu_backward:
        raise Unfit("no backward pass on the CPU: FlexAttention refuses it")
    heads = _affordable_heads(rival, case, direction, ours, gemm_gflops, limit)
    inputs = [tensor[..., :heads, :].detach() for tensor in tensors]
    if rival.heads_first:
        inputs = [tensor.flatten(1, -3) for tensor in inputs]
        inputs = inputs if device == "cuda" else [tensor.transpose(1, 2) for tensor in inputs]
    inputs = [tensor.contiguous() for tensor in inputs]
    shown = ours[..., :heads, :]
    begin = perf_counter()
    try:
        built = rival.build(case, ours)
    except Exception as error:
        raise _unfit(error) from error
    variants = built if isinstance(built, Mapping) else {None: built}
    found: dict[str | None, Timing] = {}
    reason: Unfit | None = None
    compile_seconds = None
    for name, attend in variants.items():
        if rival.heads_first and device == "cuda":
            attend = _transposing(attend)
        try:
            with torch.no_grad():
                out = attend(*inputs)
            if rival.compiles:
                compile_seconds = perf_counter() - begin
            if rival.is_same:
                _require_agreement(out, shown, rival, dtype)
            del out
            found[name] = timed(step(attend, inputs, direction), device, budget=budget, least=1)
        except Exception as error:
            reason = _unfit(error)
    if not found:
        assert reason is not None
        raise reason
    variant = min(found, key=lambda name: found[name].seconds)
    setup_seconds = None
    if rival.setup is not None and device == "cuda" and direction == "forward":
        setup = rival.setup
        setup_seconds = timed(lambda: setup(case, ours), device, budget=budget, least=1).seconds
    scaled = case.num_heads / heads
    note = f"timed on {heads} of {case.num_heads} heads, scaled" if heads < case.num_heads else None
    seconds = found[variant].seconds * scaled + (setup_seconds or 0.0)
    return RivalRow(seconds, note, compile_seconds, setup_seconds, variant)


def _unfit(error: Exception) -> Unfit:
    """Foreign code may fail in any way; the table says how and goes on."""
    if isinstance(error, Unfit):
        return error
    first_line = (str(error).strip().splitlines() or [""])[0]
    return Unfit(f"{type(error).__name__}: {first_line[:200]}")


def _transposing(attend: Attend) -> Attend:
    """[B, H, N, D] in and out for those who want it, as views where they can take them."""
    return lambda *tensors: attend(*(x.transpose(1, 2) for x in tensors))


def _affordable_heads(
    rival: Rival, case: Case, direction: Direction, like: Tensor, gemm_gflops: float, limit: float
) -> int:
    skips = like.is_cuda and rival.has_kernels
    flops = case.dense_flops(direction) if rival.is_dense and not skips else case.useful_flops(direction)
    seconds = flops / ((GPU_RATE if skips else rival.rate) * gemm_gflops * 1e9)
    size = like.element_size()
    twice = 2 if direction == "backward" else 1
    free, fixed = free_bytes(like.device.type), 0.0 if skips else rival.fixed_bytes(case, size)
    each = 0.0 if skips else twice * rival.bytes_per_head(case, size)
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
