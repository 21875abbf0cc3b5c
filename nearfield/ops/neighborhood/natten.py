"""Neighborhood attention by NATTEN's CUDA kernels, where they are installed and fit the tensors.

NATTEN ignores the gradient of its log-sum-exp; here it is computed (lse.py). Its kernels also come from the
Hugging Face Hub through the package `kernels`, to those who ask for "natten-hub" by name.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood import lse as lse_module
from nearfield.ops.neighborhood.geometry import Axis, Bound

DEVICE = "cuda"
REPOSITORY, VERSION = "kernels-community/natten", 1
ADVICE = "natten.org has wheels for some pairs of torch and CUDA; backend='natten-hub' downloads one."


def missing() -> str | None:
    """Why there is no NATTEN with kernels in this process, or None."""
    if find_spec("natten") is None:
        return f"the package natten is not installed. {ADVICE}"
    if not getattr(import_module("natten"), "HAS_LIBNATTEN", False):  # nor has nearfield's stand-in
        return f"the package natten has no compiled kernels here. {ADVICE}"
    return None


def missing_hub() -> str | None:
    """Why NATTEN's kernels cannot be downloaded, or None; the Hub itself is not asked."""
    return None if find_spec("kernels") else "the package kernels is not installed: pip install kernels."


# to a trace the answers are constants
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
missing_hub._dynamo_marked_constant = True  # type: ignore[attr-defined]


def supports(query: Tensor, key: Tensor, value: Tensor, bound: Bound, **options: Any) -> str | None:
    """Why the NATTEN that is installed cannot run this, or None."""
    reason = unfit(query, bound, **options) or missing()
    if reason is not None:
        return reason
    import natten

    return _no_kernel(natten, query, key, value)


def supports_hub(query: Tensor, key: Tensor, value: Tensor, bound: Bound, **options: Any) -> str | None:
    """Why NATTEN's kernels from the Hub cannot run this, or None, as far as it is known before a download."""
    return unfit(query, bound, **options) or missing_hub()


def unfit(
    query: Tensor,
    bound: Bound,
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float,
    **more: Any,
) -> str | None:
    """Why NATTEN has no such problem, or None."""
    options = {"bias": bias, "key_mask": key_mask, "sink_logits": sink_logits}
    given = [name for name, x in options.items() if x is not None]
    if given or bound.pattern.num_sinks:
        return f"NATTEN has no bias, key mask or sinks, given {', '.join(given) or 'num_sinks'}."
    if bound.offset:
        return f"NATTEN takes as many queries as keys, given {bound.num_queries} for {bound.num_keys}."
    if bound.pattern.border == "pad" or not all(_is_shifted(axis) for axis in bound.axes):
        return f'NATTEN knows no border but "shift", given {bound.pattern.border!r}.'
    if min(bound.grid) < 2 or any(_window(axis) < 2 for axis in bound.axes):
        return f"NATTEN needs sides and windows of 2 or more, given the grid {bound.grid}."
    if any(axis.size < _window(axis) * axis.dilation for axis in bound.axes):
        return "NATTEN needs causal windows that fit the shortest dilation group."
    if scale == 0:
        return "NATTEN takes a scale of 0 for none."
    if not torch.compiler.is_compiling() and torch._C._functorch.get_interpreter_stack():
        return "NATTEN runs in no torch.func transform."
    if query.device.type != DEVICE:
        return f"NATTEN's kernels need tensors on a GPU, these are on {query.device.type!r}."
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, bound: Bound, **options: Any) -> tuple[Tensor, Tensor]:
    """Output [B, *grid, H, Dv] and log-sum-exp [B, *grid, H] by the NATTEN that is installed."""
    import natten

    return _attend(natten, query, key, value, bound, **options)


class Hub:
    """The same by NATTEN's kernels from the Hugging Face Hub, which are downloaded when first used."""

    @staticmethod
    def attend(
        query: Tensor, key: Tensor, value: Tensor, bound: Bound, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Output [B, *grid, H, Dv] and log-sum-exp [B, *grid, H]."""
        natten = _downloaded()
        reason = _no_kernel(natten, query, key, value)
        if reason is not None:
            raise BackendUnavailable(f"backend='natten-hub' cannot run here: {reason}")
        return _attend(natten, query, key, value, bound, **options)


def _attend(
    natten: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    scale: float,
    **none: Any,
) -> tuple[Tensor, Tensor]:
    run = getattr(natten, f"na{len(bound.axes)}d")
    axes = bound.axes
    pattern: dict[str, Any] = {
        "kernel_size": tuple(_window(axis) for axis in axes),
        "stride": tuple(min(axis.stride, _window(axis)) for axis in axes),
        "dilation": tuple(axis.dilation for axis in axes),
        "is_causal": tuple(axis.is_causal for axis in axes),
        "scale": scale,
    }

    def again(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor | None, more_v: Tensor | None) -> Tensor:
        found: Tensor = run(q, k, v, additional_keys=more_k, additional_values=more_v, **pattern)
        return found

    extra = {"additional_keys": additional_keys, "additional_values": additional_values}
    out, lse = run(query, key, value, return_lse=True, **extra, **pattern)
    return out, lse_module.differentiable(lse, query, key, additional_keys, scale, again)


def _window(axis: Axis) -> int:
    """The window to ask for: NATTEN refuses one that is longer than its axis, though only the past counts."""
    longest = -(-axis.size // axis.dilation)
    return min(axis.kernel_size, longest) if axis.is_causal else axis.kernel_size


def _is_shifted(axis: Axis) -> bool:
    """Whether windows are those of border "shift": a causal window is cut where it begins in any case."""
    return axis.border == "shift" or axis.is_causal


def _no_kernel(natten: Any, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why this NATTEN has no kernel of its own for these tensors, or None."""
    found = natten.backends.get_compatible_backends(query, key, value, torch_compile=False)
    if any(name != "flex-fna" for name in found):
        return None
    return (
        f"NATTEN has no kernel for {query.dtype}, head_dim {query.shape[-1]} and value dim {value.shape[-1]} "
        "on this GPU."
    )


@lru_cache(maxsize=1)
def _downloaded() -> Any:
    try:
        return import_module("kernels").get_kernel(REPOSITORY, version=VERSION)
    except Exception as error:  # no network, no build for this torch and GPU: the package says which
        raise BackendUnavailable(
            f"backend='natten-hub' got no kernels from {REPOSITORY}: {type(error).__name__}: {error}"
        ) from error
