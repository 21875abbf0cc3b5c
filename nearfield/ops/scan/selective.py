"""The selective scan of Mamba: validate, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import no_transform, under_autocast
from nearfield.ops.scan import native, reference, tiled, triton
from nearfield.ops.scan.checks import check, check_tokens, ends_of, in_groups

OP = "selective_scan"


class ScanResult(NamedTuple):
    """What a scan gives: the output and, if it was asked for, the states behind the last token."""

    output: Tensor
    final_state: Tensor | None


def selective_scan(
    x: Float[Tensor, "b t channels"],
    dt: Float[Tensor, "b t channels"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "b t *groups states"],
    C: Float[Tensor, "b t *groups states"],
    *,
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "b t channels"] | None = None,
    dt_bias: Float[Tensor, " channels"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Tensor, "sequences channels states"] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> ScanResult:
    """Each channel read out of states that decay as fast as the tokens say: Mamba's scan.

        step = dt + dt_bias, or softplus(dt + dt_bias)
        h[t] = exp(step[t] A) h[t - 1] + step[t] B[t] x[t]     # N states for each channel, at first 0
        output[t] = (sum over states of C[t] h[t] + D x[t]) * silu(z[t])

    A is negative. B and C serve all channels, or as [B, T, G, N] each group of `channels / G` neighbours. A
    token with step 0 changes no state. `initial_state` continues what came before: with one token that is a
    step of decoding. `reverse` runs from the last token to the first. With `cu_seqlens` a batch of 1 holds
    sequences one after the other, each with a state of its own. States are float32 (float64 for float64
    inputs) whatever the dtype of the tokens.
    """
    check_tokens(x, "[batch, tokens, channels]", 3, inner=1)
    batch, tokens, channels = x.shape
    B, C = in_groups("B", B, channels, "channels"), in_groups("C", C, channels, "channels")
    groups, states = B.shape[2:]
    ends = ends_of(cu_seqlens, x)
    sequences = batch if ends is None else len(ends) - 1
    check("dt", dt, (batch, tokens, channels), x, exact=True)
    check("A", A, (channels, states), x)
    check("B", B, (batch, tokens, groups, states), x, exact=True)
    check("C", C, (batch, tokens, groups, states), x, exact=True)
    check("D", D, (channels,), x)
    check("z", z, (batch, tokens, channels), x, exact=True)
    check("dt_bias", dt_bias, (channels,), x)
    check("initial_state", initial_state, (sequences, channels, states), x)

    ask: dict[str, Callable[[], Verdict]] = {
        "native": lambda: Verdict(no_transform() or native.supports(x, A)),
        "triton": lambda: Verdict(no_transform() or triton.supports(x, A)),
        "tiled": lambda: Verdict(no_transform()),
        "reference": Verdict,
    }
    name = choose(OP, backend, ask)
    options: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "reverse": reverse}

    def run(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        given = {**options, "z": z, "initial_state": initial_state}
        if name == "native":
            return native.selective_scan(x, dt, A, B, C, cu_seqlens=ends, **given)
        if name == "triton":
            return triton.selective_scan(x, dt, A, B, C, cu_seqlens=ends, **given)
        scan = tiled.selective_scan if name == "tiled" else reference.selective_scan
        if ends is None:
            return scan(x, dt, A, B, C, **given)
        return _one_by_one(scan, ends, x, dt, A, B, C, **given)

    output, state = under_autocast(run, x, dt, B, C, z)
    return ScanResult(output, state if output_final_state else None)


def _one_by_one(
    scan: Callable[..., tuple[Tensor, Tensor]],
    ends: list[int],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    z: Tensor | None,
    initial_state: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Packed sequences by a scan that knows batches only."""
    outputs, states = [x[:, :0]], []
    for number, (begin, end) in enumerate(pairwise(ends)):
        part = slice(begin, end)
        output, state = scan(
            x[:, part],
            dt[:, part],
            A,
            B[:, part],
            C[:, part],
            z=None if z is None else z[:, part],
            initial_state=None if initial_state is None else initial_state[number : number + 1],
            **options,
        )
        outputs.append(output)
        states.append(state)
    wide = torch.promote_types(x.dtype, torch.float32)
    none = x.new_zeros((0, *A.shape), dtype=wide)
    return torch.cat(outputs, 1), torch.cat([none, *states])
