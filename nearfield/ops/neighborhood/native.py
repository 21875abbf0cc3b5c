"""Neighborhood attention by the C++ kernels of csrc/: on a CPU, forward and backward, any strides.

A call describes its tensors in a structure of numbers (csrc/nearfield.h) and hands it over. A tensor is
copied only if its channels do not lie side by side. What follows from shapes alone is worked out once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from nearfield.core import library
from nearfield.ops.kernels import DTYPES, call, missing, side_by_side, unfit, warn
from nearfield.ops.neighborhood import operator
from nearfield.ops.neighborhood.geometry import Border, Bound, Neighborhood
from nearfield.ops.neighborhood.operator import BIAS, KEY_MASK, NUM_TENSORS, SINK_LOGITS

NAME = "nearfield::native_attention"
FORWARD, BACKWARD = operator.schemas()
PACKED_FORWARD, PACKED_BACKWARD = operator.schemas(f"{operator.TENSORS}, SymInt[] grids, {operator.PATTERN}")
DECODE = (
    "(Tensor query, Tensor key, Tensor value, Tensor? visible, Tensor? addend, float scale) -> "
    "(Tensor, Tensor)"
)

BORDERS = {"shift": 0, "truncate": 1, "pad": 2}
INPUTS = ("query", "key", "value", "additional_key", "additional_value")
GRADIENTS = tuple(f"grad_{name}" for name in INPUTS)
ROWS = ("lse", "grad_lse")  # fields of tensors without channels
ABSENT = (1, 1, 1, 1, 0)  # size, kernel_size, stride, dilation and is_causal of an axis that a grid lacks

MISFIT = (
    "The tensors do not fit one another. "
    "Call the functions of nearfield.ops.neighborhood, which say what is wrong."
)

Given = list[Tensor | None]  # the eight tensors that an operator begins with
Results = Mapping[str, Tensor | None]  # what a call writes, and in a backward what it reads besides, by field
Problems = tuple[Any, int]  # structures as ctypes has them, and how many


def supports(query: Tensor, key: Tensor, value: Tensor, bound: Bound, **options: Any) -> str | None:
    """Why the kernels cannot run this, or None."""
    return unfit(query, value, options["scale"]) or missing()


def warn_if_missed(query: Tensor, value: Tensor, scale: float) -> None:
    """Say, once in a process, that a slower way is taken only because the kernels are not here."""
    if missing() is not None and unfit(query, value, scale) is None:
        warn()


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
    return _forward(
        query,
        key,
        value,
        additional_keys,
        additional_values,
        bias,
        key_mask,
        sink_logits,
        *operator.pattern_arguments(bound),
        scale,
    )


def attend_numbers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    border: Border,
    *,
    bias: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attend` with a pattern given in numbers: nothing here that a trace could stumble over."""
    ones, never = [1] * len(kernel_size), [False] * len(kernel_size)
    pattern = (list(kernel_size), list(stride), ones, never, border, 0)
    return _forward(query, key, value, None, None, bias, None, None, *pattern, scale)


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
    return _forward_packed(
        query,
        key,
        value,
        additional_keys,
        additional_values,
        bias,
        key_mask,
        sink_logits,
        list(chain.from_iterable(grids)),
        *operator.pattern_arguments(bound),
        scale,
    )


