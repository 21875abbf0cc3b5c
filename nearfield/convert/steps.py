"""Texts that follow a cache in steps: what a decoder that decodes by a policy is compared by.

Several steps are taken at once: each row of such a chunk chooses for itself and reads what a step would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfield.convert.decoder import Asked, Reading
from nearfield.data import recall
from nearfield.plan.reuse import ReusePolicy


def follow(model: Any, cache: Any, ids: Tensor, first: int) -> Reading:
    """The tokens of a text `[1, N]` from number `first` on, predicted in steps behind a cache that holds the
    `first - 1` tokens before; the cache is left as it was."""
    from nearfield.hosts.transformers_blocks import MOST_ROWS

    losses, right = [], []
    began = perf_counter()
    with torch.no_grad():
        for start in range(first - 1, ids.shape[1] - 1, MOST_ROWS):
            rows = ids[:, start : min(start + MOST_ROWS, ids.shape[1] - 1)]
            target = ids[0, start + 1 : start + 1 + rows.shape[1]]
            logits = model(input_ids=rows, past_key_values=cache).logits[0].float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            right += (logits.argmax(-1) == target).tolist()
    cache.crop(first - ids.shape[1])
    return Reading(torch.cat(losses), right, perf_counter() - began)


def ask_in_steps(model: Any, cache: Any, prompt: recall.Prompt) -> Asked:
    """Whether steps behind the context in a cache write each answer: questions and answers follow in steps,
    and each token of an answer must be the likeliest; the cache is left as it was."""
    from nearfield.hosts.transformers_blocks import MOST_ROWS

    right = []
    with torch.no_grad():
        for question, answer in zip(prompt.questions, prompt.answers, strict=True):
            tokens = torch.tensor([question + answer[:-1]])
            logits = [
                model(input_ids=rows, past_key_values=cache).logits[0]
                for rows in tokens.split(MOST_ROWS, dim=1)
            ]
            said = torch.cat(logits)[len(question) - 1 :].argmax(-1).tolist()
            right.append(said == list(answer))
            cache.crop(-tokens.shape[1])
    return Asked(right)


def prefill(model: Any, ids: Tensor, capacity: int) -> Any:
    """A cache with room for so many tokens that holds these."""
    from nearfield.hosts.transformers_blocks import block_cache

    cache = block_cache(model, capacity)
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            layer.activate_past_recording()  # else what has left its window could not be taken back
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return cache


@contextmanager
def decoding_by(model: nn.Module, policy: ReusePolicy | None) -> Iterator[None]:
    """The model decodes by a policy, or as it is."""
    from nearfield.hosts.transformers_blocks import install_reuse

    restore = None if policy is None else install_reuse(model, policy)
    try:
        yield
    finally:
        if restore is not None:
            restore()


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads: of a table of tokens that is no head only a row, left out."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if head is None or table.weight is head.weight else total - table.weight.nbytes
