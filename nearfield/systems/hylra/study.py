"""The policy that HyLRA makes of a decoder and a text, policies to compare it with, and what one costs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfield.bench.seeds import by_seed, draw_seeds, paired_interval
from nearfield.measure.reuse import Merge, ReuseProfile, reuse_profile, sensitive_by_density
from nearfield.plan.reuse import ReusePolicy, Sources, best_reuse, follow
from nearfield.systems.hylra.model import Planted, planted
from nearfield.systems.hylra.steer import HyLRA

SPARSITY = 0.91  # published: all but so many layers are sparse
SEEDS = (0, 1, 2)  # of planted decoders
SMALL: dict[str, Any] = {"num_tokens": 64, "block_size": 8, "num_sinks": 8, "num_recent": 16}
LARGE: dict[str, Any] = {"num_tokens": 512, "block_size": 64, "num_sinks": 64, "num_recent": 128}
MODERATE: dict[str, Any] = {**LARGE, "num_tokens": 2048, "num_recent": 512}
RUN = 16  # neighbouring tokens that count once in an interval
TOKENS, FOLLOWING = 8192, 256  # SmolLM2's positions, and how many of them are decoded


@torch.no_grad()
def hylra_policy(
    model: nn.Module,
    input_ids: Int[Tensor, "1 n"] | Sequence[Int[Tensor, "1 n"]],
    *,
    num_tokens: int = 2048,
    block_size: int = 64,
    num_sinks: int = 64,
    num_recent: int = 512,
    sensitive: float | Collection[int] = 1 - SPARSITY,
    steps: int = 64,
    heads: Merge = "min",
    parity: bool = False,
) -> ReusePolicy:
    """What each layer of a decoder does in a step that reads `num_tokens` keys, as one or several texts tell.

    The last `steps` tokens of each text are profiled. `sensitive` layers stay full: a share of all, by
    density, or their numbers (`distortion(...).sensitive(0.09)` measures them as the paper does). `heads`
    says how overlaps of heads are merged; "mean" is published for models whose heads share their keys.

    `parity=True` is the published way: the texts are prompts which the model goes on with by `steps` tokens,
    greedily; profile and programme are the published ones, and blocks are chosen by their hashes.
    """
    texts = [input_ids] if isinstance(input_ids, Tensor) else list(input_ids)
    if not texts:
        raise ValueError("There is no text to profile. Give one [1, tokens], or several.")
    kept: dict[str, Any] = {"block_size": block_size, "num_sinks": num_sinks, "num_recent": num_recent}
    profiles = []
    for text in texts:
        read = answered(model, text, steps) if parity else text
        profiles.append(reuse_profile(model, read, steps=steps, num_tokens=num_tokens, parity=parity, **kept))
    full = _sensitive(profiles, sensitive) if isinstance(sensitive, float | int) else tuple(sensitive)
    full = tuple(sorted({*full, *profiles[0].fixed}))
    found = best_reuse([profile.matrix(heads) for profile in profiles], sensitive=full, parity=parity)
    return ReusePolicy(found.sources, num_tokens, **kept, score="hash" if parity else "bound")


@torch.no_grad()
def answered(model: Any, input_ids: Int[Tensor, "1 n"], steps: int) -> Int[Tensor, "1 n_and_steps"]:
    """A prompt and the `steps` tokens with which the model goes on, each the most likely."""
    how = {"do_sample": False, "min_new_tokens": steps, "max_new_tokens": steps}
    mask = torch.ones_like(input_ids)
    found: Tensor = model.generate(input_ids, attention_mask=mask, pad_token_id=0, **how)
    return found


def uniform_sources(layers: int, full: Collection[int], selecting: int) -> Sources:
    """Every so many sparse layers one selects."""
    sparse = [layer for layer in range(layers) if layer not in full]
    return follow(layers, full, {sparse[at * len(sparse) // selecting] for at in range(selecting)})


def random_sources(layers: int, full: Collection[int], selecting: int, draw: Random) -> Sources:
    """The first sparse layer selects, and any others."""
    first, *rest = (layer for layer in range(layers) if layer not in full)
    return follow(layers, full, {first, *draw.sample(rest, selecting - 1)})


class Followed(NamedTuple):
    """How a decoder takes the end of a text: nats of every next token, and the divergence of what it expects
    from what the dense decoder does."""

    nats: Float[Tensor, " steps_less_1"]
    divergence: Float[Tensor, " steps"]


class Ending:
    """A text of which a decoder has read all but the end, which can follow as often as it is asked to."""

    @torch.no_grad()
    def __init__(self, model: Any, input_ids: Int[Tensor, "1 n"], steps: int):
        from nearfield.hosts.transformers_blocks import block_cache

        self.model, self.rest = model, input_ids[:, -steps:]
        self.cache = block_cache(model, input_ids.shape[1])
        model(input_ids=input_ids[:, :-steps], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.dense = self._expected()

    @torch.no_grad()
    def follow(self, policy: ReusePolicy | None = None) -> Followed:
        """The end, its tokens given, in steps that read what the policy says; None: all keys."""
        if policy is None:
            found = self.dense
        else:
            with HyLRA(policy)(self.model):
                found = self._expected()
        nats = F.nll_loss(found[:-1], self.rest[0, 1:], reduction="none")
        divergence = F.kl_div(found, self.dense, log_target=True, reduction="none").sum(-1)
        return Followed(nats.double(), divergence.double())

    def _expected(self) -> Float[Tensor, "steps vocabulary"]:
        """Log-probabilities of the tokens after each; in calls of as many rows as are decoding still."""
        from nearfield.hosts.transformers_blocks import MOST_ROWS

        found = []
        for part in self.rest.split(MOST_ROWS, dim=1):
            logits = self.model(input_ids=part, past_key_values=self.cache, use_cache=True).logits
            found.append(logits[0].float().log_softmax(-1))
        self.cache.crop(-self.rest.shape[1])
        return torch.cat(found)


@dataclass(eq=False)
class Case:
    """A decoder, its profile on one text, and another text whose end it is to follow."""

    model: Any
    profile: ReuseProfile
    input_ids: Int[Tensor, "1 n"]
    following: int  # tokens that are decoded
    wide: tuple[int, ...]  # layers that stay full
    kept: dict[str, Any]
    changes: int | None
    truth: Planted | None

    @cached_property
    def ending(self) -> Ending:
        return Ending(self.model, self.input_ids, self.following)

    def best(self, full: Collection[int], selecting: int | None = None) -> Sources:
        changes = self.changes if selecting is None else selecting - 1
        return best_reuse(self.profile.matrix(), sensitive=full, max_changes=changes).sources

    def harm(self, policies: Sequence[Sources], kept: dict[str, Any] | None = None) -> Followed:
        """Nats more than dense, and divergence, the mean over policies.

        Blocks are chosen by exact attention, so that what differs is who chooses.
        """
        settings = {**(kept or self.kept), "score": "mass"}
        told = [self.ending.follow(ReusePolicy(each, **settings)) for each in policies]
        nats, divergence = (torch.stack(each).mean(0) for each in zip(*told, strict=True))
        return Followed(nats - self.ending.follow().nats, divergence)

    def are_near(self, layer: int) -> bool:
        return self.truth is None or self.truth.group(layer) == self.truth.group(layer + 1)

    def are_far(self, i: int, j: int) -> bool:
        if self.truth is None:
            return abs(i - j) >= len(self.profile.names) // 2
        return self.truth.group(i) != self.truth.group(j)


class Costs:
    """What policies cost, by their kind and, within it, text by text."""

    def __init__(self, full: bool) -> None:
        self.full = full
        self.costs: dict[str, list[Followed]] = {}

    def add(self, name: str, cost: Followed) -> None:
        self.costs.setdefault(name, []).append(cost)

    @property
    def label(self) -> str:
        return "change of perplexity in %" if self.full else "divergence from dense, nats"

    def by_text(self) -> dict[str, list[float]]:
        """Changes of perplexity in %, or divergences of random decoders, whose perplexity says nothing."""
        divergence = {name: [float(each.divergence.mean()) for each in c] for name, c in self.costs.items()}
        if not self.full:
            return divergence
        return {name: [100 * float(each.nats.mean().expm1()) for each in c] for name, c in self.costs.items()}

    def gains(self, ours: str, others: Sequence[str]) -> tuple[float, str]:
        """The lowest end of the 95 % intervals of what `ours` saves, and all in words."""
        intervals = {name: paired_interval(self._runs(name), self._runs(ours)) for name in others}
        words = f"{self.label}: {by_seed(self.by_text())}"
        if self.full:
            means = {n: torch.cat([each.divergence for each in c]).mean() for n, c in self.costs.items()}
            words += "; divergence " + ", ".join(f"{name} {float(mean):.4f}" for name, mean in means.items())
        words += f"; {ours} saves, nats a token, 95 %: "
        words += ", ".join(f"{name} {low:+.4f} to {high:+.4f}" for name, (low, high) in intervals.items())
        return min(low for low, _ in intervals.values()), words

    def draw(self, axes: Any) -> None:
        draw_seeds(axes, self.by_text(), self.label)

    def _runs(self, name: str) -> list[float]:
        """Means of runs of neighbouring tokens, which are not independent."""
        costs = [each.nats if self.full else each.divergence for each in self.costs[name]]
        return [float(part.mean()) for cost in costs for part in cost.split(RUN)]


def cases(full: bool, texts: int = 2) -> Iterator[Case]:
    """Three planted decoders, or SmolLM2 on some long texts with the policies of another."""
    if not full:
        for seed in SEEDS:
            made = planted(seed=seed)
            profile = reuse_profile(made.model, made.calibration, steps=32, **SMALL)
            wide = sensitive_by_density(profile, 1 / len(profile.names))
            yield Case(made.model, profile, made.input_ids, 64, wide, SMALL, 3, made)
        return
    from nearfield.data import text
    from nearfield.hosts import packaged

    host, documents = packaged.load("smollm2-135m"), text.documents("python")
    counts = {"num_calibration": 1, "num_held_out": texts}
    parts = text.split(documents, host.processor, tokens=TOKENS, **counts)
    profile = reuse_profile(host.model, parts.calibration, **LARGE)
    wide = sensitive_by_density(profile, 1 - SPARSITY)
    for ids in parts.held_out:
        yield Case(host.model, profile, ids[None], FOLLOWING, wide, LARGE, None, None)


def _sensitive(profiles: Sequence[ReuseProfile], share: float) -> tuple[int, ...]:
    """By the mean density of all texts."""
    density = torch.stack([profile.density for profile in profiles]).mean(0)
    return sensitive_by_density(replace(profiles[0], density=density), share)
