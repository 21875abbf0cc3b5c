"""Neighborhood attention over sequences, or grids, of different sizes packed one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import check, no_transform, scale_or_default, under_autocast
from nearfield.ops.neighborhood import native, triton
from nearfield.ops.neighborhood.attention import checked, neighborhood_attention
from nearfield.ops.neighborhood.geometry import Neighborhood
from nearfield.ops.neighborhood.operator import bind

OP = "neighborhood_attention_varlen"
OTHERS = ("tiled", "reference", "flex")  # each says for itself, size by size, whether it can


class VarlenOptions(TypedDict, total=False):
    """What `neighborhood_attention_varlen` takes beside its tensors and the geometry."""

    cu_seqlens: Tensor | Sequence[int] | None
    grids: Iterable[int | Sequence[int]] | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    bias: Tensor | None
    key_mask: Tensor | None
    sink_logits: Tensor | None
    scale: float | None
    backend: str


@overload
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Neighborhood,
    *,
    return_lse: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Neighborhood,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> Tensor: ...
def neighborhood_attention_varlen(
    query: Float[Tensor, "*b tokens heads dim"],
    key: Float[Tensor, "*b tokens kv_heads dim"],
    value: Float[Tensor, "*b tokens kv_heads dv"],
    geometry: Neighborhood,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    grids: Iterable[int | Sequence[int]] | None = None,
    additional_keys: Float[Tensor, "sequences extra kv_heads dim"] | None = None,
    additional_values: Float[Tensor, "sequences extra kv_heads dv"] | None = None,
    bias: Float[Tensor, "heads *offsets"] | None = None,
    key_mask: Bool[Tensor, "*b tokens"] | None = None,
    sink_logits: Float[Tensor, " heads"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> (
    Float[Tensor, "*b tokens heads dv"]
    | tuple[Float[Tensor, "*b tokens heads dv"], Float[Tensor, "*b tokens heads"]]
):
    """What separate calls of `neighborhood_attention` on each sequence give, packed like the input.

        neighborhood_attention_varlen(q, k, v, Neighborhood(64, is_causal=True), cu_seqlens=[0, 300, 421])
        neighborhood_attention_varlen(q, k, v, Neighborhood(7), grids=[(32, 32), (24, 40)])

    Tokens are `[T, H, D]` or `[1, T, H, D]`. Say where sequences end by `cu_seqlens` (0 first, T last), or
    give the grid of each, whose tokens are then row-major. Additional keys have one batch row for each
    sequence; sinks are counted in each sequence anew. The native backend runs all sequences as one job, the
    others run those of one size as one batch. Lengths in a tensor are read back to the host: give a list
    where the call is traced or must not wait for a GPU.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[0] != 1) or x.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name} has shape {list(x.shape)}, query {list(query.shape)}. "
                "Both must be packed: [tokens, heads, head_dim], or the same behind a batch of 1."
            )
    tokens = query.shape[-3]
    sizes = _sizes(cu_seqlens, grids, tokens)
    if key_mask is not None:
        check("key_mask", key_mask, tuple(query.shape[:-2]), query, torch.bool)
    for name, extra in (("additional_keys", additional_keys), ("additional_values", additional_values)):
        if extra is not None and (extra.dim() != 4 or extra.shape[0] != len(sizes)):
            raise ValueError(
                f"{name} has shape {list(extra.shape)}. "
                f"It needs one batch row for each of {len(sizes)} sequences."
            )

    if tokens:
        mixed = len(set(map(len, sizes))) > 1
        factor = scale_or_default(scale, query.shape[-1])

        def ask_native() -> Verdict:
            return Verdict(
                no_transform()
                or ("the CPU kernels take grids of one rank in a call." if mixed else None)
                or native.unfit(query, value, factor)
                or native.missing()
            )

        def ask_triton() -> Verdict:
            return Verdict(no_transform() or triton.unfit(query, value, factor))

        ask = {"native": ask_native, "triton": ask_triton, **dict.fromkeys(OTHERS, Verdict)}
        name = choose(OP, backend, ask)
        if name == "native" or (name == "triton" and not mixed):
            given = {"bias": bias, "key_mask": key_mask, "sink_logits": sink_logits, "scale": scale}
            run = {"native": native, "triton": triton}[name].attend_packed
            out, lse = _as_one_job(
                run, query, key, value, geometry, sizes, additional_keys, additional_values, given
            )
            return (out, lse) if return_lse else out

    members: dict[tuple[int, ...], list[int]] = {}
    for number, grid in enumerate(sizes):
        members.setdefault(grid, []).append(number)
    first, starts = 0, []
    for grid in sizes:
        starts.append(first)
        first += prod(grid)

    def take(x: Tensor, numbers: list[int], grid: tuple[int, ...]) -> Tensor:
        x = x.reshape(tokens, *x.shape[query.dim() - 2 :])
        return torch.stack([x.narrow(0, starts[i], prod(grid)) for i in numbers]).unflatten(1, grid)

    def pick(x: Tensor | None, numbers: list[int]) -> Tensor | None:
        return None if x is None else torch.stack([x[i] for i in numbers])

    outs: dict[int, Tensor] = {}
    lses: dict[int, Tensor] = {}
    for grid, numbers in members.items():
        if not prod(grid):
            continue
        out, lse = neighborhood_attention(
            take(query, numbers, grid),
            take(key, numbers, grid),
            take(value, numbers, grid),
            geometry,
            additional_keys=pick(additional_keys, numbers),
            additional_values=pick(additional_values, numbers),
            bias=bias,
            key_mask=None if key_mask is None else take(key_mask, numbers, grid),
            sink_logits=sink_logits,
            scale=scale,
            return_lse=True,
            backend=backend,
        )
        rank = len(grid)
        outs.update(zip(numbers, out.flatten(1, rank).unbind(0), strict=True))
        lses.update(zip(numbers, lse.flatten(1, rank).unbind(0), strict=True))
    order = sorted(outs)
    if not order:
        empty = value.new_zeros((*query.shape[:-1], value.shape[-1]))
        return (empty, empty.sum(-1)) if return_lse else empty
    out = torch.cat([outs[i] for i in order]).reshape(*query.shape[:-1], value.shape[-1])
    return (out, torch.cat([lses[i] for i in order]).reshape(query.shape[:-1])) if return_lse else out


