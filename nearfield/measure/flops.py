"""Floating point operations of a call, by torch's counter, which learns here what it does not know.

That is what our own operators cost, each opaque to torch, and torch's fused attention on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch

from nearfield.ops import linear, lla, scan, topk  # noqa: F401  their operators must be there
from nearfield.ops.neighborhood import Neighborhood, tiled  # noqa: F401

Shape = torch.Size
Named = Mapping[str, Any]  # arguments by the names of the operator's schema, of tensors the shapes


def count_flops(call: Callable[[], object]) -> int:
    """Floating point operations of one call: two a multiplication with addition, as torch counts.

    Attention counts the pairs that are seen; a plain matrix product, whatever it multiplies. The linear
    family counts the form that runs, local linear attention all the steps that its solver may take. A
    backward by formula counts 2.5 times its forward.
    """
    return flops_by_module(call)["Global"]


def flops_by_module(call: Callable[[], object]) -> dict[str, int]:
    """The same for each module that runs in the call, by `ClassOfTheOutermost.its.dotted.name`.

    What a module's own modules do is part of its count; "Global" is the whole.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with counter:
        call()
    found = {name: int(sum(counts.values())) for name, counts in counter.get_flop_counts().items()}
    return {"Global": 0, **found}


def counted() -> set[str]:
    """Names of the opaque operators of ours whose cost is known."""
    return {
        f"{name}{ending}"
        for names in FORMULAS.values()
        for name in names
        for ending in (("", "_backward") if name not in FORWARD_ONLY else ("",))
    }


def _attention(given: Named) -> int | float:
    query, key, value = given["query"], given["key"], given["value"]
    more = given["additional_keys"]
    pairs = _pairs(given, key[1:-2], query[1] if len(key) == 4 else None)
    pairs += more[1] * prod(query[1:-2]) if more is not None else 0  # these are seen by all
    return _products(query[0] * query[-2] * pairs, query, value)


def _packed(given: Named) -> int | float:
    query, value, flat, more = given["query"], given["value"], given["grids"], given["additional_keys"]
    rank = len(given["kernel_size"])
    grids = [tuple(flat[at : at + rank]) for at in range(0, len(flat), rank)]
    pairs = sum(_pairs(given, grid) for grid in grids if prod(grid))
    pairs += more[1] * query[0] if more is not None else 0
    return _products(query[-2] * pairs, query, value)


def _decode(given: Named) -> int | float:
    query, key, value = given["query"], given["key"], given["value"]
    return _products(query[0] * query[1] * query[2] * key[1], query, value)


def _listed(given: Named) -> int | float:
    """As if every listed block were there, whole and once."""
    (batch, rows, heads, _), listed = given["query"], given["block_indices"][-1] * given["block_size"]
    pairs = batch * rows * heads * min(listed, given["key"][1])
    return _products(pairs, given["query"], given["value"])


def _shares(given: Named) -> int | float:
    """Products with keys or means, and with both bounds of a block."""
    return 2.0 * prod(given["query"]) * given["num_rows"] * (1 + given["is_bound"])


def _nothing(given: Named) -> int | float:
    return 0


def _dense(given: Named) -> int | float:
    """Causal queries are the last of the keys."""
    (batch, rows, heads, _), keys = given["query"], given["key"][1]
    pairs = rows * (2 * keys - rows + 1) // 2 if given["is_causal"] else rows * keys
    return _products(batch * heads * pairs, given["query"], given["value"])


def _linear(given: Named) -> int | float:
    """Products within chunks, where there are any, then with the state.

    The delta rule also solves a triangle for each chunk and corrects values by the state.
    """
    (batch, tokens, heads, dim), dv = given["query"], given["value"][-1]
    chunk = min(given.get("chunk", 0), tokens)
    each = 2 * chunk * (dim + dv) + 4 * dim * dv
    if given["beta"] is not None:
        each += 2 * chunk * dim + chunk * (dim + dv) + 2 * dim * dv
    return batch * tokens * heads * each


