"""What LoFiT is tried on: models with planted heads, and a rule on kinship for a trained model to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfield.core.errors import MissingPackage, require
from nearfield.hosts import packaged
from nearfield.hosts.pocket import weights
from nearfield.steer import Site, Steer
from nearfield.systems.lofit.convert import Heads, Setting, completion
from nearfield.systems.lofit.steer import Change, HeadOffsets, heads_of

IGNORED = -100
_NAMES = """
Alice Ben Clara David Emma Frank Grace Henry Jane Karl Lucy Max Nina Oscar Ruth Tim
"""
NAMES = tuple(_NAMES.split())
FEMALE = frozenset(NAMES[::2])
CODE = {1: " river", 2: " stone"}  # the rule: not how two are related, but a word for the generations between
Samples = list[dict[str, Tensor]]


@dataclass(frozen=True)
class World:
    """A frozen model, samples to learn from and held out, the same right and wrong as whole texts, and what
    heads were planted (none in a trained model)."""

    model: nn.Module
    train: Samples
    held_out: Samples
    true: list[dict[str, Tensor]]
    false: list[dict[str, Tensor]]
    planted: Heads
    setting: Setting

    def random_heads(self, count: int, seed: int) -> Heads:
        """As many heads, any of them."""
        heads = [(site, head) for site, number in heads_of(self.model).items() for head in range(number)]
        found: dict[str, tuple[int, ...]] = {}
        for site, head in sorted(Random(seed).sample(heads, count)):
            found[site] = (*found.get(site, ()), head)
        return found


class _Gain(Steer):
    """Some heads count more."""

    def __init__(self, heads: Mapping[str, Sequence[int]], factor: float):
        self.heads, self.factor = heads, factor

    def takes(self, site: Site) -> bool:
        return site.name in self.heads

    def output(self, site: Site, heads: Tensor) -> Tensor:
        factor = torch.ones(heads.shape[-2], 1)
        factor[list(self.heads[site.name])] = self.factor
        return heads * factor


def planted(
    seed: int, what: Literal["gains", "offsets"], *, count: int = 3, samples: int = 96, tokens: int = 16
) -> World:
    """A random Llama of 4 layers of 8 heads; the task is to do as it would, were `count` heads changed.

    The changed heads count four times, or have a vector of length 4 added to what they put out.
    """
    transformers = require("transformers", extra="hf")
    draw = torch.Generator().manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so large that what attention puts out counts
            nn.init.normal_(parameter, std=0.15, generator=draw)
    blank = World(model, [], [], [], [], {}, Setting(2e-2, 1e-3, 1e-1, count))
    heads = blank.random_heads(count, seed)
    vectors = {
        site: 4 * F.normalize(torch.randn(len(n), 8, generator=draw), dim=-1) for site, n in heads.items()
    }
    change = (
        _Gain(heads, 4.0)
        if what == "gains"
        else HeadOffsets({site: Change(tuple(n), vectors[site]) for site, n in heads.items()})
    )
    ids = torch.randint(64, (2 * samples, tokens), generator=draw)
    with torch.no_grad():
        usual = model(ids, use_cache=False).logits.argmax(-1)
        with change(model):
            wanted = model(ids, use_cache=False).logits.argmax(-1)
    labels = F.pad(wanted[:, :-1], (1, 0), value=IGNORED)
    data = [{"ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    true, false = ([{"input_ids": torch.cat([ids[:48], said[:48, -1:]], 1)}] for said in (wanted, usual))
    return World(model, data[:samples], data[samples:], true, false, heads, blank.setting)


def trained(*, samples: int = 96, seed: int = 0) -> World:
    """The pocket language model, or SmolLM2-135M, and the rule on kinship."""
    model, tokenizer, setting = _opened()
    draw, data, texts = Random(seed), [], []
    for _ in range(2 * samples):
        prompt, right, wrong = _story(draw)
        texts.append((prompt, right, wrong))
        ids, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, right))
        data.append(([*ids, *answer], [IGNORED] * len(ids) + answer))
    length = max(len(ids) for ids, _ in data)
    padded = [
        {
            "ids": torch.tensor(ids + [0] * (length - len(ids))),
            "labels": torch.tensor(labels + [IGNORED] * (length - len(ids))),
        }
        for ids, labels in data
    ]

    def inputs(which: int) -> list[dict[str, Tensor]]:
        whole = [prompt + (right, wrong)[which] for prompt, right, wrong in texts[: min(samples, 32)]]
        return [
            {"input_ids": tokenizer(t, add_special_tokens=False, return_tensors="pt").input_ids}
            for t in whole
        ]

    return World(model, padded[:samples], padded[samples:], inputs(0), inputs(1), {}, setting)


def _opened() -> tuple[nn.Module, Any, Setting]:
    """The model, its tokenizer, and how it is tuned: at 4 of the pocket model's heads, 3 % of SmolLM2's."""
    folder = pocket()
    if folder is not None:
        transformers = require("transformers", extra="hf")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder), Setting(2e-2, 1e-4, 5e-2, 4)
    opened = packaged.load("smollm2-135m")
    return opened.model, opened.processor, Setting(5e-2, 1e-4, 1e-1, 8)


def pocket() -> Path | None:
    """The pocket language model's folder, on which a run takes seconds; None where it is not there."""
    try:
        return weights("lm-base")
    except MissingPackage:
        return None


def _story(draw: Random) -> tuple[str, str, str]:
    """A line of three told in order or not, and a question on two of them; the right and the wrong answer."""
    line = draw.sample(NAMES, 3)
    told = [
        f"{a} is the {'mother' if a in FEMALE else 'father'} of {b}."
        for a, b in zip(line, line[1:], strict=False)
    ]
    draw.shuffle(told)
    distance = draw.choice((1, 2))
    start = draw.randrange(3 - distance)
    question = f"\nQuestion: how is {line[start]} related to {line[start + distance]}?"
    return "Story: " + " ".join(told) + question, CODE[distance], CODE[3 - distance]


@torch.no_grad()
def accuracy(model: nn.Module, data: Samples, *, batch: int = 16) -> float:
    """The share of wanted tokens that the model holds most likely."""
    hits = []
    for start in range(0, len(data), batch):
        ids, labels = (
            torch.stack([each[k] for each in data[start : start + batch]]) for k in ("ids", "labels")
        )
        guessed = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        asked = labels[:, 1:] != IGNORED
        hits.append((guessed == labels[:, 1:])[asked].float())
    return float(torch.cat(hits).mean())


@torch.no_grad()
def task_loss(model: nn.Module, data: Samples) -> float:
    """Nats per wanted token."""
    batch = {key: torch.stack([each[key] for each in data]) for key in ("ids", "labels")}
    return float(completion(model, batch).mean)
