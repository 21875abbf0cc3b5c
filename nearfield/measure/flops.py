"""Floating point operations of a call, by torch's counter, which learns here what our own operators cost."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

import nearfield.ops.neighborhood  # its operators must be there to be named
from nearfield.ops.neighborhood.operator import bound_again


def count_flops(call: Callable[[], object]) -> int:
    """Floating point operations of one call: two a multiplication with addition, as torch counts.

    Attention counts the pairs that are seen; a plain matrix product, whatever it multiplies.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with counter:
        call()
    return int(counter.get_total_flops())


def _formulas() -> dict[Any, Callable[..., int]]:
    ops = torch.ops.nearfield
    return {
        ops.native_attention: _attention,
        ops.native_attention_backward: _attention_backward,
        ops.native_decode: _decode,
    }


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None) -> int:
    *_, sizes, strides, dilations, causal, border, sinks, _scale = rest
    like = _Shaped(query), _Shaped(key)
    pairs = bound_again(*like, sizes, strides, dilations, causal, border, sinks).num_pairs  # type: ignore[arg-type]
    more = rest[0][1] * prod(query[1:-2]) if rest[0] is not None else 0  # additional keys are seen by all
    return 2 * query[0] * query[-2] * (pairs + more) * (query[-1] + value[-1])


def _attention_backward(*arguments: Any, out_shape: Any = None) -> int:
    """Five products for the forward's two."""
    return 5 * _attention(*arguments[4:-1]) // 2


def _decode(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None) -> int:
    return 2 * query[0] * query[1] * query[2] * key[1] * (query[-1] + value[-1])


class _Shaped:
    """A shape in the place of a tensor."""

    def __init__(self, shape: Any):
        self.shape = shape
