"""Attention at a cost linear in the tokens: the past is kept in a matrix for each head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor

from nearfield.ops.checks import check, scale_or_default
from nearfield.ops.linear.calls import LinearResult, State, call, check_call, divided, plain, state_shapes
from nearfield.ops.linear.dispatch import attend


def linear_attention(
    query: Float[Tensor, "b *places heads dim"],
    key: Float[Tensor, "b *grid kv_heads dim"],
    value: Float[Tensor, "b *grid kv_heads dv"],
    *,
    is_causal: bool = True,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> LinearResult:
    """Attention without a softmax: values weighted by `scale * q k`, through a state instead of all pairs.

        S <- S + k_t^T v_t,   o_t = scale * q_t S                    # not causal: the S of all tokens
        normalize=True:       z <- z + k_t,   o_t / (scale * q_t z + 1e-10)

    Apply feature maps to query and key before. The state `[B, H, K, V]` is in float32 (float64 for float64);
    with `normalize` it is `(S, z)`, z `[B, H, K]`. `cu_seqlens` separates sequences packed in a batch of 1;
    states then have one row for each. `form` is how it is computed: "parallel" by the matrix of all pairs,
    "chunk" or "recurrent", which agree. Without causal order the tokens may be a grid, and the keys others
    than the queries.
    """
    check_call(query, key, value, is_causal, form)
    solve = partial(
        attend,
        "linear_attention",
        scale=scale_or_default(scale, query.shape[-1]),
        is_causal=is_causal,
        form=form,
        backend=backend,
    )
    return call(
        divided(solve) if normalize else plain(solve),
        query,
        key,
        value,
        {},
        initial_state,
        state_shapes(query, value, normalize),
        cu_seqlens,
        output_final_state,
    )


def gated_linear_attention(
    query: Float[Tensor, "b t heads dim"],
    key: Float[Tensor, "b t kv_heads dim"],
    value: Float[Tensor, "b t kv_heads dv"],
    g: Float[Tensor, "*gate"],
    *,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> LinearResult:
    """Causal linear attention whose state decays: the past fades by `exp(g)` at every step.

        S <- exp(g_t) S + k_t^T v_t,   o_t = scale * q_t S

    `g` is the log of the decay, at most 0: `[B, T, H]` one for each head (Mamba-2, simple GLA),
    `[B, T, H, K]` one for each channel of the keys (GLA), or `[H]` constant (retention). With `normalize`
    the sum of the keys decays likewise and divides; states, forms and `cu_seqlens` are those of
    `linear_attention`.
    """
    check_call(query, key, value, True, form)
    batch, tokens, heads, dim = query.shape
    if isinstance(g, Tensor) and g.dim() == 1:
        check("g", g, (heads,), query)
        g = g.expand(batch, tokens, heads)
    elif isinstance(g, Tensor) and g.dim() == 4:
        check("g", g, (batch, tokens, heads, dim), query)
    else:
        check("g", g, (batch, tokens, heads), query)
    solve = partial(
        attend,
        "gated_linear_attention",
        scale=scale_or_default(scale, dim),
        form=form,
        backend=backend,
    )
    return call(
        divided(solve) if normalize else plain(solve),
        query,
        key,
        value,
        {"g": g},
        initial_state,
        state_shapes(query, value, normalize),
        cu_seqlens,
        output_final_state,
    )


def delta_rule(
    query: Float[Tensor, "b t heads dim"],
    key: Float[Tensor, "b t kv_heads dim"],
    value: Float[Tensor, "b t kv_heads dv"],
    beta: Float[Tensor, "b t heads"],
    *,
    g: Float[Tensor, "b t heads"] | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> LinearResult:
    """Causal linear attention that corrects its state: what was stored under a key is replaced, not added to.

        S <- exp(g_t) S,   S <- S + beta_t k_t^T (v_t - k_t S),   o_t = scale * q_t S

    With keys of length 1, `beta` 1 overwrites and 0 leaves alone; longer keys with `beta |k|^2` above 2 make
    the state grow without bound. `g` is as in `gated_linear_attention`, one for each head. States, forms and
    `cu_seqlens` are those of `linear_attention`.
    """
    check_call(query, key, value, True, form)
    check("beta", beta, tuple(query.shape[:3]), query)
    if g is not None:
        check("g", g, tuple(query.shape[:3]), query)
    solve = partial(
        attend,
        "delta_rule",
        scale=scale_or_default(scale, query.shape[-1]),
        form=form,
        backend=backend,
    )
    return call(
        plain(solve),
        query,
        key,
        value,
        {"beta": beta, "g": g},
        initial_state,
        state_shapes(query, value, False),
        cu_seqlens,
        output_final_state,
    )
