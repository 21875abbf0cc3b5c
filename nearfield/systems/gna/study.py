"""Features of DINOv2-S with all its layers made local for a while, on real pictures."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearfield.hosts import local, packaged, seam
from nearfield.ops.neighborhood import Neighborhood
from nearfield.plan import GroupPlan, SitePlan


def features(
    images: Float[Tensor, "b 3 y x"], pattern: Neighborhood | None
) -> Float[Tensor, "b patches dim"]:
    """Patch features with every layer under one pattern; `None` leaves the model as it is."""
    model = _model()

    def localise(call: seam.Call) -> Tensor:
        site = call.site
        plan = SitePlan(site.name, (GroupPlan(tuple(range(site.num_kv_heads)), pattern),))
        return local.attend(call.query, call.key, call.value, site, plan, scale=call.scale)

    with torch.no_grad(), nullcontext() if pattern is None else seam.attention(model, localise):
        return model(pixel_values=images).last_hidden_state[:, 1:]


@cache
def _model() -> Any:
    return packaged.load("dinov2-s").model
