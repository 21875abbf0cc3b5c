"""Prompts whose answer stands far back in the context: what perplexity does not see.

A passkey calibrates, a lookup among four keys judges: other words, other places, other questions, so a plan
that only learnt one template is caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

NAMES = (
    "Lisbon",
    "Oslo",
    "Cairo",
    "Lima",
    "Paris",
    "Dublin",
    "Vienna",
    "Tokyo",
    "Delhi",
    "Rome",
    "Berlin",
    "Madrid",
    "Athens",
    "Havana",
    "Seoul",
    "Prague",
    "Boston",
    "Denver",
    "Dallas",
    "Houston",
)


@dataclass(frozen=True)
class Prompt:
    """One context and questions on it. `answers[i]` follows `questions[i]`; its tokens stand in `context` at
    `needles[i]` (start, end), at `depths[i]` of the text."""

    context: list[int]
    questions: list[list[int]]
    answers: list[list[int]]
    needles: list[tuple[int, int]]
    depths: list[float]


@dataclass(frozen=True)
class Passage:
    """Text with pass keys hidden in it and asked at its end, in one sequence. `answers[i]` are the positions
    of an answer's tokens, `needles` the positions of the tokens that they are read from."""

    ids: list[int]
    answers: list[range]
    needles: list[int]

    text_end: int  # where the questions begin


def passkey(haystack: Sequence[int], tokenizer: Any, *, tokens: int, generator: Random) -> Passage:
    """`tokens` of text that hides four pass keys and ends in a question and answer on each."""
    doors = ("red", "green", "black", "white")
    numbers = [str(generator.randrange(10_000, 100_000)) for _ in doors]
    prompt = _hide(
        haystack,
        tokenizer,
        tokens,
        [
            (
                f"\nThe pass key of the {door} door is ",
                number,
                f". Remember it: {number} opens the {door} door.\n",
            )
            for door, number in zip(doors, numbers, strict=True)
        ],
        [
            f"\n\nWhat is the pass key of the {door} door? The pass key of the {door} door is "
            for door in doors
        ],
        [0.1, 0.3, 0.5, 0.7],
        generator,
        ask_all=True,
    )
    ids, answers = list(prompt.context), []
    for question, answer in zip(prompt.questions, prompt.answers, strict=True):
        ids += question
        answers.append(range(len(ids), len(ids) + len(answer)))
        ids += answer
    needles = [at for start, stop in prompt.needles for at in range(start, stop)]
    return Passage(ids, answers, needles, len(prompt.context))


def lookup(
    haystack: Sequence[int], tokenizer: Any, *, tokens: int, num_prompts: int, generator: Random
) -> list[Prompt]:
    """`num_prompts` contexts of about `tokens`, each with four keys at four depths and a question on each."""
    made = []
    depths = [0.125, 0.375, 0.625, 0.875]
    for _ in range(num_prompts):
        names = generator.sample(NAMES, len(depths))
        numbers = [str(generator.randrange(10_000, 100_000)) for _ in names]
        made.append(
            _hide(
                haystack,
                tokenizer,
                tokens,
                [
                    (f"\nOne of the special magic numbers for {name} is: ", number, ".\n")
                    for name, number in zip(names, numbers, strict=True)
                ],
                [
                    f"\n\nWhat is the special magic number for {name}? "
                    f"The special magic number for {name} is: "
                    for name in names
                ],
                depths,
                generator,
            )
        )
    return made


def _hide(
    haystack: Sequence[int],
    tokenizer: Any,
    tokens: int,
    needles: list[tuple[str, str, str]],
    questions: list[str],
    depths: list[float],
    generator: Random,
    ask_all: bool = False,
) -> Prompt:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    # digits are encoded apart, so that the answer's tokens are the same in the needle and behind the question
    pieces = [[encode(part) for part in needle] for needle in needles]
    asked = [encode(question) for question in questions]
    answers = [piece[1] for piece in pieces]
    body = tokens - sum(len(part) for piece in pieces for part in piece)
    lengths = [len(q) + len(a) for q, a in zip(asked, answers, strict=True)]
    body -= sum(lengths) if ask_all else max(lengths)
    if body < 1 or len(haystack) < body:
        raise ValueError(
            f"A retrieval prompt of {tokens:,} tokens needs {max(body, 1):,} of text around its keys; "
            f"there are {len(haystack):,}. Give a longer text or other --tokens."
        )
    start = generator.randrange(len(haystack) - body + 1)
    hay = list(haystack[start : start + body])
    context: list[int] = []
    places = []
    done = 0
    for (before, number, after), depth in zip(pieces, depths, strict=True):
        at = int(body * depth)
        context += hay[done:at] + before
        places.append((len(context), len(context) + len(number)))
        context += number + after
        done = at
    return Prompt(context + hay[done:], asked, answers, places, list(depths))
