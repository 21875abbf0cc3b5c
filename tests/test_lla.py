"""Laws of local linear attention: its definition, its fast form, its solvers, its decoding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.dense import dense_attention
from nearfield.ops.lla import (
    Solver,
    first_order_attention,
    local_linear_attention,
    local_linear_attention_decode,
    reference,
    tiled,
)
from nearfield.ops.lla.operator import Options
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention, visible_slots
from nearfield.testing import assert_close, poisoned_empty, qkv, relative_error

PAST = Neighborhood(99, is_causal=True)
PATTERNS = {  # name: pattern, tokens, queries
    "past": (PAST, 66, 66),
    "window": (Neighborhood(9, is_causal=True), 129, 129),
    "window, last three": (Neighborhood(9, is_causal=True), 20, 3),
    "window and sinks": (Neighborhood(7, is_causal=True, num_sinks=3), 80, 80),
    "centred": (Neighborhood(6), 75, 75),
    "cut": (Neighborhood(6, border="truncate"), 67, 67),
    "all see all": (Neighborhood(13), 13, 13),
}
ONE_STEP = Options(4, True, "shift", 0, "cg", 1, 1e-6, False, False, 0.5)
CONVERGED = Solver("cg", max_iterations=60, tolerance=1e-13)


def problem(
    name: str, dtype: torch.dtype = torch.float64, *, masked: bool = False, requires_grad: bool = True
) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key, value and ridge, two heads sharing a key head and dv != d; the pattern and the mask."""
    geometry, tokens, queries = PATTERNS[name]
    tensors = [*qkv(2, tokens, 4, 6, num_kv_heads=2, value_dim=5)]
    tensors[0] = tensors[0][:, -queries:]
    draw = torch.Generator().manual_seed(1)
    tensors.append(torch.rand(2, queries, 4, generator=draw) + 0.3)
    options: dict[str, Any] = {"geometry": geometry}
    if masked:
        options["key_mask"] = torch.rand(2, tokens, generator=draw) < 0.6
        options["key_mask"][0, :4] = False
    return [x.to(dtype).requires_grad_(requires_grad) for x in tensors], options


def results(tensors: list[Tensor], options: dict[str, Any], **more: Any) -> list[Tensor]:
    """Output and the gradients of query, key, value and ridge."""
    q, k, v, ridge = tensors
    out = local_linear_attention(q, k, v, ridge=ridge, **options, **more)
    draw = torch.Generator().manual_seed(2)
    pull = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * pull).sum(), tensors)]


def close(found: list[Tensor], expected: list[Tensor], within: float | None = None) -> None:
    for number, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert_close(a, e, gradient=number > 0, within=within)


