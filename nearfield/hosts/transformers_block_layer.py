"""A cache layer in buffers with room, and what a choice of blocks needs of its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from nearfield.ops.topk import BlockSummary, extend_blocks, summarize_blocks

SPARE = 256  # tokens that a prompt's buffers have room for beside it


class BlockLayer(DynamicLayer):
    """A layer of a cache in buffers that double when they are full: a step copies none of the keys before it.

    `keys` and `values` are views of what is there. Where a selecting layer asks for it, a summary of the
    blocks is kept beside them.
    """

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, capacity: int = 0):
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.buffers: list[Tensor] = []
        self.summary: BlockSummary | None = None
        self.summarized = 0  # keys that the summary holds

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> BlockLayer:
        """A layer with the keys and values of another."""
        found = cls()
        if layer.get_seq_length():
            found.update(layer.keys, layer.values)
        return found

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values so far, as views."""
        new, stop = (key_states, value_states), self.length + key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        held = () if not self.length else (self.keys, self.values)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*new, *held)):
            joined = new if not held else [torch.cat(pair, dim=2) for pair in zip(held, new, strict=True)]
            self.buffers, (self.keys, self.values), self.length = [], joined, stop
            return self.keys, self.values
        if not self.buffers or stop > self.buffers[0].shape[2] or _is_frozen(self.buffers[0]):
            self._move(new, stop)
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, self.length : stop] = x
        self._show(stop)
        return self.keys, self.values

    def summarize(self, block_size: int, score: str, key_mask: Tensor | None = None) -> BlockSummary:
        """What `score` needs of the blocks of all keys; only what has come since is looked at."""
        keys, summary = self.keys.transpose(1, 2), self.summary
        if summary is not None and _is_frozen(summary.table):
            summary = None
        if summary is None or (summary.score, summary.block_size) != (score, block_size):
            summary = summarize_blocks(keys, block_size=block_size, score=score, key_mask=key_mask)
        elif self.summarized < self.length:
            summary = extend_blocks(summary, keys, first=self.summarized, key_mask=key_mask)
        self.summary, self.summarized = summary, self.length
        return summary

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the room in them included, and of the summary."""
        held = self.buffers or ([self.keys, self.values] if self.length else [])
        table = [] if self.summary is None else [self.summary.table]
        return sum(x.nbytes for x in (*held, *table))

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give how many tokens to remove as a negative number."
            )
        if tokens_to_remove and self.length:
            self._show(max(0, self.length + tokens_to_remove))
            if self.summary is not None:  # a block that has lost keys is looked at again
                whole = self.length // self.summary.block_size * self.summary.block_size
                self.summarized = min(self.summarized, whole)

    def reset(self) -> None:
        self.buffers, self.length, self.keys, self.values, self.is_initialized = [], 0, None, None, False
        self.summary, self.summarized = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def offload(self) -> None:
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.length:
            return
        if self.buffers:
            self.buffers = [change(buffer) for buffer in self.buffers]
            self._show(self.length)
        else:
            self.keys, self.values = change(self.keys), change(self.values)
        if self.summary is not None:
            self.summary = self.summary._replace(table=change(self.summary.table))

    def _move(self, new: tuple[Tensor, Tensor], stop: int) -> None:
        """Larger buffers, or such as may be written, that hold what there is."""
        room = self.capacity if stop <= self.capacity else stop + SPARE
        if self.buffers and stop > self.buffers[0].shape[2]:
            room = max(room, 2 * self.buffers[0].shape[2])
        moved = []
        for x, held in zip(new, (self.keys, self.values), strict=True):
            buffer = x.new_empty((*x.shape[:2], room, x.shape[3]))
            if self.length:
                buffer[:, :, : self.length] = held
            moved.append(buffer)
        self.buffers = moved

    def _show(self, length: int) -> None:
        self.length = length
        whole = self.buffers or (self.keys, self.values)
        self.keys, self.values = (x[:, :, :length] for x in whole)


def block_cache(model: nn.Module, capacity: int = 0) -> DynamicCache:
    """An empty cache for a decoder, whose layers of full attention are `BlockLayer`s with so much room."""
    config: Any = model.config
    cache = DynamicCache(config=config)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    while cache.layer_class_to_replicate is not None and len(cache.layers) < layers:
        cache.layers.append(cache.layer_class_to_replicate())
    cache.layers = [BlockLayer(capacity) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def _is_frozen(x: Tensor) -> bool:
    return x.is_inference() and not torch.is_inference_mode_enabled()
