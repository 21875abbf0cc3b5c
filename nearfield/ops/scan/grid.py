"""The selective scan over a grid: four paths with parameters of their own, and the sum of what they give."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from jaxtyping import Float
from torch import Tensor

from nearfield.ops.scan.checks import check, check_tokens
from nearfield.ops.scan.orders import ORDERS, tables
from nearfield.ops.scan.selective import selective_scan


def selective_scan_2d(
    x: Float[Tensor, "b y x channels"],
    dt: Float[Tensor, "b y x 4 channels"],
    A: Float[Tensor, "4 channels states"],
    B: Float[Tensor, "b y x 4 states"],
    C: Float[Tensor, "b y x 4 states"],
    *,
    D: Float[Tensor, "4 channels"] | None = None,
    dt_bias: Float[Tensor, "4 channels"] | None = None,
    dt_softplus: bool = False,
    order: str = "snake",
    backend: str = "auto",
) -> Float[Tensor, "b y x channels"]:
    """The sum of four selective scans of a grid along four paths, so that each token sees all others.

    Step sizes, B and C of each path stand at the token that they belong to, whatever the path. With
    `order="snake"` a path turns round at the end of each line, so that it never leaps; "raster" goes along
    rows, along columns, and back along both. `nearfield.ops.scan.orders.paths` lists them.
    """
    if order not in ORDERS:
        near = get_close_matches(str(order), ORDERS, n=1) or ORDERS
        raise ValueError(f"order={order!r} is unknown. Did you mean {' or '.join(map(repr, near))}?")
    check_tokens(x, "[batch, y, x, channels]", 4, inner=1)
    batch, height, width, channels = x.shape
    for name, table in (("A", A), ("B", B)):
        if not isinstance(table, Tensor) or not table.dim():
            raise TypeError(f"{name} must be a tensor whose last dimension counts the states.")
    places, states = (batch, height, width, 4), A.shape[-1]
    check("dt", dt, (*places, channels), x, exact=True)
    check("A", A, (4, channels, states), x)
    check("B", B, (*places, states), x, exact=True)
    check("C", C, (*places, states), x, exact=True)
    check("D", D, (4, channels), x)
    check("dt_bias", dt_bias, (4, channels), x)

    picked = tables.__wrapped__ if torch.compiler.is_compiling() else tables
    shared, own, back = (
        torch.tensor(table, dtype=torch.int64, device=x.device) for table in picked(height, width, order)
    )

    def along(m: Tensor) -> Tensor:
        """[B, Y, X, 4, ...] as [B, T, 4, ...], each path in its order."""
        return m.flatten(1, 3).index_select(1, own).unflatten(1, (height * width, 4))

    found = selective_scan(
        x.flatten(1, 2).index_select(1, shared).unflatten(1, (height * width, 4)).flatten(2),
        along(dt).flatten(2),
        A.flatten(0, 1),
        along(B),
        along(C),
        D=None if D is None else D.flatten(),
        dt_bias=None if dt_bias is None else dt_bias.flatten(),
        dt_softplus=dt_softplus,
        backend=backend,
    ).output
    rows = found.unflatten(2, (4, channels)).flatten(1, 2).index_select(1, back)
    return rows.unflatten(1, (height, width, 4)).sum(3)