def decode(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, addend: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, Dv] and log-sum-exp [B, N, H] over the keys that are `visible` [B or 1, N, M], or all.

    `addend` [B or 1, H, N, M] is added to the scores. There are no derivatives.
    """
    return _decode(query, key, value, visible, addend, scale)


@torch.library.custom_op(NAME, mutates_args=(), device_types="cpu", schema=FORWARD)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, pattern = _tidy(arguments), arguments[NUM_TENSORS:]
    return _run_forward(given, lambda results: _batch(given, pattern, results))


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), device_types="cpu", schema=BACKWARD)
def _backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    given, pattern = _tidy(arguments), arguments[NUM_TENSORS:-1]
    upstream = (grad, grad_lse, out, lse)
    return _run_backward(upstream, arguments, 1, lambda results: _batch(given, pattern, results))


@torch.library.custom_op(f"{NAME}_varlen", mutates_args=(), device_types="cpu", schema=PACKED_FORWARD)
def _forward_packed(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, (grids, *pattern) = _tidy(arguments), arguments[NUM_TENSORS:]
    return _run_forward(given, lambda results: _pack(given, _split(grids, len(pattern[0])), pattern, results))


@torch.library.custom_op(
    f"{NAME}_varlen_backward", mutates_args=(), device_types="cpu", schema=PACKED_BACKWARD
)
def _backward_packed(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    given, (flat, *pattern) = _tidy(arguments), arguments[NUM_TENSORS:-1]
    grids = _split(flat, len(pattern[0]))
    empty = [number for number, grid in enumerate(grids) if not prod(grid)]
    grads = _run_backward(
        (grad, grad_lse, out, lse),
        arguments,
        len(grids) - len(empty),
        lambda results: _pack(given, grids, pattern, results),
    )
    for extra, found in zip(given[3:5], grads[3:5], strict=True):
        if extra is not None and empty:
            found[empty] = 0  # no query saw them
    return grads


@torch.library.custom_op("nearfield::native_decode", mutates_args=(), device_types="cpu", schema=DECODE)
def _decode(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, addend: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    (batch, rows, heads, dim), (_, keys, kv_heads, _) = query.shape, key.shape
    if (
        key.shape != (batch, keys, kv_heads, dim)
        or value.shape[:-1] != key.shape[:-1]
        or not (visible is None or visible.shape in ((batch, rows, keys), (1, rows, keys)))
        or not (addend is None or addend.shape in ((batch, heads, rows, keys), (1, heads, rows, keys)))
        or not (query.dtype == key.dtype == value.dtype and (visible is None or visible.dtype == torch.bool))
    ):
        raise ValueError(MISFIT)
    out, lse = _results(query, value)
    if not lse.numel():
        return out, lse
    query, key, value = (side_by_side(x) for x in (query, key, value))
    problem = library.Decode(
        DTYPES[query.dtype], batch, rows, keys, heads, kv_heads, dim, value.shape[-1], scale
    )
    for name, x in (("query", query), ("key", key), ("value", value), ("out", out), ("lse", lse)):
        setattr(problem, name, _place(name, x))
    if visible is not None:
        visible = side_by_side(visible)
        problem.visible = visible.data_ptr()
        problem.visible_stride = (visible.stride(0) if len(visible) > 1 else 0, visible.stride(1))
    if addend is not None:
        addend = side_by_side(addend.to(torch.float32))
        problem.addend = addend.data_ptr()
        problem.addend_stride = (addend.stride(0) if len(addend) > 1 else 0, *addend.stride()[1:3])
    call("nearfield_decode_forward", problem)
    return out, lse


@_decode.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, addend: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _results(query, value)


@_decode.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return operator.each(_decode, info, in_dims, args)


operator.register("native", _forward, _backward)
operator.register("native", _forward_packed, _backward_packed, batched=False)


def _results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the output and the log-sum-exp, by the query: a default device may be set elsewhere."""
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


def _run_forward(given: Given, describe: Callable[[Results], Problems]) -> tuple[Tensor, Tensor]:
    query, value = given[0], given[2]
    assert query is not None and value is not None
    out, lse = _results(query, value)
    if lse.numel():
        call("nearfield_attention_forward", *describe({"out": out, "lse": lse}))
    return out, lse


