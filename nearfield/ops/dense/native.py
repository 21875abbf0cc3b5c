"""Dense attention by the C++ kernels of csrc/: on a CPU, forward and backward, any strides.

To a kernel full attention is a window that is the whole axis, on which queries then need no place: there may
be any number of them. Causal queries are the last of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import sizeof
from functools import lru_cache
from itertools import pairwise
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from nearfield.core import library
from nearfield.ops.kernels import DTYPES, by_batch, call, no_second_derivative, side_by_side
from nearfield.ops.neighborhood.geometry import LARGEST

NAME = "nearfield::native_dense"
NUM_TENSORS = 4  # that a problem begins with
PROBLEM = "Tensor query, Tensor key, Tensor value, Tensor? key_mask, bool is_causal, float scale"
FORWARD = f"({PROBLEM}) -> (Tensor, Tensor)"
BACKWARD = f"(Tensor grad, Tensor out, Tensor lse, {PROBLEM}) -> (Tensor, Tensor, Tensor)"
MISFIT = "The tensors do not fit one another. Call dense_attention, which says what is wrong."

PLACE = Struct("6q")  # nearfield_tensor
SIZE = sizeof(library.Attention)
AT = {name: getattr(library.Attention, name).offset for name, *_ in library.Attention._fields_}
ABSENT = (1, 1, 1, 1, 0)  # size, kernel_size, stride, dilation and is_causal of an axis that is not there
# A backward of few heads takes queries in pieces, each with gradients of all keys, which are summed: tasks
# for more threads. Shapes alone say how many, and so the order of all sums, whatever the threads.
TASKS = 16  # pieces times heads, at most
PIECE = 256  # queries of a piece, at least; and never fewer than keys, so that the sums need no more memory


def attend(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Output `[B, N, H, Dv]`; keys that the mask `[B, M]` hides may hold anything."""
    return _forward(query, key, value, key_mask, is_causal, scale)[0]


@torch.library.custom_op(NAME, mutates_args=(), device_types="cpu", schema=FORWARD)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _results(*arguments)
    _run("nearfield_attention_forward", arguments, {"out": out, "lse": lse}, {}, 1)
    return out, lse


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), device_types="cpu", schema=BACKWARD)
def _backward(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, *_ = arguments
    shape = (*query.shape[:-1], value.shape[-1])
    fits = grad.shape == out.shape == shape and grad.dtype == out.dtype == query.dtype
    if not fits or lse.shape != shape[:-1] or lse.dtype != torch.float32:
        raise ValueError(MISFIT)
    (batch, queries, *_), (_, keys, kv_heads, _) = query.shape, key.shape
    pieces = max(1, min(queries // max(keys, PIECE), TASKS // max(batch * kv_heads, 1)))
    grad_query = query.new_empty(query.shape)
    parts = [x.new_empty((pieces, *x.shape)) for x in (key, value)]
    by_query = {"out": out, "lse": lse, "grad_out": grad, "grad_query": grad_query}
    by_piece = dict(zip(("grad_key", "grad_value"), parts, strict=True))
    if not _run("nearfield_attention_backward", arguments, by_query, by_piece, pieces):
        for x in parts:  # no query sees the keys
            x.zero_()
    grad_key, grad_value = (x.sum(0) if pieces > 1 else x.reshape(x.shape[1:]) for x in parts)
    return grad_query, grad_key, grad_value


@_forward.register_fake
def _results(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Memory for the output and the log-sum-exp, by the query: a default device may be set elsewhere."""
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


@_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:NUM_TENSORS])
    ctx.rest = inputs[NUM_TENSORS:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (NUM_TENSORS + len(ctx.rest))
    found = _backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *(x if n else None for x, n in zip(found, ctx.needs_input_grad, strict=False)), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second_derivative)
_forward.register_vmap(by_batch(_forward, NUM_TENSORS))
_backward.register_vmap(by_batch(_backward, 3 + NUM_TENSORS))


def _run(
    name: str,
    arguments: tuple[Any, ...],
    by_query: dict[str, Tensor],
    by_piece: dict[str, Tensor],
    pieces: int,
) -> bool:
    """Call a kernel on the queries in `pieces`, each with all keys; False, and nothing done, without queries.

    Tensors `by_query` have a row for each of them, those `by_piece` begin with the pieces.
    """
    query, key, value, key_mask, is_causal, scale = arguments
    mask = None if key_mask is None else (key_mask.shape, key_mask.dtype)
    specs = (query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, mask, is_causal, scale)
    edges = _edges(query.shape[1], pieces)
    problems = (library.Attention * pieces).from_buffer_copy(
        b"".join([_blank(last - first, *specs) for first, last in pairwise(edges)])
    )
    if not by_query["out"].numel():
        return False
    held = []  # copies must outlive the call

    def place(field: str, x: Tensor, strides: Sequence[int], steps: Sequence[int]) -> None:
        """Put `x` into the problem of each piece, so many elements from its start."""
        address, width, (batch, token, head) = x.data_ptr(), x.element_size(), strides
        for i, step in enumerate(steps):
            PLACE.pack_into(problems, i * SIZE + AT[field], address + step * width, batch, 0, 0, token, head)

    for field, x in {"query": query, **by_query}.items():
        if field != "lse":  # which has no channels
            held.append(x := side_by_side(x))
        strides = x.stride()[:3]
        place(field, x, strides, [first * strides[1] for first in edges[:-1]])
    for field, x in (("key", key), ("value", value)):
        held.append(x := side_by_side(x))
        place(field, x, x.stride()[:3], [0] * pieces)
    for field, x in by_piece.items():
        step, *strides = x.stride()[:4]
        place(field, x, strides, range(0, pieces * step, step))
    if key_mask is not None:
        held.append(x := key_mask.contiguous())
        for problem in problems:
            problem.key_mask = x.data_ptr()
    call(name, problems, pieces)
    return True


def _edges(queries: int, pieces: int) -> list[int]:
    """First query of each piece, and the end of the last."""
    return [queries * i // pieces for i in range(pieces + 1)]


@lru_cache(maxsize=1024)
def _blank(
    num_queries: int,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    mask: tuple[tuple[int, ...], torch.dtype] | None,
    is_causal: bool,
    scale: float,
) -> bytes:
    """A problem of some of the queries without its tensors: checked, for kernels trust it."""
    (batch, queries, heads, dim), (_, keys, kv_heads, _), dv = query, key, value[-1]
    if (
        key != (batch, keys, kv_heads, dim)
        or value != (batch, keys, kv_heads, dv)
        or not dtype == key_dtype == value_dtype
        or mask not in (None, ((batch, keys), torch.bool))
        or heads % kv_heads
        or not keys
        or (is_causal and queries > keys)
    ):
        raise ValueError(MISFIT)
    return bytes(
        library.Attention(
            dtype=DTYPES[dtype],
            border=0,
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            value_dim=dv,
            axis=(ABSENT, ABSENT, (keys, LARGEST if is_causal else keys, 1, 1, is_causal)),
            first_query=keys - num_queries,
            scale=scale,
        )
    )
