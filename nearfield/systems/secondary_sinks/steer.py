"""Sinks written smaller, or larger, than a decoder's MLP writes them, for as long as a `with` lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.systems.secondary_sinks.layer import decoder_blocks, gated_mlp


@dataclass
class RescaleSinks:
    """Gives what an MLP writes along a sink's direction another norm; `norm=None` changes nothing.

        stages = mlp_stages(model, ids, layer=22, positions=[0])
        with RescaleSinks(22, stages["output"][0], norm=1.0)(model):
            model(...)

    Tokens whose MLP output has a cosine above `cosine` with `direction` are taken, the first `spared` of a
    text aside: those are the primary sinks. Their places count what a cache holds. The published norm is 100.
    This changes a residual stream, not attention, so it does not add up with `Steer`: nest the two.
    """

    layer: int
    direction: Float[Tensor, " dim"]
    norm: float | None = 100.0
    cosine: float = 0.98
    spared: int = 3

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model, changed in this thread until the `with` ends."""
        blocks = decoder_blocks(model)
        if not 0 <= self.layer < len(blocks):
            raise ValueError(f"layer={self.layer} is not one of the {len(blocks)} blocks, counted from 0.")
        name, _, block = blocks[self.layer]
        mlp, thread, first = gated_mlp(block, name), threading.get_ident(), [0]

        def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == thread:
                cache = kwargs.get("past_key_values")
                first[0] = 0 if cache is None else int(cache.get_seq_length(self.layer))

        def rescale(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if self.norm is None or threading.get_ident() != thread:
                return None
            along = F.cosine_similarity(output.float(), self.direction.to(output).float(), dim=-1)
            taken = along > self.cosine  # [B, N]
            taken[:, : max(0, self.spared - first[0])] = False
            if not taken.any():
                return None
            size = output.norm(dim=-1, keepdim=True)
            return torch.where(taken[..., None], output * (self.norm / size), output)

        with ExitStack() as stack:
            stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            stack.callback(mlp.register_forward_hook(rescale).remove)
            yield model
