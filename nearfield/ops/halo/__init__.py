"""Halo attention: the queries of a block share one window, the block and a halo around it."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.core.dims import per_dim
from nearfield.ops.checks import (
    check,
    check_heads,
    no_forward_mode,
    no_transform,
    scale_or_default,
    under_autocast,
)
from nearfield.ops.halo import native, reference, tiled
from nearfield.ops.halo.blocks import Blocks

__all__ = ["halo_attention"]

OP = "halo_attention"
LAYOUT = "[batch, one or two grid sides, heads, head_dim]"
BORDERS = ("zero", "mask")
REL_STRIDES = ("exact", "timm")
BACKENDS = {"native": native.attend, "tiled": tiled.attend, "reference": reference.attend}


def halo_attention(
    query: Float[Tensor, "b *places heads dim"],
    key: Float[Tensor, "b *grid heads dim"],
    value: Float[Tensor, "b *grid heads dv"],
    *,
    block_size: int | tuple[int, ...],
    halo_size: int | tuple[int, ...],
    height_rel: Float[Tensor, "ny dim"] | None = None,
    width_rel: Float[Tensor, "nx dim"] | None = None,
    query_stride: int = 1,
    border: Literal["zero", "mask"] = "zero",
    rel_stride: Literal["exact", "timm"] = "exact",
    scale: float | None = None,
    scale_positions: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b *places heads dv"]:
    """Attention of each block of queries to the keys of the block and of a halo around it.

        halo_attention(q, k, v, block_size=8, halo_size=3)  # [B, 32, 32, H, D]: 14 x 14 keys for each query

    With `window = block_size + 2 * halo_size`, tables `[2 * window - 1, dim]` add to the score of query
    `(i, j)` of a block and key `(m, n)` of its window, both counted from the corner:

        scale * q k + q height_rel[window - 1 + m - i] + q width_rel[window - 1 + n - j]

    `scale_positions` multiplies these terms by `scale` too. A grid of one axis has `width_rel` only.
    Outside the grid there are keys and values of zero, which get the logits of their position;
    `border="mask"` hides them. With `query_stride` 2 the queries are those at every second position, half as
    many on each axis as keys, and i = 0, 2, 4 ...; `rel_stride="timm"` counts 0, 1, 2 ..., as timm's weights
    expect. Only the reference keeps scores; otherwise memory is linear in tokens.
    """
    check_heads(query, key, value, rank=(4, 5), layout=LAYOUT)
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"{query.shape[-2]} query heads for {key.shape[-2]} key/value heads. "
            "Halo attention shares no keys between heads: repeat them, or project as many."
        )
    blocks = _blocks(query, key, block_size, halo_size, query_stride, border, rel_stride)
    tables = _tables(query, blocks, height_rel, width_rel)
    factor = scale_or_default(scale, query.shape[-1])
    position_scale = factor if scale_positions else 1.0

    def ask_native() -> Verdict:
        return Verdict(no_transform() or native.supports(query, value, blocks, bool(tables), factor))

    name = choose(
        OP, backend, {"native": ask_native, "tiled": lambda: Verdict(no_forward_mode()), "reference": Verdict}
    )

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return BACKENDS[name](query, key, value, blocks, tables, scale=factor, position_scale=position_scale)

    return under_autocast(attend, query, key, value)


def _blocks(
    query: Tensor,
    key: Tensor,
    block_size: int | tuple[int, ...],
    halo_size: int | tuple[int, ...],
    query_stride: int,
    border: str,
    rel_stride: str,
) -> Blocks:
    """The geometry, once it fits the grids."""
    grid, places = tuple(key.shape[1:-2]), tuple(query.shape[1:-2])
    block = per_dim("block_size", block_size, len(grid))
    halo = per_dim("halo_size", halo_size, len(grid))
    if any(size < 1 for size in block) or any(size < 0 for size in halo):
        raise ValueError(
            f"block_size={block_size}, halo_size={halo_size}. "
            "Give blocks of at least 1 and halos of at least 0."
        )
    if query_stride < 1 or any(size % query_stride for size in block):
        raise ValueError(
            f"query_stride={query_stride} does not divide block_size={block}. Give one that does, or 1 and "
            "pool the output."
        )
    for name, given, known in (("border", border, BORDERS), ("rel_stride", rel_stride, REL_STRIDES)):
        if given not in known:
            raise ValueError(f"{name}={given!r} is unknown. Choose {' or '.join(map(repr, known))}.")
    if any(side % size for side, size in zip(grid, block, strict=True)):
        padded = tuple(-(-side // size) * size for side, size in zip(grid, block, strict=True))
        raise ValueError(
            f"block_size={block} does not divide the grid {grid}. Pad the tokens to {padded} first."
        )
    wanted = tuple(side // query_stride for side in grid)
    if places != wanted:
        raise ValueError(
            f"The grid of the queries is {places}, of the keys {grid}. "
            f"With query_stride={query_stride} give queries on a grid of {wanted}."
        )
    return Blocks(grid, block, halo, query_stride, query_stride if rel_stride == "exact" else 1, border)


def _tables(
    query: Tensor, blocks: Blocks, height_rel: Tensor | None, width_rel: Tensor | None
) -> tuple[Tensor, ...]:
    """One table for each axis, or none."""
    given = {"height_rel": height_rel, "width_rel": width_rel}
    if len(blocks.grid) == 1:
        if height_rel is not None:
            raise ValueError("height_rel was given for a grid of one axis. Give its table as width_rel.")
        del given["height_rel"]
    if all(table is None for table in given.values()):
        return ()
    found = []
    for (name, table), window in zip(given.items(), blocks.windows, strict=True):
        if table is None:
            raise ValueError(f"{name} is missing beside the other table. Give both or neither.")
        check(name, table, (2 * window - 1, query.shape[-1]), query)
        found.append(table)
    return tuple(found)
