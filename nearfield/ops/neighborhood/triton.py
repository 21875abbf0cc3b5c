"""Neighborhood attention by Triton kernels: on a GPU, forward and backward, on the grid as it lies in memory.

A program takes a box of queries of one head and walks the boxes of keys that their windows touch. Gradients
of queries and of keys are two kernels, each stationary in its own boxes: no atomics, the same bits each time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from nearfield.ops.neighborhood import (
    gluon_forward,
    operator,
    triton_backward,
    triton_forward,
    triton_plan,
    tuned,
)
from nearfield.ops.neighborhood.geometry import Bound, Neighborhood
from nearfield.ops.neighborhood.operator import NUM_TENSORS
from nearfield.ops.neighborhood.triton_plan import Sides, Tiling, Way

NAME = "nearfield::triton_attention"
FORWARD, BACKWARD = operator.schemas()
PACKED_FORWARD, PACKED_BACKWARD = operator.schemas(f"{operator.TENSORS}, SymInt[] grids, {operator.PATTERN}")
DEVICES = ("cuda", "xpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256  # channels
LARGEST_SCALE = torch.finfo(torch.float32).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
LOG2E = 1.4426950408889634
BORDERS = {"shift": 0, "truncate": 1, "pad": 2}
SPLITS = 32  # parts of the queries that share the gradients of a key that all see
OFFSETS = 32  # entries of a bias table whose gradient one program adds up


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


def arch(device: torch.device) -> int:
    """Ten times the compute capability; of a CPU, where Triton interprets, that of a GPU that can do all."""
    if device.type == "cpu":
        return 90
    if device.type != "cuda" or torch.version.hip is not None:  # others count otherwise and fetch no boxes
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# to a trace the answers are constants
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unfit(query: Tensor, value: Tensor, scale: float) -> str | None:
    """Why the kernels cannot run on such queries and values, or None."""
    if query.dtype not in DTYPES:
        return f"the GPU kernels compute in float32, bfloat16 and float16, not in {query.dtype}."
    if query.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes wrongly in bfloat16. Use float16 or float32 in it."
    if not 1 <= query.shape[-1] <= WIDEST or not 1 <= value.shape[-1] <= WIDEST:
        return (
            f"the GPU kernels take 1 to {WIDEST} channels, given {query.shape[-1]} of queries and keys, "
            f"{value.shape[-1]} of values."
        )
    if not abs(scale) * LOG2E <= LARGEST_SCALE:
        return f"the GPU kernels need a scale that float32 can hold, given {scale}."
    return missing(query.device.type)


def supports(query: Tensor, key: Tensor, value: Tensor, bound: Bound, **options: Any) -> str | None:
    """Why the kernels cannot run this, or None."""
    return unfit(query, value, options["scale"])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, *grid, H, Dv] and log-sum-exp [B, *grid, H]; masked keys may hold anything."""
    more = (additional_keys, additional_values, bias, key_mask, sink_logits)
    return _forward(query, key, value, *more, *operator.pattern_arguments(bound), scale)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grids: Sequence[Sequence[int]],
    bound: Bound,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, Dv] and log-sum-exp [T, H] of grids one after the other in [T, H, D], as one job.

    `bound` is the pattern on any one of the grids. There are [grids, L, H, D] additional keys.
    """
    more = (additional_keys, additional_values, bias, key_mask, sink_logits)
    flat = list(chain.from_iterable(grids))
    return _forward_packed(query, key, value, *more, flat, *operator.pattern_arguments(bound), scale)


@torch.library.custom_op(NAME, mutates_args=(), schema=FORWARD)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _run_forward(_Problem(arguments[:NUM_TENSORS], arguments[NUM_TENSORS:]))


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), schema=BACKWARD)
def _backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    problem = _Problem(arguments[:NUM_TENSORS], arguments[NUM_TENSORS:-1])
    return _run_backward(problem, (grad, grad_lse, out, lse), arguments[:NUM_TENSORS], arguments[-1])


@torch.library.custom_op(f"{NAME}_varlen", mutates_args=(), schema=PACKED_FORWARD)
def _forward_packed(*arguments: Any) -> tuple[Tensor, Tensor]:
    grids, *pattern = arguments[NUM_TENSORS:]
    return _run_forward(_Problem(arguments[:NUM_TENSORS], pattern, grids))


@torch.library.custom_op(f"{NAME}_varlen_backward", mutates_args=(), schema=PACKED_BACKWARD)
def _backward_packed(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    grids, *pattern = arguments[NUM_TENSORS:-1]
    problem = _Problem(arguments[:NUM_TENSORS], pattern, grids)
    return _run_backward(problem, (grad, grad_lse, out, lse), arguments[:NUM_TENSORS], arguments[-1])


operator.register("triton", _forward, _backward)
operator.register("triton", _forward_packed, _backward_packed, batched=False)


class _Problem:
    """One call as its kernels see it: tensors, the patterns on their grids, and what they have not.

    Packed grids lie one after the other; a table says where each begins and what its sides are.
    """

    def __init__(
        self, tensors: Sequence[Any], pattern: Sequence[Any], packed: Sequence[int] | None = None
    ) -> None:
        query, key, value, more_keys, more_values, bias, key_mask, sink_logits = tensors
        *numbers, scale = pattern
        self.query, self.key, self.value = (_side_by_side(x) for x in (query, key, value))
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        self.key_mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.sink_logits = None if sink_logits is None else sink_logits.to(torch.float32).contiguous()
        self.is_packed = packed is not None
        if packed is None:
            self.grids: tuple[tuple[int, ...], ...] = (tuple(key.shape[1:-2]),)
            self.bounds: tuple[Bound, ...] = (operator.bound_again(query, key, *numbers),)
            self.batch = query.shape[0]
        else:
            rank = len(numbers[0])
            self.grids = tuple(tuple(packed[i : i + rank]) for i in range(0, len(packed), rank))
            geometry = Neighborhood(*map(tuple, numbers[:4]), *numbers[4:])  # type: ignore[arg-type]
            self.bounds = tuple(geometry.on(grid) for grid in sorted(set(self.grids)) if prod(grid))
            self.batch = len(self.grids)
        self.offset = self.bounds[0].offset
        self.axes = triton_plan.on_three_axes(self.bounds[0])
        self.num_additional = 0 if more_keys is None else more_keys.shape[1]
        self.places, self.sinks = self._sinks()
        self.more = self._extra_keys(more_keys, more_values)
        self.num_more = 0 if self.more is None else self.more[0].shape[1]
        self.heads, self.kv_heads = query.shape[-2], key.shape[-2]
        self.dims = (query.shape[-1], value.shape[-1])
        # the kernels want a scale above zero
        self.sign = 0 if abs(scale) < SMALLEST_SCALE else 1 if scale > 0 else -1
        self.scale = abs(scale) if self.sign else 1.0
        if self.sign != 1:
            self.query = self.query * self.sign

    def _sinks(self) -> tuple[Tensor | None, Tensor | None]:
        """Places of the extra keys [B, L], and of the sinks among all tokens [B, S], where there are sinks.

        -1 for a key that all see; -2 for a sink that a row lacks.
        """
        count, device = self.bounds[0].pattern.num_sinks, self.query.device
        longest = max(bound.num_keys for bound in self.bounds)
        count = min(count, longest)
        if not count:
            return None, None
        if self.is_packed:
            sizes = [prod(grid) for grid in self.grids]
        else:
            sizes = [longest] * self.batch
        first = _table((0, *_running(sizes)[:-1]), device)[:, None]
        size = _table(tuple(sizes), device)[:, None]
        if self.key_mask is None:
            places = torch.arange(count, device=device)[None].expand(self.batch, -1)
            places = torch.where(places < size, places, -2)
        else:  # the first of a row that are not masked
            is_open = self.key_mask.view(torch.bool).flatten()
            row = torch.arange(self.batch, device=device)
            row = row.repeat_interleave(size[:, 0], output_size=len(is_open))
            rank = is_open.cumsum(0)
            before = torch.cat([rank.new_zeros(1), rank])[first[:, 0]]
            rank = rank - before[row] - 1
            slot = torch.where(is_open & (rank < count), row * count + rank, self.batch * count)
            found = torch.full((self.batch * count + 1,), -2, device=device)
            found.scatter_(0, slot, torch.arange(len(is_open), device=device) - first[:, 0][row])
            places = found[:-1].unflatten(0, (self.batch, count))
        tokens = torch.where(places < 0, -1, places + first)
        seen_by_all = places.new_full((self.batch, self.num_additional), -1)
        return torch.cat([seen_by_all, places], 1).to(torch.int32), tokens

    def _extra_keys(
        self, more_keys: Tensor | None, more_values: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, L, Hkv, D] outside the windows: the additional ones, then the sinks."""
        if self.sinks is None:
            if more_keys is None or more_values is None or not more_keys.shape[1]:
                return None
            return _side_by_side(more_keys), _side_by_side(more_values)
        absent = (self.sinks < 0)[..., None, None]
        found = []
        for x, more in ((self.key, more_keys), (self.value, more_values)):
            if self.is_packed:
                x = x[self.sinks.clamp(min=0)]
            else:  # no flat view, which may be a copy
                row = torch.arange(self.batch, device=x.device)[:, None]
                x = x[row, (self.sinks % x.shape[1]).clamp(min=0)]
            x = x.masked_fill(absent, 0)
            found.append(x if more is None else torch.cat([more, x], 1))
        return found[0], found[1]

    def tiling(self, kind: str, *walked: Tensor) -> Tiling:
        """The boxes in which a kernel goes over this problem, of which it walks these tensors."""
        way = self.way(kind, *walked)
        problem = (self.bounds, kind, self.query.element_size(), max(self.dims))
        measured = tuned.tiles(*problem, tuned.device_name(self.query.device))
        if measured is None or triton_plan.WAYS.index(measured.way) > triton_plan.WAYS.index(way):
            return triton_plan.tiling(*problem, arch(self.query.device), way)
        return measured

    def way(self, kind: str, *walked: Tensor) -> Way:
        """The most that the options and the layout of what is walked allow."""
        way = triton_plan.way_of(self.bounds[0], max(self.dims))
        if way == "rows" or not self.has_boxes(*walked):
            return "rows"
        is_plain = kind == "forward" and self.more is None and self.sink_logits is None
        if not is_plain or self.dims[0] != self.dims[1] or not self.has_boxes(self.query):
            return "boxes"
        return "boxes" if interpreted() or gluon_forward.gluon is None else way

    def has_boxes(self, *tensors: Tensor) -> bool:
        """Whether descriptors can hold these, of which only tokens beyond the grid are left out."""
        if self.is_packed or arch(self.query.device) < 90:
            return False
        if self.key_mask is not None or self.bias is not None:  # a bias would want shared memory, too
            return False
        for x in tensors:
            dim, item = x.shape[-1], x.element_size()
            *steps, head, _ = x.stride()
            if dim != _padded(dim) or (head != dim and x.shape[-2] > 1) or x.data_ptr() % 16:
                return False
            if any(step * item % 16 or not step for step in steps):
                return False
        return True

    def boxes_of(self, x: Tensor, sides: Sides) -> Any:
        """A descriptor of tokens [batch, three axes, heads * channels], in boxes of one head."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        batch, *axes, heads, dim = x.shape
        axes = [1] * (triton_plan.RANK - len(axes)) + axes
        steps = [step or x.stride(0) for step in self.strides(x)[:4]]  # an axis of one token is never stepped
        return TensorDescriptor(x, [batch, *axes, heads * dim], [*steps, 1], [1, *sides, dim])

    def boxes(self, sides: Sequence[int], of_queries: bool) -> tuple[int, Tensor]:
        """How many boxes all packed grids have and a table of them, or how many one of a batch has."""
        dilation = tuple(axis.dilation for axis in self.axes)
        if self.is_packed:
            table = _work(self.grids, dilation, tuple(sides), self.query.device)
            return len(table), table
        offset = self.offset if of_queries else 0
        return _count_boxes(self.grids[0], dilation, tuple(sides), offset), self.query

    def programs(self, boxes: int, heads: int) -> int:
        """Programs of a kernel, one for each box, head and entry of a batch."""
        return boxes * heads * (1 if self.is_packed else self.batch)

    def sizes(self) -> Tensor:
        """For packed grids where each begins and its three sides."""
        return _sizes(self.grids, self.query.device) if self.is_packed else self.query

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """From batch to batch, along three axes, and from head to head; packed: from token to token."""
        if self.is_packed:
            return 0, 0, 0, x.stride(0), x.stride(1)
        batch, *axes, head, _ = x.stride()
        return (batch, *(0,) * (triton_plan.RANK - len(axes)), *axes, head)

    def pattern(self) -> tuple[Any, ...]:
        """What every kernel knows of the pattern: sides, kernel sizes, strides, dilations, first query."""
        return (
            tuple(axis.size for axis in self.axes),
            tuple(axis.kernel_size for axis in self.axes),
            tuple(axis.stride for axis in self.axes),
            tuple(axis.dilation for axis in self.axes),
            self.offset,
        )

    def settings(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        (dim, dv), (D, DV) = self.dims, (_padded(dim) for dim in self.dims)
        return {
            "CAUSAL": tuple(axis.is_causal for axis in self.axes),
            "BORDER": BORDERS[self.bounds[0].pattern.border],
            "D": D,
            "DV": DV,
            "EVEN": dim == D,
            "EVEN_V": dv == DV,
            "PACKED": self.is_packed,
        }

    def shape(self, tiles: Tiling, *others: Tensor) -> dict[str, Any]:
        """Sides of boxes, how many axes there are, whether a box is too wide for 32 bits, and how to run."""
        sides = tuple(map(max, tiles.q_tile, tiles.kv_tile))
        reach = [side * axis.dilation for side, axis in zip(sides, self.axes, strict=True)]
        if self.is_packed:
            whole = max(bound.num_keys for bound in self.bounds)
            reach = [0, 0, whole]
        steps = (self.strides(x)[1:4] for x in (self.query, self.key, self.value, *others))
        far = any(sum(n * step for n, step in zip(reach, x, strict=True)) >= 2**30 for x in steps)
        return {
            "TQ": tiles.q_tile,
            "TK": tiles.kv_tile,
            "RANK": len(self.bounds[0].axes),
            "FAR": far,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def extras(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[tuple[int, ...], tuple[int, ...]]]:
        """Extra keys, values and places, and strides; where there are none something to point at."""
        if self.more is None:
            return (self.key, self.value, self.key), ((0, 0, 0), (0, 0, 0))
        keys, values = self.more
        places = keys if self.places is None else self.places
        return (keys, values, places), (keys.stride()[:3], values.stride()[:3])


def _run_forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    q, k, v = problem.query, problem.key, problem.value
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if not lse.numel():
        return out, lse
    tiles = problem.tiling("forward", k, v)
    if tiles.way == "groups":
        with torch.cuda.device_of(q):
            gluon_forward.launch(problem, out, lse, tiles)
        return out, lse
    boxes, work = problem.boxes(tiles.q_tile, True)
    extra, extra_strides = problem.extras()
    pattern = problem.bounds[0].pattern
    outside = pattern.border == "pad" and problem.bias is not None
    masked = problem.key_mask is not None or outside
    by_box = tiles.way == "boxes"
    keys, values = (problem.boxes_of(x, tiles.kv_tile) if by_box else x for x in (k, v))
    with torch.cuda.device_of(q):
        triton_forward.forward[(problem.programs(boxes, problem.heads),)](
            q, keys, values, *extra,
            *(_or(x, q) for x in (problem.bias, problem.key_mask, problem.sink_logits)),
            out, lse, work, problem.sizes(), *problem.pattern(), *map(problem.strides, (q, k, v)),
            *extra_strides, boxes, problem.heads, problem.heads // problem.kv_heads, problem.num_more,
            *problem.dims, problem.scale * LOG2E,
            BM=prod(tiles.q_tile), BL=prod(tiles.kv_tile),
            HAS_MASK=problem.key_mask is not None, HAS_BIAS=problem.bias is not None,
            HAS_SINK=problem.sink_logits is not None, HAS_MORE=problem.more is not None,
            HAS_PLACES=problem.places is not None, PARTIAL=tiles.partial or masked,
            WHOLE=tiles.whole and not masked, BY_BOX=by_box, **problem.shape(tiles),
            **problem.settings(),
        )  # fmt: skip
    return out, lse


def _run_backward(
    problem: _Problem,
    upstream: tuple[Tensor, Tensor | None, Tensor, Tensor],
    given: Sequence[Tensor | None],
    want_bias: bool,
) -> tuple[Tensor, ...]:
    """The gradients of what a forward was given, each in the dtype of what it belongs to."""
    grad, grad_lse, out, lse = upstream
    q, k, v = problem.query, problem.key, problem.value
    grad, out, lse = _side_by_side(grad), out.contiguous(), lse.contiguous()
    if grad_lse is not None:  # where nothing is seen the log-sum-exp is no function of the inputs
        grad_lse = grad_lse.to(torch.float32).masked_fill(lse == -torch.inf, 0).contiguous()
    want_bias = want_bias and problem.bias is not None
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    more = [grad.new_empty(0) if x is None else torch.zeros_like(x) for x in given[3:5]]
    table = torch.zeros_like(given[5]) if want_bias and given[5] is not None else grad.new_empty(0)
    logits = grad.new_empty(0) if given[7] is None else torch.zeros_like(given[7])
    if not lse.numel():
        return dq, dk.zero_(), dv.zero_(), *more, table, logits
    level, less = torch.empty_like(lse), torch.empty_like(lse)
    with torch.cuda.device_of(q):
        _query_gradients(problem, grad, grad_lse, out, lse, level, less, dq)
        _key_gradients(problem, grad, level, less, dk, dv)
        if problem.more is not None:
            _extra_gradients(problem, grad, level, less, dk, dv, more)
        if want_bias:
            table = _bias_gradient(problem, grad, level, less).to(table.dtype)
    if problem.sink_logits is not None:
        share = torch.exp(problem.sink_logits - lse) * less
        share = share.masked_fill(lse == -torch.inf, 0).flatten(0, -2)
        logits = -share.sum(0, dtype=torch.float64).to(logits.dtype)
    return dq if problem.sign == 1 else dq * problem.sign, dk, dv, *more, table, logits


def _query_gradients(
    problem: _Problem,
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    level: Tensor,
    less: Tensor,
    dq: Tensor,
) -> None:
    """Set the gradients of queries, and what the other kernels need of each row: `level` and `less`."""
    q, k, v = problem.query, problem.key, problem.value
    tiles = problem.tiling("queries", k, v)
    boxes, work = problem.boxes(tiles.q_tile, True)
    by_box, masked = tiles.way == "boxes", problem.key_mask is not None
    keys, values = (problem.boxes_of(x, tiles.kv_tile) if by_box else x for x in (k, v))
    extra, extra_strides = problem.extras()
    triton_backward.query_gradients[(problem.programs(boxes, problem.heads),)](
        q, keys, values, *extra, *(_or(x, q) for x in (problem.bias, problem.key_mask)), grad,
        _or(grad_lse, lse), out, lse, level, less, dq, work, problem.sizes(), *problem.pattern(),
        *map(problem.strides, (q, k, v, grad)), *extra_strides, boxes, problem.heads,
        problem.heads // problem.kv_heads, problem.num_more, *problem.dims, problem.scale * LOG2E,
        BM=prod(tiles.q_tile), BL=prod(tiles.kv_tile), HAS_MASK=masked, HAS_BIAS=problem.bias is not None,
        HAS_GRAD_LSE=grad_lse is not None, HAS_MORE=problem.more is not None,
        HAS_PLACES=problem.places is not None, PARTIAL=tiles.partial or masked,
        WHOLE=tiles.whole and not masked, BY_BOX=by_box, **problem.shape(tiles, grad), **problem.settings(),
    )  # fmt: skip


def _key_gradients(
    problem: _Problem, grad: Tensor, level: Tensor, less: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Set the gradients of keys and values inside the grid."""
    q, k, v = problem.query, problem.key, problem.value
    group_size = problem.heads // problem.kv_heads
    tiles = problem.tiling("keys", q, grad)
    boxes, work = problem.boxes(tiles.kv_tile, False)
    by_box = tiles.way == "boxes"
    queries, grads = (problem.boxes_of(x, tiles.q_tile) if by_box else x for x in (q, grad))
    triton_backward.key_gradients[(problem.programs(boxes, problem.kv_heads),)](
        queries, k, v, *(_or(x, q) for x in (problem.bias, problem.key_mask)), grads, level, less, dk, dv,
        work, problem.sizes(), *problem.pattern(), *map(problem.strides, (q, k, v, grad)), boxes,
        problem.heads, group_size, *problem.dims, problem.scale * LOG2E, BN=prod(tiles.kv_tile),
        HAS_MASK=problem.key_mask is not None, HAS_BIAS=problem.bias is not None, PARTIAL=tiles.partial,
        WHOLE=tiles.whole, BY_BOX=by_box, GROUPED=group_size > 1, **problem.shape(tiles, grad),
        **problem.settings(),
    )  # fmt: skip


