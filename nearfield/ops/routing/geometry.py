"""What a routing pattern is: integers and words, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

Selection = Literal["causal", "balanced", "parity"]
SMOOTHING = 1e-2  # official code divides by this much more than the number of clusters a token is in


@dataclass(frozen=True)
class Routing:
    """Attention inside clusters of tokens that point the same way.

        Routing(256)                                        # decoder: clusters never look ahead
        Routing(256, selection="balanced", is_causal=False)  # encoder

    `selection` says who is in a cluster:
    - "causal": each token joins the one cluster nearest to its query and key together, and sees the last
      `window_size` members up to itself. No token has a say in what an earlier one sees.
    - "balanced": each cluster takes the `window_size` tokens that lie nearest to its centroid; a token may be
      in several clusters, whose results are averaged, or in none, and then gets 0.
    - "parity": the same as the published code has it, which also divides by (count + 0.01). With `is_causal`
      no query sees a later key, yet **the future leaks**: a later token can push an earlier one out of a
      cluster. It is for comparison with published figures, not for training a decoder.

    `sees_self=False` lets a token see itself only when it sees nothing else (for keys that are the queries).
    """

    window_size: int
    selection: Selection = "causal"
    is_causal: bool = True
    sees_self: bool = True

    def __post_init__(self) -> None:
        if (
            isinstance(self.window_size, bool)
            or not isinstance(self.window_size, int)
            or self.window_size < 1
        ):
            raise ValueError(
                f"window_size={self.window_size!r} must be a whole number of at least 1: tokens per cluster."
            )
        if self.selection not in get_args(Selection):
            near = get_close_matches(str(self.selection), get_args(Selection), n=1) or ["causal"]
            raise ValueError(
                f"selection={self.selection!r} is unknown. Did you mean {near[0]!r}? "
                f"Give one of {', '.join(get_args(Selection))}."
            )
        if self.selection == "causal" and not self.is_causal:
            raise ValueError(
                "selection='causal' with is_causal=False looks back only. "
                "Give selection='balanced' for an encoder."
            )
        if self.selection == "balanced" and self.is_causal:
            raise ValueError(
                "selection='balanced' with is_causal=True would leak the future: later tokens push earlier "
                "ones out of a cluster. Give selection='causal', or 'parity' to reproduce the published code."
            )

    @property
    def smoothing(self) -> float:
        """What is added to the number of clusters that results are divided by."""
        return SMOOTHING if self.selection == "parity" else 0.0
