"""Local linear attention, and the attention with a given first-order correction that it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops.checks import check, check_heads, no_transform, scale_or_default, under_autocast
from nearfield.ops.lla import native, operator, reference, tiled, triton
from nearfield.ops.lla.solver import Settled, Solver
from nearfield.ops.neighborhood.geometry import Bound, Neighborhood
from nearfield.ops.neighborhood.operator import bind

OP = "local_linear_attention"
LAYOUT = "[batch, one to three grid sides, heads, head_dim]"
GRADIENTS = ("exact", "detached")
DEFAULT = Solver()


def local_linear_attention(
    query: Float[Tensor, "b *places heads dim"],
    key: Float[Tensor, "b *grid kv_heads dim"],
    value: Float[Tensor, "b *grid kv_heads dv"],
    geometry: Neighborhood,
    *,
    ridge: float | Tensor = 10.0,
    solver: Solver = DEFAULT,
    ridge_grad: Literal["exact", "detached"] = "exact",
    key_mask: Bool[Tensor, "b *grid"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b *places heads dv"]:
    """Attention that fits a line to the values it sees: the fit of values on keys, read off at the query.

        local_linear_attention(q, k, v, Neighborhood(1024, is_causal=True), ridge=1.0)

    With softmax weights p, their means m of keys and values and the covariance C of the keys under them:

        out = m_v + Cov_p(v, k) (C + ridge)^-1 (q - m_k)

    A large `ridge` makes it softmax attention, a small one linear regression. It is positive: a number, one
    for each head `[H]`, or one for each query `[B, *places, H]`; tensors are differentiable. Its meaning
    depends on the size of the keys, so normalise them. A query that sees nothing gets 0.

    Patterns, masked keys and queries fewer than keys are those of `neighborhood_attention`, without
    border="pad". `ridge_grad="detached"` gives the gradients of the published code, which hold the sum of the
    weights for a constant where it multiplies the ridge. `backend="reference"` solves exactly, whatever the
    `solver`.
    """
    if ridge_grad not in GRADIENTS:
        raise ValueError(f"ridge_grad={ridge_grad!r} is unknown. Choose one of {', '.join(GRADIENTS)}.")
    if not isinstance(solver, Solver):
        raise TypeError(f"solver is a {type(solver).__name__}. Give a Solver, such as Solver(method='cg').")
    bound, factor = _checked(query, key, value, geometry, key_mask, scale)
    how = solver.settle(ridge, query)
    detached = ridge_grad == "detached"
    ridges = ridge_of_rows(ridge, query, how.dtype)
    unfit = _solver_misfit(how)

    def ask_native() -> Verdict:
        cannot = unfit or operator.misfit(bound) or _sinks_misfit(bound) or no_transform()
        if detached:
            cannot = 'the CPU kernels know only ridge_grad="exact".'
        return Verdict(cannot or native.unfit(query, value, factor) or native.missing())

    ask = _backends(query, value, bound, unfit)
    name = choose(OP, backend, {"native": ask_native, **ask})

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name == "native":  # masked keys may hold anything there
            rows = ridges.float()
            settings = (how.max_iterations, how.tolerance, factor)
            return native.attend(query, key, value, bound, rows, key_mask, *settings)
        key, value = _unmasked(key, key_mask), _unmasked(value, key_mask)
        options: dict[str, Any] = {"ridge": ridges.flatten(1, -2), "detached": detached}
        return _run(name, query, key, value, bound, key_mask, how, factor, options)

    return under_autocast(attend, query, key, value)


def first_order_attention(
    query: Float[Tensor, "b *places heads dim"],
    key: Float[Tensor, "b *grid kv_heads dim"],
    value: Float[Tensor, "b *grid kv_heads dv"],
    correction: Float[Tensor, "b *places heads dim"],
    geometry: Neighborhood,
    *,
    key_mask: Bool[Tensor, "b *grid"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b *places heads dv"]:
    """Softmax attention less a term linear in the keys: out = m_v - sum_j p_j (correction . (k_j - m_k)) v_j.

    Here p are the softmax weights and m their means of values and keys. A correction of 0 is softmax
    attention; one that a layer predicts from the token is Parallax (arXiv 2605.29157); the one that solves a
    ridge regression is `local_linear_attention`. The scale is for the scores only.
    """
    bound, factor = _checked(query, key, value, geometry, key_mask, scale)
    check("correction", correction, tuple(query.shape), query)
    how = Settled("cg", 1, 0.0, torch.promote_types(query.dtype, torch.float32))  # nothing is solved
    name = choose("first_order_attention", backend, _backends(query, value, bound, None))

    def attend(query: Tensor, key: Tensor, value: Tensor, correction: Tensor) -> Tensor:
        key, value = _unmasked(key, key_mask), _unmasked(value, key_mask)
        options = {"correction": correction.flatten(1, -3)}
        return _run(name, query, key, value, bound, key_mask, how, factor, options)

    return under_autocast(attend, query, key, value, correction)


def ridge_of_rows(ridge: float | Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    """The ridge of each query `[B, *places, H]`."""
    rows = tuple(query.shape[:-1])
    if not isinstance(ridge, Tensor):
        if not 0 < ridge < math.inf:
            raise ValueError(f"ridge={ridge} must be positive and finite. Give 1e8 for softmax attention.")
        return torch.full((), ridge, dtype=dtype, device=query.device).expand(rows)
    if tuple(ridge.shape) not in ((), rows[-1:], rows) or not ridge.is_floating_point():
        raise ValueError(
            f"ridge has shape {list(ridge.shape)} and dtype {ridge.dtype}. Give a number, "
            f"or a floating tensor of shape {list(rows[-1:])} or {list(rows)}."
        )
    if ridge.device != query.device:
        raise ValueError(f"ridge is on {ridge.device}, the query on {query.device}. Move it to that device.")
    return ridge.to(dtype).expand(rows)


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Neighborhood,
    key_mask: Tensor | None,
    scale: float | None,
) -> tuple[Bound, float]:
    """The geometry on the grid of the keys and the factor on scores, once everything fits."""
    if not isinstance(geometry, Neighborhood):
        raise TypeError(
            f"geometry is a {type(geometry).__name__}. "
            "Give a Neighborhood, such as Neighborhood(1024, is_causal=True)."
        )
    check_heads(query, key, value, rank=(4, 5, 6), layout=LAYOUT)
    if geometry.border == "pad":
        raise NotImplementedError(
            "border='pad' is missing here: keys outside would join the regression. Use border='truncate'."
        )
    places, grid = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    if len(grid) > 1 and places != grid:
        raise ValueError(f"The grid of the queries is {places}, of the keys {grid}. Give both the same one.")
    bound = bind(geometry, grid, places[0] if len(grid) == 1 else None)
    if key_mask is not None:
        check("key_mask", key_mask, (query.shape[0], *grid), query, torch.bool)
    return bound, scale_or_default(scale, query.shape[-1])


def _backends(
    query: Tensor, value: Tensor, bound: Bound, solver_misfit: str | None
) -> dict[str, Callable[[], Verdict]]:
    """What the backends that both functions have say to this problem, the best first."""

    def ask_triton() -> Verdict:
        cannot = solver_misfit or operator.misfit(bound) or _sinks_misfit(bound) or no_transform()
        slow = None if query.device.type == "cuda" else "the interpreter of Triton is for tests."
        return Verdict(cannot or triton.unfit(query, value), slow)

    return {
        "triton": ask_triton,
        "tiled": lambda: Verdict(operator.misfit(bound) or no_transform()),
        "reference": Verdict,
    }


def _solver_misfit(how: Settled) -> str | None:
    """Why kernels that run conjugate gradients in float32 cannot take this, or None."""
    if how.method != "cg":
        return f"it solves by conjugate gradients only, and the solver settled on {how.method!r}."
    if how.dtype != torch.float32:
        return "it computes in float32, and this needs float64."
    return None


def _sinks_misfit(bound: Bound) -> str | None:
    return "it knows no sinks." if bound.pattern.num_sinks else None


def _unmasked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """NaN in a masked key must not reach a product."""
    return x if key_mask is None else x.masked_fill(~key_mask[..., None, None], 0)


def _run(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bound: Bound,
    key_mask: Tensor | None,
    how: Settled,
    scale: float,
    options: dict[str, Any],
) -> Tensor:
    """One of the backends that see tokens in a row."""
    places = query.shape[1:-2]
    query, key, value = (x.flatten(1, -3) for x in (query, key, value))
    if name == "reference":
        visible = reference.visible(bound, key_mask, query.device)
        out = reference.attend(query, key, value, visible, dtype=how.dtype, scale=scale, **options)
    else:
        run = tiled.attend if name == "tiled" else triton.attend
        out = run(query, key, value, bound, key_mask=key_mask, how=how, scale=scale, **options)
    return out.unflatten(1, places)
