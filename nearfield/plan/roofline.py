"""Seconds predicted from integers: how much a kernel computes and moves, over what the machine can do.

    seconds = computed FLOPs / (GEMM rate * share of it that the kernel reaches) * (1 + MASK * partial share)
            + bytes moved besides / memory rate

Computed FLOPs are 2 * (head_dim + value_dim) * heads a pair of the visited tiles, masked or not. The
constants are a few published or measured figures. The tiled backend on a CPU was met within a third (18
cases, fp32 and bf16); elsewhere expect a factor of two, and a good order among patterns, which is what a plan
needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from nearfield.ops.neighborhood.geometry import Axis, Bound
from nearfield.plan.tiles import LANES, Tile, best_tile, flattened, item_bytes, lane_box, permutation_bytes

Direction = Literal["forward", "backward"]
BACKWARD_FLOPS = 2.5  # five matrix products instead of two

# What a mask adds to a tile. NATTEN on H100: a tile bound of 7.5 became 6.0 with half of the tiles partial
# (FLUX, 256 x 256), and 5.4 became 3.6 with 83 % of them partial (Hunyuan, 30 x 48 x 80).
MASK = 0.55


@dataclass(frozen=True)
class Device:
    """What a machine reaches: GFLOP/s of a large matrix product by dtype, bytes a second of memory."""

    name: str
    is_gpu: bool
    gemm_gflops: dict[str, float]
    memory_bytes: float


DEVICES = {
    # large cuBLAS products reach some 0.7 of the data sheet's peak: 989, 989 and 312 TFLOP/s in 16 bits
    "h100": Device("h100", True, {"float16": 7.0e5, "bfloat16": 7.0e5, "float32": 5.0e4}, 3.35e12),
    "h200": Device("h200", True, {"float16": 7.0e5, "bfloat16": 7.0e5, "float32": 5.0e4}, 4.8e12),
    "a100": Device("a100", True, {"float16": 2.4e5, "bfloat16": 2.4e5, "float32": 1.7e4}, 2.0e12),
    # processors differ too much to be listed: their GEMM rate is asked for
    "cpu": Device("cpu", False, {}, 4.0e9),
}

# Share of the GEMM rate that a kernel reaches on the tiles that it visits: (CPU 4-byte, CPU 2-byte, GPU).
REACH = {
    "dense": (0.75, 0.35, 0.82),  # torch's own attention without a mask
    "reference": (0.20, 0.10, 0.10),
    "tiled": (0.60, 0.25, 0.30),  # measured, 4,096 tokens on one Zen 4 core
    "flex": (0.30, 0.15, 0.50),
    "native": (0.88, 0.66, 0.0),  # of the keys that its rows of lanes read, see `lane_box`
    "triton": (0.30, 0.30, 0.60),
}
# The tiled backend gathers each query tile's neighborhood first, unless that is a run of tokens: besides the
# products it costs bytes, not masks.
GATHER_SIDE = {1: 128, 2: 8, 3: 4}  # by rank


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
    item = item_bytes(dtype)
    work = _work(bound, backend, q_tile, kv_tile, heads // kv_heads)
    moved = work.scores * heads * item + work.gathered * kv_heads * (head_dim + value_dim) * item
    if work.tiles is not None and machine.is_gpu:
        moved += permutation_bytes(
            bound,
            *work.tiles,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=dtype,
        )
    reach = REACH[backend][2 if machine.is_gpu else int(item < 4)]
    flops = 2 * (head_dim + value_dim) * heads * work.pairs
    seconds = flops / (gemm_gflops * 1e9 * reach) * (1 + MASK * work.partial_share)
    seconds += moved / machine.memory_bytes
    return batch * seconds * (BACKWARD_FLOPS if direction == "backward" else 1)


def find_device(name: str) -> Device:
    """The machine of that name."""
    if name not in DEVICES:
        raise ValueError(f"device={name!r} is unknown. Choose one of {', '.join(DEVICES)}.")
    return DEVICES[name]


class _Work(NamedTuple):
    """What a backend does for one head: (query, key) pairs computed, and numbers moved besides its inputs."""

    pairs: float
    partial_share: float = 0.0
    scores: float = 0.0  # numbers written or read, a query head
    gathered: float = 0.0  # keys written or read, a key/value head
    tiles: tuple[Tile, Tile] | None = None


def _work(bound: Bound, backend: str, q_tile: Tile | None, kv_tile: Tile | None, group: int) -> _Work:
    everything = bound.num_queries * bound.num_keys
    if backend == "dense":
        is_causal = len(bound.axes) == 1 and bound.axes[0].is_causal
        return _Work(everything - (bound.num_queries * (bound.num_queries - 1) // 2 if is_causal else 0))
    if backend == "reference":
        return _Work(everything, scores=8 * everything)  # scores, mask, weights: each written and read
    if backend == "tiled":
        tile = q_tile or tuple(_gathered_side(axis, len(bound.axes)) for axis in bound.axes)
        keys = bound.tiles(tile, 1).static
        is_run = len(bound.axes) == 1 and bound.axes[0].dilation == 1
        return _Work(keys * prod(tile), gathered=0 if is_run else 2 * keys)
    if backend == "native":
        return _Work(LANES * lane_box(bound, group)[1] / group)
    if backend == "flex":
        return _Work(everything / flattened(bound, prod(q_tile or (128,)), prod(kv_tile or (128,))), 1.0)
    chosen = best_tile(bound, q_tile=q_tile, kv_tile=kv_tile)
    tiles = bound.tiles(*chosen)
    return _Work(tiles.static * prod(chosen[0]) * prod(chosen[1]), tiles.partial_share, tiles=chosen)


def _gathered_side(axis: Axis, rank: int) -> int:
    """Queries of a tile on one axis: whole strides, not wider than a dilation group."""
    whole = axis.stride * max(1, GATHER_SIDE[rank] // axis.stride)
    return min(whole, -(-axis.size // axis.dilation))
