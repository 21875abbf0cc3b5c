"""Neighborhood attention by FlashAttention 4's block-sparse kernels, through FlexAttention's FLASH backend.

Tokens are put in the order of boxes (flash_boxes.py), which the kernels take for blocks of one row, and the
output is put back. Gradients are those of FlexAttention, that of the log-sum-exp is our own (lse.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from nearfield.ops.neighborhood import flash_boxes, lse
from nearfield.ops.neighborhood.flash_boxes import Boxes, Order
from nearfield.ops.neighborhood.geometry import Bound

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import FlexKernelOptions

DEVICE = "cuda"
OPTIONS: FlexKernelOptions = {"BACKEND": "FLASH"}
DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 128  # channels; wider ones run in tiles of other sizes than a block
KV_AREA = 128
# tokens of a block of queries by the GPU's major compute capability: two tiles of 128 go together on 10
Q_AREAS = {9: 128, 10: 256}

Kernel = Callable[[Tensor, Tensor, Tensor, BlockMask, float], tuple[Tensor, Tensor]]


def missing() -> str | None:
    """Why FlashAttention 4 cannot be imported, or None."""
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4 is not installed: pip install --pre flash-attn-4."
    return None


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    **more: Any,
) -> str | None:
    """Why FlashAttention cannot run this, or None."""
    options = {"bias": bias, "key_mask": key_mask, "sink_logits": sink_logits}
    given = [name for name, x in options.items() if x is not None]
    if given or bound.pattern.num_sinks:
        named = ", ".join(given) or "num_sinks"
        return f"this way of FlashAttention has no bias, key mask or sinks, given {named}."
    if bound.pattern.border == "pad":
        return 'FlashAttention has no keys outside the grid, so border="pad" cannot run.'
    if bound.offset:
        return f"it takes as many queries as keys, given {bound.num_queries} for {bound.num_keys}."
    if query.dtype not in DTYPES:
        return f"FlashAttention computes in float16 and bfloat16, not in {query.dtype}."
    dims = (query.shape[-1], value.shape[-1])
    if any(dim % 8 or not 8 <= dim <= WIDEST for dim in dims):
        return f"FlashAttention takes a multiple of 8 up to {WIDEST} channels here, given {dims}."
    if torch.compiler.is_compiling():
        return "it compiles a graph of its own. Call it outside torch.compile."
    if torch._C._functorch.get_interpreter_stack():
        return "FlashAttention runs in no torch.func transform."
    if query.device.type != DEVICE:
        return f"FlashAttention needs tensors on a GPU, these are on {query.device.type!r}."
    major = _major(query.device)
    if major not in Q_AREAS:
        return f"its block-sparse kernels are for GPUs of compute capability 9 and 10, this one has {major}."
    if major < 10 and torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled():
        return "its gradients are not deterministic on this GPU, and torch is told to be."
    return missing()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    scale: float,
    **none: Any,
) -> tuple[Tensor, Tensor]:
    """Output [B, *grid, H, Dv] and log-sum-exp [B, *grid, H], of checked arguments."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, more_k: Tensor | None, more_v: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _attend(q, k, v, more_k, more_v, bound, scale)

    out, found = run(query, key, value, additional_keys, additional_values)
    return out, lse.differentiable(
        found, query, key, additional_keys, scale, lambda *tensors: run(*tensors)[0]
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    more_keys: Tensor | None,
    more_values: Tensor | None,
    bound: Bound,
    scale: float,
) -> tuple[Tensor, Tensor]:
    places = query.shape[1:-2]
    q_area = Q_AREAS[_major(query.device)]
    boxes = flash_boxes.cut(bound, q_area, KV_AREA, query.device)
    extra = 0 if more_keys is None else more_keys.shape[1]
    q, k, v = (
        _into(x.flatten(1, -3), order)
        for x, order in ((query, boxes.queries), (key, boxes.keys), (value, boxes.keys))
    )
    if more_keys is not None and more_values is not None:
        room = (0, 0, 0, 0, 0, -extra % KV_AREA)
        k, v = (torch.cat([F.pad(more, room), x], 1) for more, x in ((more_keys, k), (more_values, v)))
    mask = _block_mask(bound, extra, q_area, query.device)
    run, order = _kernel(bound, extra, query.device), boxes.queries
    found, logs = run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale)
    out = _Moved.apply(found.transpose(1, 2), order.slot, order.token, order.idle)
    return out.unflatten(1, places), logs.transpose(1, 2).index_select(1, order.slot).unflatten(1, places)


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _into(x: Tensor, order: Order) -> Tensor:
    """Tokens [B, N, H, D] in the order of slots."""
    moved: Tensor = _Moved.apply(x, order.token, order.slot, None)
    return moved


class _Moved(torch.autograd.Function):
    """`x[:, there]`, whose gradient is moved back, not added up: all but idle slots have one token each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, idle: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, idle)
        return x.index_select(1, there)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back, idle = ctx.saved_tensors
        grad = grad.index_select(1, back)
        if idle is not None:  # a query that repeats another one has no gradient of its own
            grad = grad.masked_fill_(idle[:, None, None], 0)
        return grad, None, None, None


@lru_cache(maxsize=64)
def _kernel(bound: Bound, extra: int, device: torch.device) -> Kernel:
    """FlexAttention compiled for one geometry, as code of its own: torch caches only a few shapes of one."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, aux = flex_attention(
            query,
            key,
            value,
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=OPTIONS,
            return_aux=AuxRequest(lse=True),
        )
        return out, cast(Tensor, aux.lse).detach()  # FLASH refuses a gradient of it, even one of zeros

    own = FunctionType(run.__code__.replace(), run.__globals__, "run", run.__defaults__, run.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


@lru_cache(maxsize=64)
def _block_mask(bound: Bound, extra: int, q_area: int, device: torch.device) -> BlockMask:
    """The mask of a geometry on slots, behind blocks of `extra` keys that all see."""
    boxes = flash_boxes.cut(bound, q_area, KV_AREA, device)
    ahead = -(-extra // KV_AREA)
    some, whole = (F.pad(part, (ahead, 0), value=True) for part in (boxes.some, boxes.whole))
    if extra % KV_AREA:
        whole[:, ahead - 1] = False
    place = tuple(F.pad(table, (ahead * KV_AREA, 0), value=-1) for table in boxes.place)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=(q_area, KV_AREA),
        mask_mod=_visible(boxes, place, extra),
        seq_lengths=(len(boxes.queries.token), len(place[0])),
    )


def _visible(boxes: Boxes, place: tuple[Tensor, ...], extra: int) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod on slots: by tables, which cost less than a division for each axis."""
    first, end = boxes.first, boxes.end

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (first[0][q] <= place[0][k]) & (place[0][k] < end[0][q])
        for low, at, high in zip(first[1:], place[1:], end[1:], strict=True):
            seen = seen & (low[q] <= at[k]) & (at[k] < high[q])
        return seen | (k < extra) if extra else seen

    return visible


def _listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of blocks how many are wanted, and which: those first."""
    order = torch.sort(wanted.to(torch.int8), dim=-1, descending=True, stable=True)[1]
    return wanted.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
