"""Averaged weights: an exponential moving average of what training does, often better than where it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """The moving average of a model's trainable parameters, with a copy of its buffers.

    After `update` number n the average is `decay · average + (1 - decay) · parameter`; with `warmup` the
    decay is at most n / (n + 9), so that the start is soon forgotten. Kept in float32 at least: in bfloat16
    a step of 1 - decay is lost to rounding.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False):
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} must lie above 0 and below 1.")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.average = {
            name: parameter.detach().to(_wide(parameter), copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model by one step."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9)) if self.warmup else self.decay
        now = dict(model.named_parameters())
        average = list(self.average.values())
        torch._foreach_lerp_(
            average, [now[n].detach().to(a.dtype) for n, a in self.average.items()], 1 - decay
        )
        for name, buffer in model.named_buffers():
            self.buffers[name].copy_(buffer)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model holds the average; afterwards its own values again, to the bit."""
        own = {name: tensor.detach().clone() for name, tensor in self._held(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._held(model).items():
                    tensor.copy_(own[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the average into the model, for good."""
        for name, tensor in self._held(model).items():
            tensor.copy_(self.average[name] if name in self.average else self.buffers[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by name, and the number of updates."""
        tensors = {f"average.{name}": tensor for name, tensor in self.average.items()}
        tensors |= {f"buffer.{name}": tensor for name, tensor in self.buffers.items()}
        return tensors, {"updates": self.updates}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on from what `state` gave. Raises `ValueError` where names differ."""
        mine, _ = self.state()
        if mine.keys() != tensors.keys():
            raise ValueError(f"The averaged weights differ in {sorted(mine.keys() ^ tensors.keys())[:3]}.")
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        self.updates = int(numbers["updates"])

    def _held(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = {n: p for n, p in model.named_parameters() if n in self.average}
        return {**parameters, **dict(model.named_buffers())}


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
