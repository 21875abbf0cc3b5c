"""What the main job asks of a language model: what would damage it, how a try does, how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nearfield.convert.quality import Change, Recall, perplexity_change, recall_change
from nearfield.convert.swap import NUM_SINKS
from nearfield.data import recall, text
from nearfield.hosts.seam import Site
from nearfield.measure.sensitivity import SiteDamage, sensitivity
from nearfield.ops.neighborhood import Neighborhood

HEAD_CHUNK = 512  # positions whose logits are held at once
SHORTEST = 192  # tokens of a lookup prompt: four keys, a question, and text around them
LENGTHS = (
    (8, 4),
    (4, 3),
    (2, 2),
    (1, 1),
)  # (divisor of the tokens, lookup prompts of that length): 40 questions
DECODED = 8  # tokens written to time decoding


@dataclass(frozen=True)
class Trial:
    """One run on the calibration passage: loss added per token of text and per token of the pass keys (nats),
    pass keys found, prefill seconds."""

    added: float
    added_to_answers: float
    answered: int
    seconds: float


class Decoder:
    """A language model with its texts. Everything it is calibrated on is apart from what judges it.

    Raises `ValueError` where the text is too short, or the model has fewer positions than `tokens`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        source: str,
        tokens: int,
        *,
        num_held_out: int = 4,
        seed: int = 0,
        lengths: Sequence[tuple[int, int]] = LENGTHS,
    ):
        self.model, self.tokens = model, tokens
        texts = text.split(
            text.documents(source), tokenizer, tokens=tokens, num_calibration=1, num_held_out=num_held_out
        )
        self.held_out = texts.held_out
        random = Random(seed)
        calibration = texts.calibration.flatten().tolist()
        self.passage = recall.passkey(calibration, tokenizer, tokens=tokens, generator=random)
        self.ids = torch.tensor([self.passage.ids])
        stream = texts.held_out.flatten().tolist()
        self.prompts = [
            prompt
            for divisor, number in lengths
            for prompt in recall.lookup(
                stream,
                tokenizer,
                tokens=max(tokens // divisor, SHORTEST),
                num_prompts=number,
                generator=random,
            )
        ]
        self.generator = torch.Generator().manual_seed(seed)
        self._before: Reading | None = None

    def candidates(self, site: Site) -> list[Neighborhood]:
        """Causal windows of 64, 128, … up to half the tokens, each with the first tokens as sinks."""
        found, window = [], 64
        while window <= self.tokens // 2:
            found.append(Neighborhood(window, is_causal=True, num_sinks=NUM_SINKS))
            window *= 2
        return found

    def damages(self, progress: Callable[[int, int], None] | None = None) -> list[SiteDamage]:
        """Predicted added loss per token of text, and per token of an answer, of every candidate."""
        first = self.tokens // 2
        answer_rows = [at - 1 for answer in self.passage.answers for at in answer]
        found = sensitivity(
            self.model,
            partial(_summed_loss, ids=self.ids, first=first, keep=self._keep),
            self.candidates,
            rows=range(first - 1, self.passage.text_end),
            answer_rows=answer_rows,
            needle=self.passage.needles,
            generator=self.generator,
            progress=progress,
        )
        per_token, per_answer = 1 / (self.passage.text_end - first), 1 / len(answer_rows)
        for site in found:
            site.damage.mul_(per_token)
            site.recall.mul_(per_answer)
        return found

    def trial(self) -> Trial:
        """The model as it now is, on the calibration passage, against how it was."""
        reading = read(self.model, self.ids)
        first = self.tokens // 2
        added = reading.losses.double() - self.before.losses.double()
        on_answers = added[[at - first for answer in self.passage.answers for at in answer]]
        on_text = added[: self.passage.text_end - first]
        return Trial(float(on_text.mean()), float(on_answers.mean()), self.answered(reading), reading.seconds)

    def answered(self, reading: Reading | None = None) -> int:
        """Pass keys that a reading of the passage got right; of the unconverted model if none is given."""
        reading = reading or self.before
        first = self.tokens // 2
        return sum(all(reading.right[at - first] for at in answer) for answer in self.passage.answers)

    @property
    def before(self) -> Reading:
        """The passage as the unconverted model reads it; ask before converting, or after `damages`."""
        if self._before is None:
            self._before = read(self.model, self.ids)
        return self._before

    def _keep(self, reading: Reading) -> None:
        self._before = reading


@dataclass(frozen=True)
class Reading:
    """One forward over a text: loss of each token of the last half, whether it was the likeliest, seconds."""

    losses: Float[Tensor, " half"]
    right: list[bool]
    seconds: float


def read(model: nn.Module, ids: Int64[Tensor, "1 n"]) -> Reading:
    """The forward is a prefill's (`logits_to_keep=1`, no cache); other logits are made outside the clock."""
    half = ids.shape[1] // 2
    with torch.no_grad():
        began = perf_counter()
        states, head = _states(model, ids)
        seconds = perf_counter() - began
        losses, right = [], []
        for chunk, target in zip(
            states[0, half - 1 : -1].split(HEAD_CHUNK), ids[0, half:].split(HEAD_CHUNK), strict=True
        ):
            logits = head(chunk)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            right += (logits.argmax(-1) == target).tolist()
    return Reading(torch.cat(losses), right, seconds)


def _states(model: Any, ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The decoder's last hidden states of a prefill, and the map from them to logits.

    Raises `NotImplementedError` for a model whose own last logits that map does not give.
    """
    kept: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(
        lambda m, a, output: kept.append(output.last_hidden_state)
    )
    try:
        last = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    finally:
        hook.remove()
    project, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)

    def plain(states: Tensor) -> Tensor:
        found = project(states).float()
        return found if cap is None else torch.tanh(found / cap) * cap

    with torch.no_grad():
        again = plain(kept[0][:, -1:])
        scale = float((last.float() * again).sum() / again.square().sum())  # some models scale their logits
        if not torch.allclose(again * scale, last.float(), rtol=1e-3, atol=1e-3):
            raise NotImplementedError(
                f"How {type(model).__name__} makes logits of hidden states is not known here."
            )
    return kept[0], plain if abs(scale - 1) < 1e-3 else lambda states: plain(states) * scale


def _summed_loss(model: nn.Module, *, ids: Tensor, first: int, keep: Callable[[Reading], None]) -> Tensor:
    """Σ loss of the tokens from `first` on, with a graph behind it; logits are recomputed, not kept."""
    began = perf_counter()
    states, head = _states(model, ids)
    seconds = perf_counter() - began
    pieces = list(
        zip(states[0, first - 1 : -1].split(HEAD_CHUNK), ids[0, first:].split(HEAD_CHUNK), strict=True)
    )

    def summed(chunk: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = head(chunk)
        losses = F.cross_entropy(logits, target, reduction="none")
        return losses.sum(), losses.detach(), (logits.argmax(-1) == target).detach()

    found = [checkpoint(summed, chunk, target, use_reentrant=False) for chunk, target in pieces]
    keep(Reading(torch.cat([f[1] for f in found]), torch.cat([f[2] for f in found]).tolist(), seconds))
    return torch.stack([f[0] for f in found]).sum()


@dataclass(frozen=True)
class Asked:
    """Answers to the questions of one prompt; bytes its cache held; tokens a second when decoding."""

    right: list[bool]
    cache_bytes: int = 0
    tokens_per_second: float = 0.0


def ask(model: nn.Module, prompt: recall.Prompt, *, decode: bool = False) -> Asked:
    """Whether greedy decoding writes each answer: the context is read once into a cache, and every token of
    an answer must be the likeliest one behind the question and the tokens before it."""
    from transformers import DynamicCache

    from nearfield.hosts.transformers import cache_bytes

    asked = [q + a for q, a in zip(prompt.questions, prompt.answers, strict=True)]
    longest = max(map(len, asked))
    # a shorter row gets tokens behind its answer, which no token of the answer sees
    asked = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens in asked]
    held, rate = 0, 0.0
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        last = model(input_ids=torch.tensor([prompt.context]), past_key_values=cache, logits_to_keep=1).logits
        if decode:
            held, rate = cache_bytes(cache), _decode_rate(model, deepcopy(cache), last.argmax(-1))
        cache.batch_repeat_interleave(len(asked))
        logits = model(input_ids=torch.tensor(asked), past_key_values=cache).logits
    right = []
    for row, (question, answer) in enumerate(zip(prompt.questions, prompt.answers, strict=True)):
        start = len(question) - 1
        right.append(logits[row, start : start + len(answer)].argmax(-1).tolist() == list(answer))
    return Asked(right, held, rate)


def _decode_rate(model: nn.Module, cache: Any, token: Tensor) -> float:
    seconds = []
    for _ in range(DECODED):
        began = perf_counter()
        token = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        seconds.append(perf_counter() - began)
    return 1 / median(seconds[1:])


@dataclass
class Judged:
    """All that was measured of one state of the model."""

    readings: list[Reading]
    asked: list[Asked]


@dataclass
class Judgement:
    """Before against after on text and prompts that the plan never saw.

    `recall` is None where the text alone settled it: over the budget, no question was asked.
    """

    before: Judged
    after: Judged
    perplexity: Change
    recall: Recall | None

    def holds(self, budget: float) -> bool:
        """Whether the upper end of the interval of the change is within `budget` and retrieval is kept."""
        return self.perplexity.high <= budget and self.recall is not None and self.recall.kept

    def json(self) -> dict[str, Any]:
        """The two figures."""
        return {"perplexity": self.perplexity.json(), "recall": self.recall.json() if self.recall else None}


def judge(
    task: Decoder,
    converted: Callable[[bool], None],
    *,
    known: Judged | None = None,
    budget: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Judgement, Judged]:
    """Interleaved: each slice and prompt is read by the model as it was, then as it is.

    `converted(True)` makes the model local, `converted(False)` puts it back; `known` are the figures of the
    unconverted model from an earlier call, which then are not measured again. With a `budget`, no question is
    asked where the text is over it already.
    """
    before, after = known or Judged([], []), Judged([], [])
    total = 2 * (len(task.held_out) + len(task.prompts))

    def tell() -> None:
        if progress:
            progress(len(before.readings) + len(after.readings) + len(before.asked) + len(after.asked), total)

    def measured(kind: Callable[..., Any], on: bool, where: list[Any], *args: Any, **kwargs: Any) -> None:
        converted(on)
        where.append(kind(task.model, *args, **kwargs))
        tell()

    for at, ids in enumerate(task.held_out[:, None]):
        if at == len(before.readings):
            measured(read, False, before.readings, ids)
        measured(read, True, after.readings, ids)
    change = perplexity_change([r.losses for r in before.readings], [r.losses for r in after.readings])
    if budget is not None and change.high > budget:
        return Judgement(before, after, change, None), before
    for at, prompt in enumerate(task.prompts):
        last = at == len(task.prompts) - 1
        if at == len(before.asked):
            measured(ask, False, before.asked, prompt, decode=last)
        measured(ask, True, after.asked, prompt, decode=last)
    right = [[found for asked in state.asked for found in asked.right] for state in (before, after)]
    return Judgement(before, after, change, recall_change(*right)), before
