"""Neighborhood attention by torch's compiled FlexAttention."""

from __future__ import annotations

from torch import Tensor

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood.geometry import Bound


def supports(query: Tensor, key: Tensor, value: Tensor, bound: Bound, **options: object) -> str | None:
    """Why FlexAttention cannot run this, or None."""
    return "this build has no FlexAttention backend yet."


def attend(
    query: Tensor, key: Tensor, value: Tensor, bound: Bound, **options: object
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    raise BackendUnavailable(str(supports(query, key, value, bound)))
