"""Which blocks a query attends to, from the scores of all."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfield.core.backend import Verdict
from nearfield.core.backend import choose as choose_backend
from nearfield.ops.checks import no_transform
from nearfield.ops.kernels import missing
from nearfield.ops.topk import native
from nearfield.ops.topk.geometry import check_block_size, check_causal, count_blocks

OP = "choose_blocks"


def choose_blocks(
    scores: Float[Tensor, "b n kv_heads blocks"],
    num_blocks: int,
    *,
    block_size: int,
    num_keys: int,
    num_sinks: int = 0,
    num_recent: int = 0,
    backend: str = "auto",
) -> Int[Tensor, "b n kv_heads s"]:
    """The `num_blocks` blocks of the largest scores for each query and key head, in ascending order.

    Queries are the last of `num_keys` keys. The first blocks with a score, as many as hold `num_sinks` keys,
    and those of a query's last `num_recent` keys are among the chosen, whatever their scores; where they
    alone are more than `num_blocks`, they are all. A block of score 0 (unseen) is never chosen: -1 stands,
    last, where there is none. Of equal scores the first is taken.
    """
    check_block_size(block_size)
    blocks = count_blocks(num_keys, block_size)
    if scores.dim() != 4 or scores.shape[-1] != blocks:
        raise ValueError(
            f"scores have shape {list(scores.shape)}. {num_keys} keys in blocks of {block_size} "
            f"are {blocks}: give [batch, queries, kv_heads, {blocks}]."
        )
    if num_blocks < 1 or num_sinks < 0 or num_recent < 0:
        raise ValueError(
            f"num_blocks={num_blocks}, num_sinks={num_sinks}, num_recent={num_recent}. "
            "Choose at least one block, and no negative number of keys."
        )
    num_queries = scores.shape[1]
    check_causal(num_queries, num_keys)
    width = _width(num_blocks, num_queries, num_keys, block_size, num_sinks, num_recent)
    sinks = count_blocks(num_sinks, block_size)

    def ask_native() -> Verdict:
        if scores.device.type != "cpu" or scores.dtype != torch.float32:
            return Verdict("the CPU kernels choose by float32 scores on a CPU.")
        return Verdict(no_transform() or missing())

    # the definition in torch answers to both names of what runs anywhere
    asked = {"native": ask_native, "tiled": Verdict, "reference": Verdict}
    if choose_backend(OP, backend, asked) == "native":
        return native.choose(scores, num_blocks, block_size, num_keys, sinks, num_recent, width)
    return _choose(scores, num_blocks, block_size, num_keys, sinks, num_recent, width)


def _choose(
    scores: Tensor, num_blocks: int, block_size: int, num_keys: int, sinks: int, num_recent: int, width: int
) -> Tensor:
    scores, num_queries, blocks = scores.detach(), scores.shape[1], scores.shape[-1]
    at = torch.arange(num_keys - num_queries, num_keys, device=scores.device)[:, None]
    block = torch.arange(blocks, device=scores.device)
    first = (at - num_recent + 1).div(block_size, rounding_mode="floor")
    recent = (block >= first) & (block <= at // block_size) & (num_recent > 0)  # [N, blocks]
    is_seen = scores > 0
    forced = (recent[:, None] | (is_seen.cumsum(-1) <= sinks)) & is_seen
    order = torch.where(forced, torch.inf, scores)
    order, index = order.sort(dim=-1, descending=True, stable=True)
    stays = (order > 0) & ((block < num_blocks) | (order == torch.inf))
    index = index.masked_fill(~stays, blocks).sort(-1).values[..., :width]
    return index.masked_fill(index == blocks, -1)


def _width(
    num_blocks: int, num_queries: int, num_keys: int, block_size: int, num_sinks: int, num_recent: int
) -> int:
    """Blocks that a query may get: from numbers alone, whatever the scores."""
    at = num_keys - 1 if num_queries == 1 else block_size * num_keys  # else one that begins a block
    recent = at // block_size - (at - num_recent + 1) // block_size + 1 if num_recent else 0
    return min(
        max(num_blocks, count_blocks(num_sinks, block_size) + recent), count_blocks(num_keys, block_size)
    )
