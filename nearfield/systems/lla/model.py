"""Small models of two attention layers, one for each way of attending, and the tasks that tell them apart."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfield.data import sequences
from nearfield.nn.local_linear_attention import LocalLinearAttention
from nearfield.nn.rotary import rotate
from nearfield.ops.linear import gated_linear_attention
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.train import Loss, Recipe, Task
from nearfield.train.losses import cross_entropy

RANK, TEMPERATURE = 16, 16  # of the gates, as in flash-linear-attention's GLA layer


class SoftmaxAttention(nn.Module):
    """Causal softmax attention on normalised, rotated queries and keys: the layer of lla without slopes."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = (nn.RMSNorm(dim // num_heads, eps=1e-6) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b t dim"]:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        at = torch.arange(x.shape[1], device=x.device)[None]
        q, k = rotate(self.q_norm(q), at), rotate(self.k_norm(k), at)
        past = Neighborhood(x.shape[1], is_causal=True)
        return self.proj(neighborhood_attention(q, k, v, past).flatten(-2))


class GatedLinearAttention(nn.Module):
    """Linear attention whose state decays by a gate for each channel (GLA, arXiv 2312.06635)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.gate = nn.Sequential(nn.Linear(dim, RANK, bias=False), nn.Linear(RANK, dim))
        self.norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b t dim"]) -> Float[Tensor, "b t dim"]:
        q, k, v, g = (
            y.unflatten(-1, (self.num_heads, -1))
            for y in (
                self.q_proj(x),
                self.k_proj(x),
                self.v_proj(x),
                F.logsigmoid(self.gate(x)) / TEMPERATURE,
            )
        )
        out = self.norm(gated_linear_attention(q, k, v, g).output).flatten(-2)
        return self.proj(out * F.silu(self.g_proj(x)))


MIXERS = {"lla": LocalLinearAttention, "softmax": SoftmaxAttention, "gla": GatedLinearAttention}


class SequenceModel(nn.Module):
    """Embedded tokens, attention layers without networks between them, and a linear readout."""

    def __init__(
        self,
        mixer: str,
        *,
        vocabulary: int = 8192,
        num_outputs: int | None = None,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 2,
    ):
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"mixer={mixer!r} is unknown. Choose one of {', '.join(MIXERS)}.")
        self.embed = nn.Embedding(vocabulary, dim)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6) for _ in range(depth))
        self.mixers = nn.ModuleList(MIXERS[mixer](dim, num_heads) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_outputs or vocabulary, bias=False)

    def forward(self, ids: Int[Tensor, "b t"], asked: Bool[Tensor, "b t"]) -> Float[Tensor, "n outputs"]:
        """Logits where something is `asked`, and nowhere else: the readout is most of the work."""
        x = self.embed(ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(self.norm(x[asked]))


lla_recall = partial(SequenceModel, "lla")
softmax_recall = partial(SequenceModel, "softmax")
gla_recall = partial(SequenceModel, "gla")


class Rows:
    """Sequences as samples by number."""

    def __init__(self, made: sequences.Tokens):
        self.made = made

    def __len__(self) -> int:
        return len(self.made.ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"ids": self.made.ids[number], "targets": self.made.targets[number]}


def mqar(
    recipe: Recipe,
    *,
    mixer: str = "lla",
    tokens: int = 64,
    pairs: int = 8,
    vocabulary: int = 8192,
    num_sequences: int = 20_000,
    **model: Any,
) -> Task:
    """Associative recall: `evaluate` gives the share of right answers on sequences not trained on."""
    make = partial(sequences.recall, tokens=tokens, pairs=pairs, vocabulary=vocabulary)
    return _task(SequenceModel(mixer, vocabulary=vocabulary, **model), make, num_sequences, recipe.seed)


def tracking(
    recipe: Recipe,
    *,
    mixer: str = "lla",
    swaps: int = 16,
    items: int = 5,
    num_sequences: int = 20_000,
    **model: Any,
) -> Task:
    """State tracking: which item stands first after each of a row of swaps."""
    make = partial(sequences.permutations, swaps=swaps, items=items)
    built = SequenceModel(mixer, vocabulary=items**2, num_outputs=items, **model)
    return _task(built, make, num_sequences, recipe.seed)


def accuracy(model: nn.Module, made: sequences.Tokens) -> float:
    """The share of right answers."""
    device = next(model.parameters()).device
    right = total = 0
    with torch.no_grad():
        for ids, targets in zip(made.ids.split(128), made.targets.split(128), strict=True):
            asked = targets != sequences.IGNORED
            found = model(ids.to(device), asked.to(device)).argmax(-1).cpu()
            right += int((found == targets[asked]).sum())
            total += len(found)
    return right / total


def _task(model: nn.Module, make: partial[sequences.Tokens], num_sequences: int, seed: int) -> Task:
    train, test = (
        make(count, generator=torch.Generator().manual_seed(2 * seed + part))
        for part, count in enumerate((num_sequences, 256))
    )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        asked = batch["targets"] != sequences.IGNORED
        return cross_entropy(model(batch["ids"], asked), batch["targets"][asked])

    return Task(model, Rows(train), loss, lambda model: {"accuracy": accuracy(model, test)})
