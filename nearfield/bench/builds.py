"""How else the same problem is computed, as each one's own guide says to do it: what `rivals.py` times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nearfield.bench.cases import Case
from nearfield.core.errors import MissingPackage, require
from nearfield.ops.neighborhood import flash_boxes, neighborhood_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unfit(Exception):
    """A rival cannot run this problem here; the message is the reason in words."""


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


SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(case: Case, like: Tensor) -> Attend | Mapping[str, Attend]:
    """Full attention, causal where the case is; on a GPU by each of torch's backends."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.is_causal)

    def by(backend: SDPBackend) -> Attend:
        def attend_by(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attend(q, k, v)

        return attend_by

    return {name: by(backend) for name, backend in SDPA.items()} if like.is_cuda else attend


def sdpa_mask(case: Case, like: Tensor) -> Attend:
    """Torch's attention with the pattern as a ready mask."""
    seen = dense_mask(case, like.device)
    # additive and in the inputs' dtype: a boolean mask would be converted again in every call
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex_mask(case: Case, like: Tensor) -> Any:
    """FlexAttention's block mask of the pattern."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = prod(case.grid)
    return create_block_mask(
        case.bound.mask_mod, None, None, tokens, tokens, device=like.device.type, _compile=like.is_cuda
    )


def flex(case: Case, like: Tensor) -> Attend:
    """Compiled FlexAttention with a ready block mask."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # shapes seen before would make this one dynamic, which fails to compile on the CPU
    block_mask = flex_mask(case, like)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def ours(backend: str) -> Callable[[Case, Tensor], Attend]:
    """Our own function by a named backend."""

    def build(case: Case, like: Tensor) -> Attend:
        return lambda q, k, v: neighborhood_attention(q, k, v, case.pattern, backend=backend)

    return build


def sparge(case: Case, like: Tensor) -> Attend:
    """SpargeAttention in 8 bits on every box that some query sees, whole: the order of boxes is its input."""
    try:
        sparge = require("spas_sage_attn", package="spas_sage_attn")
    except MissingPackage:
        raise Unfit("SpargeAttn is not installed here") from None
    major = torch.cuda.get_device_capability()[0] if like.is_cuda else 0
    boxes = flash_boxes.cut(case.bound, *((64, 128) if major == 9 else (128, 64)), like.device)
    shape = (case.batch, case.num_heads, *boxes.some.shape)
    blocks = boxes.some.to(torch.int8).expand(shape).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        order, (batch, _, heads, _) = boxes.queries, q.flatten(1, -3).shape
        q, k, v = (
            x.flatten(1, -3).index_select(1, where.token).transpose(1, 2)
            for x, where in ((q, order), (k, boxes.keys), (v, boxes.keys))
        )
        out = sparge.block_sparse_sage2_attn_cuda(
            q.contiguous(), k.contiguous(), v.contiguous(), mask_id=blocks[:batch, :heads]
        )
        return out.transpose(1, 2).index_select(1, order.slot)

    return attend


def natten(case: Case, like: Tensor) -> Attend:
    """NATTEN as it chooses its kernels itself."""
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


def gather(case: Case, like: Tensor) -> Attend:
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
