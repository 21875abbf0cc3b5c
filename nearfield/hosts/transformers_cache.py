"""Caches of transformers decoders that hold, per group of heads, only the keys its pattern can still see.

Each `_Store` keeps the keys and values of the heads of one pattern in one buffer:

    [ room | sinks out of the window's reach | window | new tokens | room ]

Sinks are copied to just before the window, over keys that have left it, so that what a new token sees is one
slice and a decode step is one attention call without a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from nearfield.core import per_dim
from nearfield.hosts.transformers_block_layer import BlockLayer
from nearfield.hosts.transformers_masks import Reading
from nearfield.ops.dense import dense_attention
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention

NEVER = 1 << 62  # position of a sink that has not arrived
_expected: ContextVar[BoundedLayer | None] = ContextVar("nearfield_bounded_layer", default=None)


@dataclass(frozen=True)
class Part:
    """Key/value heads of one site that share a pattern; None is full attention."""

    kv_heads: tuple[int, ...]
    pattern: Neighborhood | None

    @property
    def reach(self) -> int | None:
        """Keys before a token that its window still sees; None is all of them."""
        if self.pattern is None:
            return None
        return (per_dim("kernel_size", self.pattern.kernel_size, 1)[0] - 1) * self.dilation

    @property
    def dilation(self) -> int:
        """Distance of neighbours in the window."""
        return 1 if self.pattern is None else per_dim("dilation", self.pattern.dilation, 1)[0]

    @property
    def num_sinks(self) -> int:
        """Sinks of the pattern."""
        return 0 if self.pattern is None else self.pattern.num_sinks

    def held(self, num_tokens: int) -> int:
        """Keys that a row of `num_tokens` leaves in the cache, for each head."""
        return num_tokens if self.reach is None else min(num_tokens, self.reach + self.num_sinks)


def select(heads: Tensor, parts: tuple[Part, ...], share: int = 1) -> list[Tensor]:
    """`[B, H, ...]` by part, `share` query heads to a key/value head; views where heads are neighbours."""
    if len(parts) == 1:
        return [heads]
    chosen = []
    for part in parts:
        runs = [heads[:, run.start * share : run.stop * share] for run in _runs(part.kv_heads)]
        chosen.append(runs[0] if len(runs) == 1 else torch.cat(runs, dim=1))
    return chosen


def unite(pieces: list[Tensor], parts: tuple[Part, ...], share: int) -> Tensor:
    """The outputs `[B, N, H, Dv]` of all parts with the heads in their order."""
    if len(parts) == 1:
        return pieces[0]
    found = {}
    for part, piece in zip(parts, pieces, strict=True):
        runs = _runs(part.kv_heads)
        for run, heads in zip(runs, piece.split([len(run) * share for run in runs], dim=2), strict=True):
            found[run.start] = heads
    return torch.cat([found[start] for start in sorted(found)], dim=2)


def _runs(heads: tuple[int, ...]) -> list[range]:
    """Ascending heads as runs of neighbours."""
    runs: list[range] = []
    for head in heads:
        if runs and runs[-1].stop == head:
            runs[-1] = range(runs[-1].start, head + 1)
        else:
            runs.append(range(head, head + 1))
    return runs


class BoundedLayer(CacheLayerMixin):
    """One layer of a cache whose local groups hold `kernel_size - 1` keys and the sinks, no more."""

    is_sliding = False  # masks are asked for in full length: full groups need them
    supports_early_init = False

    def __init__(self, parts: tuple[Part, ...], name: str):
        super().__init__()
        self.parts, self.name = parts, name
        self.stores = [_Store(part) for part in parts]
        self.seen = 0
        self.armed = False
        self.pending: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: the converted attention module stores them itself."""
        if not self.armed or self.pending is not None:
            raise RuntimeError(
                f"This cache was filled by a converted model and is now used at {self.name!r} by one that is "
                "not, or after a step that failed. Start with a fresh cache."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.armed = False
        self.pending = (key_states, value_states)
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def take(self) -> tuple[Tensor, Tensor]:
        """The keys and values of the last `update`, once."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending

    def store(self, key: Tensor, value: Tensor, keys: Tensor | None) -> None:
        """Takes in the first tokens `[B, H, N, D]`; `keys` [B, M] is False at padding."""
        arrived = None if keys is None else keys[:, -key.shape[2] :]
        pieces = zip(self.stores, select(key, self.parts), select(value, self.parts), strict=True)
        for store, some_keys, some_values in pieces:
            store.fill(some_keys, some_values, self.seen - key.shape[2], arrived)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        reading: Reading | None,
        scale: float,
        full: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """Takes in new tokens `[B, H, N, D]` and returns what their queries see, `[B, N, H, Dv]`.

        `full(query, key, value, mask)` is the host's own attention.
        """
        batch, num_new, share = query.shape[0], query.shape[2], query.shape[1] // key.shape[1]
        if reading is not None and not reading.plain and any(part.pattern is not None for part in self.parts):
            raise NotImplementedError(
                f"The attention mask at {self.name!r} says more than causality and padding while the cache "
                "holds only the window and the sinks. Use such masks without a cache (use_cache=False)."
            )
        keys = None if reading is None else reading.keys.expand(batch, -1)
        arrived = None if keys is None else keys[:, -num_new:]
        outs = []
        groups = zip(self.parts, self.stores, *(select(x, self.parts) for x in (key, value)), strict=True)
        for (part, store, some_keys, some_values), some_queries in zip(
            groups, select(query, self.parts, share), strict=True
        ):
            slots, contents, num_sinks = store.extend(some_keys, some_values, self.seen - num_new, arrived)
            if part.pattern is None:
                if mask is None and num_new > 1:
                    mask = torch.ones(num_new, self.seen, dtype=torch.bool, device=query.device)
                    mask = mask.tril_(self.seen - num_new)[None, None]
                outs.append(full(some_queries, slots, contents, mask))
                continue
            seen = store.visible(reading, keys, slots.shape[2], num_sinks, self.seen)
            if num_new == 1 and part.dilation == 1:
                row = None if seen is None else seen[:, None, None]
                outs.append(one_row(some_queries, slots, contents, row, scale))
            else:
                q, k, v = (x.transpose(1, 2) for x in (some_queries, slots, contents))
                outs.append(neighborhood_attention(q, k, v, part.pattern, key_mask=seen, scale=scale))
        return unite(outs, self.parts, share)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def held(self) -> dict[int, int]:
        """Key/value head -> keys that the next token can still need, in each row."""
        return {
            head: store.held
            for part, store in zip(self.parts, self.stores, strict=True)
            for head in part.kv_heads
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, the room in them included."""
        return sum(tensor.nbytes for store in self.stores for tensor in store.tensors())

    def reset(self) -> None:
        self.stores = [_Store(part) for part in self.parts]
        self.seen, self.armed, self.pending, self.is_initialized = 0, False, None, False

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

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, which works until the first key left a window."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not supported. Give how many tokens to remove as a negative "
                "number."
            )
        if tokens_to_remove == 0 or not self.seen:
            return
        if any(store.end - store.start != self.seen for store in self.stores):
            raise RuntimeError(
                f"crop({tokens_to_remove}) at {self.name!r}: keys that the shortened text would see again "
                "have left the window and are gone. Generate without an assistant model and without prompt "
                "lookup, or leave the site full."
            )
        self.seen = max(0, self.seen + tokens_to_remove)
        for store in self.stores:
            store.shorten(self.seen)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            store.change(change)


