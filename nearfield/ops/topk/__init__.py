"""Attention of each query to a few blocks of keys, and the choice of these blocks."""

from nearfield.ops.topk.attention import topk_block_attention
from nearfield.ops.topk.choice import choose_blocks
from nearfield.ops.topk.scores import block_scores
from nearfield.ops.topk.summary import SCORES, BlockSummary, Score, extend_blocks, summarize_blocks

__all__ = [
    "SCORES",
    "BlockSummary",
    "Score",
    "block_scores",
    "choose_blocks",
    "extend_blocks",
    "summarize_blocks",
    "topk_block_attention",
]
