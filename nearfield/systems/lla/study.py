"""Values predicted from the pairs before them by one layer without weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nearfield.data import sequences
from nearfield.ops.lla import Solver, local_linear_attention
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention

EXACT = Solver(method="cholesky")


def regress(made: sequences.Regression, bandwidth: float, ridge: float) -> Tensor:
    """The value at each position but the first, by local linear attention over the pairs before it."""
    return _predict(
        made, partial(local_linear_attention, ridge=ridge, solver=EXACT, scale=bandwidth, backend="tiled")
    )


def average(made: sequences.Regression, bandwidth: float) -> Tensor:
    """The same by softmax attention."""
    return _predict(made, lambda q, k, v, past: neighborhood_attention(q, k, v, past, scale=bandwidth))


def _predict(made: sequences.Regression, attend: Callable[..., Tensor]) -> Float[Tensor, "b t dim"]:
    queries, keys, values = made.keys[:, 1:], made.keys[:, :-1], made.values[:, :-1]
    past = Neighborhood(queries.shape[1], is_causal=True)
    return attend(*(x.unsqueeze(2) for x in (queries, keys, values)), past).squeeze(2)


def recursive_ridge(made: sequences.Regression, ridge: float) -> Float[Tensor, "b t dim"]:
    """One linear map fitted to all pairs before each position: the best of linear recurrent layers."""
    keys, values = made.keys.double(), made.values.double()
    gram = (keys.unsqueeze(-1) * keys.unsqueeze(-2)).cumsum(1)  # [B, T, D, D]
    cross = (keys.unsqueeze(-1) * values.unsqueeze(-2)).cumsum(1)
    eye = torch.eye(keys.shape[-1], dtype=keys.dtype)
    maps = torch.linalg.solve(gram[:, :-1] + ridge * eye, cross[:, :-1])
    return torch.einsum("btd,btde->bte", keys[:, 1:], maps).float()


def error(made: sequences.Regression, predicted: Tensor) -> float:
    """Squared error over the mean square of the values."""
    return float((predicted - made.values[:, 1:]).square().mean() / made.values.square().mean())
