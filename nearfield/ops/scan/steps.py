"""What a scan does before and after its recurrence: sizes of the steps, the skip and the gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 40.0  # where log(1 + e^x) is x even in float64


def step_sizes(dt: Tensor, dt_bias: Tensor | None, softplus: bool, wide: torch.dtype) -> Tensor:
    """What the decays and inputs of a scan are multiplied by at each position."""
    step = dt.to(wide)
    step = step if dt_bias is None else step + dt_bias.to(wide)
    return F.softplus(step, threshold=EXACT) if softplus else step


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """`(y + D x) silu(z)`; D broadcasts over x."""
    y = y if D is None else y + D.to(y.dtype) * x.to(y.dtype)
    return y if z is None else y * F.silu(z.to(y.dtype))
