"""A small decoder whose layers choose alike in known groups, and of which one needs all keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nearfield.core.errors import require

DIM, LAYERS, HEADS, KV_HEADS, WORDS = 64, 12, 4, 2, 256
PEAKED = 1.6  # how far scores differ: most attention lies in few blocks
STEP = 0.1  # what a layer adds, over what there is: neighbours' states are alike
WIDE_STEP = 0.6  # the same for the layer that needs all keys


@dataclass(frozen=True)
class Planted:
    """A model and two texts, with the truth: the first layers of the groups, and the one that needs all keys.

    Layers of a group share their query and key weights, and their states are nearly the same.
    """

    model: Any
    calibration: Int[Tensor, "1 n"]
    input_ids: Int[Tensor, "1 n"]
    starts: tuple[int, ...]
    wide: int

    def group(self, layer: int) -> int:
        """The first layer of a layer's group."""
        return max(start for start in self.starts if start <= layer)


@torch.no_grad()
def planted(*, tokens: int = 512, seed: int = 0) -> Planted:
    """A random Llama of 12 layers in three groups; one has nearly even attention and a large output."""
    transformers = require("transformers", extra="hf")
    draw = torch.Generator().manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=DIM,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4 * tokens,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()

    def fill(weight: Tensor, scale: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=draw) * scale * weight.shape[1] ** -0.5)

    fill(model.model.embed_tokens.weight, DIM**0.5)
    fill(model.lm_head.weight, 2.0)
    first, second = (int(torch.randint(3, (1,), generator=draw)) for _ in range(2))
    starts = (0, 2 + first, 5 + first + second)  # groups of at least two layers
    others = [layer for layer in range(1, LAYERS) if layer not in starts]
    wide = others[int(torch.randint(len(others), (1,), generator=draw))]
    pair: tuple[Tensor, Tensor] | None = None
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        if number in starts or pair is None:
            fill(attention.q_proj.weight, PEAKED)
            fill(attention.k_proj.weight, PEAKED)
            pair = attention.q_proj.weight.clone(), attention.k_proj.weight.clone()
        attention.q_proj.weight.copy_(pair[0] * (0.1 if number == wide else 1.0))
        attention.k_proj.weight.copy_(pair[1])
        fill(attention.v_proj.weight, 1.0)
        # the mean of many values is small, so what an even attention puts out is made as large as others'
        fill(attention.o_proj.weight, WIDE_STEP * (tokens / 4) ** 0.5 if number == wide else STEP * 2)
        fill(mlp.down_proj.weight, 0.05)
    texts = torch.randint(WORDS, (2, 1, tokens), generator=draw)
    return Planted(model, texts[0], texts[1], starts, wide)