def _extra_gradients(
    problem: _Problem, grad: Tensor, level: Tensor, less: Tensor, dk: Tensor, dv: Tensor, more: list[Tensor]
) -> None:
    """Set the gradients of additional keys and values, and add those of the sinks to the others."""
    (keys, values, places), strides = problem.extras()
    q = problem.query
    tiles = triton_plan.tiling(problem.bounds, "keys", q.element_size(), max(problem.dims), arch(q.device))
    rows, columns = prod(tiles.q_tile), prod(tiles.kv_tile)
    most = max(bound.num_queries for bound in problem.bounds)
    splits, blocks = min(SPLITS, -(-most // rows)), -(-problem.num_more // columns)
    parts = [x.new_empty((splits, *x.shape), dtype=torch.float32) for x in (keys, values)]
    triton_backward.extra_gradients[(blocks * splits * problem.kv_heads * problem.batch,)](
        q, keys, values, places, grad, level, less, *parts, problem.sizes(), *problem.pattern(),
        *map(problem.strides, (q, grad)), *strides, blocks, splits, problem.batch, problem.heads,
        problem.heads // problem.kv_heads, problem.num_more, *problem.dims, problem.scale * LOG2E,
        HAS_PLACES=problem.places is not None, BM=rows, BL=columns, num_warps=tiles.warps,
        num_stages=tiles.stages, **problem.settings(),
    )  # fmt: skip
    for number, (part, whole) in enumerate(zip(parts, (dk, dv), strict=True)):
        found, count = part.sum(0), problem.num_additional
        if count:
            more[number] = found[:, :count].to(whole.dtype)
        if problem.sinks is not None:
            absent = (problem.sinks < 0)[..., None, None]
            found = found[:, count:].masked_fill(absent, 0).flatten(0, 1).to(whole.dtype)
            whole.flatten(0, -3).index_add_(0, problem.sinks.clamp(min=0).flatten(), found)


def _bias_gradient(problem: _Problem, grad: Tensor, level: Tensor, less: Tensor) -> Tensor:
    q, k, v, bias = problem.query, problem.key, problem.value, problem.bias
    assert bias is not None
    rows = 32
    if problem.is_packed:
        work = _work(problem.grids, None, (rows,), q.device)
        blocks = items = len(work)
    else:
        work, blocks = q, -(-problem.bounds[0].num_queries // rows)
        items = blocks * problem.batch
    parts = min(items, 128)
    each = -(-items // parts)
    parts = -(-items // each)
    chunks = -(-bias[0].numel() // OFFSETS)
    shares = bias.new_empty((parts, *bias.shape))
    triton_backward.bias_gradients[(chunks * parts * problem.heads,)](
        q, k, v, bias, _or(problem.key_mask, q), grad, level, less, shares, work, problem.sizes(),
        *problem.pattern(), *map(problem.strides, (q, k, v, grad)), blocks, items, parts, each, chunks,
        problem.heads, problem.heads // problem.kv_heads, *problem.dims, problem.scale * LOG2E,
        HAS_MASK=problem.key_mask is not None, BM=rows, BO=OFFSETS, num_warps=4, num_stages=1,
        **problem.settings(),
    )  # fmt: skip
    return shares.sum(0)


def _side_by_side(x: Tensor) -> Tensor:
    """`x` with its channels next to one another, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _or(x: Tensor | None, anything: Tensor) -> Tensor:
    """`x`, or something to point at that nobody reads."""
    return anything if x is None else x


def _padded(dim: int) -> int:
    """Channels as tiles hold them: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def _running(sizes: Sequence[int]) -> tuple[int, ...]:
    total, found = 0, []
    for size in sizes:
        total += size
        found.append(total)
    return tuple(found)


def _count_boxes(grid: tuple[int, ...], dilation: tuple[int, ...], sides: Sequence[int], offset: int) -> int:
    """Boxes of a grid's queries from token `offset` of the last axis on."""
    full = (*(1,) * (triton_plan.RANK - len(grid)), *grid)
    spans = (*full[:-1], full[-1] - offset)
    counts = (
        triton_plan.num_boxes(n, d, side) * d for n, d, side in zip(spans, dilation, sides, strict=True)
    )
    return prod(counts)


@lru_cache(maxsize=64)
def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _sizes(grids: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """[grids, 4]: the first token of each, and its sides on three axes."""
    ends = _running([prod(grid) for grid in grids])
    rows = [
        (end - prod(grid), *(1,) * (triton_plan.RANK - len(grid)), *grid)
        for end, grid in zip(ends, grids, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _work(
    grids: tuple[tuple[int, ...], ...],
    dilation: tuple[int, ...] | None,
    sides: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """[boxes, 2]: the grid of each box and its number there; without a dilation runs of `sides` tokens."""
    counts = [
        -(-prod(grid) // sides[0])
        if dilation is None
        else _count_boxes(grid, dilation, sides, 0) * bool(prod(grid))
        for grid in grids
    ]
    rows = [(number, box) for number, count in enumerate(counts) for box in range(count)]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 2)
