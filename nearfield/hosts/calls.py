"""How hosts call attention: the arguments of SDPA and multi-head attention as one call in our layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfield.hosts.local import key_mask_of
from nearfield.hosts.seam import Role, Site

MOST_PREFIX_TOKENS = 16  # class, distillation and register tokens of known ViTs: at most 1 + 1 + 8
CONTEXT_NAMES = ("context", "encoder_hidden_states", "memory", "cond", "key_value_states")


@dataclass
class Seen:
    """One attention call as a host makes it, in the layout `[B, N, heads, D]`; masks say True for visible."""

    query: Tensor
    key: Tensor
    value: Tensor
    role: Role
    is_causal: bool = False
    scale: float | None = None
    mask: Tensor | None = None  # without what is_causal and key_mask say
    key_mask: Tensor | None = None  # [B, M]; a float one is added to the scores
    dropout: float = 0.0
    host: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # what follows, on other tensors
    is_twin: bool = False  # `host` is SDPA in the place of a fused path that has the site inside

    def site(self, name: str, grids: Sequence[tuple[int, ...]]) -> Site:
        """What is known of the place this call was made at."""
        grid, prefix = _fit(grids, self.key.shape[1]) if self.role == "self" else (None, 0)
        rows, keys = range(self.query.shape[1]), range(self.key.shape[1])
        heads = self.query.shape[2], self.key.shape[2]
        return Site(name, self.role, grid, prefix, self.is_causal, *heads, rows, keys)

    def complete_mask(self) -> Tensor | None:
        """One mask that says everything, or None where the site's causality says all."""
        if self.mask is None and self.key_mask is None:
            return None
        n, m = self.query.shape[1], self.key.shape[1]
        parts = [] if self.mask is None else [self.mask]
        if self.key_mask is not None:
            parts.append(self.key_mask[:, None, None])
        if self.is_causal:
            parts.append(torch.ones(n, m, dtype=torch.bool, device=self.query.device).tril_())
        whole = parts[0]
        if all(part.dtype == torch.bool for part in parts):
            for part in parts[1:]:
                whole = whole & part
            return whole
        whole = _additive(whole, self.query.dtype)
        for part in parts[1:]:
            whole = whole + _additive(part, self.query.dtype)
        return whole

    def padding(self) -> Tensor | None:
        """The mask as padded keys; `ValueError` where it says more."""
        if self.mask is not None:
            return key_mask_of(self.complete_mask(), self.query.shape[0], self.key.shape[1], self.is_causal)
        if self.key_mask is None or self.key_mask.dtype == torch.bool:
            return self.key_mask
        batch, keys = self.key_mask.shape
        return key_mask_of(self.key_mask[:, None, None], batch, keys, False)


class Asked:
    """Someone who answers for sites: a handler for a while, or a plan for good."""

    def listening(self) -> bool:
        """Whether calls of this thread are to be offered."""
        return True

    def answer(self, module: nn.Module, seen: Seen) -> Tensor | None:
        """The site's result `[B, N, heads, Dv]`, or None: the host's own computation goes on."""
        raise NotImplementedError

    def aside(self) -> AbstractContextManager[None]:
        """Lets the host's own computation run as if this asker were not there."""
        return nullcontext()

    def hidden(self) -> AbstractContextManager[None]:
        """As `aside`, but sites inside still ask."""
        return nullcontext()


