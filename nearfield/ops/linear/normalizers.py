"""Linear attention normalised otherwise: rows that sum to one by subtraction, or to a learned temperature."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.ops.checks import check, scale_or_default
from nearfield.ops.linear.calls import LinearResult, call, check_call, state_shapes, with_weights
from nearfield.ops.linear.dispatch import attend
from nearfield.ops.linear.packed import States, Tensors


def inline_attention(
    query: Float[Tensor, "b *places heads dim"],
    key: Float[Tensor, "b *grid kv_heads dim"],
    value: Float[Tensor, "b *grid kv_heads dv"],
    *,
    key_mask: Bool[Tensor, "b *grid"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    initial_state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> LinearResult:
    """Injective linear attention: weights sum to one by subtraction, so different queries see differently.

        A_ij = (scale * q_i k_j - mean_m(scale * q_i k_m) + 1) / N

    N counts the keys: those seen so far if causal, and never those with `key_mask` False, which nobody sees,
    whatever they hold. A query that sees no key gets 0. The state is `(S, sum of keys [B, H, K], sum of
    values [B, H, V], count [B])`; the other options are those of `linear_attention`.
    """
    check_call(query, key, value, is_causal, form)
    factor = scale_or_default(scale, query.shape[-1])
    if key_mask is not None:
        check("key_mask", key_mask, tuple(key.shape[:-2]), query, torch.bool)
    elif cu_seqlens is not None:  # sequences filled up to one length must not count what fills them
        key_mask = torch.ones(key.shape[:-2], dtype=torch.bool, device=key.device)
    solve = partial(attend, "inline_attention", scale=factor, is_causal=is_causal, form=form, backend=backend)

    def run(
        query: Tensor, key: Tensor, value: Tensor, gates: Tensors, state: States
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        mask = gates["mask"]
        if mask is not None:
            key, value = (x.masked_fill(~mask[..., None, None], 0) for x in (key, value))
        products, weights, sums = with_weights(solve, query, key, value, {}, state)
        values = value.to(products.dtype).repeat_interleave(query.shape[2] // value.shape[2], 2)
        counted = values.new_ones(key.shape[:2]) if mask is None else mask.to(values.dtype)
        all_values, count = values.sum(1), counted.sum(1)  # [B, H, V], [B]
        seen, number = all_values.unsqueeze(1), count.unsqueeze(1)  # of each query: [B, 1 or T, ...]
        if is_causal:
            seen, number = values.cumsum(1), counted.cumsum(1)
        if state is not None:
            all_values, count = all_values + state[2], count + state[3]
            seen, number = seen + state[2].unsqueeze(1), number + state[3].unsqueeze(1)
        number = number.clamp(min=1)[..., None, None]
        return (products + (1 - weights / number) * seen) / number, (*sums, all_values, count)

    heads, dim, dv = query.shape[-2], query.shape[-1], value.shape[-1]
    return call(
        run,
        query,
        key,
        value,
        {"mask": None if key_mask is None else key_mask.flatten(1)},
        initial_state,
        [(heads, dim, dv), (heads, dim), (heads, dv), ()],
        cu_seqlens,
        output_final_state,
    )


def enhanced_linear_attention(
    query: Float[Tensor, "b *places heads dim"],
    key: Float[Tensor, "b *grid kv_heads dim"],
    value: Float[Tensor, "b *grid kv_heads dv"],
    *,
    temperature: Float[Tensor, " heads"],
    min_denominator: float = 100.0,
    is_causal: bool = False,
    initial_state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> LinearResult:
    """Linear attention by the positive parts of query and key, with a learned temperature and a floor below.

        A_ij = temperature * relu(q_i) relu(k_j) / max(sum_m relu(q_i) relu(k_m), min_denominator)

    A row sums to the temperature of its head, or to less where the floor holds. The state is `(S, z)` of
    `linear_attention` with `normalize`; so are the other options.
    """
    check_call(query, key, value, is_causal, form)
    check("temperature", temperature, (query.shape[-2],), query)
    if not min_denominator > 0:
        raise ValueError(f"min_denominator={min_denominator} must be above 0; the published models have 100.")
    solve = partial(
        attend, "enhanced_linear_attention", scale=1.0, is_causal=is_causal, form=form, backend=backend
    )

    def run(
        query: Tensor, key: Tensor, value: Tensor, gates: Tensors, state: States
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        products, weights, last = with_weights(solve, query.relu(), key.relu(), value, gates, state)
        return products * (temperature.to(products.dtype)[:, None] / weights.clamp(min=min_denominator)), last

    return call(
        run,
        query,
        key,
        value,
        {},
        initial_state,
        state_shapes(query, value, True),
        cu_seqlens,
        output_final_state,
    )