class _Store:
    """The keys and values of one part, `[B, heads, slots, D]`."""

    def __init__(self, part: Part):
        self.reach, self.num_sinks = part.reach, part.num_sinks
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.start = self.end = 0  # slots of the window, or of everything
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.sink_at: Tensor | None = None  # [B, sinks] positions, once rows differ by padding
        self.last_sink = -1  # the highest position of a sink in any row
        self.complete = not self.num_sinks

    @property
    def held(self) -> int:
        window = self.end - self.start
        sinks = 0 if self.sink_keys is None else self.sink_keys.shape[2]
        if self.reach is None or window < self.reach:
            return window
        return min(window, self.reach) + sinks

    def tensors(self) -> list[Tensor]:
        found = (self.keys, self.values, self.sink_keys, self.sink_values, self.sink_at)
        return [tensor for tensor in found if tensor is not None]

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "sink_keys", "sink_values", "sink_at"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    def fill(self, key: Tensor, value: Tensor, at: int, arrived: Tensor | None) -> None:
        """Takes in the first tokens, of which only what later ones see is kept."""
        self._note_sinks(key, value, at, arrived)
        self._keep(key, value, 0)

    def extend(
        self, key: Tensor, value: Tensor, at: int, arrived: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        """Takes in tokens from position `at` on; what they see as `(keys, values, sinks in front)`."""
        assert self.keys is not None
        assert self.values is not None
        if self.reach is not None:
            self.start = max(self.start, self.end - self.reach)
        first = at - (self.end - self.start)  # position of the first key of the window
        in_front = 0
        if first and self.num_sinks and self.sink_keys is not None:
            in_front = min(self.sink_keys.shape[2], first) if self.sink_at is None else self.num_sinks
        num_new = key.shape[2]
        if torch.is_grad_enabled() or (num_new > 1 and self.reach is not None):
            found = []
            for buffer, sinks, new in (
                (self.keys, self.sink_keys, key),
                (self.values, self.sink_values, value),
            ):
                front = [] if sinks is None else [sinks[:, :, :in_front]]
                found.append(torch.cat([*front, buffer[:, :, self.start : self.end], new], dim=2))
            slots, contents = found
            self._keep(slots, contents, in_front)
        else:
            self._make_room(num_new)
            begin = self.start - in_front
            for buffer, sinks, new in (
                (self.keys, self.sink_keys, key),
                (self.values, self.sink_values, value),
            ):
                buffer[:, :, self.end : self.end + num_new] = new
                if in_front and sinks is not None:
                    buffer[:, :, begin : self.start] = sinks[:, :, :in_front]
            self.end += num_new
            slots, contents = self.keys[:, :, begin : self.end], self.values[:, :, begin : self.end]
        self._note_sinks(key, value, at, arrived)
        return slots, contents, in_front

    def visible(
        self, reading: Reading | None, keys: Tensor | None, num_slots: int, num_sinks: int, seen: int
    ) -> Tensor | None:
        """Which of the slots `[B, slots]` hold a key of their row that is no padding; None for all."""
        in_window = num_slots - num_sinks
        first = seen - in_window
        hidden = reading is not None and reading.last_hidden + seen - reading.keys.shape[-1] >= first
        uneven = num_sinks > 0 and self.sink_at is not None and self.last_sink >= first
        if not hidden and not uneven:
            return None
        parts = []
        if num_sinks:
            assert self.keys is not None
            batch, device = self.keys.shape[0], self.keys.device
            if self.sink_at is None:
                parts.append(torch.ones(batch, num_sinks, dtype=torch.bool, device=device))
            else:
                parts.append(self.sink_at[:, :num_sinks] < first)
        if hidden and keys is not None:
            parts.append(keys[:, -in_window:])
        else:
            assert self.keys is not None
            parts.append(torch.ones(self.keys.shape[0], in_window, dtype=torch.bool, device=self.keys.device))
        return torch.cat(parts, dim=1)

    def shorten(self, seen: int) -> None:
        """Forgets all but the first `seen` tokens; nothing may have left the window yet."""
        self.end = self.start + seen
        if self.keys is not None and self.values is not None:  # without room: the next token moves them
            self.keys, self.values = self.keys[:, :, : self.end], self.values[:, :, : self.end]
        if self.sink_at is not None:
            self.sink_at = self.sink_at.masked_fill(self.sink_at >= seen, NEVER)
            self._count_sinks()
        elif self.sink_keys is not None and self.sink_values is not None:
            self.sink_keys, self.sink_values = self.sink_keys[:, :, :seen], self.sink_values[:, :, :seen]
            self.complete = self.sink_keys.shape[2] == self.num_sinks

    def _keep(self, key: Tensor, value: Tensor, front: int) -> None:
        """Replaces the buffers by the last of these tokens, behind `front` sinks."""
        num = key.shape[2] - front
        held = num if self.reach is None else min(num, self.reach)
        key, value = key[:, :, key.shape[2] - held :], value[:, :, value.shape[2] - held :]
        self.start, self.end = 0, held
        self.keys, self.values = key, value
        if not (torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)):
            self._make_room(1)

    def _make_room(self, num_new: int) -> None:
        """Room for new tokens behind the window and sinks before it, in buffers that may be written."""
        assert self.keys is not None
        assert self.values is not None
        frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if self.end + num_new <= self.keys.shape[2] and not frozen:
            return
        held = self.end - self.start
        # An eighth to spare: moving a window costs a step no more than eight of its keys do.
        room = self.num_sinks + held + num_new + max(32, held // 8)
        moved = []
        for buffer in (self.keys, self.values):
            larger = buffer.new_zeros((*buffer.shape[:2], room, buffer.shape[3]))
            larger[:, :, self.num_sinks : self.num_sinks + held] = buffer[:, :, self.start : self.end]
            moved.append(larger)
        self.keys, self.values = moved
        self.start, self.end = self.num_sinks, self.num_sinks + held

    def _note_sinks(self, key: Tensor, value: Tensor, at: int, arrived: Tensor | None) -> None:
        """Keeps the first `num_sinks` tokens of each row that are no padding, as they arrive."""
        if self.complete:
            return
        if self.sink_at is None and arrived is None:
            have = 0 if self.sink_keys is None else self.sink_keys.shape[2]
            news = [x[:, :, : self.num_sinks - have] for x in (key, value)]
            if self.sink_keys is None or self.sink_values is None:
                self.sink_keys, self.sink_values = (x.clone() for x in news)
            else:
                self.sink_keys = torch.cat([self.sink_keys, news[0]], dim=2)
                self.sink_values = torch.cat([self.sink_values, news[1]], dim=2)
            self.last_sink = self.sink_keys.shape[2] - 1
            self.complete = self.sink_keys.shape[2] == self.num_sinks
            return
        batch, num_heads, num_new = key.shape[:3]
        if arrived is None:
            arrived = torch.ones(batch, num_new, dtype=torch.bool, device=key.device)
        if self.sink_at is None:
            self._pad_sinks(key, value)
        assert self.sink_at is not None
        assert self.sink_keys is not None
        assert self.sink_values is not None
        rank = arrived.cumsum(1) - 1 + (self.sink_at < NEVER).sum(1, keepdim=True)  # [B, N]
        wanted = torch.arange(self.num_sinks, device=key.device)
        hit = arrived[:, None] & (rank[:, None] == wanted[:, None])  # [B, sinks, N]
        found, index = hit.any(-1), hit.int().argmax(-1)
        place = index[:, None, :, None].expand(-1, num_heads, -1, -1)
        chosen = found[:, None, :, None]
        self.sink_keys = torch.where(
            chosen, key.gather(2, place.expand(-1, -1, -1, key.shape[3])), self.sink_keys
        )
        self.sink_values = torch.where(
            chosen, value.gather(2, place.expand(-1, -1, -1, value.shape[3])), self.sink_values
        )
        self.sink_at = torch.where(found, index + at, self.sink_at)
        self._count_sinks()

    def _pad_sinks(self, key: Tensor, value: Tensor) -> None:
        """From sinks that all rows share to sinks row by row."""
        have = 0 if self.sink_keys is None else self.sink_keys.shape[2]
        at = torch.full((key.shape[0], self.num_sinks), NEVER, device=key.device)
        at[:, :have] = torch.arange(have, device=key.device)
        self.sink_at = at
        for name, like in (("sink_keys", key), ("sink_values", value)):
            rest = like.new_zeros((*like.shape[:2], self.num_sinks - have, like.shape[3]))
            old = getattr(self, name)
            setattr(self, name, rest if old is None else torch.cat([old, rest], dim=2))

    def _count_sinks(self) -> None:
        assert self.sink_at is not None
        self.last_sink = int(self.sink_at.max())
        self.complete = self.last_sink < NEVER


def one_row(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query per row, `[B, 1, H, Dv]`."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return dense_attention(q, k, v, mask=mask, scale=scale)


def bind(cache: Cache | None, index: int, parts: tuple[Part, ...], name: str) -> None:
    """Makes the attention call that follows expect a bounded layer, put in the place of a still empty one.

    A layer that already holds keys, or quantises them, stays: then nothing is bounded, and the result is the
    same.
    """
    _expected.set(None)
    if cache is None or isinstance(cache, EncoderDecoderCache):
        return
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not cache.offloading
    if plain and not layer.get_seq_length():
        layer = cache.layers[index] = BoundedLayer(parts, name)
    if isinstance(layer, BoundedLayer):
        if layer.parts != parts:
            raise RuntimeError(
                f"This cache was filled under another plan of {name!r}. Start with a fresh cache."
            )
        layer.armed = True
        _expected.set(layer)
    elif not isinstance(layer, DynamicLayer):
        raise NotImplementedError(
            f"A converted model cannot use a {type(layer).__name__} at {name!r}. "
            "Use the default cache: leave cache_implementation and past_key_values unset."
        )


def claim(key: Tensor) -> BoundedLayer | None:
    """The bounded layer that this attention call belongs to, once; None where no such cache is in use."""
    layer = _expected.get()
    if layer is None:
        return None
    _expected.set(None)
    if layer.pending is None or layer.pending[0] is not key:
        raise NotImplementedError(
            f"The host shares or changes keys between its cache and its attention at {layer.name!r}, which a "
            "bounded cache cannot follow. Generate with use_cache=False, or leave the site full."
        )
    return layer


def cache_bytes(cache: Cache) -> int:
    """Bytes that the keys and values of any cache take up now, spare room in buffers included."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, BoundedLayer | BlockLayer):
            total += layer.nbytes
        else:
            held = (getattr(layer, "keys", None), getattr(layer, "values", None))
            total += sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))
    return total