def loops(q: Tensor, k: Tensor, v: Tensor, ridge: float, seen: Tensor) -> Tensor:
    """The regression itself, a query of a head at a time: weighted least squares for intercept and slope."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                at = seen[b if len(seen) > 1 else 0, i].nonzero().flatten()
                if not len(at):
                    continue
                keys, values = k[b, at, h // group], v[b, at, h // group]
                p = (keys @ q[b, i, h] * q.shape[-1] ** -0.5).softmax(0)
                rows = torch.cat([torch.ones(len(at), 1, dtype=q.dtype), keys - q[b, i, h]], 1)
                penalty = torch.full((rows.shape[1],), ridge, dtype=q.dtype)
                penalty[0] = 0  # the intercept is free
                normal = rows.mT @ (p[:, None] * rows) + penalty.diag()
                out[b, i, h] = torch.linalg.solve(normal, rows.mT @ (p[:, None] * values))[0]
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("geometry", "grid"),
    [
        (Neighborhood(5, is_causal=True), (9,)),
        (Neighborhood(3, dilation=2, is_causal=True, num_sinks=2), (9,)),
        (Neighborhood(4, stride=2), (10,)),
        (Neighborhood((3, 2)), (4, 3)),
        (Neighborhood(2, is_causal=(True, False, True)), (2, 3, 2)),
    ],
)
def test_the_reference_is_the_regression_for_every_pattern(
    geometry: Neighborhood, grid: tuple[int, ...], masked: bool
) -> None:
    q, k, v = qkv(2, *grid, 2, 3, num_kv_heads=1, value_dim=4, dtype=torch.float64)
    mask = torch.rand(2, *grid) < 0.6 if masked else None
    bound = geometry.on(grid)
    if masked and geometry.num_sinks:
        seen = reference.visible(bound, mask, q.device)
    else:
        rows = [bound.keys(i) for i in range(bound.num_keys)]
        seen = torch.zeros(1, len(rows), len(rows), dtype=torch.bool)
        for i, keys in enumerate(rows):
            seen[0, i, keys] = True
        seen = seen if mask is None else seen & mask.flatten(1)[:, None]
    out = local_linear_attention(q, k, v, geometry, ridge=0.7, key_mask=mask, backend="reference")
    expected = loops(*(x.flatten(1, -3) for x in (q, k, v)), 0.7, seen)
    assert_close(out.flatten(1, -3), expected)


def test_sinks_are_the_first_keys_that_are_not_masked() -> None:
    bound = Neighborhood(1, is_causal=True, num_sinks=1).on(4)
    seen = reference.visible(bound, torch.tensor([[False, True, True, True]]), torch.device("cpu"))
    assert seen[0].int().tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]


def test_the_reference_has_all_derivatives() -> None:
    tensors = qkv(1, 3, 2, 2, num_kv_heads=1, dtype=torch.float64, requires_grad=True)
    ridge = torch.rand(1, 3, 2, dtype=torch.float64).add(0.3).requires_grad_()
    mask = torch.tensor([[False, True, True]])

    def call(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> Tensor:
        return local_linear_attention(q, k, v, PAST, ridge=ridge, key_mask=mask, backend="reference")

    assert torch.autograd.gradcheck(call, (*tensors, ridge), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (*tensors, ridge), fast_mode=True)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("ridge_grad", ["exact", "detached"])
def test_it_is_what_the_paper_publishes_with_the_gradients_of_its_code(ridge: float, ridge_grad: str) -> None:
    found, expected = [], []
    for target in (found, expected):
        q, k, v = qkv(2, 24, 2, 6, dtype=torch.float64, requires_grad=True)
        rows = torch.full((2, 24, 2), ridge, dtype=torch.float64, requires_grad=True)
        if target is found:
            target.extend(
                results([q, k, v, rows], {"geometry": PAST}, ridge_grad=ridge_grad, backend="tiled")
            )
            continue
        seen = reference.visible(PAST.on(24), None, q.device)
        options = {"ridge": rows, "detached": ridge_grad == "detached", "scale": 6**-0.5}
        out, _, _ = reference.published(q, k, v, seen, **options)
        pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        target.extend([out, *torch.autograd.grad((out * pull).sum(), (q, k, v, rows))])
    close(found, expected)


def test_the_two_gradients_differ() -> None:
    tensors, options = problem("past")
    exact, detached = (results(tensors, options, ridge_grad=kind) for kind in ("exact", "detached"))
    assert torch.equal(exact[0], detached[0])
    assert relative_error(detached[1], exact[1]) > 0.01
    for number in (3, 4):  # of value and ridge they are the same
        assert torch.equal(exact[number], detached[number])


@pytest.mark.parametrize(("masked", "method"), [(False, "cg"), (True, "cholesky")])
@pytest.mark.parametrize("name", PATTERNS)
def test_tiled_is_exact(name: str, masked: bool, method: str) -> None:
    tensors, options = problem(name, masked=masked)
    solver = CONVERGED if method == "cg" else Solver(method)
    with poisoned_empty():
        found = results(tensors, options, solver=solver, backend="tiled")
    close(found, results(tensors, options, backend="reference"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("past", torch.float32),
        ("window", torch.float32),
        ("centred", torch.bfloat16),
        ("window", torch.float16),
    ],
)
def test_tiled_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    tensors, options = problem(name, dtype)
    found = results(tensors, options, backend="tiled", solver=Solver("cg"))
    wide = [x.detach().double().requires_grad_() for x in tensors]
    close(found, results(wide, options, backend="reference"))


def test_strides_change_nothing() -> None:
    tensors, options = problem("window", requires_grad=False)
    q, k, v, ridge = tensors
    expected = local_linear_attention(q, k, v, ridge=ridge, **options)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(local_linear_attention(*turned, ridge=ridge, **options), expected)
    one = k[:1].expand_as(k)
    expected = local_linear_attention(q, one.contiguous(), v, ridge=ridge, **options)
    assert torch.equal(local_linear_attention(q, one, v, ridge=ridge, **options), expected)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_the_ridge_is_a_dial_from_regression_to_softmax(backend: str) -> None:
    q, k, v = qkv(1, 40, 2, 6, dtype=torch.float64)
    softmax = dense_attention(q, k, v, is_causal=True)
    found = local_linear_attention(q, k, v, PAST, ridge=1e8, backend=backend)
    assert_close(found, softmax, within=1e-8)
    affine = k @ torch.randn(6, 6, dtype=torch.float64) + 1.3
    slope = torch.linalg.lstsq(torch.cat([k[0, :, 0], torch.ones(40, 1)], 1), affine[0, :, 0]).solution
    expected = torch.cat([q[0, :, 0], torch.ones(40, 1)], 1) @ slope
    found = local_linear_attention(
        q, k, affine, PAST, ridge=1e-10, backend=backend, solver=Solver("cholesky")
    )
    assert_close(found[0, 7:, 0], expected[7:], within=1e-8)
    assert relative_error(found[0, :6, 0], expected[:6]) > 0.1  # too few keys to know


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ridge", [1e8, 0.01, 1e-10])
def test_the_first_query_gets_its_value_and_weights_sum_to_one(
    ridge: float, dtype: torch.dtype, backend: str
) -> None:
    q, k, v = qkv(1, 20, 2, 6, dtype=dtype)
    v[..., 0] = 1
    out = local_linear_attention(q, k, v, PAST, ridge=ridge, backend=backend)
    assert torch.equal(out[:, 0], v[:, 0])
    late = out[
        :, 7:, :, 0
    ]  # with fewer keys than channels weights are up to 1 / ridge, and so is their rounding
    assert_close(late, torch.ones_like(late), within=1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("method", ["cg", "cholesky"])
def test_a_mean_that_all_keys_share_costs_no_digits(method: str) -> None:
    q, k, v = qkv(1, 64, 2, 16, dtype=torch.float64)
    shift = torch.randn(16, dtype=torch.float64)
    q, shift = q - (q @ shift)[..., None] * shift / shift.square().sum(), 1000 * shift  # the scores stay
    k = (k + shift).float().double()  # what float32 holds of it
    options = {"ridge": 0.5, "solver": Solver(method, max_iterations=60)}
    tensors = [x.float().requires_grad_() for x in (q, k, v)]
    wide = [x.clone().requires_grad_() for x in (q.float().double(), k, v.float().double())]
    out = local_linear_attention(*tensors, PAST, backend="tiled", **options)
    expected = local_linear_attention(*wide, PAST, ridge=0.5, backend="reference")
    # the correction itself is as long as the shift, and its product with a key is rounded like it
    assert_close(out, expected, within=2e-2)


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    tensors, options = problem("window", masked=True)
    for backend in ("tiled", "reference"):
        found = results(tensors, options, backend=backend)
        assert (found[0][0, :4] == 0).all()
        assert all(x.isfinite().all() for x in found)
        assert (found[1][0, :4] == 0).all()


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_what_is_not_seen_has_no_say(backend: str) -> None:
    q, k, v = qkv(1, 80, 2, 6)
    options = {"geometry": Neighborhood(8, is_causal=True), "ridge": 1.0, "backend": backend}
    clean = local_linear_attention(q, k, v, **options)
    k[:, 70:], v[:, 70:] = 1e18, 1e18
    k[:, :4], v[:, :4] = 1e18, 1e18
    assert_close(local_linear_attention(q, k, v, **options)[:, 12:70], clean[:, 12:70])
    mask = torch.ones(1, 80, dtype=torch.bool)
    mask[:, 70:] = False
    k[:, 70:] = torch.nan
    assert local_linear_attention(q, k, v, key_mask=mask, **options)[:, 12:70].isfinite().all()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_window_of_any_length(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 140))
    is_causal, border = data.draw(st.booleans()), data.draw(st.sampled_from(["shift", "truncate"]))
    largest = tokens if border == "shift" and not is_causal else 150
    sinks = data.draw(st.integers(0, 5))
    geometry = Neighborhood(data.draw(st.integers(1, largest)), 1, 1, is_causal, border, sinks)
    queries = data.draw(st.integers(1, tokens)) if is_causal else tokens
    q, k, v = qkv(1, tokens, 2, 3, num_kv_heads=1, dtype=torch.float64)
    options = {"ridge": 0.5, "key_mask": torch.rand(1, tokens) < 0.8 if data.draw(st.booleans()) else None}
    found, expected = (
        local_linear_attention(q[:, -queries:], k, v, geometry, backend=b, **options)
        for b in ("tiled", "reference")
    )
    assert_close(found, expected)
    bound = geometry.on(tokens, num_queries=queries)
    if options["key_mask"] is None:  # who sees whom is the geometry's word
        seen = reference.visible(bound, None, q.device)[0]
        assert [row.nonzero().flatten().tolist() for row in seen] == [bound.keys(i) for i in range(queries)]


def test_solvers_agree_and_few_iterations_do_not_suffice_for_a_small_ridge() -> None:
    q, k, v = qkv(1, 128, 1, 16, dtype=torch.float64)
    exact = local_linear_attention(q, k, v, PAST, ridge=0.05, solver=Solver("cholesky"))
    errors = [
        relative_error(local_linear_attention(q, k, v, PAST, ridge=0.05, solver=Solver("cg", n)), exact)
        for n in (2, 8, 32, 200)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05
    assert errors[-1] < 1e-11
    loose = local_linear_attention(q, k, v, PAST, ridge=0.05, solver=Solver("cg", 200, tolerance=0.3))
    assert relative_error(loose, exact) > 1e-3


def test_what_auto_solves_with() -> None:
    narrow, wide = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 65)
    for ridge, query, expected in (
        (10.0, narrow, ("cg", 8, 1e-6, torch.float32)),
        (1.0, wide.bfloat16(), ("cg", 16, 1e-3, torch.float32)),
        (0.05, narrow, ("cholesky", 32, 1e-6, torch.float32)),
        (0.05, wide, ("cg", 32, 1e-6, torch.float32)),
        (torch.ones(1), narrow, ("cholesky", 32, 1e-6, torch.float32)),
        (10.0, wide.double(), ("cholesky", 8, 1e-12, torch.float64)),
        (1e-4, wide, ("cg", 32, 1e-6, torch.float64)),
    ):
        assert tuple(Solver().settle(ridge, query)) == expected


@pytest.mark.parametrize("shape", [(), (4,), (2, 129, 4)])
def test_a_ridge_may_be_of_all_of_heads_or_of_queries(shape: tuple[int, ...]) -> None:
    (q, k, v, _), options = problem("window", requires_grad=False)
    ridge = (torch.rand(shape, dtype=torch.float64) + 0.2).requires_grad_()
    rows = ridge.detach().expand(2, 129, 4).clone().requires_grad_()
    found, expected = (local_linear_attention(q, k, v, ridge=r, **options) for r in (ridge, rows))
    assert torch.equal(found, expected)
    (grad,) = torch.autograd.grad(found.square().sum(), ridge)
    (of_rows,) = torch.autograd.grad(expected.square().sum(), rows)
    assert_close(grad, of_rows.sum_to_size(shape) if shape else of_rows.sum(), gradient=True)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_given_correction(backend: str) -> None:
    geometry = Neighborhood(9, is_causal=True)
    q, k, v = qkv(1, 67, 2, 3, num_kv_heads=1, value_dim=5, dtype=torch.float64, requires_grad=True)
    r = torch.randn(1, 67, 2, 3, dtype=torch.float64, requires_grad=True)
    out = first_order_attention(q, k, v, r, geometry, scale=0.3, backend=backend)
    # Parallax as it is defined: softmax attention of the values, less that of values times r k, centred
    softmax = {"scale": 0.3, "backend": "reference"}
    total = torch.zeros_like(out)
    keys, values = (x.repeat_interleave(2, 2) for x in (k, v))
    mean = neighborhood_attention(q, keys, values, geometry, **softmax)
    of_keys = neighborhood_attention(q, keys, keys, geometry, **softmax)
    total = total + mean * (1 + (r * of_keys).sum(-1, keepdim=True))
    for channel in range(3):
        part = neighborhood_attention(q, keys, keys[..., channel, None] * values, geometry, **softmax)
        total = total - r[..., channel, None] * part
    assert_close(out, total)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v, r), retain_graph=True) for x in (out, total)]
    for a, e in zip(*grads, strict=True):
        assert_close(a, e, gradient=True)
    nothing = first_order_attention(q, k, v, torch.zeros_like(r), geometry, scale=0.3, backend=backend)
    assert_close(nothing, mean)


@pytest.mark.parametrize("method", ["auto", "cg"])
@pytest.mark.parametrize("splits", [1, 3, 40])
def test_decoding_is_the_last_rows(splits: int, method: str) -> None:
    q, k, v = qkv(2, 33, 4, 6, num_kv_heads=2, value_dim=5, dtype=torch.float64, requires_grad=True)
    ridge = torch.rand(4, dtype=torch.float64).add(0.3).requires_grad_()
    solver = CONVERGED if method == "cg" else Solver()
    outs = [
        local_linear_attention(q, k, v, PAST, ridge=ridge, backend="reference")[:, -2:],
        local_linear_attention_decode(q[:, -2:], k, v, ridge=ridge, solver=solver, num_splits=splits),
    ]
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v, ridge)) for x in outs]
    close([outs[1], *grads[1]], [outs[0], *grads[0]])


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_decoding_reads_a_rolling_cache_in_any_order(backend: str) -> None:
    geometry = Neighborhood(6, is_causal=True, num_sinks=2)
    q, k, v = qkv(1, 30, 2, 4, dtype=torch.float64)
    expected = local_linear_attention(q, k, v, geometry, ridge=0.5, backend="reference")[:, -1:]
    slots = torch.tensor([[0, 1, 27, 28, 29, 24, 25, 26, -1]])  # two sinks, a ring, an empty slot
    cached = [x[:, slots[0]] for x in (k, v)]
    seen = visible_slots(geometry, torch.tensor([[29]]), slots)
    for splits in (1, 4):
        out = local_linear_attention_decode(
            q[:, -1:], *cached, visible=seen, ridge=0.5, num_splits=splits, backend=backend
        )
        assert_close(out, expected)
    blind = torch.zeros_like(seen)
    x = q[:, -1:].clone().requires_grad_()
    out = local_linear_attention_decode(x, *cached, visible=blind, ridge=0.5, num_splits=4, backend=backend)
    assert (out == 0).all()
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_memory_of_tiled_is_linear_in_tokens() -> None:
    """What the backward keeps, and the largest tensor that a call makes."""
    largest = []
    for tokens in (192, 384):
        sizes = [0]

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor) and out._base is None:
                    sizes.append(out.numel())  # noqa: B023
                return out

        q, k, v = qkv(1, tokens, 1, 4)
        with Watch():
            tiled._forward._init_fn(
                q, k, v, torch.ones(1, tokens, 1), None, None, *ONE_STEP._replace(kernel_size=tokens)
            )
        largest.append(max(sizes))
    assert largest[1] <= 2 * largest[0]
    assert largest[1] <= 64 * 384


def test_a_window_is_looked_at_and_nothing_else() -> None:
    q, k, _ = (x.transpose(1, 2).flatten(0, 1) for x in qkv(1, 400, 1, 4))
    bound = Neighborhood(10, is_causal=True).on(400)
    seen = [s for piece in tiled._pieces(q[:, None], k, bound, None) for s in piece.segments]
    assert max(s.stop - s.start for s in seen) <= tiled.ROWS + 9


def test_it_passes_torchs_own_checks() -> None:
    q, k, v = qkv(2, 9, 4, 4, num_kv_heads=2, value_dim=3, requires_grad=True)
    ridge = torch.rand(2, 9, 4).add(0.5).requires_grad_()
    options = ONE_STEP._replace(max_iterations=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(tiled._forward, (q, k, v, ridge, None, torch.rand(2, 9) < 0.7, *options))
        given = (q, k, v, None, torch.randn_like(q), None, *options)
        torch.library.opcheck(tiled._forward, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_it_compiles_whole_with_moving_sizes(backend: str) -> None:
    torch._dynamo.reset()
    geometry = Neighborhood(4, is_causal=True)
    options = {"ridge": 1.0, "backend": backend, "solver": Solver("cg")}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_linear_attention(q, k, v, geometry, **options)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (5, 9):
        tensors = qkv(1, tokens, 2, 4, requires_grad=True)
        found, expected = compiled(*tensors), call(*tensors)
        grads = [torch.autograd.grad(x.square().sum(), tensors) for x in (found, expected)]
        close([found, *grads[0]], [expected, *grads[1]])


@pytest.mark.compile
def test_decoding_compiles_whole() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(local_linear_attention_decode, fullgraph=True, backend="eager")
    q, k, v = qkv(1, 9, 2, 4)
    options = {"ridge": 1.0, "solver": Solver("cg", 4), "num_splits": 2}
    assert_close(
        compiled(q[:, -1:], k, v, **options), local_linear_attention_decode(q[:, -1:], k, v, **options)
    )


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_vmap_is_a_batch(backend: str) -> None:
    tensors = qkv(3, 2, 9, 2, 4, dtype=torch.float64, requires_grad=True)
    correction = torch.randn(2, 9, 2, 4, dtype=torch.float64)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        solved = local_linear_attention(q, k, v, PAST, ridge=0.5, backend=backend)
        return solved + first_order_attention(q, k, v, correction, PAST, backend=backend)

    found = torch.vmap(call)(*tensors)
    expected = torch.stack([call(*parts) for parts in zip(*tensors, strict=True)])
    assert_close(found, expected)
    for a, e in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (found, expected)), strict=True):
        assert_close(a, e, gradient=True)


def test_transforms_go_to_the_reference_and_second_derivatives_say_so() -> None:
    q, k, v = qkv(1, 5, 1, 2, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, backend: str = "auto") -> Tensor:
        return local_linear_attention(q, k, v, PAST, ridge=0.5, backend=backend).sum()

    (expected,) = torch.autograd.grad(call(q), q)
    assert_close(torch.func.grad(call)(q), expected, gradient=True)
    with pytest.raises(BackendUnavailable, match="torch.func"):
        torch.func.grad(lambda q: call(q, "tiled"))(q)
    (grad,) = torch.autograd.grad(call(q, "tiled"), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.sum().backward()


def test_autocast_computes_in_the_lower_precision() -> None:
    tensors = qkv(1, 9, 2, 4)
    ridge = torch.full((2,), 0.5)
    for backend in ("tiled", "reference"):
        options = {"ridge": ridge, "backend": backend}
        with torch.autocast("cpu", torch.bfloat16):
            out = local_linear_attention(*tensors, PAST, **options)
            late = local_linear_attention_decode(tensors[0][:, -1:], *tensors[1:], **options)
        assert_close(out, local_linear_attention(*(x.bfloat16() for x in tensors), PAST, **options))
        assert late.dtype == torch.bfloat16


def test_a_backend_broken_on_purpose_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = problem("window")
    expected = results(tensors, options, backend="reference")

    def one_less(*arguments: Any) -> Tensor | None:
        seen = visible(*arguments)
        if seen is not None:
            seen[:, -1, 0] ^= True  # one key of one query of each chunk
        return seen

    def unscaled(p: Tensor, x: Tensor) -> Tensor:
        return x

    visible = tiled._visible
    for name, broken in (("_visible", one_less), ("_centred", unscaled)):
        with monkeypatch.context() as change:
            change.setattr(tiled, name, broken)
            found = results(tensors, options, backend="tiled")
        with pytest.raises(AssertionError):
            close(found, expected)


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    q, k, v = qkv(1, 7, 2, 4)
    for options, error, says in (
        ({"ridge": 0.0}, ValueError, "must be positive"),
        ({"ridge": torch.ones(3)}, ValueError, r"shape \[2\] or \[1, 7, 2\]"),
        ({"ridge": torch.ones(2, dtype=torch.int64)}, ValueError, "floating"),
        ({"ridge_grad": "exat"}, ValueError, "exact, detached"),
        ({"solver": "cg"}, TypeError, "Solver"),
        ({"key_mask": torch.ones(1, 6, dtype=torch.bool)}, ValueError, "key_mask"),
        ({"scale": torch.ones(())}, TypeError, "scale is a tensor"),
    ):
        with pytest.raises(error, match=says):
            local_linear_attention(q, k, v, PAST, **options)
    for wrong in ({"method": "lu"}, {"max_iterations": 0}, {"tolerance": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Solver(**wrong)
    with pytest.raises(TypeError, match="Give a Neighborhood"):
        local_linear_attention(q, k, v, 7)
    with pytest.raises(NotImplementedError, match="truncate"):
        local_linear_attention(q, k, v, Neighborhood(3, border="pad"))
    with pytest.raises(BackendUnavailable, match="stride 1"):
        local_linear_attention(q, k, v, Neighborhood(3, dilation=2), backend="tiled")
    with pytest.raises(BackendUnavailable, match="on a GPU"):
        local_linear_attention(q, k, v, PAST, backend="triton")
    with pytest.raises(BackendUnavailable, match="conjugate gradients only"):
        local_linear_attention(q, k, v, PAST, ridge=0.05, backend="native")
    with pytest.raises(BackendUnavailable, match="exact"):
        local_linear_attention(q, k, v, PAST, ridge_grad="detached", backend="native")
    with pytest.raises(ValueError, match="correction"):
        first_order_attention(q, k, v, k[:, :3], PAST)
    with pytest.raises(ValueError, match="belong to the keys"):
        local_linear_attention_decode(q, k[:, :3], v[:, :3])
    with pytest.raises(ValueError, match="num_splits"):
        local_linear_attention_decode(q, k, v, num_splits=0)
    with pytest.raises(ValueError, match="visible"):
        local_linear_attention_decode(q, k, v, visible=torch.ones(1, 7, 6, dtype=torch.bool))
