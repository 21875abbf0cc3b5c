"""The pocket language models while they learn: their tokenizer, windows of text, windows of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import tasks
import texts
import torch
import torch.nn.functional as F
from first import widen
from torch import Tensor, nn

from nearfield.train import Loss

SPECIAL = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(len(SPECIAL))
VOCABULARY, WIDTH = 2048, 192
TASKS = 0.3  # the share of windows that are tasks
GUESSED = 0.1  # what a token counts that no one can know, in a task
HELD_OUT = 10_000  # the seed of tasks that are never learnt from


def build() -> nn.Module:
    """A Llama of six layers with fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=320,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    widen(model.model.layers, WIDTH)
    return model


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and tokens held out, documents ended by `EOS`; the tokenizer; texts to hide in."""

    tokenizer: Any
    train: Tensor
    held_out: Tensor

    def window(self, draw: Random, length: int) -> list[int]:
        """A stretch of the text to learn from, at any place."""
        start = draw.randrange(len(self.train) - length)
        return self.train[start : start + length].tolist()

    def haystack(self, draw: Random, length: int) -> str:
        """A stretch of text in words."""
        return self.tokenizer.decode(self.window(draw, length), skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def corpus(folder: Path) -> Corpus:
    """The corpus, made once and kept in the folder."""
    from safetensors.torch import load_file, save_file
    from transformers import PreTrainedTokenizerFast

    kept, named = folder / "corpus.safetensors", folder / "tokenizer.json"
    if not kept.is_file() or not named.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        parts = texts.documents()
        _train_tokenizer(parts[0]).save(str(named))
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(named))
        tokens = {}
        for name, documents in zip(("train", "held_out"), parts, strict=True):
            stream = []
            for document in documents:
                stream += [*tokenizer(document, add_special_tokens=False, verbose=False).input_ids, EOS]
            tokens[name] = torch.tensor(stream, dtype=torch.int16)
        save_file(tokens, str(kept))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(named), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokens = load_file(str(kept))
    return Corpus(tokenizer, tokens["train"], tokens["held_out"])


def _train_tokenizer(documents: list[str]) -> Any:
    """A byte-level BPE on the texts and the tasks, each digit a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    draw = Random("tokenizer")
    said = [" " + " ".join((*tasks.WORDS, *tasks.NAMES))] * 4000  # a token each
    said += ["".join(text for text, _ in tasks.task(draw, 1.0, lambda _: "")) for _ in range(2000)]
    said += ["".join(text for text, _ in tasks.instruction(draw)) for _ in range(2000)]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*documents, *said], trainer)
    return made


@dataclass(frozen=True)
class Windows:
    """Windows by number: text, or tasks behind one another, each begun by `BOS`; longer ones at the end."""

    corpus: Corpus
    seed: int
    batches: int
    batch_size: int
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256),)  # the share of the way at which each begins
    shares: tuple[float, float] = (TASKS, 0.0)  # of tasks, of instructions
    drills: bool = False  # tasks are those of `tasks.drill` alone, and text says the same again and again

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        done = (number // self.batch_size) / self.batches
        length = next(each for start, each in reversed(self.lengths) if done >= start)
        draw = Random(f"windows/{self.seed}/{number}")
        kind = draw.random()
        if kind >= sum(self.shares):
            some = self.corpus.window(draw, draw.randint(6, length // 2) if self.drills else length)
            return _padded([BOS, *(some * length)[:length]], [1.0] * length, length)
        ids, weights = [BOS], list[float]()
        while len(ids) < length + 1:
            if self.drills:
                pieces = tasks.drill(draw, done)
            elif kind < self.shares[0]:
                pieces = tasks.task(draw, done, lambda draw: self.corpus.haystack(draw, length // 2))
            else:
                pieces = tasks.instruction(draw)
            some, marks = encode(self.corpus, pieces)
            if len(ids) + len(some) > length + 1:
                if len(ids) == 1:  # too long for any window: another one
                    continue
                break
            ids, weights = ids + some, weights + [1.0 if mark else GUESSED for mark in marks]
        return _padded(ids, weights, length)


def encode(corpus: Corpus, pieces: tasks.Pieces) -> tuple[list[int], list[bool]]:
    """Tokens of a task and of the end behind it, and which of them answer."""
    ids, marks = list[int](), list[bool]()
    for text, is_answer in pieces:
        some = corpus.encode(text)
        ids, marks = ids + some, marks + [is_answer] * len(some)
    return [*ids, EOS], [*marks, False]


def _padded(ids: list[int], weights: list[float], length: int) -> dict[str, Tensor]:
    missing = length + 1 - len(ids)
    return {
        "ids": torch.tensor(ids + [PAD] * missing),
        "weights": torch.tensor(weights + [0.0] * missing),
    }


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    """Cross-entropy of each next token, by its weight."""
    logits = model(batch["ids"][:, :-1], use_cache=False).logits
    rows = F.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="none")
    weights = batch["weights"].flatten()
    return Loss((rows * weights).sum(), weights.sum())


def judge(corpus: Corpus, kind: str, *, windows: int = 24, prompts: int = 24) -> Any:
    """An `evaluate` for `fit`: the loss on held-out text, and the share of answers that are right."""

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        ids = held_out_windows(corpus, windows, 256).to(device)
        logits = model(ids[:, :-1], use_cache=False).logits
        found = {"loss": float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))}
        draw = Random(HELD_OUT)
        makers = {
            "recall": {
                "recall-8": lambda: tasks.recall(draw, 8),
                "recall-16": lambda: tasks.recall(draw, 16),
                "kinship": lambda: tasks.kinship(draw, 4),
                "counting": lambda: tasks.counting(draw, 6),
                "copying": lambda: tasks.copying(draw, 10),
                "hidden": lambda: tasks.hidden(draw, corpus.haystack(draw, 128), 2),
            },
            "instruction": {
                name: (lambda name=name: tasks.instruction(draw, name)) for name in tasks.INSTRUCTIONS
            },
        }[kind]
        for name, make in makers.items():
            right = answers_right(model, corpus, [make() for _ in range(prompts)])
            found[name] = sum(right) / len(right)
        return found

    return evaluate


def held_out_windows(corpus: Corpus, count: int, length: int) -> Tensor:
    """Windows spread evenly over the held-out text, each begun by `BOS`."""
    starts = torch.linspace(0, len(corpus.held_out) - length - 1, count).long()
    found = torch.stack([corpus.held_out[start : start + length] for start in starts]).long()
    return torch.cat([torch.full((count, 1), BOS), found], 1)


@torch.no_grad()
def answers_right(model: nn.Module, corpus: Corpus, prompts: list[tasks.Pieces]) -> list[bool]:
    """For each answer in the prompts, whether the model's own choice is right in every token of it."""
    device, right = next(model.parameters()).device, []
    for pieces in prompts:
        ids = encode(corpus, pieces)[0]
        tokens = torch.tensor([[BOS, *ids]], device=device)
        chosen = model(tokens[:, :-1], use_cache=False).logits[0].argmax(-1).tolist()
        hits = [a == b for a, b in zip(chosen, ids, strict=True)]
        at = 0
        for text, is_answer in pieces:
            length = len(corpus.encode(text))
            if is_answer:
                right.append(all(hits[at : at + length]))
            at += length
    return right
