"""Neighborhood attention in one, two and three dimensions: validate, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.core.backend import Choice, Verdict, choose, explain, requested
from nearfield.ops.checks import check, check_heads, scale_or_default
from nearfield.ops.neighborhood import reference
from nearfield.ops.neighborhood.geometry import Bound, Neighborhood, _bind

__all__ = ["Neighborhood", "neighborhood_attention", "why"]

OP = "neighborhood_attention"
TINY = 1 << 14  # scores; below, computing all of them is quicker than cutting the problem up


@overload
def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, geometry: Neighborhood, *, return_lse: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, geometry: Neighborhood, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def neighborhood_attention(
    query: Float[Tensor, "b *places heads dim"],
    key: Float[Tensor, "b *grid kv_heads dim"],
    value: Float[Tensor, "b *grid kv_heads dv"],
    geometry: Neighborhood,
    *,
    additional_keys: Float[Tensor, "b extra kv_heads dim"] | None = None,
    additional_values: Float[Tensor, "b extra kv_heads dv"] | None = None,
    bias: Float[Tensor, "heads *offsets"] | None = None,
    key_mask: Bool[Tensor, "b *grid"] | None = None,
    sink_logits: Float[Tensor, " heads"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b *places heads dv"] | tuple[Float[Tensor, "b *places heads dv"], Float[Tensor, "b *places heads"]]:
    """Attention in which each query sees the keys around it, as `geometry` says.

        out = neighborhood_attention(q, k, v, Neighborhood(7))                     # [B, 56, 56, H, D]: 49 keys each
        out = neighborhood_attention(q, k, v, Neighborhood(1024, is_causal=True, num_sinks=4))    # [B, N, H, D]

    Query head h uses key/value head `h // (heads // kv_heads)`. Additional keys are seen by every query, in
    the same softmax. `bias[h, key - query + kernel_size - 1, ...]` (per axis, in dilation steps) is added to the
    score of a key in the window; sinks outside it get none. Keys where `key_mask` is False are seen by nobody,
    whatever they hold. `sink_logits` joins the softmax's denominator and has no value. In one causal dimension
    the queries may be fewer than the keys: they are then the last ones.

    A query that sees nothing gets 0 and a log-sum-exp of -inf. With `return_lse` the result is `(out, lse)`,
    the natural log-sum-exp of the scores in float32 (float64 for float64 inputs), differentiable.
    """
    options = {
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "bias": bias,
        "key_mask": key_mask,
        "sink_logits": sink_logits,
        "scale": scale,
    }
    bound = _checked(query, key, value, geometry, options)
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        half = torch.get_autocast_dtype(device)
        cast = ("additional_keys", "additional_values")
        options |= {name: options[name].to(half) for name in cast if options[name] is not None}
        with torch.autocast(device, enabled=False):
            out, lse = _run(backend, query.to(half), key.to(half), value.to(half), bound, options)
    else:
        out, lse = _run(backend, query, key, value, bound, options)
    return (out, lse) if return_lse else out


def why(query: Tensor, key: Tensor, value: Tensor, geometry: Neighborhood, **options: Any) -> Choice:
    """Which backend "auto" takes for this call of `neighborhood_attention`, and why not the others."""
    backend = requested(options.pop("backend", "auto"))
    options.pop("return_lse", None)
    names = ("additional_keys", "additional_values", "bias", "key_mask", "sink_logits", "scale")
    unknown = set(options) - set(names)
    if unknown:
        raise TypeError(f"{sorted(unknown)} are no options of {OP}. Those are: {', '.join(names)}.")
    options = {name: options.get(name) for name in names}
    bound = _checked(query, key, value, geometry, options)
    choice = explain(OP, _backends(query, key, value, bound, options))
    if backend == "auto":
        return choice
    chosen = choose(OP, backend, _backends(query, key, value, bound, options))
    others = {name: reason for name, reason in choice.others.items() if name != chosen}
    return Choice(OP, chosen, {**others, choice.backend: f"not asked for; {chosen!r} was."} if chosen != choice.backend else others)


def _run(
    backend: str, query: Tensor, key: Tensor, value: Tensor, bound: Bound, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    mask = options["key_mask"]
    if mask is not None:  # whatever a masked key holds, NaN too, must not reach a product
        key, value = (x.masked_fill(~mask[..., None, None], 0) for x in (key, value))
    name = choose(OP, backend, _backends(query, key, value, bound, options))
    return _attend(name)(query, key, value, bound, **options)


def _attend(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if name == "tiled":
        from nearfield.ops.neighborhood import tiled

        return tiled.attend
    if name == "flex":
        from nearfield.ops.neighborhood import flex

        return flex.attend
    return reference.attend


def _backends(
    query: Tensor, key: Tensor, value: Tensor, bound: Bound, options: dict[str, Any]
) -> dict[str, Callable[[], Verdict]]:
    """What each backend says to this problem, best first."""

    def tiled() -> Verdict:
        from nearfield.ops.neighborhood import tiled

        scores = query.shape[0] * query.shape[-2] * bound.num_queries * bound.num_keys
        tiny = f"{scores} scores in all: computing every one is quicker." if scores <= TINY else None
        return Verdict(tiled.supports(query, key, value, bound, **options), tiny)

    def flex() -> Verdict:
        from nearfield.ops.neighborhood import flex

        cannot = flex.supports(query, key, value, bound, **options)
        return Verdict(cannot, "it compiles every new shape for seconds; ask for it by name.")

    return {
        "native": lambda: Verdict("this build carries no compiled CPU kernels."),
        "triton": lambda: Verdict("this build carries no GPU kernels."),
        "tiled": tiled,
        "reference": Verdict,
        "flex": flex,
    }


def _checked(query: Tensor, key: Tensor, value: Tensor, geometry: Neighborhood, options: dict[str, Any]) -> Bound:
    """The geometry bound to the grid, once every shape, dtype and device is right; fills in `scale`."""
    if not isinstance(geometry, Neighborhood):
        raise TypeError(f"geometry is a {type(geometry).__name__}. Give a Neighborhood, such as Neighborhood(7).")
    check_heads(query, key, value, rank=(4, 5, 6), layout="[batch, one to three grid sides, heads, head_dim]")
    places, grid = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    if len(grid) > 1 and places != grid:
        raise ValueError(f"The grid of the queries is {places}, of the keys {grid}. Give both the same one.")
    bound = _bound(geometry, grid, places[0] if len(grid) == 1 else None)

    batch, num_heads, head_dim, num_kv_heads = query.shape[0], query.shape[-2], query.shape[-1], key.shape[-2]
    more_keys, more_values = options["additional_keys"], options["additional_values"]
    if (more_keys is None) != (more_values is None):
        raise ValueError("additional_keys and additional_values belong together. Give both or neither.")
    if more_keys is not None:
        count = more_keys.shape[1] if more_keys.dim() == 4 else "L"
        check("additional_keys", more_keys, (batch, count, num_kv_heads, head_dim), query, query.dtype)
        check("additional_values", more_values, (batch, count, num_kv_heads, value.shape[-1]), query, query.dtype)
    if options["bias"] is not None:
        sides = (2 * axis.kernel_size - 1 for axis in bound.axes)
        check("bias", options["bias"], (num_heads, *sides), query)
    if options["sink_logits"] is not None:
        check("sink_logits", options["sink_logits"], (num_heads,), query)
    if options["key_mask"] is not None:
        check("key_mask", options["key_mask"], (batch, *grid), query, torch.bool)
    options["scale"] = scale_or_default(options["scale"], head_dim)
    return bound


def _bound(geometry: Neighborhood, grid: tuple[int, ...], num_queries: int | None) -> Bound:
    """`geometry.on(grid)`, also for the symbolic sides of a trace, which no cache can hold."""
    if all(type(side) is int for side in (*grid, num_queries or 0)):
        return geometry.on(grid, num_queries=num_queries)
    return _bind.__wrapped__(geometry, grid, num_queries)
