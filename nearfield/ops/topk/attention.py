"""Attention of each query to the blocks of keys that were chosen for it."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import check, check_heads, no_transform, scale_or_default, under_autocast
from nearfield.ops.kernels import missing, unfit
from nearfield.ops.topk import native, reference, tiled, triton
from nearfield.ops.topk.geometry import check_block_size, check_causal, count_blocks

OP = "topk_block_attention"
BY_NAME = {
    "native": native.attend,
    "triton": triton.attend,
    "tiled": tiled.attend,
    "reference": reference.attend,
}


class TopkOptions(TypedDict, total=False):
    """What `topk_block_attention` takes beside its tensors and the length of a block."""

    key_mask: Tensor | None
    is_causal: bool
    scale: float | None
    backend: str


@overload
def topk_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    return_lse: Literal[True],
    **options: Unpack[TopkOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def topk_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    return_lse: Literal[False] = False,
    **options: Unpack[TopkOptions],
) -> Tensor: ...
def topk_block_attention(
    query: Float[Tensor, "b n heads dim"],
    key: Float[Tensor, "b m kv_heads dim"],
    value: Float[Tensor, "b m kv_heads dv"],
    block_indices: Int[Tensor, "b #n kv_heads s"],
    *,
    block_size: int,
    key_mask: Bool[Tensor, "#b m"] | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b n heads dv"] | tuple[Float[Tensor, "b n heads dv"], Float[Tensor, "b n heads"]]:
    """Attention of each query to the keys of a few blocks: those of `block_indices`, all others unread.

        scores = block_scores(q, k, block_size=64)
        blocks = choose_blocks(scores, 32, block_size=64, num_keys=k.shape[1])
        out = topk_block_attention(q, k, v, blocks, block_size=64)     # 2048 keys, however many there are

    Block c holds the keys from c * block_size on; the last may be ragged. A list serves the heads that share
    a key head, and one query or all. A negative index is no block, one named twice counts once. Causal
    queries are the last of the keys. A query that sees nothing gets 0, its log-sum-exp is -inf.
    """
    check_heads(query, key, value, rank=(4,), layout="[batch, tokens, heads, head_dim]")
    check_block_size(block_size)
    batch, num_queries, _, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    _check_indices(block_indices, query, num_kv_heads)
    if key_mask is not None:
        check("key_mask", key_mask, (1 if key_mask.shape[:1] == (1,) else batch, num_keys), query, torch.bool)
    if is_causal:
        check_causal(num_queries, num_keys)
    factor = scale_or_default(scale, head_dim)
    if block_indices.dtype != torch.int64:
        block_indices = block_indices.long()

    is_empty = not num_keys or not block_indices.shape[-1]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))

    def ask_native() -> Verdict:
        if needs_grad:
            return Verdict("the CPU kernels have no gradients here. Use torch.no_grad(), or another backend.")
        return Verdict(no_transform() or unfit(query, value, factor) or missing())

    def ask_triton() -> Verdict:
        if needs_grad or is_empty:
            return Verdict("the GPU kernels have no gradients here, and need at least one key and one block.")
        cannot = no_transform() or triton.unfit(query, value)
        return Verdict(cannot, "Triton's interpreter is slow." if triton.is_interpreted() else None)

    def ask_tiled() -> Verdict:
        return Verdict("gathering needs at least one key and one block in each list." if is_empty else None)

    asked = {"native": ask_native, "triton": ask_triton, "tiled": ask_tiled, "reference": Verdict}
    name = choose(OP, backend, asked)

    mask = None if key_mask is None else key_mask.expand(batch, num_keys)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return BY_NAME[name](
            query, key, value, block_indices,
            block_size=block_size, key_mask=mask, is_causal=is_causal, scale=factor,
        )  # fmt: skip

    if (
        name != "native" and block_indices.device.type == "cpu"
    ):  # elsewhere a look at them would wait for them
        _check_named(block_indices, count_blocks(num_keys, block_size))
    out, lse = under_autocast(attend, query, key, value)
    return (out, lse) if return_lse else out


def _check_indices(block_indices: Tensor, query: Tensor, num_kv_heads: int) -> None:
    if not isinstance(block_indices, Tensor) or block_indices.dtype not in (torch.int32, torch.int64):
        kind = block_indices.dtype if isinstance(block_indices, Tensor) else type(block_indices).__name__
        raise TypeError(f"block_indices are {kind}. Give whole numbers, torch.int64 or torch.int32.")
    batch, num_queries = query.shape[:2]
    shape = tuple(block_indices.shape)
    if len(shape) != 4 or shape[:3] not in ((batch, num_queries, num_kv_heads), (batch, 1, num_kv_heads)):
        raise ValueError(
            f"block_indices have shape {list(shape)}. Give [{batch}, {num_queries}, {num_kv_heads}, blocks], "
            "or one row for all queries."
        )
    if block_indices.device != query.device:
        raise ValueError(
            f"block_indices are on {block_indices.device}, the query on {query.device}. "
            "Move them to one device."
        )


def _check_named(block_indices: Tensor, blocks: int) -> None:
    """Refuse blocks behind the last; in a trace and under vmap they count as none."""
    if torch.compiler.is_compiling() or torch._C._functorch.get_interpreter_stack():
        return
    if block_indices.numel() and (last := int(block_indices.max())) >= blocks:
        raise ValueError(f"block_indices name block {last}. There are {blocks}, counted from 0.")