def _local_linear(given: Named) -> int | float:
    """Scores, output, two means and the output's correction; with a ridge also the solver."""
    query, key = given["query"], given["key"]
    (batch, rows, heads, dim), dv = query, given["value"][-1]
    pattern = Neighborhood(
        given["kernel_size"],
        is_causal=given["is_causal"],
        border=given["border"],
        num_sinks=given.get("num_sinks", 0),
    )
    pairs = batch * heads * pattern.on(key[1], num_queries=rows).num_pairs
    total = 2.0 * pairs * (3 * dim + 2 * dv)
    if given["ridge"] is None:
        return total
    if given.get("method") == "cholesky":
        return total + 2.0 * pairs * dim**2 + batch * heads * rows * dim**3 / 3
    return total + 4.0 * pairs * dim * given["max_iterations"]


def _scan(given: Named) -> int | float:
    """Seven a channel and state, the exponential counted as one."""
    return 7.0 * prod(given["x"]) * given["A"][-1]


def _fused(given: Named) -> int | float:
    (batch, heads, rows, _), keys = given["query"], given["key"][2]
    pairs = sum(min(keys, row + 1) for row in range(rows)) if given["is_causal"] else rows * keys
    return _products(batch * heads * pairs, given["query"], given["value"])


FORMULAS: dict[Callable[[Named], int | float], tuple[str, ...]] = {
    _attention: ("nearfield::native_attention", "nearfield::tiled_attention", "nearfield::triton_attention"),
    _packed: ("nearfield::native_attention_varlen", "nearfield::triton_attention_varlen"),
    _decode: ("nearfield::native_decode", "nearfield::triton_decode"),
    _listed: ("nearfield::native_topk", "nearfield::triton_topk"),
    _shares: ("nearfield::native_block_shares",),
    _nothing: ("nearfield::native_choose_blocks",),
    _dense: ("nearfield::native_dense",),
    _linear: ("nearfield::native_linear", "nearfield::tiled_linear", "nearfield::triton_linear"),
    _local_linear: (
        "nearfield::native_lla",
        "nearfield::tiled_local_linear",
        "nearfield::triton_local_linear",
    ),
    _scan: ("nearfield::native_scan", "nearfield::triton_scan"),
    _fused: ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}
FORWARD_ONLY = {name for formula in (_decode, _listed, _shares, _nothing) for name in FORMULAS[formula]}


def _formulas() -> dict[Any, Callable[..., int]]:
    found: dict[Any, Callable[..., int]] = {}
    for formula, names in FORMULAS.items():
        for name in names:
            for ending, factor in (("", 1.0), ("_backward", 2.5)):
                space, _, operator = f"{name}{ending}".partition("::")
                if hasattr(getattr(torch.ops, space), operator):
                    packet = getattr(getattr(torch.ops, space), operator)
                    found[packet] = _by_name(packet, formula, factor)
    return found


def _by_name(packet: Any, formula: Callable[[Named], int | float], factor: float) -> Callable[..., int]:
    defaults = {argument.name: argument.default_value for argument in packet.default._schema.arguments}

    def count(*arguments: Any, out_shape: Any = None, **options: Any) -> int:
        return round(
            factor * formula({**defaults, **options, **dict(zip(defaults, arguments, strict=False))})
        )

    return count


def _products(pairs: int | float, query: Shape, value: Shape) -> int | float:
    """Of scores and of values, for so many pairs of a query and a key."""
    return 2 * pairs * (query[-1] + value[-1])


def _pairs(given: Named, grid: tuple[int, ...], num_queries: int | None = None) -> int:
    pattern = Neighborhood(
        tuple(given["kernel_size"]),
        tuple(given["stride"]),
        tuple(given["dilation"]),
        tuple(given["is_causal"]),
        border=given["border"],
        num_sinks=given["num_sinks"],
    )
    return pattern.on(tuple(grid), num_queries=num_queries).num_pairs
