"""Steps of transformers decoders that read few blocks of a long cache: top-k blocks, chosen by some layers.

Prompts are read densely. A call of a few new tokens behind a filled cache is decoding: layer by layer, as the
policy says, it attends to everything, to the blocks that it selects, or to those that an earlier layer of the
same step has selected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from nearfield.hosts.transformers import attention_modules, install_answers
from nearfield.hosts.transformers_block_layer import BlockLayer, block_cache
from nearfield.hosts.transformers_masks import read_mask
from nearfield.hosts.transformers_sites import (
    is_causal_site,
    layer_type,
    native_window,
    num_kv_heads_of,
    role_of,
)
from nearfield.ops.dense import dense_attention
from nearfield.ops.topk import block_scores, choose_blocks, topk_block_attention

if TYPE_CHECKING:
    from nearfield.plan.reuse import ReusePolicy

__all__ = [
    "MOST_ROWS",
    "BlockLayer",
    "BlockReuse",
    "block_cache",
    "block_caches",
    "decoder_layers",
    "install_reuse",
    "sparse_layers",
]

MOST_ROWS = 16  # new tokens of a call up to which it is decoding: speculative steps, evaluation in chunks


@dataclass
class _Step:
    """Where a thread is in a step."""

    layer: int = 1 << 30  # that was asked last
    source: int | None = None
    chosen: Tensor | None = None  # blocks [B, N, Hkv, S] that the source chose
    cached: ref[BlockLayer] | None = None  # the layer of the cache that the attention call is for


class BlockReuse:
    """Attention by a policy, layer after layer, and what has been chosen in the step that is under way."""

    def __init__(self, policy: ReusePolicy):
        self.policy = policy
        self.steps: dict[int, _Step] = {}  # by thread

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        cached: BlockLayer | None = None,
    ) -> Tensor | None:
        """The output `[B, N, heads, Dv]` of one layer in a decoding step; None where dense attention is due.

        Tensors are `[B, N, heads, D]`, the mask is as in `seam.Call`. A row of several selects for itself. A
        layer whose source has chosen nothing in this step, because it was not asked, selects too.
        """
        policy, step = self.policy, self._step()
        bound, step.cached = None if step.cached is None else step.cached(), None
        if layer <= step.layer:
            step.source = step.chosen = None
        step.layer = layer
        (batch, rows), num_keys = query.shape[:2], key.shape[1]
        before = num_keys - rows
        if rows > MOST_ROWS or not before:
            return None
        key_mask = None
        if mask is not None:
            if mask.shape[-1] != num_keys or mask.shape[-2] != rows:
                return None
            reading = read_mask(mask, is_causal=True)
            if not reading.plain:
                return None
            if reading.last_hidden >= 0:
                key_mask = reading.keys.expand(batch, -1)
        source = policy.sources[layer]
        dense = rows if source is None else min(max(policy.least_tokens - 1 - before, 0), rows)
        if dense == rows:
            return _dense(query, key, value, key_mask, scale) if rows == 1 else None
        query, first = query[:, dense:], query[:, :dense]
        chosen = step.chosen if source != layer and step.source == source else None
        if chosen is None or chosen.shape[:3] != (batch, rows - dense, key.shape[2]):
            chosen = self._choose(query, key, key_mask, scale, cached or bound)
            step.source, step.chosen = source, chosen
        out = topk_block_attention(
            query,
            key,
            value,
            chosen.to(query.device),
            block_size=policy.block_size,
            key_mask=key_mask,
            scale=scale,
        )
        if dense:  # rows that see too few keys, in a call that goes beyond
            seen = before + dense
            some = None if key_mask is None else key_mask[:, :seen]
            out = torch.cat([_dense(first, key[:, :seen], value[:, :seen], some, scale), out], dim=1)
        return out

    def expect(self, cached: BlockLayer | None) -> None:
        """Says which layer of a cache the attention call that follows is for."""
        self._step().cached = None if cached is None else ref(cached)

    def _step(self) -> _Step:
        thread = threading.get_ident()
        step = self.steps.get(thread)
        if step is None:
            step = self.steps[thread] = _Step()
        return step

    def _choose(
        self, query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float, cached: BlockLayer | None
    ) -> Tensor:
        policy, summary = self.policy, None
        if cached is not None and policy.score != "mass" and _is_of(cached, key):
            summary = cached.summarize(policy.block_size, policy.score, key_mask)
        scores = block_scores(
            query,
            key,
            block_size=policy.block_size,
            score=policy.score,
            summary=summary,
            key_mask=key_mask,
            scale=scale,
        )
        return choose_blocks(
            scores,
            policy.num_blocks,
            block_size=policy.block_size,
            num_keys=key.shape[1],
            num_sinks=policy.num_sinks,
            num_recent=policy.num_recent,
        )

    def __deepcopy__(self, memo: Any) -> BlockReuse:
        return memo.setdefault(id(self), BlockReuse(self.policy))  # a step under way is nobody else's


def install_reuse(model: nn.Module, policy: ReusePolicy) -> Callable[[], None]:
    """Has a transformers decoder decode by a policy for good; the result puts everything back.

        restore = install_reuse(model, ReusePolicy((None, 1, 1, 3, 3), num_tokens=2048))

    Weights and their names stay. `generate` and its default cache need nothing else. Layers with a sliding
    window of their own or with capped scores stay dense whatever the policy says.
    """
    modules, reuse = _layers(model, policy), BlockReuse(policy)
    names = {module: name for name, module in attention_modules(model).items()}
    answers = {
        names[module]: partial(reuse.attend, layer)
        for layer, module in modules.items()
        if _can_be_sparse(module)
    }
    with ExitStack() as stack:
        stack.callback(install_answers(model, answers))
        _bind(modules, reuse, stack)
        return stack.pop_all().close


@contextmanager
def block_caches(model: nn.Module, policy: ReusePolicy) -> Iterator[BlockReuse]:
    """What a steer that decodes by a policy asks for answers; inside the `with` caches are in blocks."""
    reuse = BlockReuse(policy)
    with ExitStack() as stack:
        _bind(_layers(model, policy), reuse, stack)
        yield reuse


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> attention module, for the causal self-attention of a transformers decoder.

    Raises `NotImplementedError` where a model has none, or more than one decoder.
    """
    found: dict[int, nn.Module] = {}
    for name, module in attention_modules(model).items():
        layer = getattr(module, "layer_idx", None)
        if role_of(module, name) != "self" or not is_causal_site(module) or not isinstance(layer, int):
            continue
        if layer in found:
            raise NotImplementedError(
                f"{type(model).__name__} has two attention sites for layer {layer}, one of them {name!r}. "
                "Give the part that decodes."
            )
        found[layer] = module
    if not found or getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model).__name__} is no decoder that generates from one cache: it has no steps to make "
            "sparse. Give a language model, such as LlamaForCausalLM."
        )
    return found


