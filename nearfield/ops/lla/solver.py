"""Solving (C + ridge) x = b for every query: by conjugate gradients without C, or by Cholesky with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

METHODS = ("auto", "cg", "cholesky")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # below float32 the result is rounded more coarsely:
HALF_TOLERANCE = 1e-3
SMALL = 0.1  # a ridge below needs more iterations than a factorisation costs
TINY = 1e-3  # a ridge below is lost among the rounding errors of a float32 covariance
# ridge down to which so many iterations leave an error near that of float32, for keys of unit variance
ENOUGH = ((10.0, 8), (1.0, 16), (0.0, 32))
UNKNOWN = 32  # iterations for a ridge that is a tensor
WIDEST_FACTORED = 64  # channels up to which "auto" may choose Cholesky


class Settled(NamedTuple):
    """A solver with nothing left open. `dtype` is what the whole operator computes in."""

    method: str
    max_iterations: int
    tolerance: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Solver:
    """How the linear system of each query is solved.

    `"cg"` takes at most `max_iterations` steps of conjugate gradients, each of them one pass over the keys; a
    row stops where the norm of its residual is `tolerance` of that of its right-hand side. `"cholesky"`
    factors one head_dim x head_dim matrix for each query and heeds neither number. `"auto"` takes Cholesky
    for float64, and up to 64 channels where the ridge is below 0.1 or a tensor, which may be so; else CG.

    Without `max_iterations` there are 8 for a ridge from 10 up, 16 from 1 up, 32 below and for a tensor:
    right for keys of about unit variance. Without `tolerance` it is 1e-12 for float64, 1e-6 for float32, 1e-3
    below. Everything is computed in float64 if the tensors are, or the ridge is a number below 1e-3; else in
    float32.
    """

    method: Literal["auto", "cg", "cholesky"] = "auto"
    max_iterations: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown. Choose one of {', '.join(METHODS)}.")
        count, tolerance = self.max_iterations, self.tolerance
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"max_iterations={count!r} must be a whole number of at least 1, or None.")
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ValueError(f"tolerance={tolerance!r} must be at least 0 and below 1, or None.")

    def settle(self, ridge: float | Tensor, query: Tensor) -> Settled:
        """What to do for this ridge and queries such as these."""
        number = None if isinstance(ridge, Tensor) else ridge
        dtype = torch.promote_types(query.dtype, torch.float32)
        if number is not None and number < TINY:
            dtype = torch.float64
        method = self.method
        if method == "auto":
            small = (number is None or number < SMALL) and query.shape[-1] <= WIDEST_FACTORED
            method = "cholesky" if small or query.dtype == torch.float64 else "cg"
        count, tolerance = self.max_iterations, self.tolerance
        if count is None:
            count = UNKNOWN if number is None else next(n for above, n in ENOUGH if number >= above)
        if tolerance is None:
            tolerance = TOLERANCE.get(query.dtype, HALF_TOLERANCE)
        return Settled(method, count, tolerance, dtype)


def solve(
    weights: Tensor, key: Tensor, key_mean: Tensor, rhs: Tensor, ridge: Tensor, how: Settled, budget: int
) -> Tensor:
    """x `[X, R, D]` with (C + ridge) x = rhs, where C is the covariance of the keys under each row's weights.

    `weights` is `[X, R, M]`, `key` `[X, M, D]`, `ridge` `[X, R, 1]`. About `budget` numbers are made at once.
    """
    if how.method == "cg":
        return conjugate_gradients(
            lambda x: covariance_times(weights, key, key_mean, x),
            rhs,
            ridge,
            how.max_iterations,
            how.tolerance,
        )
    found = torch.empty_like(rhs)
    heads = max(1, budget // (8 * key[0].numel()))  # an eighth: what is made is read again at once
    rows = max(1, heads // len(key))
    for head in range(0, len(key), heads):
        for first in range(0, rhs.shape[1], rows):
            part = (slice(head, head + heads), slice(first, first + rows))
            spread = covariance(weights[part], key[part[0]], key_mean[part])
            found[part] = factored(spread, rhs[part], ridge[part])
    return found


def covariance_times(weights: Tensor, key: Tensor, key_mean: Tensor, x: Tensor) -> Tensor:
    """C x: centred before it is multiplied, so that a mean that all keys share costs no digits."""
    along = x @ key.mT
    along -= (x * key_mean).sum(-1, keepdim=True)
    along *= weights
    return along @ key - along.sum(-1, keepdim=True) * key_mean


def covariance(weights: Tensor, key: Tensor, key_mean: Tensor) -> Tensor:
    """C `[X, R, D, D]`, symmetric and positive also in rounded arithmetic."""
    spread = key.unsqueeze(1) - key_mean.unsqueeze(2)  # [X, R, M, D]
    spread = spread * weights.sqrt().unsqueeze(-1)
    return spread.mT @ spread


def conjugate_gradients(
    times: Callable[[Tensor], Tensor],
    rhs: Tensor,
    ridge: Tensor,
    max_iterations: int,
    tolerance: float,
    *,
    stop_early: bool = True,
) -> Tensor:
    """x with times(x) + ridge x = rhs, all rows in step; a row that is there rests.

    `stop_early` leaves when all rest, which a trace cannot follow.
    """
    x, residual, direction = torch.zeros_like(rhs), rhs, rhs
    norm = residual.square().sum(-1, keepdim=True)
    enough = norm * tolerance**2
    active = norm > enough
    for _ in range(max_iterations):
        if stop_early and not active.any():
            break
        image = times(direction) + ridge * direction
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(active, norm / torch.where(active, curvature, 1), 0)
        x = x + step * direction
        residual = residual - step * image
        new = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(active, new / torch.where(active, norm, 1), 0) * direction
        norm = torch.where(active, new, norm)
        active = active & (new > enough)
    return x


def factored(covariance: Tensor, rhs: Tensor, ridge: Tensor) -> Tensor:
    """x with (covariance + ridge) x = rhs."""
    system = covariance.clone()
    system.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed.any():  # rounding made a matrix of large entries indefinite
        return torch.linalg.solve_ex(system.double(), rhs.double()).result.to(rhs.dtype)
    return torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)
