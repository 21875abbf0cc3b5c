"""How many tokens merge where: integers, no tensors."""

from __future__ import annotations


def num_pairs(num_tokens: int, window_size: int | None = None, parity: int = 0) -> int:
    """Adjacent pairs (parity, parity + 1), (parity + 2, parity + 3) ... that lie inside one window.

    16 tokens make 8 pairs from 0 on and 7 from 1 on; in windows of 4 the latter are 4.
    """
    pairs = max(num_tokens - parity, 0) // 2
    if window_size is None:
        return pairs
    borders = max(num_tokens - 1, 0) // window_size  # k * window_size - 1 is left of one, for k = 1, 2, ...
    if window_size % 2 == 0:
        return pairs - borders * parity
    return pairs - (borders + 1 - parity) // 2


def lengths(num_tokens: int, keep: float | int, num_layers: int) -> tuple[int, ...]:
    """Tokens left after each of `num_layers` layers that merge equally many; the last takes the remainder.

        lengths(4096, 0.5, 4)   # (3584, 3072, 2560, 2048)

    `keep` is the share of tokens left at the end, or as a whole number how many.
    """
    left = keep if isinstance(keep, int) else round(num_tokens * keep)
    if num_layers < 1 or not 0 < left <= num_tokens:
        raise ValueError(
            f"keep={keep} of {num_tokens} tokens in {num_layers} layers: "
            f"give at least one layer, and between 1 and {num_tokens} tokens to keep."
        )
    share, rest = divmod(num_tokens - left, num_layers)
    found = [num_tokens - share * (layer + 1) for layer in range(num_layers)]
    found[-1] -= rest
    for before, after in zip([num_tokens, *found], found, strict=False):
        if before - after > before // 2:
            raise ValueError(
                f"keep={keep} of {num_tokens} tokens in {num_layers} layers merges {before - after} of "
                f"{before} tokens in one layer; at most half can. Keep more, or merge in more layers."
            )
    return tuple(found)
