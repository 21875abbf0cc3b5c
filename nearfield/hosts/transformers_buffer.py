"""A cache that takes tokens into buffers made once: no step copies the keys of those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer


def buffered_cache(model: nn.Module, capacity: int) -> DynamicCache:
    """An empty cache for a decoder, whose layers of full attention have room for `capacity` tokens.

    `model(ids, past_key_values=buffered_cache(model, 8192))`. Attention is given views of the tokens that are
    there, so a step reads them and copies none. Layers with a window of their own stay the host's.
    """
    config: Any = model.config
    cache = DynamicCache(config=config)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    while cache.layer_class_to_replicate is not None and len(cache.layers) < layers:
        cache.layers.append(cache.layer_class_to_replicate())
    cache.layers = [BufferedLayer(capacity) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


class BufferedLayer(DynamicLayer):
    """A layer whose keys and values are views of buffers with room for `capacity` tokens."""

    keys: Any
    values: Any

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values so far, as views."""
        stop = self.length + key_states.shape[-2]
        if stop > self.capacity:
            raise ValueError(
                f"The cache has room for {self.capacity} tokens and is given token {stop}. Make it larger."
            )
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise RuntimeError("A buffered cache carries no gradients. Run under torch.no_grad().")
        if not self.buffers:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.buffers = [
                x.new_empty((*x.shape[:2], self.capacity, x.shape[3])) for x in (key_states, value_states)
            ]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : stop] = new
        self._show(stop)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give how many tokens to remove as a negative number."
            )
        if self.buffers:
            self._show(max(0, self.length + tokens_to_remove))

    def reset(self) -> None:
        self.buffers, self.length, self.keys, self.values, self.is_initialized = [], 0, None, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.buffers:
            self.buffers = [change(buffer) for buffer in self.buffers]
            self._show(self.length)

    def _show(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