def sparse_layers(model: nn.Module) -> tuple[int, ...]:
    """The layers of a decoder that a policy can make sparse: no sliding window, no capped scores."""
    return tuple(sorted(layer for layer, module in decoder_layers(model).items() if _can_be_sparse(module)))


def _can_be_sparse(module: nn.Module) -> bool:
    kind = layer_type(module)
    return kind in (None, "full_attention") and native_window(module) is None and not _is_capped(module)


def _is_capped(module: nn.Module) -> bool:
    """Whether a module caps its attention scores."""
    return getattr(getattr(module, "config", None), "attn_logit_softcapping", None) is not None


def _layers(model: nn.Module, policy: ReusePolicy) -> dict[int, nn.Module]:
    """The attention modules that a policy speaks of, which must be those of the model."""
    found = decoder_layers(model)
    if len(policy.sources) <= max(found) or len(policy.sources) > _num_layers(model):
        raise ValueError(
            f"The policy is for {len(policy.sources)} layers; the model has {_num_layers(model)}. Give each "
            "layer one source."
        )
    for layer, source in enumerate(policy.sources):
        if source is None or layer not in found or source not in found:
            continue
        if num_kv_heads_of(found[layer]) != num_kv_heads_of(found[source]):
            raise ValueError(
                f"Layer {layer} has {num_kv_heads_of(found[layer])} key/value heads and its source {source} "
                f"{num_kv_heads_of(found[source])}: blocks are chosen for each. Give it another source."
            )
    return found


def _num_layers(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _bind(modules: dict[int, nn.Module], reuse: BlockReuse, stack: ExitStack) -> None:
    """Until the stack closes, each module's layer of a cache is a `BlockLayer` and is told to `reuse`."""
    for layer, module in modules.items():
        hook = partial(_before, reuse, layer)
        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _before(
    reuse: BlockReuse, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache):
        cache = next((given for given in (*kwargs.values(), *args) if isinstance(given, Cache)), None)
    reuse.expect(None if cache is None else _bound(cache, layer))


def _bound(cache: Cache, layer: int) -> BlockLayer | None:
    """The layer of a cache in blocks, put in the place of a plain one; None where it is of another kind."""
    if isinstance(cache, EncoderDecoderCache) or cache.offloading:
        return None
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    held = cache.layers[layer]
    if type(held) is DynamicLayer:
        held = cache.layers[layer] = BlockLayer.adopt(held)
    if isinstance(held, BlockLayer):
        return held
    if not isinstance(held, DynamicLayer):
        raise NotImplementedError(
            f"A model that decodes by blocks cannot use a {type(held).__name__} at layer {layer}. Use the "
            "default cache: leave cache_implementation and past_key_values unset."
        )
    return None


def _is_of(cached: BlockLayer, key: Tensor) -> bool:
    """Whether `key` is what the layer holds, and not what a handler has made of it."""
    return key.shape[1] == cached.length and key.data_ptr() == cached.keys.data_ptr()


def _dense(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """Attention to all keys, of which each is read once and not once per query head."""
    mask = None if key_mask is None else key_mask[:, None, None]
    return dense_attention(query, key, value, mask=mask, is_causal=query.shape[1] > 1, scale=scale)