def _run_backward(
    upstream: tuple[Tensor, Tensor | None, Tensor, Tensor],
    arguments: tuple[Any, ...],
    count: int,
    describe: Callable[[Results], Problems],
) -> tuple[Tensor, ...]:
    """The gradients of `count` problems, made contiguous in the dtype of what they belong to."""
    grad, grad_lse, out, lse = upstream
    if grad.shape != out.shape or lse.shape != out.shape[:-1] or out.shape[:-1] != arguments[0].shape[:-1]:
        raise ValueError(MISFIT)
    inputs, bias, sink_logits = arguments[: len(INPUTS)], arguments[BIAS], arguments[SINK_LOGITS]
    want_bias = arguments[-1] and bias is not None
    grads = [None if x is None else x.new_empty(x.shape) for x in inputs]
    table = bias.new_empty((count, *bias.shape), dtype=torch.float32) if want_bias else None
    if grad_lse is not None:  # where nothing is seen the log-sum-exp is no function of the inputs
        grad_lse = grad_lse.to(torch.float32).masked_fill(lse == -torch.inf, 0)
    if lse.numel():
        results: dict[str, Tensor | None] = dict(zip(GRADIENTS, grads, strict=True))
        results |= {"out": side_by_side(out), "lse": lse}
        results |= {"grad_out": side_by_side(grad), "grad_lse": grad_lse, "grad_bias": table}
        call("nearfield_attention_backward", *describe(results))
    else:
        for x in (*grads, table):
            if x is not None:
                x.zero_()
    logits = None
    if sink_logits is not None:
        delta = torch.linalg.vecdot(grad.float(), out.float())
        delta = delta if grad_lse is None else delta - grad_lse
        share = torch.exp(sink_logits.float() - lse) * delta
        share = share.masked_fill(lse == -torch.inf, 0).flatten(0, -2)
        logits = -share.sum(0, dtype=torch.float64).to(sink_logits.dtype)
    summed = None if table is None else table.sum(0).to(bias.dtype)
    return tuple(grad.new_empty(0) if x is None else x for x in (*grads, summed, logits))


def _tidy(arguments: tuple[Any, ...]) -> Given:
    """The tensors of a call as the kernels read them; most are left as they are."""
    tensors = [None if x is None else side_by_side(x) for x in arguments[: len(INPUTS)]]
    bias, key_mask, sink_logits = arguments[BIAS : SINK_LOGITS + 1]
    return [
        *tensors,
        None if bias is None else bias.to(torch.float32).contiguous(),
        None if key_mask is None else key_mask.contiguous(),
        None if sink_logits is None else sink_logits.to(torch.float32).contiguous(),
    ]


def _batch(given: Given, pattern: Sequence[Any], results: Results) -> Problems:
    """One problem: a batch of grids of one size."""
    specs = tuple([None if x is None else (x.shape, x.dtype) for x in given])
    problem = library.Attention.from_buffer_copy(_blank(specs, *map(tuple, pattern[:4]), *pattern[4:]))
    _point_to_tables(problem, given)
    for name, x in chain(zip(INPUTS, given, strict=False), results.items()):
        if x is None or not x.numel():
            continue
        if name == "grad_bias":
            problem.grad_bias = x.data_ptr()
        else:
            setattr(problem, name, _place(name, x))
    return problem, 1


def _pack(given: Given, grids: list[tuple[int, ...]], pattern: Sequence[Any], results: Results) -> Problems:
    """One problem for each grid that has tokens."""
    rest = (*map(tuple, pattern[:4]), *pattern[4:])
    tokens: list[tuple[Any, ...]] = []  # field, address, bytes of an element, strides
    extras: list[tuple[Any, ...]] = []
    for name, x in chain(zip(INPUTS, given, strict=False), results.items()):
        if x is not None and x.numel() and name != "grad_bias":
            kind = extras if "additional" in name else tokens
            kind.append((name, x.data_ptr(), x.element_size(), x.stride()))
    table, key_mask = results.get("grad_bias"), given[KEY_MASK]
    problems: list[Any] = []
    first = 0  # token of the grid at hand
    for number, grid in enumerate(grids):
        size = prod(grid)
        if not size:
            continue
        problem = library.Attention.from_buffer_copy(_blank(_specs_of_one(given, grid), *rest))
        _point_to_tables(problem, given)
        if key_mask is not None:
            problem.key_mask += first
        if table is not None:
            problem.grad_bias = table[len(problems)].data_ptr()
        row, plane = grid[-1], prod(grid[-2:])
        for name, address, width, (token, head, *_) in tokens:
            strides = (0, plane * token, row * token, token, head)
            setattr(problem, name, (address + first * token * width, strides))
        for name, address, width, (batch, token, head, _) in extras:
            setattr(problem, name, (address + number * batch * width, (0, 0, 0, token, head)))
        problems.append(problem)
        first += size
    lengths = [len(x) for x in (*given[:3], key_mask) if x is not None]
    if set(lengths) != {first} or any(x is not None and len(x) != len(grids) for x in given[3:5]):
        raise ValueError(MISFIT)
    return (library.Attention * len(problems))(*problems), len(problems)


