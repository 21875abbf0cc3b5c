"""Neighborhood attention in one, two and three dimensions: validate, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.core.backend import Choice, Verdict, choose, explain, requested
from nearfield.ops.checks import check, check_heads, no_transform, scale_or_default, under_autocast
from nearfield.ops.neighborhood import flash, flex, native, natten, reference, tiled, triton, tuned
from nearfield.ops.neighborhood.geometry import Bound, Neighborhood
from nearfield.ops.neighborhood.operator import bind

OP = "neighborhood_attention"
LAYOUT = "[batch, one to three grid sides, heads, head_dim]"
MODULES: dict[str, Any] = {
    "native": native, "triton": triton, "natten": natten, "flash": flash, "tiled": tiled,
    "reference": reference, "flex": flex, "natten-hub": natten.Hub,
}  # fmt: skip
OTHERS = {"natten": natten, "flash": flash}  # kernels of others, which "auto" takes where they were measured
SLOWER = "on this GPU it was not measured to be the fastest; `nearfield bench --tune` measures."
BY_NAME = "so it runs only when asked for by name."
OWN_MASKS = ("native", "triton")  # backends that never read what a masked key holds


class Options(TypedDict, total=False):
    """What `neighborhood_attention` takes beside its tensors and the geometry."""

    additional_keys: Tensor | None
    additional_values: Tensor | None
    bias: Tensor | None
    key_mask: Tensor | None
    sink_logits: Tensor | None
    scale: float | None
    backend: str


@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Neighborhood,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Neighborhood,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
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
) -> (
    Float[Tensor, "b *places heads dv"]
    | tuple[Float[Tensor, "b *places heads dv"], Float[Tensor, "b *places heads"]]
):
    """Attention in which each query sees the keys around it, as `geometry` says.

        neighborhood_attention(q, k, v, Neighborhood(7))  # [B, 56, 56, H, D]: 7 x 7 keys for each query
        neighborhood_attention(q, k, v, Neighborhood(1024, is_causal=True, num_sinks=4))  # [B, N, H, D]

    Query head h uses key/value head `h // (heads // kv_heads)`. Additional keys are seen by every query, in
    the same softmax. `bias[h, key - query + kernel_size - 1, ...]` (per axis, in dilation steps) is added to
    the score of a key in the window; a sink outside it gets none. A key with `key_mask` False is seen by
    nobody, whatever it holds. `sink_logits` joins the denominator of the softmax and brings no value. In one
    causal dimension the queries may be fewer than the keys: they are the last ones.

    A query that sees nothing gets 0 and a log-sum-exp of -inf. `return_lse` makes the result `(out, lse)`
    with the natural log-sum-exp of the scores, differentiable, in float32 (float64 for float64 inputs).
    """
    options: dict[str, Any] = {"bias": bias, "key_mask": key_mask, "sink_logits": sink_logits, "scale": scale}
    bound = checked(query, key, value, geometry, additional_keys, additional_values, options)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, more_keys: Tensor | None, more_values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given = {**options, "additional_keys": more_keys, "additional_values": more_values}
        name = choose(OP, backend, _backends(query, key, value, bound, given))
        if name == "tiled" and requested(backend) == "auto":
            native.warn_if_missed(query, value, options["scale"])
        if key_mask is not None and name not in OWN_MASKS:  # NaN in a masked key must not reach a product
            key, value = (x.masked_fill(~key_mask[..., None, None], 0) for x in (key, value))
        return MODULES[name].attend(query, key, value, bound, **given)

    out, lse = under_autocast(attend, query, key, value, additional_keys, additional_values)
    return (out, lse) if return_lse else out


def why(query: Tensor, key: Tensor, value: Tensor, geometry: Neighborhood, **options: Any) -> Choice:
    """Which backend "auto" takes for this call of `neighborhood_attention`, and why not the others."""
    names = ("additional_keys", "additional_values", "bias", "key_mask", "sink_logits", "scale")
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise TypeError(f"why() was given {', '.join(unknown)}. It takes the options {', '.join(names)}.")
    given = {name: options.get(name) for name in names}
    bound = checked(query, key, value, geometry, given["additional_keys"], given["additional_values"], given)
    return explain(OP, _backends(query, key, value, bound, given))


def _backends(
    query: Tensor, key: Tensor, value: Tensor, bound: Bound, options: dict[str, Any]
) -> dict[str, Callable[[], Verdict]]:
    """What each backend says to this problem, the best first."""

    def ask(supports: Callable[..., str | None], unfit: str | None = None) -> Callable[[], Verdict]:
        return lambda: Verdict(no_transform() or supports(query, key, value, bound, **options), unfit)

    asks = {
        "native": ask(native.supports),
        "triton": ask(triton.supports),
        "natten": ask(natten.supports, SLOWER),
        "flash": ask(flash.supports, SLOWER),
        "tiled": ask(tiled.supports),
        "reference": Verdict,
        "flex": ask(flex.supports, f"it compiles for seconds per shape, {BY_NAME}"),
        "natten-hub": ask(natten.supports_hub, f"it downloads kernels, {BY_NAME}"),
    }
    fastest = _fastest(query, key, value, bound)
    if fastest not in OTHERS:
        return asks
    return {fastest: ask(OTHERS[fastest].supports), **{k: v for k, v in asks.items() if k != fastest}}


def _fastest(query: Tensor, key: Tensor, value: Tensor, bound: Bound) -> str | None:
    """The backend that was the fastest on such a problem when this GPU was measured; None: never was."""
    if query.device.type != "cuda" or torch.compiler.is_compiling():  # a trace cannot read what is stored
        return None
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    dim = max(query.shape[-1], value.shape[-1])
    name = tuned.device_name(query.device)
    return tuned.preferred(bound, "backward" if learns else "forward", query.element_size(), dim, name)


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Neighborhood,
    more_keys: Tensor | None,
    more_values: Tensor | None,
    options: dict[str, Any],
) -> Bound:
    """The geometry on the grid of the keys, once all shapes, dtypes and devices fit; fills in the scale."""
    if not isinstance(geometry, Neighborhood):
        raise TypeError(
            f"geometry is a {type(geometry).__name__}. Give a Neighborhood, such as Neighborhood(7)."
        )
    check_heads(query, key, value, rank=(4, 5, 6), layout=LAYOUT)
    places, grid = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    if len(grid) > 1 and places != grid:
        raise ValueError(f"The grid of the queries is {places}, of the keys {grid}. Give both the same one.")
    bound = bind(geometry, grid, places[0] if len(grid) == 1 else None)

    batch, num_heads, head_dim, num_kv_heads = query.shape[0], query.shape[-2], query.shape[-1], key.shape[-2]
    if (more_keys is None) != (more_values is None):
        raise ValueError("additional_keys and additional_values belong together. Give both or neither.")
    if more_keys is not None and more_values is not None:
        count = more_keys.shape[1] if more_keys.dim() == 4 else "L"
        check("additional_keys", more_keys, (batch, count, num_kv_heads, head_dim), query, query.dtype)
        check(
            "additional_values",
            more_values,
            (batch, count, num_kv_heads, value.shape[-1]),
            query,
            query.dtype,
        )
    if options["bias"] is not None:
        sides = (2 * axis.kernel_size - 1 for axis in bound.axes)
        check("bias", options["bias"], (num_heads, *sides), query)
    if options["sink_logits"] is not None:
        check("sink_logits", options["sink_logits"], (num_heads,), query)
    if options["key_mask"] is not None:
        check("key_mask", options["key_mask"], (batch, *grid), query, torch.bool)
    options["scale"] = scale_or_default(options["scale"], head_dim)
    return bound
