"""What the study of behaviour shift claims, tried here."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from nearfield.bench.seeds import by_seed, draw_seeds, interval, means
from nearfield.catalog import Result
from nearfield.systems.behavior_shift.model import (
    GROUP,
    GROUPS,
    NOUNS,
    ask,
    pair,
    planted,
    random_llama,
    removal,
    tokens_of,
    trained,
)
from nearfield.systems.behavior_shift.study import (
    attribution,
    concepts,
    head_pairs,
    overlap,
    welch,
    words_of,
)

SEEDS = (0, 1, 2)
TASKS = ("Repeat", "Reverse", "Say", "Write", "Give", "Count", "Put")  # verbs that the chat model was taught
OTHERS = ("Read", "Find", "Open", "Return", "Make", "Call", "Use", "Check", "Set", "Run", "Add", "Take")


def predicts_removal(*, full: bool = False) -> Result:
    """Rank correlation with what responses lose when a prompt token shrinks by a tenth, or is zeroed."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        model, draw = random_llama(seed), torch.Generator().manual_seed(seed)
        prompt = torch.randint(64, (24 if full else 12,), generator=draw)
        response = _greedy(model, prompt, 12 if full else 6)
        less, lost = (removal(model, prompt, response, keep=keep) for keep in (0.9, 0.0))
        scores = attribution(model, prompt, response)
        near = (torch.arange(len(prompt))[:, None] - torch.arange(len(response))).float()
        shuffled = scores[torch.randperm(len(prompt), generator=draw)]
        for name, (each, truth) in {
            "shrunk": (scores, less),
            "zeroed": (scores, lost),
            "zeroed, of other tokens": (shuffled, lost),
            "zeroed, nearness": (near, lost),
        }.items():
            found.setdefault(name, []).append(_rank_correlation(each.flatten(), truth.flatten()))
    controls = found["zeroed, of other tokens"] + found["zeroed, nearness"]
    holds = min(found["shrunk"]) >= 0.9 and min(found["zeroed"]) > max(controls)
    return Result(by_seed(found), holds, lambda axes: draw_seeds(axes, found, "rank correlation"))


def finds_planted_change(*, full: bool = False) -> Result:
    """Which head gained most pairs, which layer's first direction turned most, and which word is nearest."""
    found: dict[str, list[float]] = {}
    for seed in range(10) if full else SEEDS:
        here = planted(seed)
        names = [f"w{i}" for i in range(GROUPS * GROUP)]
        words = [words_of(m, names, [[i] for i in range(len(names))]) for m in (here.base, here.tuned)]
        both = list(zip((here.base, here.tuned), words, strict=True))
        heads = [head_pairs(model, each, top=6) for model, each in both]
        gains = [b.pairs.total() - a.pairs.total() for a, b in zip(*heads, strict=True)]
        told = [concepts(model, each, ranks=1, top=1) for model, each in both]
        kept = [overlap(a, b, 1) for a, b in zip(*told, strict=True)]
        for name, right in {
            "head": gains.index(max(gains)) == here.head,
            "layer": kept.index(min(kept)) == here.layer,
            "word": told[1][here.layer].words[0] == (f"w{here.word}",),
            "a random head": Random(seed).randrange(32) == here.head,
        }.items():
            found.setdefault(name, []).append(float(right))
    shares = dict(zip(found, means(found), strict=True))
    words_ = f"share found: {', '.join(f'{name} {share:.2f}' for name, share in shares.items())}"
    holds = min(shares[name] for name in ("head", "layer", "word")) == 1
    return Result(words_, holds, lambda axes: draw_seeds(axes, found, "found"))


def instruction_density(*, full: bool = False) -> Result:
    """Score of the instruction's span, and of spans as long elsewhere, on each model's own responses."""
    models = trained(full)
    if not models:
        return Result("", None, skipped="on SmolLM2 it takes minutes: nearfield run behavior-shift --full")
    scores, said, holds = dict[str, list[float]](), list[str](), True
    prompts = (100 if len(models) > 1 else 24) if full else 8
    for name, (model, tokenizer) in models.items():
        asked = [ask(model, tokenizer, number) for number in range(prompts)]
        low, high = interval([each.score - each.elsewhere for each in asked])
        holds = holds and low > 0
        scores[name], scores[f"{name}, elsewhere"] = [a.score for a in asked], [a.elsewhere for a in asked]
        followed, not_followed = ([a.score for a in asked if a.followed is kind] for kind in (True, False))
        said.append(f"{name}: instruction minus elsewhere {low:.2f} to {high:.2f}; followed {len(followed)}")
        if min(len(followed), len(not_followed)) > 1:
            said[-1] += f" of {prompts}, their score above the others': p = {_p(followed, not_followed):.3f}"
    if len(models) > 1:
        low, high = interval([b - a for a, b in zip(scores["base"], scores["tuned"], strict=True)])
        said.append(f"tuned minus base {low:.2f} to {high:.2f}")
        holds = low > 0 and holds
    return Result("; ".join(said), holds, lambda axes: draw_seeds(axes, scores, "instruction score"))


def heads_gain_pairs(*, full: bool = False) -> Result:
    """Of the heads whose pairs with a word changed, the share with more: verbs of the tasks, other verbs."""
    models = pair()
    names = [*TASKS, *OTHERS, *NOUNS]
    tokens = tokens_of(models["base"][1], names)
    words = [words_of(model, names, tokens) for model, _ in models.values()]
    vectors = torch.nn.functional.normalize(words[0].given, dim=-1)  # the base model's, for both
    both = zip(models.values(), words, strict=True)
    heads = [head_pairs(model, each, similar=vectors @ vectors.T, top=10) for (model, _), each in both]
    found: dict[str, list[float]] = {"task verbs": [], "other verbs": []}
    for name, verbs in zip(found, (TASKS, OTHERS), strict=True):
        for verb in map(str.lower, verbs):
            counts = [(a.count(verb), b.count(verb)) for a, b in zip(*heads, strict=True)]
            moved = [after > before for before, after in counts if after != before]
            found[name] += [sum(moved) / len(moved)] if moved else []
    p = _p(found["task verbs"], found["other verbs"])
    words_ = f"by verb: {by_seed(found)}; one-sided p = {p:.3f}"
    return Result(words_, p < 0.05, lambda axes: draw_seeds(axes, found, "share of heads that gained"))


def concepts_rotate(*, full: bool = False) -> Result:
    """Shared space of the first directions of each layer before and after tuning; of neighbouring layers."""
    models = pair()
    tokens = tokens_of(models["base"][1], NOUNS)
    told = [concepts(model, words_of(model, NOUNS, tokens), ranks=16) for model, _ in models.values()]
    found = {
        "base and tuned": [overlap(a, b, 16) for a, b in zip(*told, strict=True)],
        "the next layer": [overlap(a, b, 16) for a, b in zip(told[0], told[0][1:], strict=False)],
    }
    holds = min(found["base and tuned"]) > max(found["the next layer"])
    return Result(f"by layer: {by_seed(found)}", holds, lambda axes: draw_seeds(axes, found, "shared space"))


@torch.no_grad()
def _greedy(model: torch.nn.Module, prompt: Tensor, count: int) -> Tensor:
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return tokens[len(prompt) :]


def _p(first: Sequence[float], second: Sequence[float]) -> float:
    """Of Welch's test; 1 where too few values, or values that do not vary, decide nothing."""
    try:
        return welch(first, second).p
    except ValueError:
        return 1.0


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.argsort().argsort().double() for x in (a, b)]))[0, 1])
