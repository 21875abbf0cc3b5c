"""`nearfield convert --for decode`: a language model whose steps read few blocks of a long cache.

The policy is chosen on a calibration passage (text that hides pass keys and asks for them) and judged on text
and prompts that it never saw. Prompts are read densely by either form; what is compared are steps, of which
several are taken at once: each row of such a chunk chooses for itself and reads what a step of its own would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, log1p
from time import perf_counter
from typing import Any

import torch

from nearfield.convert.decoder import Decoder, Judged, Judgement, Reading, Trial
from nearfield.convert.decoding_report import DecodeConversion, DecodePoint, Steps, Tried
from nearfield.convert.quality import perplexity_change, recall_change
from nearfield.convert.steps import ask_in_steps, decoding_by, follow, prefill, weight_bytes
from nearfield.convert.swap import convert
from nearfield.data import recall
from nearfield.hosts import packaged
from nearfield.hosts.transformers_sites import head_dim_of, native_window, num_kv_heads_of
from nearfield.measure.reuse import (
    Distortion,
    ReuseProfile,
    distortion,
    reuse_profile,
    sensitive_by_density,
)
from nearfield.plan.reuse import ReusePolicy, best_reuse

Tell = Any  # what is going on, how much is done, of how much

READ = (16, 8, 4)  # a sparse layer reads one in so many tokens
SHARES = (0.09, 0.2, 0.4, 0.6)  # of the layers, the most sensitive first, that stay full; 0.09 is published
SELECTING = (0.3, 0.6, 1)  # of the sparse layers, the share that chooses at most; 0.3 is published
LENGTHS = (
    (2, 5),
    (1, 5),
)  # (divisor of the tokens, lookup prompts): 40 questions; shorter ones read all keys
TAIL = 1024  # tokens that are read in steps at the end of a text, or a quarter of it
PROFILED = 256  # of these, the last, in which layers are compared: the questions are among them
ROUNDS = 32  # interleaved timings of a step
JUDGEMENTS = 4  # of ever more careful policies; the last is full attention everywhere
AIM = 0.45  # share of the budget to use on the calibration passage: other text loses more
ANSWER_LIMIT = 0.05  # nats per token of a pass key that a policy may add there


@dataclass(frozen=True)
class Candidate:
    """A policy and the bytes that a step by it reads, weights and cache."""

    policy: ReusePolicy
    bytes: int

    @property
    def care(self) -> tuple[int, int, int, int]:
        """What makes a policy more careful: tokens read, full layers, layers that choose, exact scores."""
        policy = self.policy
        return policy.num_tokens, len(policy.full), len(policy.selecting), int(policy.score == "mass")

    def is_within(self, other: Candidate) -> bool:
        """Whether it is in no respect more careful than another."""
        return all(a <= b for a, b in zip(self.care, other.care, strict=True))


@dataclass
class DecodeJob:
    """The job on one decoder."""

    opened: packaged.Packaged
    text: str
    tokens: int
    budget: float
    quick: bool
    seed: int
    tell: Tell
    task: Decoder = field(init=False)

    def __post_init__(self) -> None:
        from nearfield.hosts.transformers_blocks import decoder_layers, sparse_layers

        self.modules = decoder_layers(self.model)
        self.sparse = sparse_layers(self.model)
        if not self.sparse:
            raise NotImplementedError(
                f"Every layer of {self.opened.name} has a sliding window of its own or caps its scores, so a "
                "step has nothing to leave out. Give a decoder with layers of full attention."
            )
        self.first = self.tokens - min(TAIL, self.tokens // 4)  # the first token that is predicted in steps
        self.tell("read the text", 0, 1)
        self.task = Decoder(
            self.model, self.opened.processor, self.text, self.tokens, seed=self.seed, lengths=LENGTHS
        )
        self.tell("read the text", 1, 1)
        self.aim = AIM * log1p(self.budget)
        self.trials: list[tuple[ReusePolicy, Trial]] = []
        self.failed: list[Candidate] = []
        self.profiles: dict[int, ReuseProfile] = {}

    @property
    def model(self) -> Any:
        return self.opened.model

    def run(self, policy: ReusePolicy | None = None) -> DecodeConversion:
        """The model converted by `policy`, or by one that is found here."""
        self._read_passage()
        candidates: list[list[Candidate]] = []
        chosen = policy
        if chosen is None:
            candidates = self._candidates()
            chosen = self._tried(candidates)
        judged, before = self._judge(chosen, None, policy is None)
        judgements = [judged]
        while policy is None and not judged.holds(self.budget):
            chosen = self._tightened(chosen, judged, len(judgements), candidates)
            judged, before = self._judge(chosen, before, True)
            judgements.append(judged)
        points = [self._point(*each) for each in self._controls(chosen)] if policy is None else []
        steps = self._timed(chosen)
        report = convert(self.model, chosen)
        return DecodeConversion(
            model=self.opened.name,
            text=self.text,
            tokens=self.tokens,
            tail=self.tokens - self.first,
            budget=self.budget,
            quick=self.quick,
            policy=chosen,
            profile=self.profiles.get(chosen.num_tokens),
            judgements=judgements,
            trials=[Tried(tried, trial, self._bytes(tried)) for tried, trial in self.trials],
            points=points,
            passkeys=len(self.task.passage.answers),
            steps=steps,
            report=report,
        )

    # The calibration passage.

    def _read_passage(self) -> None:
        """The passage up to its tail in a cache, and its tail as the dense model reads it in steps."""
        ids = self.task.ids
        self.tell("read the calibration passage", 0, 1)
        self.cache = prefill(self.model, ids[:, : self.first - 1], self.tokens)
        self.before = follow(self.model, self.cache, ids, self.first)
        self.tell("read the calibration passage", 1, 1)

    def _try(self, policy: ReusePolicy) -> Trial:
        """A policy on the tail of the passage; one that was run already is not run again."""
        for tried, trial in self.trials:
            if tried == policy:
                return trial
        with decoding_by(self.model, policy):
            reading = follow(self.model, self.cache, self.task.ids, self.first)
        passage = self.task.passage
        added = reading.losses.double() - self.before.losses.double()
        on_answers = added[[at - self.first for answer in passage.answers for at in answer]]
        on_text = added[: passage.text_end - self.first]
        answered = _answered(reading, passage, self.first)
        found = Trial(float(on_text.mean()), float(on_answers.mean()), answered, reading.seconds)
        self.trials.append((policy, found))
        return found

    def _candidates(self) -> list[list[Candidate]]:
        """Policies, cheapest first by the bytes that a step reads; those that differ only in how many layers
        choose together, the most first.
        """
        groups: dict[tuple[int, int, str], dict[ReusePolicy, Candidate]] = {}
        sizes = [_sizes(self.tokens, self.tokens // divisor) for divisor in READ]
        disturbed = self._disturbed(sizes[-1])
        for at, size in enumerate(sizes):
            self.tell("compare layers", at, len(sizes))
            profile = self.profiles[size["num_tokens"]] = reuse_profile(
                self.model, self.task.ids, steps=min(PROFILED, self.tokens - self.first), **size
            )
            overlap, layers = profile.matrix("min"), len(profile.names)
            for share in SHARES:
                most_in_need = (
                    disturbed.sensitive(share)
                    if disturbed is not None
                    else sensitive_by_density(profile, share)
                )
                full = tuple(sorted({*most_in_need, *self._fixed}))
                for selecting in SELECTING if len(full) < layers else ():
                    most = ceil(selecting * (layers - len(full))) + len(full) - 1
                    sources = best_reuse(overlap, sensitive=full, max_changes=most).sources
                    if selecting == 1:
                        sources = tuple(None if at in full else at for at in range(layers))
                    for score in ("bound", "mass"):
                        policy = ReusePolicy(sources, score=score, **size)
                        group = groups.setdefault((size["num_tokens"], len(full), score), {})
                        group[policy] = Candidate(policy, self._bytes(policy))
        self.tell("compare layers", len(sizes), len(sizes))
        found = [sorted(group.values(), key=lambda each: each.care)[::-1] for group in groups.values()]
        return sorted(found, key=lambda group: group[-1].bytes)

    def _disturbed(self, size: dict[str, Any]) -> Distortion | None:
        """What each layer does when it alone is sparse; None for models whose windows forget tokens, which
        cannot be asked layer by layer: there the blocks that a layer needs tell.
        """
        if any(native_window(module) is not None for module in self.modules.values()):
            return None
        return distortion(
            self.model,
            self.task.ids,
            steps=min(PROFILED, self.tokens - self.first) // 2,
            progress=lambda done, total: self.tell("make each layer sparse alone", done, total),
            **size,
        )

    @property
    def _fixed(self) -> tuple[int, ...]:
        """Layers that cannot be sparse."""
        return tuple(layer for layer in self.modules if layer not in self.sparse)

    def _tried(self, groups: Sequence[Sequence[Candidate]]) -> ReusePolicy:
        """The cheapest policy that holds on the calibration passage; full attention where none does."""
        found = self._full
        for at, group in enumerate(groups):
            self.tell("try policies", at, len(groups))
            if self._holds(group[0]):
                fewer = (each.policy for each in group[:0:-1] if self._holds(each))
                found = next(fewer, group[0].policy)
                break
        self.tell("try policies", len(groups), len(groups))
        return found

    def _holds(self, candidate: Candidate) -> bool:
        """Whether text and pass keys of the passage are kept: not where a more careful policy failed."""
        if any(candidate.is_within(other) for other in self.failed):
            return False
        trial = self._try(candidate.policy)
        keeps, remembers = trial.added <= self.aim, trial.added_to_answers <= ANSWER_LIMIT
        if not (keeps and remembers):
            self.failed.append(candidate)
        return keeps and remembers

    @property
    def _full(self) -> ReusePolicy:
        sizes = _sizes(self.tokens, self.tokens // READ[-1])
        return ReusePolicy((None,) * len(self.modules), **sizes)

    def _tightened(
        self,
        policy: ReusePolicy,
        judged: Judgement,
        judgements: int,
        candidates: Sequence[Sequence[Candidate]],
    ) -> ReusePolicy:
        """A more careful policy; ever more so, and at last full attention, which always holds."""
        if judgements >= JUDGEMENTS - 1:
            return self._full
        over = max(log1p(max(judged.perplexity.high, 0.0)) / log1p(self.budget), 1.0)
        self.aim *= 0.8 / over
        self.failed.append(Candidate(policy, 0))
        return self._tried(candidates)

    # Text and prompts that took no part.

    def _judge(self, policy: ReusePolicy, known: Judged | None, tighten: bool) -> tuple[Judgement, Judged]:
        """Each slice and prompt is read once; its end follows by the dense model, and by the policy."""
        before, after, task = known or Judged([], []), Judged([], []), self.task
        total = len(task.held_out) + len(task.prompts)
        name = "judge on held-out text and prompts"
        for at, ids in enumerate(task.held_out[:, None]):
            self.tell(name, at, total)
            cache = prefill(self.model, ids[:, : self.first - 1], self.tokens)
            if at == len(before.readings):
                before.readings.append(follow(self.model, cache, ids, self.first))
            with decoding_by(self.model, policy):
                after.readings.append(follow(self.model, cache, ids, self.first))
        losses = [[reading.losses for reading in state.readings] for state in (before, after)]
        change = perplexity_change(*losses)
        if tighten and change.high > self.budget:
            return Judgement(before, after, change, None), before
        for at, prompt in enumerate(task.prompts):
            self.tell(name, len(task.held_out) + at, total)
            cache = prefill(self.model, torch.tensor([prompt.context]), self.tokens)
            if at == len(before.asked):
                before.asked.append(ask_in_steps(self.model, cache, prompt))
            with decoding_by(self.model, policy):
                after.asked.append(ask_in_steps(self.model, cache, prompt))
        self.tell(name, total, total)
        right = [[found for asked in state.asked for found in asked.right] for state in (before, after)]
        return Judgement(before, after, change, recall_change(*right)), before

    # Time.

    def _timed(self, policy: ReusePolicy) -> Steps:
        """A step with all tokens in the cache, in turn: torch's dense attention, ours, and the policy."""
        ids = self.task.ids
        self.model(input_ids=ids[:, self.first - 1 : -1], past_key_values=self.cache, logits_to_keep=1)
        ways = {
            "torch": None,
            "native": replace(policy, sources=(None,) * len(policy.sources)),
            "sparse": policy,
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for at in range(ROUNDS + 2):  # the first two wake up what comes after them
            for way, each in ways.items():
                with decoding_by(self.model, each), torch.no_grad():
                    began = perf_counter()
                    self.model(input_ids=ids[:, -1:], past_key_values=self.cache)
                    seconds[way].append(perf_counter() - began)
                self.cache.crop(-1)
            self.tell("time steps", at + 1, ROUNDS + 2)
        held = sum(getattr(layer, "nbytes", 0) for layer in self.cache.layers)
        self.cache.crop(self.first - self.tokens)
        return Steps(
            torch=seconds["torch"][2:],
            native=seconds["native"][2:],
            sparse=seconds["sparse"][2:],
            weight_bytes=weight_bytes(self.model),
            dense_bytes=self._bytes(self._full),
            sparse_bytes=self._bytes(policy),
            held_bytes=held,
        )

    def _bytes(self, policy: ReusePolicy) -> int:
        """Bytes that a step reads: the weights, and of the cache what the policy reads."""
        total = weight_bytes(self.model)
        itemsize = next(self.model.parameters()).dtype.itemsize
        for layer, module in self.modules.items():
            window, dim = native_window(module), head_dim_of(module)
            shape = {"kv_heads": num_kv_heads_of(module), "key_dim": dim, "value_dim": dim}
            if layer in self.sparse:
                total += policy.bytes_read(self.tokens, itemsize=itemsize, **shape)[layer]
            else:
                seen = self.tokens if window is None else min(window, self.tokens)
                total += policy.dense_bytes(seen, itemsize=itemsize, **shape)[layer]
        return total

    # Controls.

    def _controls(self, policy: ReusePolicy) -> Iterator[tuple[str, str, ReusePolicy]]:
        """Other policies that read as many tokens in as many sparse layers, or nearly so."""
        yield "full attention", "full", self._full
        if not policy.selecting:
            return
        number = len(policy.selecting)
        every = tuple(None if source is None else layer for layer, source in enumerate(policy.sources))
        yield (
            f"{number} layers select at even distances",
            "uniform",
            replace(policy, sources=_evenly(policy.sources, number)),
        )
        free = self.profiles[policy.num_tokens].matrix("min")
        most = number + len(self._fixed) - 1
        sources = best_reuse(free, sensitive=self._fixed, max_changes=most).sources
        yield "no layer protected", "unprotected", replace(policy, sources=sources)
        yield "every sparse layer selects", "every", replace(policy, sources=every)
        recent = policy.num_blocks * policy.block_size - policy.num_sinks
        yield f"a window of {recent:,} and sinks", "window", replace(policy, num_recent=recent)
        yield "the policy", "policy", policy

    def _point(self, name: str, kind: str, policy: ReusePolicy) -> DecodePoint:
        if kind == "full":
            answered = _answered(self.before, self.task.passage, self.first)
            return DecodePoint(name, kind, 0.0, 0.0, answered, self._bytes(policy))
        trial = self._try(policy)
        return DecodePoint(
            name, kind, trial.added, trial.added_to_answers, trial.answered, self._bytes(policy)
        )


def _answered(reading: Reading, passage: recall.Passage, first: int) -> int:
    """Pass keys that were right to the last digit."""
    return sum(all(reading.right[at - first] for at in answer) for answer in passage.answers)


def _sizes(tokens: int, num_tokens: int) -> dict[str, Any]:
    """How many keys are read and in what: blocks of tokens / 256, from 4 to 64; a quarter are the newest."""
    block = 4
    while block < 64 and block * 256 < tokens:
        block *= 2
    num_tokens = num_tokens // block * block
    return {
        "num_tokens": num_tokens,
        "block_size": block,
        "num_sinks": block,
        "num_recent": num_tokens // 4,
    }


def _evenly(sources: Sequence[int | None], number: int) -> tuple[int | None, ...]:
    """The same full layers; of the others so many select, at even distances."""
    sparse = [layer for layer, source in enumerate(sources) if source is not None]
    selecting = {sparse[at * len(sparse) // number] for at in range(number)}
    found: list[int | None] = []
    last = None
    for layer, source in enumerate(sources):
        last = layer if layer in selecting else last
        found.append(None if source is None else last)
    return tuple(found)
