"""The models that are studied: random ones with planted changes, and a base model with its tuned sibling."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfield.core.errors import MissingPackage, require
from nearfield.hosts.pocket import weights
from nearfield.systems.behavior_shift import study

_NOUNS = "apple bird boat bread chair clock door fish garden hammer lamp mirror needle orange river"
NOUNS = tuple(_NOUNS.split())
GROUPS, GROUP = 10, 4  # words of the random models, in groups that are akin
Models = dict[str, tuple[Any, Any]]  # name -> model, tokenizer


def random_llama(seed: int, std: float = 0.1) -> Any:
    """A Llama of 4 layers of 8 heads on 4, so strongly drawn that responses depend on their prompt."""
    transformers = require("transformers", extra="hf")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std, generator=draw)
    return model


class Planted(NamedTuple):
    """Two models of the same words, and what was done to the second: a head, a layer, the word it writes."""

    base: Any
    tuned: Any
    head: int
    layer: int
    word: int


@torch.no_grad()
def planted(seed: int) -> Planted:
    """A random Llama whose words come in groups, and a copy with one head and one layer changed.

    Three dimensions of the head read one group's centre, in queries and in keys; the layer writes the output
    vector of one word in every one of its values.
    """
    base, draw = random_llama(seed), torch.Generator().manual_seed(seed)
    groups = torch.arange(GROUPS * GROUP) // GROUP
    centres = torch.randn(GROUPS, 64, generator=draw)
    base.model.embed_tokens.weight[: len(groups)] = centres[groups] + 0.3 * torch.randn(
        len(groups), 64, generator=draw
    )
    tuned = copy.deepcopy(base)
    head, layer, word = (
        Random(f"{what}/{seed}").randrange(n) for what, n in (("head", 32), ("layer", 4), ("word", 40))
    )
    attention = tuned.model.layers[head // 8].self_attn
    direction = F.normalize(centres[seed % GROUPS], dim=0)
    query, key = 8 * (head % 8), 8 * (head % 8 // 2)  # a key head serves two
    attention.q_proj.weight[query : query + 3] = direction
    attention.k_proj.weight[key : key + 3] = direction
    signs = torch.randn(96, generator=draw).sign()
    tuned.model.layers[layer].mlp.down_proj.weight += 2 * torch.outer(tuned.lm_head.weight[word], signs)
    return Planted(base, tuned, head, layer, word)


def pair() -> Models:
    """The pocket language model before and after it learnt instructions."""
    transformers = require("transformers", extra="hf")
    found = {}
    for name, kind in (("base", "lm-base"), ("tuned", "lm-chat")):
        folder = weights(kind)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found[name] = model, transformers.AutoTokenizer.from_pretrained(folder)
    return found


def trained(full: bool) -> Models:
    """The pocket pair; where it is not there SmolLM2-135M-Instruct alone, if there is time, or none."""
    try:
        return pair()
    except MissingPackage:
        if not full:
            return {}
    from nearfield.hosts import packaged

    opened = packaged.load("smollm2-135m")
    return {"SmolLM2": (opened.model, opened.processor)}


class Asked(NamedTuple):
    """The score of a prompt's instruction, the mean score of spans as long elsewhere, was it followed."""

    score: float
    elsewhere: float
    followed: bool


def ask(model: Any, tokenizer: Any, number: int) -> Asked:
    """One instruction on words, the model's own greedy response, and what of the prompt it came from."""
    draw = Random(f"asked/{number}")
    row = draw.sample(NOUNS, draw.randint(4, 6))  # spans as long as the instruction fit behind it
    wanted, right = draw.choice(
        (
            ("Repeat the words.", " ".join(row)),
            ("Reverse the words.", " ".join(reversed(row))),
            ("Write the words in capitals.", " ".join(row).upper()),
            ("Give the first word.", row[0]),
            ("Give the last word.", row[-1]),
            ("Count the words.", str(len(row))),
        )
    )
    texts = ("Instruction:", f" {wanted}", f"\nWords: {' '.join(row)}\nResponse:")
    before, instruction, after = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    if tokenizer.bos_token_id is not None:
        before = [tokenizer.bos_token_id, *before]
    prompt = torch.tensor([*before, *instruction, *after])
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    out = model.generate(prompt[None], attention_mask=mask, max_new_tokens=8, do_sample=False)
    response = out[0, len(prompt) :]
    densities = study.density(study.sparsify(study.attribution(model, prompt, response)))
    length, first = len(instruction), len(before)
    spans = [range(at, at + length) for at in range(first + length, len(prompt) - length + 1)]
    score, *others = (study.instruction_score(densities, s) for s in (range(first, first + length), *spans))
    said = tokenizer.decode(response, skip_special_tokens=True).strip().partition("\n")[0]
    return Asked(score, sum(others) / len(others), said == right)


def tokens_of(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """The tokens of words as inside a text: with the blank before them."""
    return [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]


@torch.no_grad()
def removal(model: Any, prompt: Tensor, response: Tensor, *, keep: float = 0.0) -> Tensor:
    """What each response token's probability loses when of a prompt token's embedding only `keep` is left."""
    given = model.get_input_embeddings()(torch.cat([prompt, response]))
    copies = given.repeat(len(prompt) + 1, 1, 1)  # the last one is whole
    for number in range(len(prompt)):
        copies[number, number] *= keep
    rows = model(inputs_embeds=copies, use_cache=False).logits[:, len(prompt) - 1 : -1].softmax(-1)
    likely = rows.gather(-1, response.expand(len(rows), -1)[..., None])[..., 0]
    return likely[-1] - likely[:-1]
