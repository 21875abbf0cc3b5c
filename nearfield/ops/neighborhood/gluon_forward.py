"""The forward kernel of neighborhood attention for Hopper, in Gluon: warps that load, and warps that compute.

A program takes a query box of 128 queries of one head. One warp fetches key and value boxes into a ring; two
groups of four warps take half of the queries each, so that one's softmax runs beside the other's products.
Inside a group the scores of the next key box are computed beside the values of the last one. For plain
patterns only: no mask, bias, sinks, extra keys, dilation or packed grids. `triton_forward.py` has the rest.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nearfield.ops.neighborhood.triton_boxes import (
    below,
    cut,
    flat,
    in_windows,
    key_boxes,
    locate,
    partial_box,
    split_box,
    whole_box,
    windows,
)
from nearfield.ops.neighborhood.triton_plan import Tiling

# Gluon changes from version to version: those that compile this file
KNOWN = tuple(f"3.{minor}." for minor in range(6, 10))

try:
    import triton

    if not triton.__version__.startswith(KNOWN):
        raise ImportError(f"Triton is {triton.__version__}")
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # names differ between versions
    fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    send = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
    meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    Memory = gl.shared_memory_descriptor
    view = Memory.reinterpret if hasattr(Memory, "reinterpret") else Memory._reinterpret
except (ImportError, AttributeError):  # no Triton, or another one; the module still imports
    gluon = gl = None


def jit(function: Callable[..., Any]) -> Any:
    """The function, compiled where Gluon is there."""
    return function if gluon is None else gluon.jit(function)


def kernel(function: Callable[..., Any]) -> Any:
    """A kernel of which sizes make no variants, except by being 1."""
    sizes = ("grid", "kernel_size", "stride", "offset", "boxes", "heads", "group_size")
    names = [name for name in sizes if name in function.__code__.co_varnames]
    return function if gluon is None else gluon.jit(do_not_specialize_on_alignment=names)(function)


LOG2E = 1.4426950408889634
# Registers of a thread at launch, then of the warp that fetches and of those that compute.
REGISTERS, FEW, MANY = 168, 24, 240


@jit
def lanes(T: gl.constexpr, layout: gl.constexpr):
    """Coordinates of each lane in a box with sides T."""
    r = gl.arange(0, T[0] * T[1] * T[2], layout=layout)
    return r // (T[1] * T[2]), r // T[2] % T[1], r % T[2]


@jit
def first_box(visited, TK: gl.constexpr, RANK: gl.constexpr):
    """Where the first box that is walked begins."""
    _, partial, v0, v1, v2 = visited
    a0, a1, a2 = partial_box(0, v0, v1, v2, TK, RANK)
    b0, b1, b2 = whole_box(0, v0, v1, v2, TK, RANK)
    return gl.where(partial > 0, a0, b0), gl.where(partial > 0, a1, b1), gl.where(partial > 0, a2, b2)


@jit
def fetch_box(x, boxes, full, empty, turn, batch, at, channel, T: gl.constexpr, D: gl.constexpr):
    """Fetch a box of keys or values into its place in the ring as soon as both groups have left it."""
    STAGES: gl.constexpr = boxes.shape[0]
    slot = turn % STAGES
    mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), T[0] * T[1] * T[2] * D * 2)
    here = view(boxes.index(slot), x.dtype, [1, T[0], T[1], T[2], D], x.layout)
    fetch(x, [batch, at[0], at[1], at[2], channel], full.index(slot), here)


@jit
def produce(
    descriptors, memory, barriers, place, visited,
    TQ: gl.constexpr, TH: gl.constexpr, TK: gl.constexpr, D: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: queries once, then the keys of a box and the values of the box before it."""
    query, key, value, _ = descriptors
    q_boxes, k_boxes, v_boxes = memory
    q_full, k_full, k_empty, v_full, v_empty, _ = barriers
    batch, head, kv_head, q_at, _ = place
    boxes, partial, v0, v1, v2 = visited
    channel = kv_head * D

    mbarrier.expect(q_full, 2 * TH[0] * TH[1] * TH[2] * D * 2)
    for half in gl.static_range(2):
        at0 = q_at[0] + half * (TQ[0] - TH[0])
        at1 = q_at[1] + half * (TQ[1] - TH[1])
        at2 = q_at[2] + half * (TQ[2] - TH[2])
        here = view(q_boxes.index(half), query.dtype, [1, TH[0], TH[1], TH[2], D], query.layout)
        fetch(query, [batch, at0, at1, at2, head * D], q_full, here)
    l0, l1, l2 = first_box(visited, TK, RANK)
    fetch_box(key, k_boxes, k_full, k_empty, 0, batch, (l0, l1, l2), channel, TK, D)
    for t in range(1, partial):
        a0, a1, a2 = partial_box(t, v0, v1, v2, TK, RANK)
        fetch_box(key, k_boxes, k_full, k_empty, t, batch, (a0, a1, a2), channel, TK, D)
        fetch_box(value, v_boxes, v_full, v_empty, t - 1, batch, (l0, l1, l2), channel, TK, D)
        l0 = a0
        l1 = a1
        l2 = a2
    for t in range(gl.maximum(partial, 1), boxes):
        a0, a1, a2 = whole_box(t - partial, v0, v1, v2, TK, RANK)
        fetch_box(key, k_boxes, k_full, k_empty, t, batch, (a0, a1, a2), channel, TK, D)
        fetch_box(value, v_boxes, v_full, v_empty, t - 1, batch, (l0, l1, l2), channel, TK, D)
        l0 = a0
        l1 = a1
        l2 = a2
    fetch_box(value, v_boxes, v_full, v_empty, boxes - 1, batch, (l0, l1, l2), channel, TK, D)