def _as_one_job(
    run: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Neighborhood,
    sizes: list[tuple[int, ...]],
    more_keys: Tensor | None,
    more_values: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """All sequences by a backend that needs no stacked copies of those of one size."""
    places = query.shape[:-2]
    q, k, v = (x.flatten(0, -3) for x in (query, key, value))
    mask = None if options["key_mask"] is None else options["key_mask"].flatten()

    first = next(i for i, grid in enumerate(sizes) if prod(grid))  # those before it have no tokens
    one = {**options, "key_mask": None}
    part = [x[: prod(sizes[first])].unflatten(0, sizes[first])[None] for x in (q, k, v)]
    extra = [None if x is None else x[first : first + 1] for x in (more_keys, more_values)]
    bound = checked(part[0], part[1], part[2], geometry, extra[0], extra[1], one)
    for grid in {grid for grid in sizes if prod(grid)}:
        bind(geometry, grid)  # refuses a pattern that does not fit

    def attend(
        query: Tensor, key: Tensor, value: Tensor, more_keys: Tensor | None, more_values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given = {**one, "key_mask": mask, "additional_keys": more_keys, "additional_values": more_values}
        return run(query, key, value, sizes, bound, **given)

    out, lse = under_autocast(attend, q, k, v, more_keys, more_values)
    return out.unflatten(0, places), lse.unflatten(0, places)


def _sizes(cu_seqlens: Any, grids: Any, tokens: int) -> list[tuple[int, ...]]:
    """The grid of each packed sequence."""
    if (cu_seqlens is None) == (grids is None):
        raise ValueError(
            "Give either cu_seqlens (where sequences end) or grids (the sides of each), not both or neither."
        )
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        if not ends or ends[0] != 0 or ends[-1] != tokens or any(b < a for a, b in pairwise(ends)):
            raise ValueError(f"cu_seqlens={ends} must rise from 0 to the {tokens} tokens given.")
        return [(b - a,) for a, b in pairwise(ends)]
    table = grids.tolist() if isinstance(grids, Tensor) else list(grids)
    sizes = [(entry,) if isinstance(entry, int) else tuple(int(side) for side in entry) for entry in table]
    if any(side < 0 for size in sizes for side in size) or sum(map(prod, sizes)) != tokens:
        raise ValueError(f"grids={sizes} hold {sum(map(prod, sizes))} tokens; {tokens} were given.")
    return sizes
