"""A small decoder into whose weights sinks are planted, so that what a study finds can be held against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nearfield.core.errors import require

DIM, LAYERS, HEADS, KV_HEADS = 64, 20, 4, 2
WORDS = 100  # ordinary tokens 1 to 99, behind them the triggers, behind those their twins
PRIMARY, SECONDARY, END = 2, 7, 17  # the blocks that write the primary, write the others, take it away
HEIGHT, PUSH = 150.0, 5.0  # how strongly the primary and triggers are written
WEAR = 3.0  # what each later block takes from a sink's norm, so that strength decides on its lifetime


@dataclass(frozen=True)
class Planted:
    """A model and a text with the truth about its sinks.

    `positions` are the tokens that block `born` writes along the primary sink at 0, the weakest first; those
    at `twins` are written as strongly, at the same block, along a direction of their own.
    """

    model: Any
    input_ids: Int[Tensor, "1 n"]
    band: range
    born: int
    positions: tuple[int, ...]
    twins: tuple[int, ...]


@torch.no_grad()
def planted(*, tokens: int = 256, sinks: int = 16, seed: int = 0) -> Planted:
    """A random Llama of 20 layers that makes token 0 a primary sink and `sinks` others secondary ones.

    A neuron of one MLP answers to a trigger in a token's embedding by writing along the primary's direction,
    the stronger the larger the trigger; in all layers heads look for that direction. The rest is random.
    """
    transformers = require("transformers", extra="hf")
    draw = torch.Generator().manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 2 * sinks,
        hidden_size=DIM,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    axes = torch.linalg.qr(torch.randn(DIM, DIM, generator=draw)).Q.T
    sink, start, trigger, twin, aside, common = axes[:6]
    rest = axes[6:].T @ axes[6:]  # what is random stays off the planted directions
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * DIM**-0.5)
    words = model.model.embed_tokens.weight
    words.copy_(2 * torch.nn.functional.normalize(words @ rest, dim=-1) + 3 * common)
    words[0] += 3 * start
    strength = torch.linspace(2.3, 3.2, sinks)[:, None]
    words[WORDS : WORDS + sinks] += strength * trigger
    words[WORDS + sinks :] += strength * twin
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.copy_(projection.weight @ rest)
            slow = projection.weight.view(-1, DIM // HEADS, DIM)  # dimensions that positions hardly turn
            slow[:, -1] = 0
            slow[:, DIM // HEADS // 2 - 1] = 0.9 * (common if projection is attention.q_proj else sink)
        attention.o_proj.weight.copy_(0.3 * rest @ attention.o_proj.weight)
        mlp.down_proj.weight.copy_(0.2 * rest @ mlp.down_proj.weight)
    _write(model, PRIMARY, 0, start, sink, HEIGHT / 22)
    _write(model, SECONDARY, 0, trigger, sink, PUSH)
    _write(model, SECONDARY, 1, twin, aside, PUSH)
    _write(model, SECONDARY, 2, sink, sink, 0.1)  # so that the primary's MLP output points there too
    for layer in range(SECONDARY + 1, END):
        _write(model, layer, 0, sink, sink, -WEAR / DIM)
    _write(model, END, 0, sink, sink, -70 / DIM)
    ids = torch.randint(1, WORDS, (1, tokens), generator=draw)
    ids[0, 0] = 0
    places = 1 + torch.randperm(tokens * 3 // 4 - 1, generator=draw)[: 2 * sinks]  # none without later tokens
    ids[0, places] = torch.arange(WORDS, WORDS + 2 * sinks)
    positions, twins = places[:sinks].tolist(), places[sinks:].tolist()
    return Planted(model, ids, range(PRIMARY, END), SECONDARY, tuple(positions), tuple(twins))


def _write(model: Any, layer: int, neuron: int, reads: Tensor, writes: Tensor, strength: float) -> None:
    """A neuron that answers to one direction, by about the square of its share, along another."""
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj.weight[neuron] = reads
    mlp.up_proj.weight[neuron] = reads
    mlp.down_proj.weight[:, neuron] = strength * writes