@jit
def scores_of(q, k_boxes, k_full, turn):
    """Begin the scores of key box number `turn`."""
    STAGES: gl.constexpr = k_boxes.shape[0]
    KEYS: gl.constexpr = k_boxes.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    ROWS: gl.constexpr = q.shape[0]
    slot = turn % STAGES
    mbarrier.wait(k_full.index(slot), turn // STAGES & 1)
    empty = gl.zeros([ROWS, KEYS], gl.float32, layout)
    return warpgroup_mma(q, k_boxes.index(slot).permute((1, 0)), empty, use_acc=False, is_async=True)


@jit
def values_of(p, v_boxes, v_full, turn, acc):
    """Begin to add the values of key box number `turn`."""
    STAGES: gl.constexpr = v_boxes.shape[0]
    slot = turn % STAGES
    mbarrier.wait(v_full.index(slot), turn // STAGES & 1)
    weights = unpacked(p, v_boxes, gl.DotOperandLayout(0, acc.type.layout, 2))
    return warpgroup_mma(weights, v_boxes.index(slot), acc, is_async=True)


@jit
def packed(weights, dtype: gl.constexpr):
    """Weights in 16 bits, in pairs: what a loop carries in 16 bits, it packs again each time."""
    ROWS: gl.constexpr = weights.shape[0]
    PAIRS: gl.constexpr = weights.shape[1] // 2
    NAME: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    CODE: gl.constexpr = "cvt.rn." + NAME + ".f32 $0, $2, $1;"
    first, second = gl.split(gl.reshape(weights, [ROWS, PAIRS, 2]))
    return gl.inline_asm_elementwise(CODE, "=r,r,r", [first, second], dtype=gl.int32, is_pure=True, pack=1)


@jit
def unpacked(pairs, like, layout: gl.constexpr):
    """What `packed` packed."""
    ROWS: gl.constexpr = pairs.shape[0]
    KEYS: gl.constexpr = pairs.shape[1] * 2
    first, second = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(like.dtype, like.dtype), is_pure=True, pack=1
    )
    return gl.convert_layout(gl.reshape(gl.join(first, second), [ROWS, KEYS]), layout)


@jit
def leave(boxes, empty, turn):
    """This group needs box number `turn` no longer."""
    mbarrier.arrive(empty.index(turn % boxes.shape[0]))


@jit
def soften(scores, top, total, scale, start, end, at, lane, MASKED: gl.constexpr, RANK: gl.constexpr):
    """Weights of a tile of scores, the new maximum and sum of rows, and what older sums shrink to.

    MASKED: keys outside of the windows of `start` to `end` are not seen, and rows may see nothing.
    """
    if MASKED:
        j = (at[0] + lane[0], at[1] + lane[1], at[2] + lane[2])
        scores = gl.where(in_windows(start, end, j, RANK), scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 1) * scale)
    level = higher
    if MASKED:
        level = gl.where(higher == float("-inf"), 0.0, higher)
    p = gl.exp2(scores * scale - level[:, None])
    shrink = gl.exp2(top - level)
    return p, higher, total * shrink + gl.sum(p, 1), shrink


