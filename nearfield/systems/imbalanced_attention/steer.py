"""A boost of the scores of informed image tokens, and guidance by the prompt without its image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfield.hosts.generation import Branch, generate
from nearfield.hosts.seam import Site
from nearfield.hosts.vision_language import image_tokens
from nearfield.steer import Steer
from nearfield.systems.imbalanced_attention.study import Informed, informed_tokens


@dataclass
class InformedBoost(Steer):
    """More attention to informed image tokens, for the newest token alone.

    A score e becomes `e + gain * |e|`, or `e + log(1 + gain)` with `mode="log"`, which multiplies the odds of
    a token by `1 + gain` whatever the scores are. The gain is `alpha` at local tokens and `beta` at summary
    tokens, in layers from `start` to before `stop`. `tokens` has an entry for each row of a batch; `heads`
    [layers, heads] is a factor on the gain.
    """

    tokens: Sequence[Informed]
    alpha: float = 0.7
    beta: float = 0.4
    mode: Literal["abs", "log"] = "abs"
    start: int = 2
    stop: int | None = None
    heads: Tensor | None = None
    sites: str = "*language_model.*"

    def __post_init__(self) -> None:
        if self.mode not in ("abs", "log"):
            raise ValueError(f"mode={self.mode!r} is unknown. Write abs or log.")
        if not self.tokens:
            raise ValueError("tokens is empty. Give what informed_tokens found, an entry for each row.")
        found = [
            (row, place, gain)
            for row, (local, summary) in enumerate(self.tokens)
            for places, gain in ((set(local) - set(summary), self.alpha), (set(summary), self.beta))
            for place in sorted(places)
        ]
        self._where = torch.tensor([each[:2] for each in found], dtype=torch.long).view(-1, 2)
        self._gains = torch.tensor([each[2] for each in found], dtype=torch.float64)

    def takes(self, site: Site) -> bool:
        """Layers from `start` to before `stop`."""
        layer = site.layer or 0
        return super().takes(site) and layer >= self.start and (self.stop is None or layer < self.stop)

    def rows(self, site: Site) -> range:
        """The newest token."""
        return site.rows[-1:]

    def score(self, site: Site, scores: Tensor, rows: range, keys: range) -> Tensor:
        """Scores before masks, so that what is hidden stays hidden and no -inf is multiplied."""
        gain = self._gain(scores, keys)[:, None, None]  # [B, 1, 1, M]
        if self.heads is not None:
            gain = gain * self.heads[site.layer or 0].to(gain)[:, None, None]
        return scores + (gain * scores.abs() if self.mode == "abs" else gain.log1p())

    def _gain(self, scores: Tensor, keys: range) -> Float[Tensor, "b m"]:
        """The gain of each key of each row; zero at all that is not informed."""
        if len(scores) % len(self.tokens):
            raise ValueError(f"tokens has {len(self.tokens)} entries for a batch of {len(scores)}.")
        gain = scores.new_zeros(len(self.tokens), len(keys))
        row, place = self._where.to(scores.device).unbind(1)
        here = (place >= keys.start) & (place < keys.stop)
        gain[row[here], place[here] - keys.start] = self._gains.to(gain)[here]
        return gain.repeat_interleave(len(scores) // len(self.tokens), 0)


def guide(gamma: float = 1.1, floor: float = 0.1) -> Callable[[list[Tensor]], Tensor]:
    """What `hosts.generation.generate` makes of logits with the image and without: the image counts more.

    `gamma * (with - without) + without` of log-probabilities, where a token is as likely with the image as
    `floor` times the likeliest. `gamma=1` gives the log-probabilities with the image.
    """

    def combine(logits: list[Tensor]) -> Tensor:
        seen, blind = (each.log_softmax(-1) for each in logits)
        if gamma == 1:
            return seen
        cut = seen < math.log(floor) + seen.amax(-1, keepdim=True)
        return (gamma * (seen - blind) + blind).masked_fill(cut, -math.inf)

    return combine


def generate_informed(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    boost: InformedBoost | None = None,
    gamma: float = 1.1,
    **options: Any,
) -> Int[Tensor, "b tokens"]:
    """Tokens of `model.generate` with boosted attention and guidance; `gamma=1` leaves guidance out.

    `boost` is by default that of the paper on `informed_tokens(model, inputs)`.
    """
    boost = InformedBoost(informed_tokens(model, inputs)) if boost is None else boost
    steered = Branch(inputs, within=lambda: boost(model))
    if gamma == 1:
        return generate(model, [steered], lambda logits: logits[0], **options)
    return generate(model, [steered, Branch(without_image(model, inputs))], guide(gamma), **options)


def without_image(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt with its image tokens, and the marks around them, taken out."""
    ids = inputs["input_ids"]
    keep = torch.ones_like(ids, dtype=torch.bool)
    for row, ranges in enumerate(image_tokens(model, inputs)):
        for where in ranges:
            keep[row, where.start : where.stop] = False
    for name in ("vision_start_token_id", "vision_end_token_id"):
        mark = getattr(model.config, name, None)
        if mark is not None:
            keep &= ids != mark
    if len(set(keep.sum(-1).tolist())) > 1:
        raise ValueError(
            "The rows hold unequal numbers of image tokens, so that without them they differ in length. Give "
            "them one by one."
        )
    texts = {name: each for name, each in inputs.items() if getattr(each, "shape", None) == ids.shape}
    return {name: each[keep].view(len(ids), -1) for name, each in texts.items()}
