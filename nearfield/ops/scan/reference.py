"""Selective scans by their definition: one position after the other. Never optimised.

Plain torch: any device, float64, double backward, forward-mode derivatives, vmap, tracing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearfield.ops.scan.steps import skip_and_gate, step_sizes


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, C] and last state [B, C, N] for B and C of [B, T, G, N]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    (batch, length, channels), state_size = x.shape, A.shape[-1]
    step = step_sizes(dt, dt_bias, dt_softplus, wide)
    state = x.new_zeros(batch, channels, state_size, dtype=wide) if initial_state is None else initial_state
    state = state.to(wide)
    share = channels // B.shape[2]
    tokens = list(zip(*(m.to(wide).unbind(1) for m in (step, x, B, C)), strict=True))
    rows: list[Tensor] = []
    for delta, u, inputs, outputs in reversed(tokens) if reverse else tokens:
        decay = torch.exp(delta[..., None] * A.to(wide))  # [B, C, N]
        state = decay * state + (delta * u)[..., None] * inputs.repeat_interleave(share, 1)
        rows.append((state * outputs.repeat_interleave(share, 1)).sum(-1))
    rows = rows[::-1] if reverse else rows
    y = torch.stack(rows, 1) if length else x.new_zeros(x.shape, dtype=wide)
    return skip_and_gate(y, x, D, z).to(x.dtype), state


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, P] and last state [B, H, P, N]: a selective scan with one decay for P channels."""
    (heads, width), state_size = x.shape[2:], B.shape[-1]
    if D is not None:
        D = D.reshape(heads, -1).expand(heads, width).flatten()
    y, state = selective_scan(
        x.flatten(2),
        dt.repeat_interleave(width, 2),
        A.repeat_interleave(width)[:, None].expand(-1, state_size),
        B,
        C,
        D=D,
        z=None if z is None else z.flatten(2),
        dt_bias=None if dt_bias is None else dt_bias.repeat_interleave(width),
        initial_state=None if initial_state is None else initial_state.flatten(1, 2),
        dt_softplus=dt_softplus,
        reverse=False,
    )
    return y.unflatten(2, (heads, width)), state.unflatten(1, (heads, width))
