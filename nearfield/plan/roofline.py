"""Seconds predicted from integers: how much a kernel computes and moves, over what the machine can do.

    seconds = computed FLOPs / (GEMM rate * share of it that the kernel reaches) * (1 + mask * partial share)
            + bytes moved besides / memory rate

Computed FLOPs are 2 * (head_dim + value_dim) * heads a pair of the visited tiles, masked or not. The
constants are a few published or measured figures. On a CPU in fp32 the tiled backend was met within a third
on one axis and within a factor of two on grids (9 and 90 settings), the kernels of an H200 within a quarter
(128 channels, 16 bits); elsewhere expect a factor of two, and a good order among patterns, which is what a
plan needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal, NamedTuple

from nearfield.ops.neighborhood import triton_plan
from nearfield.ops.neighborhood.geometry import Bound
from nearfield.ops.neighborhood.tiled_sides import best_sides, side_of
from nearfield.ops.neighborhood.triton_plan import Sides, Way
from nearfield.plan.tiles import (
    LANES,
    Tile,
    best_tile,
    candidates,
    flattened,
    item_bytes,
    lane_box,
    permutation_bytes,
)

Direction = Literal["forward", "backward"]
BACKWARD_FLOPS = 2.5  # five matrix products instead of two
MASK = 0.55  # what a mask adds to a tile, where nobody measured it


@dataclass(frozen=True)
class Device:
    """What a machine reaches: GFLOP/s of a large matrix product by dtype, bytes a second of memory.

    `arch` is ten times a GPU's compute capability, 0 for a processor.
    """

    name: str
    arch: int
    gemm_gflops: dict[str, float]
    memory_bytes: float

    @property
    def is_gpu(self) -> bool:
        """Whether kernels for GPUs run on it."""
        return self.arch > 0


DEVICES = {
    # large cuBLAS products reach some 0.7 of the data sheet's peak: 989, 989 and 312 TFLOP/s in 16 bits
    "h100": Device("h100", 90, {"float16": 7.0e5, "bfloat16": 7.0e5, "float32": 5.0e4}, 3.35e12),
    # 745 to 797 TFLOP/s were measured in bfloat16
    "h200": Device("h200", 90, {"float16": 7.7e5, "bfloat16": 7.7e5, "float32": 5.0e4}, 4.8e12),
    "a100": Device("a100", 80, {"float16": 2.4e5, "bfloat16": 2.4e5, "float32": 1.7e4}, 2.0e12),
    # processors differ too much to be listed: their GEMM rate is asked for
    "cpu": Device("cpu", 0, {}, 4.0e9),
}


class Kernel(NamedTuple):
    """Share of the GEMM rate on whole tiles; what a mask adds to a tile, at once and for each axis."""

    reach: float
    mask: float
    mask_an_axis: float = 0.0


# Kernels of GPUs. TFLOP/s of the pairs that are computed, 128 channels, on an H200 unless another is named.
KERNELS = {
    "rows": Kernel(0.50, 0.20),  # not measured apart: the next without hardware that fetches
    "boxes": Kernel(0.62, 0.20),  # 460 to 487 on whole tiles, 438 where 36 % are partial, 420 at 66 %
    "groups": Kernel(0.80, 0.36),  # 594 to 635; 549 at 36 %, 491 at 66 %
    "gradients": Kernel(0.63, 0.56),  # 434 to 500; 430 at 27 %, 372 at 59 %
    # a mask reads tables of every axis: 623 without gathers; 487 at 43 % on two axes, 350 at 66 % on three
    "flash": Kernel(0.80, 0.0, 0.36),
    "flash gradients": Kernel(0.76, 0.0, 1.0),  # 590; 316 at 43 % on two axes, 201 at 66 % on three
    "natten": Kernel(0.91, 0.85),  # published for an H100: 628 to 651; 433 at 50 %, 380 at 83 %
}
# Seconds of a whole GPU that a program costs beside its tiles: 64 pictures of 56 x 56, window 7 x 7, 4 heads
# of 32 channels, are 25,088 programs and took 0.40 to 0.43 ms on an H200; products explain 0.05 ms of them.
PROGRAM = 1.4e-8
# NATTEN reorders tokens in several passes: published 2.4 to 5.7 ms on an H100; one would take 1.0 to 1.7.
PASSES = {"natten": 3}
# Matrix products that a kernel of ours computes for a pair: over the channels of keys, over those of values.
PRODUCTS = {"forward": (1, 1), "queries": (2, 1), "keys": (2, 2)}

# Share of the GEMM rate that a backend reaches on the tiles that it visits: (CPU 4-byte, CPU 2-byte, GPU);
# 0 where it does not run.
REACH = {
    "dense": (0.75, 0.35, 0.82),  # torch's own attention without a mask; 601 to 637 TFLOP/s on an H200
    "reference": (0.20, 0.10, 0.10),
    "tiled": (0.60, 0.25, 0.30),  # measured, 4,096 tokens on one Zen 4 core
    "flex": (0.30, 0.15, 0.50),
    "native": (0.88, 0.66, 0.0),  # of the keys that its rows of lanes read, see `lane_box`
    "triton": (0.30, 0.30, KERNELS["boxes"].reach),
    "flash": (0.0, 0.0, KERNELS["flash"].reach),
    "natten": (0.0, 0.0, KERNELS["natten"].reach),
}
LATTICE_AREA = 128  # tokens of a tile of FlashAttention's and NATTEN's kernels
# Queries of a tile on one axis, where the tiled backend has several ways: as tiles of so many, each was met
# within a third.
RUN = 128


def predict(
    bound: Bound,
    *,
    heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: str = "float32",
    direction: Direction = "forward",
    gemm_gflops: float | None = None,
    backend: str = "tiled",
    device: str = "cpu",
    kv_heads: int | None = None,
    batch: int = 1,
    q_tile: Tile | None = None,
    kv_tile: Tile | None = None,
) -> float:
    """Predicted seconds of one attention; `backend="dense"` is full attention on the same tokens.

    `gemm_gflops` is what a large matrix product of this dtype reaches; a known `device` has its own.
    `direction` "backward" is the backward pass alone. Tiles that are not given are the backend's.
    """
    machine = find_device(device)
    if backend not in REACH:
        raise ValueError(f"backend={backend!r} is unknown. Choose one of {', '.join(REACH)}.")
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction={direction!r} is unknown. Choose forward or backward.")
    if gemm_gflops is None and dtype in machine.gemm_gflops:
        gemm_gflops = machine.gemm_gflops[dtype]
    if gemm_gflops is None or not gemm_gflops > 0:
        known = ", ".join(name for name in DEVICES if dtype in DEVICES[name].gemm_gflops) or "none"
        raise ValueError(
            f"gemm_gflops={gemm_gflops} for {dtype} on {device!r}: give the GFLOP/s above 0 that a large "
            f"matrix product reaches. Devices known for {dtype}: {known}."
        )
    value_dim, kv_heads = value_dim or head_dim, kv_heads or heads
    item, rate = item_bytes(dtype), gemm_gflops * 1e9
    reach = REACH[backend][2 if machine.is_gpu else int(item < 4)]
    if not reach:
        raise ValueError(f"backend={backend!r} does not run on {device!r}. Choose another of the two.")
    call = _Call(bound, heads, kv_heads, head_dim, value_dim, dtype)
    if backend == "triton" and machine.is_gpu:
        return batch * _triton_seconds(call, rate, machine.arch, direction, q_tile, kv_tile)
    if backend in ("flash", "natten"):
        tiles = _lattice_tiles(bound, q_tile, kv_tile)
        return batch * _lattice_seconds(call, rate, machine.memory_bytes, direction, backend, tiles)
    flops = 2 * (head_dim + value_dim) * heads
    work = _work(bound, backend, q_tile, kv_tile, heads // kv_heads)
    moved = work.scores * heads * item + work.gathered * kv_heads * (head_dim + value_dim) * item
    seconds = flops * work.pairs / (rate * reach) * (1 + MASK * work.partial_share)
    seconds += moved / machine.memory_bytes
    return batch * seconds * (BACKWARD_FLOPS if direction == "backward" else 1)


def find_device(name: str) -> Device:
    """The machine of that name."""
    if name not in DEVICES:
        raise ValueError(f"device={name!r} is unknown. Choose one of {', '.join(DEVICES)}.")
    return DEVICES[name]


class _Call(NamedTuple):
    """One attention without its batch."""

    bound: Bound
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str


def _triton_seconds(
    call: _Call, rate: float, arch: int, direction: Direction, q_tile: Tile | None, kv_tile: Tile | None
) -> float:
    """Seconds of our kernels, from the boxes that they visit."""
    bound, dim, item = call.bound, max(call.head_dim, call.value_dim), item_bytes(call.dtype)
    if not any(size == item and dim <= width for size, width in triton_plan.FORWARD):
        raise ValueError(
            f"The Triton kernels take elements of 2 or 4 bytes and up to 256 channels, given "
            f"{call.dtype} and {dim} channels."
        )
    seconds = 0.0
    for kind in ("forward",) if direction == "forward" else ("queries", "keys"):
        tiles = triton_plan.tiling((bound,), kind, item, dim, arch, _way(call))
        q, kv = (
            found if given is None else (*(1,) * (triton_plan.RANK - len(given)), *given)
            for given, found in ((q_tile, tiles.q_tile), (kv_tile, tiles.kv_tile))
        )
        visited, whole, programs = _visited(bound, q, kv, is_inverse=kind == "keys")
        kernel = KERNELS[tiles.way if kind == "forward" else "gradients"]
        keys, values = PRODUCTS[kind]
        flops = 2 * (keys * call.head_dim + values * call.value_dim) * prod(q) * prod(kv) * call.heads
        seconds += flops * (visited + kernel.mask * (visited - whole)) / (rate * kernel.reach)
        seconds += PROGRAM * programs * (call.kv_heads if kind == "keys" else call.heads)
    return seconds


def _way(call: _Call) -> Way:
    """The most that a pattern and widths allow, tensors side by side and without further options."""
    bound, dims = call.bound, (call.head_dim, call.value_dim)
    if any(axis.dilation > 1 for axis in bound.axes) or any(dim < 16 or dim & (dim - 1) for dim in dims):
        return "rows"
    is_plain = not bound.pattern.num_sinks and bound.pattern.border != "pad" and dims[0] == dims[1]
    return "groups" if is_plain else "boxes"


def _visited(bound: Bound, q: Sides, kv: Sides, *, is_inverse: bool) -> tuple[int, int, int]:
    """Pairs of boxes that are visited, those of them that need no mask, and boxes that stay in place."""
    visited = whole = programs = 1
    firsts = (*(0,) * (triton_plan.RANK - 1), bound.offset)
    for axis, q_side, kv_side, first in zip(triton_plan.on_three_axes(bound), q, kv, firsts, strict=True):
        some, full = triton_plan.visits(axis, q_side, kv_side, first, is_inverse)
        visited, whole = visited * some, whole * full
        side, size = (kv_side, axis.size) if is_inverse else (q_side, axis.size - first)
        programs *= triton_plan.num_boxes(size, axis.dilation, side) * axis.dilation
    if not is_inverse:  # keys that all see are boxes of their own, and masked
        visited += programs * -(-bound.pattern.num_sinks // prod(kv))
    return visited, whole, programs


def _lattice_seconds(
    call: _Call, rate: float, memory: float, direction: Direction, backend: str, tiles: tuple[Tile, Tile]
) -> float:
    """Seconds of kernels that go over tiles of reordered tokens, the reordering included."""
    _, *sizes = call._asdict().items()
    moved = permutation_bytes(call.bound, *tiles, **dict(sizes))
    found, area = call.bound.tiles(*tiles), prod(tiles[0]) * prod(tiles[1])
    flops: float = 2 * (call.head_dim + call.value_dim) * call.heads * found.static * area
    kernel = KERNELS[backend]
    if direction == "backward":
        flops, kernel = BACKWARD_FLOPS * flops, KERNELS.get(f"{backend} gradients", kernel)
    mask = kernel.mask + kernel.mask_an_axis * len(call.bound.axes)
    seconds = flops / (rate * kernel.reach) * (1 + mask * found.partial_share)
    return seconds + moved * PASSES.get(backend, 1) / memory


def _lattice_tiles(bound: Bound, q_tile: Tile | None, kv_tile: Tile | None) -> tuple[Tile, Tile]:
    """Tiles of a kernel that knows one size of them: those of the least computed and masked area."""
    every = candidates(bound)
    largest = max(map(prod, every))
    fits = [tile for tile in every if prod(tile) == min(LATTICE_AREA, largest)]

    def cost(pair: tuple[Tile, Tile]) -> float:
        tiles = bound.tiles(*pair)
        return tiles.static + MASK * (tiles.static - tiles.full)

    return min(product([q_tile] if q_tile else fits, [kv_tile] if kv_tile else fits), key=cost)


class _Work(NamedTuple):
    """What a backend does for one head: (query, key) pairs computed, and numbers moved besides its inputs."""

    pairs: float
    partial_share: float = 0.0
    scores: float = 0.0  # numbers written or read, a query head
    gathered: float = 0.0  # keys written or read, a key/value head


def _work(bound: Bound, backend: str, q_tile: Tile | None, kv_tile: Tile | None, group: int) -> _Work:
    everything = bound.num_queries * bound.num_keys
    if backend == "dense":
        is_causal = len(bound.axes) == 1 and bound.axes[0].is_causal
        return _Work(everything - (bound.num_queries * (bound.num_queries - 1) // 2 if is_causal else 0))
    if backend == "reference":
        return _Work(everything, scores=8 * everything)  # scores, mask, weights: each written and read
    if backend == "tiled":
        return _tiled_work(bound, q_tile, group)
    if backend == "native":
        return _Work(LANES * lane_box(bound, group)[1] / group)
    if backend == "flex":
        return _Work(everything / flattened(bound, prod(q_tile or (128,)), prod(kv_tile or (128,))), 1.0)
    chosen = best_tile(bound, q_tile=q_tile, kv_tile=kv_tile)
    tiles = bound.tiles(*chosen)
    return _Work(tiles.static * prod(chosen[0]) * prod(chosen[1]), tiles.partial_share)


def _tiled_work(bound: Bound, q_tile: Tile | None, group: int) -> _Work:
    """Tiles of queries on the boxes of keys around them. To gather a box costs bytes besides the products."""
    if len(bound.axes) > 1:
        sides = best_sides(bound, group) if q_tile is None else map(side_of, bound.axes, q_tile)
        queries, tiles, keys = (prod(numbers) for numbers in zip(*sides, strict=True))
        return _Work(tiles * queries * keys, gathered=2 * tiles * keys)
    axis = bound.axes[0]  # and what lies in a run is not gathered
    whole = axis.stride * max(1, RUN // axis.stride)
    tile = q_tile or (min(whole, -(-axis.size // axis.dilation)),)
    seen = bound.tiles(tile, 1).static
    return _Work(seen * prod(tile), gathered=2 * seen if axis.dilation > 1 else 0)