def _specs_of_one(given: Given, grid: tuple[int, ...]) -> tuple[Any, ...]:
    """Shapes and dtypes of packed tensors as if there were one grid only."""
    found: list[Any] = []
    for place, x in enumerate(given):
        if x is None or place in (BIAS, SINK_LOGITS):
            found.append(None if x is None else (x.shape, x.dtype))
        else:
            found.append(((1, *(() if place in (3, 4) else grid), *x.shape[1:]), x.dtype))
    return tuple(found)


def _split(flat: Sequence[int], rank: int) -> list[tuple[int, ...]]:
    """The grids that an operator was given end to end."""
    return [tuple(flat[i : i + rank]) for i in range(0, len(flat), rank)]


def _place(name: str, x: Tensor) -> tuple[int, tuple[int, ...]]:
    """A tensor as nearfield_tensor; the strides of axes that its grid lacks mean nothing."""
    batch, *inner = x.stride()
    if name not in ROWS:
        inner.pop()
    return x.data_ptr(), (batch, *(0,) * (4 - len(inner)), *inner)


def _point_to_tables(problem: Any, given: Given) -> None:
    for name, x in zip(("bias", "key_mask", "sink_logits"), given[BIAS:], strict=True):
        if x is not None:
            setattr(problem, name, x.data_ptr())


@lru_cache(maxsize=1024)
def _blank(
    specs: tuple[Any, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    border: Border,
    num_sinks: int,
    scale: float,
) -> bytes:
    """A problem without its tensors, whose shapes and dtypes are `specs`: checked, for kernels trust them."""
    (query, dtype), (key, _), (value, _), more_keys, more_values, *_ = specs
    (batch, *places, heads, dim), (*_, kv_heads, dv) = query, value
    grid = tuple(key[1:-2])
    pattern = Neighborhood(kernel_size, stride, dilation, is_causal, border, num_sinks)
    bound = pattern.on(grid, num_queries=places[0] if len(grid) == 1 else None)
    count = more_keys[0][1] if more_keys else 0
    shapes = (
        (batch, *(places if len(grid) == 1 else grid), heads, dim),
        (batch, *grid, kv_heads, dim),
        (batch, *grid, kv_heads, dv),
        (batch, count, kv_heads, dim),
        (batch, count, kv_heads, dv),
        (heads, *(2 * size - 1 for size in kernel_size)),
        (batch, *grid),
        (heads,),
    )
    kinds = (*(dtype,) * len(INPUTS), torch.float32, torch.bool, torch.float32)
    wanted = zip(shapes, kinds, strict=True)
    fits = (spec is None or spec == want for spec, want in zip(specs, wanted, strict=True))
    if not all(fits) or heads % kv_heads or (more_keys is None) != (more_values is None):
        raise ValueError(MISFIT)
    axes = [(a.size, a.kernel_size, a.stride, a.dilation, a.is_causal) for a in bound.axes]
    return bytes(
        library.Attention(
            dtype=DTYPES[dtype],
            border=BORDERS[border],
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            value_dim=dv,
            axis=(*(ABSENT,) * (3 - len(axes)), *axes),
            first_query=bound.offset,
            num_sinks=num_sinks,
            num_additional=count,
            scale=scale,
        )
    )
