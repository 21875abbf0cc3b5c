"""Blocks of keys on a line: how many, and which keys and queries lie in which. Integers only."""

from __future__ import annotations


def count_blocks(num_keys: int, block_size: int) -> int:
    """How many blocks hold `num_keys` keys; the last may be ragged."""
    return -(-num_keys // block_size)


def check_block_size(block_size: int) -> None:
    """Refuse what is no length of a block."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size is {block_size!r}. Give a whole number of keys, such as 64.")
    if block_size < 1:
        raise ValueError(f"block_size={block_size} holds no key. Give at least 1.")


def check_causal(num_queries: int, num_keys: int) -> None:
    """Refuse more causal queries than keys: they are the last of them."""
    if num_queries > num_keys:
        raise ValueError(
            f"{num_queries} causal queries for {num_keys} keys. Queries are the last of the keys."
        )