@jit
def absorb(
    acc, p, top, total, turn, at, q, memory, barriers, scale, start, end, lane,
    HALF: gl.constexpr, MASKED: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """One key box more: its scores beside the values of the box before it, of which `p` are the weights."""
    _, k_boxes, v_boxes = memory
    _, k_full, k_empty, v_full, v_empty, orders = barriers
    mbarrier.wait(orders.index(HALF), (turn & 1) ^ (1 - HALF))  # the groups begin their products in turn
    scores = scores_of(q, k_boxes, k_full, turn)
    acc = values_of(p, v_boxes, v_full, turn - 1, acc)
    mbarrier.arrive(orders.index(1 - HALF))
    scores = warpgroup_mma_wait(1, deps=[scores])
    leave(k_boxes, k_empty, turn)
    weights, top, total, shrink = soften(scores, top, total, scale, start, end, at, lane, MASKED, RANK)
    p = packed(weights, q.dtype)
    # has long passed, but behind it the compiler would move the weights, to wait for the products
    mbarrier.wait(v_full.index((turn - 1) % v_boxes.shape[0]), (turn - 1) // v_boxes.shape[0] & 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    leave(v_boxes, v_empty, turn - 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, p, top, total


@jit
def consume(
    descriptors, memory, barriers, place, visited, pattern, lse, scale, heads,
    HALF: gl.constexpr, TQ: gl.constexpr, TH: gl.constexpr, TK: gl.constexpr, D: gl.constexpr,
    CAUSAL: gl.constexpr, SHIFT: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """Four warps: the output of half of the queries."""
    out = descriptors[3]
    q_boxes, k_boxes, v_boxes = memory
    q_full, k_full, k_empty, v_full, _, orders = barriers
    batch, head, _, q_at, first_query = place
    boxes, partial, v0, v1, v2 = visited
    length, kernel_size, stride, offset = pattern
    ROWS: gl.constexpr = q_boxes.shape[1]
    KEYS: gl.constexpr = k_boxes.shape[1]
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    by_channel: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row: gl.constexpr = gl.SliceLayout(1, by_key)

    at0 = q_at[0] + HALF * (TQ[0] - TH[0])
    at1 = q_at[1] + HALF * (TQ[1] - TH[1])
    at2 = q_at[2] + HALF * (TQ[2] - TH[2])
    r0, r1, r2 = lanes(TH, row)
    c = (at0 + r0, at1 + r1, at2 + offset + r2)
    start, end = windows(c, length, kernel_size, stride, CAUSAL, SHIFT)
    start, end = cut(start, end, length)
    lane = lanes(TK, gl.SliceLayout(0, by_key))

    q = q_boxes.index(HALF)
    top = gl.full([ROWS], float("-inf"), gl.float32, row)
    total = gl.zeros([ROWS], gl.float32, row)
    acc = gl.zeros([ROWS, D], gl.float32, by_channel)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(orders.index(HALF), 1 - HALF)
    scores = scores_of(q, k_boxes, k_full, 0)
    mbarrier.arrive(orders.index(1 - HALF))
    scores = warpgroup_mma_wait(0, deps=[scores])
    leave(k_boxes, k_empty, 0)
    at = first_box(visited, TK, RANK)
    weights, top, total, _ = soften(scores, top, total, scale, start, end, at, lane, True, RANK)
    p = packed(weights, q.dtype)
    for t in range(1, partial):
        at = partial_box(t, v0, v1, v2, TK, RANK)
        acc, p, top, total = absorb(
            acc, p, top, total, t, at, q, memory, barriers, scale, start, end, lane,
            HALF, True, RANK,
        )  # fmt: skip
    for t in range(gl.maximum(partial, 1), boxes):
        acc, p, top, total = absorb(
            acc, p, top, total, t, at, q, memory, barriers, scale, start, end, lane,
            HALF, False, RANK,
        )  # fmt: skip
    acc = values_of(p, v_boxes, v_full, boxes - 1, acc)
    acc = warpgroup_mma_wait(0, deps=[acc])

    whole = gl.where(total == 0.0, 1.0, total)
    result = acc * gl.convert_layout(1.0 / whole, gl.SliceLayout(1, by_channel))[:, None]
    meet()  # nobody reads the queries any more
    q.store(result.to(q.dtype))
    fence_async_shared()
    meet()
    here = view(q, out.dtype, [1, TH[0], TH[1], TH[2], D], out.layout)
    send(out, [batch, at0, at1, at2, head * D], here)
    log = gl.where(total == 0.0, float("-inf"), top * 0.6931471805599453 + gl.log(whole))
    sides = (length[0], length[1], length[2])
    gl.store(lse + (first_query + flat(c, sides) - offset) * heads + head, log, mask=below(c, length, RANK))
    tma.store_wait(0)


@kernel
def forward(
    query, key, value, out, lse, grid, kernel_size, stride, offset, boxes, heads, group_size, scale,
    TQ: gl.constexpr, TH: gl.constexpr, TK: gl.constexpr, CAUSAL: gl.constexpr, BORDER: gl.constexpr,
    D: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr,
    FEW: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a query box, all tensors given by descriptors but the last.

    `scale` is above zero and in base 2, the log-sum-exp natural. FEW and MANY: registers of a thread of the
    warp that fetches, and of those that compute.
    """
    SHIFT: gl.constexpr = BORDER == 0
    ROWS: gl.constexpr = TH[0] * TH[1] * TH[2]
    KEYS: gl.constexpr = TK[0] * TK[1] * TK[2]
    item = gl.program_id(0) % boxes
    head = gl.program_id(0) // boxes % heads
    outer = gl.program_id(0) // boxes // heads
    _, box, sides, first_query, _ = locate(lse, lse, item, outer, grid, offset, False)
    one: gl.constexpr = (1, 1, 1)
    _, first = split_box(box, sides, one, offset, TQ)
    v0 = key_boxes(first[0], sides[0], kernel_size[0], stride[0], TQ[0], TK[0], CAUSAL[0], SHIFT, False)
    v1 = key_boxes(first[1], sides[1], kernel_size[1], stride[1], TQ[1], TK[1], CAUSAL[1], SHIFT, False)
    v2 = key_boxes(first[2], sides[2], kernel_size[2], stride[2], TQ[2], TK[2], CAUSAL[2], SHIFT, False)
    count = v0[1] * v1[1] * v2[1]
    partial = count - v0[3] * v1[3] * v2[3]
    count = gl.maximum(count, 1)  # one that nobody sees, if there is none

    q_boxes = gl.allocate_shared_memory(query.dtype, [2, ROWS, D], gl.NVMMASharedLayout(128, 16, 2))
    k_boxes = gl.allocate_shared_memory(key.dtype, [STAGES, KEYS, D], gl.NVMMASharedLayout(128, 16, 2))
    v_boxes = gl.allocate_shared_memory(value.dtype, [STAGES, KEYS, D], gl.NVMMASharedLayout(128, 16, 2))
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    orders = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(orders.index(i), count=1)

    descriptors = (query, key, value, out)
    memory = (q_boxes, k_boxes, v_boxes)
    barriers = (q_full, k_full, k_empty, v_full, v_empty, orders)
    q_at = (first[0], first[1], first[2] - offset)
    place = (outer, head, head // group_size, q_at, first_query)
    visited = (count, partial, v0, v1, v2)
    pattern = (sides, kernel_size, stride, offset)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    descriptors, memory, barriers, place, visited, pattern, lse, scale, heads,
                    0, TQ, TH, TK, D, CAUSAL, SHIFT, RANK,
                ),
            ),
            (
                consume,
                (
                    descriptors, memory, barriers, place, visited, pattern, lse, scale, heads,
                    1, TQ, TH, TK, D, CAUSAL, SHIFT, RANK,
                ),
            ),
            (produce, (descriptors, memory, barriers, place, visited, TQ, TH, TK, D, RANK)),
        ],
        [4, 1],
        [MANY, FEW],
    )  # fmt: skip


def halved(sides: Sequence[int]) -> tuple[int, ...]:
    """The sides of half a box, cut so that its tokens follow one another in the whole one."""
    axis = next(i for i, side in enumerate(sides) if side > 1)
    return tuple(side // 2 if i == axis else side for i, side in enumerate(sides))


def launch(problem: Any, out: Any, lse: Any, tiles: Tiling) -> None:
    """Set contiguous `out` and `lse` to the results of a `triton._Problem`.

    Descriptors must be able to hold all tensors. A query box holds 128 queries, a key box 64 or 128 keys.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(128, 16, 5)
    half = halved(tiles.q_tile)

    def described(x: Any, sides: Sequence[int]) -> Any:
        found = problem.boxes_of(x, tuple(sides))
        return TensorDescriptor(found.base, found.shape, found.strides, found.block_shape, layout)

    boxes, _ = problem.boxes(tiles.q_tile, True)
    settings = problem.settings()
    grid, kernel_size, stride, _, offset = problem.pattern()
    forward[(boxes * problem.heads * problem.batch,)](
        described(problem.query, half), described(problem.key, tiles.kv_tile),
        described(problem.value, tiles.kv_tile), described(out, half), lse, grid, kernel_size, stride, offset,
        boxes, problem.heads, problem.heads // problem.kv_heads, problem.scale * LOG2E,
        TQ=tiles.q_tile, TH=half, TK=tiles.kv_tile, CAUSAL=settings["CAUSAL"], BORDER=settings["BORDER"],
        D=settings["D"], RANK=len(problem.bounds[0].axes), STAGES=tiles.stages, FEW=FEW, MANY=MANY,
        num_warps=tiles.warps, maxnreg=REGISTERS,
    )  # fmt: skip