def sdpa(
    who: Asked,
    module: nn.Module,
    context: Any,
    follow: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """What `who` answers to an SDPA call, in SDPA's layout `[..., heads, N, D]`.

    `follow` is SDPA itself, or whoever is asked next.
    """
    if query.is_nested or (is_causal and attn_mask is not None):
        return None  # the first has no grid, the second torch refuses
    rank, n, m = query.ndim, query.shape[-2], key.shape[-2]
    mask = attn_mask
    if rank < 4:  # one head: [B, N, D] or [N, D]
        query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
        mask = mask.unsqueeze(-3) if mask is not None and mask.ndim == 3 else mask
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    query, key, value = (_heads_last(x, lead) for x in (query, key, value))
    if not enable_gqa:  # heads broadcast like any dimension; one key head for all is left as it is
        heads = max(x.shape[2] for x in (query, key, value))
        query = query.expand(-1, -1, heads, -1)
        if key.shape[2] != value.shape[2]:
            key, value = (x.expand(-1, -1, heads, -1) for x in (key, value))
    if mask is not None and mask.ndim > 4:
        mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
    causal = is_causal and n == m
    if is_causal and not causal:
        # SDPA aligns unequal lengths at the first key, the house at the last: a mask leaves no doubt.
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril_()
    key_mask = None
    if mask is not None and mask.ndim == 4 and mask.shape[1:] == (1, 1, m):
        key_mask, mask = mask[:, 0, 0].expand(query.shape[0], m), None
    elif mask is not None and _is_causal_mask(mask, n, m):
        causal, mask = True, None
    role: Role = "self" if n == m and context is None else "cross"

    def back(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = x.reshape(*lead, *x.shape[1:])
        return x if rank > 3 else x.squeeze(-3)

    def host(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        out = follow(back(query), back(key), back(value), enable_gqa=enable_gqa, **options)
        return _heads_last(out if rank > 3 else out.unsqueeze(-3), lead)

    seen = Seen(query, key, value, role, causal, scale, mask, key_mask, dropout_p, host)
    out = who.answer(module, seen)
    return None if out is None else back(out)


def multihead(
    who: Asked,
    module: nn.Module,
    weights: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
    follow: Callable[[Seen], Tensor | None] = lambda seen: None,
) -> Tensor | None:
    """What `who` answers to a call of multi-head attention, after the output projection.

    `follow` asks those who would be asked next.
    """
    role: Role = "self" if query is key or query is value else "cross"
    batched, batch_first = query.ndim == 3, weights.batch_first
    q, k, v = _project(weights, query, key, value)
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    q, k, v = (x.unflatten(-1, (weights.num_heads, -1)) for x in (q, k, v))  # [B, N, H, D]
    extra = weights.bias_k is not None, weights.add_zero_attn
    if any(extra):
        role = "cross"  # keys that no query stands for
        k, v = (_extended(x, bias, extra[1]) for x, bias in ((k, weights.bias_k), (v, weights.bias_v)))
    seen = Seen(q, k, v, role, dropout=weights.dropout if weights.training else 0.0)
    if key_padding_mask is not None:
        seen.key_mask = _visible(key_padding_mask, sum(extra))
    size = q.shape[1], k.shape[1]
    if is_causal and key_padding_mask is None and not need_weights:  # torch then looks at the hint alone
        attn_mask = (
            ~torch.ones(size, dtype=torch.bool, device=q.device).tril_() if size[0] != size[1] else None
        )
        seen.is_causal, extra = attn_mask is None, (False, False)
    if attn_mask is not None:
        mask = _visible(attn_mask, sum(extra))
        mask = mask.view(len(q), -1, *size) if mask.ndim == 3 and len(mask) != 1 else mask
        seen.is_causal = size[0] == size[1] and (is_causal or _is_causal_mask(mask, *size))
        seen.mask = None if seen.is_causal else mask[(None,) * (4 - mask.ndim)]
    seen = with_twin(seen, follow)
    out = who.answer(module, seen)
    if out is None:
        return None
    out = F.linear(out.flatten(-2), weights.out_proj.weight, weights.out_proj.bias)
    if not batched:
        return out[0]
    return out if batch_first else out.transpose(0, 1)


def with_twin(seen: Seen, follow: Callable[[Seen], Tensor | None]) -> Seen:
    """The call with SDPA as its host, where `follow` answers None."""

    def host(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        changed = replace(seen, query=query, key=key, value=value)
        out = follow(changed)
        if out is not None:
            return out
        mask = changed.complete_mask()
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        causal = seen.is_causal and mask is None
        out = F.scaled_dot_product_attention(q, k, v, mask, seen.dropout, causal, scale=seen.scale)
        return out.transpose(1, 2)

    return replace(seen, host=host, is_twin=True)


def functional_multihead(
    who: Asked, module: nn.Module, context: Any, follow: Any, *args: Any, **kwargs: Any
) -> Any:
    """What `who` answers to a direct call of `F.multi_head_attention_forward`."""
    bound = MHA_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    if given.static_k is not None or given.static_v is not None:
        return None
    given.out_proj = SimpleNamespace(weight=given.out_proj_weight, bias=given.out_proj_bias)
    given.batch_first, given.dropout = False, given.dropout_p
    given._qkv_same_embed_dim = not given.use_separate_proj_weight
    masks = given.key_padding_mask, given.attn_mask, given.is_causal, given.need_weights
    out = multihead(who, module, given, given.query, given.key, given.value, *masks)
    return None if out is None else (out, None)


MHA_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
OPENINGS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: sdpa,
    F.multi_head_attention_forward: functional_multihead,
}


def _project(weights: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    if weights._qkv_same_embed_dim:
        if query is key and key is value:
            return F.linear(query, weights.in_proj_weight, weights.in_proj_bias).chunk(3, dim=-1)
        parts = weights.in_proj_weight.chunk(3)
    else:
        parts = (weights.q_proj_weight, weights.k_proj_weight, weights.v_proj_weight)
    biases = (None, None, None) if weights.in_proj_bias is None else weights.in_proj_bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True))


def _extended(heads: Tensor, bias: Tensor | None, zero: bool) -> Tensor:
    """Keys or values with torch's extra tokens behind them: a learned one, a zero one."""
    batch, _, num_heads, dim = heads.shape
    parts = [heads]
    if bias is not None:
        parts.append(bias.view(1, 1, num_heads, dim).expand(batch, -1, -1, -1))
    if zero:
        parts.append(heads.new_zeros(batch, 1, num_heads, dim))
    return torch.cat(parts, dim=1)


def _visible(mask: Tensor, extra: int) -> Tensor:
    """A mask of multi-head attention (True: hidden) as ours (True: visible), `extra` visible keys added."""
    if mask.dtype == torch.bool:
        return F.pad(~mask, (0, extra), value=True)
    return F.pad(mask, (0, extra))


def _is_causal_mask(mask: Tensor, n: int, m: int) -> bool:
    """Whether a mask for all of a batch and its heads says causality and nothing else."""
    if n != m or n == 1 or mask.shape[-2:] != (n, m) or mask.numel() != n * m:
        return False
    causal = torch.ones(n, m, dtype=torch.bool, device=mask.device).tril_()
    mask = mask.reshape(n, m)
    return torch.equal(mask, causal if mask.dtype == torch.bool else _additive(causal, mask.dtype))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _heads_last(x: Tensor, lead: torch.Size) -> Tensor:
    """`[..., heads, N, D]` as `[B, N, heads, D]`, by strides where the host's batch is one dimension."""
    x = x.expand(*lead, *x.shape[-3:])
    x = x.flatten(0, -4) if len(lead) > 1 else x if lead else x.unsqueeze(0)
    return x.transpose(1, 2)


def _fit(grids: Sequence[tuple[int, ...]], tokens: int) -> tuple[tuple[int, ...] | None, int]:
    """The grid seen that leaves the fewest tokens before it, the latest first; (tokens,) if none was seen."""
    fitting = [
        (tokens - prod(grid), grid)
        for grid in reversed(grids)
        if 0 <= tokens - prod(grid) <= MOST_PREFIX_TOKENS
    ]
    if fitting:
        prefix, grid = min(fitting, key=lambda found: found[0])
        return grid, prefix
    return (None if grids else (tokens,)), 0


def note_grid(grids: dict[nn.Module, tuple[int, ...]], module: nn.Module, output: Any) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d) and isinstance(output, Tensor):
        grid = tuple(output.shape[2 if output.ndim == len(module.kernel_size) + 2 else 1 :])
        if prod(grid) > MOST_PREFIX_TOKENS or min(grid) > 1:
            grids.pop(module, None)  # the latest comes last
            grids[module] = grid


def context_of(module: nn.Module, given: Any) -> Any:
    """The second sequence that a module was called with, if its signature names one as hosts do."""
    args, kwargs = given
    for name in CONTEXT_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    if len(args) > 1:
        names = list(inspect.signature(module.forward).parameters)[: len(args)]
        for name, value in zip(names, args, strict=False):
            if name in CONTEXT_NAMES and value is not None:
                return value
    return None
