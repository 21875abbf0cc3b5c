"""The scan of Mamba-2, which is gated linear attention with one decay a head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nearfield.ops.linear import gated_linear_attention
from nearfield.ops.scan.checks import check, check_tokens, ends_of, in_groups
from nearfield.ops.scan.selective import ScanResult
from nearfield.ops.scan.steps import skip_and_gate, step_sizes


def ssd(
    x: Float[Tensor, "b t heads width"],
    dt: Float[Tensor, "b t heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "b t *groups states"],
    C: Float[Tensor, "b t *groups states"],
    *,
    D: Float[Tensor, "heads *width"] | None = None,
    z: Float[Tensor, "b t heads width"] | None = None,
    dt_bias: Float[Tensor, " heads"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Tensor, "sequences heads width states"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> ScanResult:
    """A selective scan whose heads of P channels decay as one: Mamba-2's state space duality.

        step = dt + dt_bias, or softplus(dt + dt_bias)
        h[t] = exp(step[t] A) h[t - 1] + step[t] x[t] B[t]^T     # [P, N] for each head
        output[t] = (h[t] C[t] + D x[t]) * silu(z[t])

    A is negative. B and C serve all heads, or as [B, T, G, N] each group of `heads / G` neighbours. It is
    `gated_linear_attention` of the queries C, keys B and values `step x`, with `g = step A` and scale 1, and
    runs on its backends. States are [sequences, heads, P, N]. With `cu_seqlens` a batch of 1 holds sequences
    one after the other.
    """
    check_tokens(x, "[batch, tokens, heads, width]", 4, inner=2)
    batch, tokens, heads, width = x.shape
    B, C = in_groups("B", B, heads, "heads"), in_groups("C", C, heads, "heads")
    groups, states = B.shape[2:]
    ends = ends_of(cu_seqlens, x)
    sequences = batch if ends is None else len(ends) - 1
    check("dt", dt, (batch, tokens, heads), x, exact=True)
    check("A", A, (heads,), x)
    check("B", B, (batch, tokens, groups, states), x, exact=True)
    check("C", C, (batch, tokens, groups, states), x, exact=True)
    check("D", D, (heads,) if D is None or D.dim() == 1 else (heads, width), x)
    check("z", z, (batch, tokens, heads, width), x, exact=True)
    check("dt_bias", dt_bias, (heads,), x)
    check("initial_state", initial_state, (sequences, heads, width, states), x)

    wide = torch.promote_types(x.dtype, torch.float32)
    step = step_sizes(dt, dt_bias, dt_softplus, wide)
    output, state = gated_linear_attention(
        _shared(C, heads),
        _shared(B, heads),
        (step[..., None] * x).to(x.dtype),
        step * A.to(wide),
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.mT,
        output_final_state=output_final_state,
        cu_seqlens=ends,
        backend=backend,
    )
    skip = D if D is None or D.dim() == 2 else D[:, None]
    gated = skip_and_gate(output.to(wide), x, skip, z).to(output.dtype)
    return ScanResult(gated, state.mT if isinstance(state, Tensor) else None)


def _shared(m: Tensor, heads: int) -> Tensor:
    """[B, T, G, N] with one row for each head, copied only where several heads share several."""
    batch, tokens, groups, states = m.shape
    if groups == 1:
        return m.expand(batch, tokens, heads, states)
    return m if groups == heads else m.repeat_interleave(heads // groups, 2)
