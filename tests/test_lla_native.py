"""Local linear attention by the C++ kernels: exactness, strides, dtypes, threads, special numbers, torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.core import library
from nearfield.ops.lla import Solver, local_linear_attention, native
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.testing import assert_close, poisoned_empty, qkv, relative_error

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="no compiled CPU kernels")

PAST = Neighborhood(99, is_causal=True)
PATTERNS = {  # name: pattern, tokens, queries
    "past": (PAST, 70, 70),
    "two blocks of a window": (Neighborhood(20, is_causal=True), 131, 131),
    "last three": (Neighborhood(9, is_causal=True), 20, 3),
    "centred": (Neighborhood(6), 75, 75),
    "cut": (Neighborhood(7, border="truncate"), 67, 67),
    "itself": (Neighborhood(1), 18, 18),
    "all see all": (Neighborhood(63), 63, 63),
}
HALVES = (torch.bfloat16, torch.float16)
SOLVER = Solver("cg", max_iterations=60, tolerance=1e-7)


def problem(
    name: str, *, masked: bool = False, dim: int = 6, dv: int = 5, heads: int = 4
) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key, value and ridge in float64, heads that share two key heads; the pattern and the mask."""
    geometry, tokens, queries = PATTERNS[name]
    tensors = [*qkv(2, tokens, heads, dim, num_kv_heads=2, value_dim=dv)]
    tensors[0] = tensors[0][:, -queries:]
    draw = torch.Generator().manual_seed(1)
    tensors.append(torch.rand(2, queries, heads, generator=draw) + 0.5)
    options: dict[str, Any] = {"geometry": geometry}
    if masked:
        options["key_mask"] = torch.rand(2, tokens, generator=draw) < 0.6
        options["key_mask"][0, :4] = False
    return tensors, options


def results(tensors: list[Tensor], options: dict[str, Any], backend: str = "native") -> list[Tensor]:
    """Output and the gradients of query, key, value and ridge."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    q, k, v, ridge = leaves
    out = local_linear_attention(q, k, v, ridge=ridge, solver=SOLVER, backend=backend, **options)
    draw = torch.Generator().manual_seed(2)
    pull = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * pull).sum(), leaves)]


def check(tensors: list[Tensor], options: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Everything against the reference in float64 on the same numbers."""
    given = [*(x.to(dtype) for x in tensors[:3]), tensors[3].float()]
    expected = results([x.double() for x in given], options, "reference")
    for number, (a, e) in enumerate(zip(results(given, options), expected, strict=True)):
        # a ridge is float32, its gradient made of half precision numbers
        within = 3e-2 if number == 4 and dtype != torch.float32 else None
        assert_close(a, e, gradient=number > 0, within=within)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_output_and_gradients_are_those_of_the_reference(name: str, masked: bool) -> None:
    with poisoned_empty():
        check(*problem(name, masked=masked))


@pytest.mark.parametrize(("dim", "dv", "heads"), [(1, 1, 2), (64, 64, 2), (60, 33, 6), (130, 16, 2)])
def test_every_number_of_channels(dim: int, dv: int, heads: int) -> None:
    tensors, options = problem("centred", dim=dim, dv=dv, heads=heads)
    tensors[3] *= max(1, dim / 8)  # as the covariance grows: no worse a condition than elsewhere
    check(tensors, options)


@pytest.mark.parametrize("isa", library.isas())
def test_every_instruction_set(isa: str) -> None:
    with library.use(isa), poisoned_empty():
        for dtype in (torch.float32, *HALVES):
            check(*problem("centred", masked=True, dim=18, dv=20, heads=2), dtype)


@given(
    st.integers(1, 40),
    st.integers(1, 45),
    st.booleans(),
    st.sampled_from(["shift", "truncate"]),
    st.integers(0, 10**6),
)
@settings(max_examples=15, deadline=None)
def test_any_window_and_any_number_of_queries(
    tokens: int, kernel: int, is_causal: bool, border: Any, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    if not is_causal and border == "shift":
        kernel = min(kernel, tokens)
    geometry = Neighborhood(kernel, is_causal=is_causal, border=border)
    queries = int(torch.randint(1, tokens + 1, (), generator=draw)) if is_causal else tokens
    tensors = [*qkv(1, tokens, 2, 4, num_kv_heads=1, seed=seed), torch.rand(1, queries, 2) + 1]
    tensors[0] = tensors[0][:, -queries:]
    check(tensors, {"geometry": geometry, "key_mask": torch.rand(1, tokens, generator=draw) < 0.8})


def test_strides_change_nothing() -> None:
    tensors, options = problem("past", masked=True)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
        "batch last": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0),
        "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    }
    expected = results(tensors, options)
    for name, view in views.items():
        for a, e in zip(results([view(x) for x in tensors], options), expected, strict=True):
            assert torch.equal(a, e), name
    q, k, v, ridge = tensors
    one = [x[:1, :, :1].expand(2, -1, 2, -1) for x in (k, v)]
    same = ridge[:1, :1].expand_as(ridge)
    found = results([q, *one, same], options)
    for a, e in zip(found, results([q, *(x.contiguous() for x in (*one, same))], options), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("tokens", [700, 129])
def test_threads_change_no_bit(tokens: int) -> None:
    tensors = [*qkv(1, tokens, 2, 16, num_kv_heads=1), torch.rand(1, tokens, 2) + 1]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with library.grain(0):
                found.append(results(tensors, {"geometry": PAST}))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def attend(q: Tensor, k: Tensor, v: Tensor, ridge: float = 1.0, **options: Any) -> Tensor:
    geometry = options.pop("geometry", PAST)
    return local_linear_attention(
        q, k, v, geometry, ridge=ridge, solver=options.pop("solver", SOLVER), backend="native", **options
    )


def test_a_large_ridge_is_softmax_and_the_first_query_gets_the_first_value() -> None:
    q, k, v = qkv(2, 40, 4, 8, num_kv_heads=2)
    assert_close(attend(q, k, v, 1e8), neighborhood_attention(q, k, v, PAST, backend="reference"))
    assert_close(attend(q, k, v, 1e-2)[:, 0], v[:, 0].repeat_interleave(2, 1))


def test_affine_values_are_continued_to_the_query() -> None:
    q, k, _ = qkv(1, 60, 1, 4)
    matrix = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    found = attend(q, k, k @ matrix + 2, 0.02)
    assert relative_error(found[:, 30:], q[:, 30:] @ matrix + 2) < 0.1
    softmax = attend(q, k, k @ matrix + 2, 1e8)
    assert relative_error(softmax[:, 30:], q[:, 30:] @ matrix + 2) > 0.3


def test_rows_sum_to_one_whatever_the_keys_have_in_common() -> None:
    q, k, v = qkv(1, 90, 2, 8)
    ones = torch.ones_like(v)
    for far in (0.0, 100.0):
        assert (attend(q + far, k + far, ones) - 1).abs().max() < 1e-5
    moved = attend(q * 1e-3 + 50, k + 50, v, scale=1e-3)  # the covariance of far keys does not cancel
    expected = local_linear_attention(
        (q * 1e-3 + 50).double(),
        (k + 50).double(),
        v.double(),
        PAST,
        ridge=1.0,
        scale=1e-3,
        backend="reference",
    )
    assert_close(moved, expected, within=1e-5)


def test_output_and_gradient_ignore_what_no_query_sees() -> None:
    tensors, options = problem("past", masked=True)
    seen = options["key_mask"]
    clean = results(tensors, options)
    q, k, v, ridge = tensors
    dirty = [x.masked_fill(~seen[..., None, None], torch.nan) for x in (k, v)]
    settings = (PAST.on(70), ridge, seen, 60, 1e-7, 6**-0.5)
    leaves = [x.requires_grad_() for x in dirty]
    out = native.attend(q, *leaves, *settings)
    assert torch.equal(out, clean[0])
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert (grad[~seen] == 0).all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_reaches_those_who_see_it_and_nobody_else(number: float) -> None:
    q, k, v = qkv(1, 40, 2, 4)
    clean = attend(q, k, v, geometry=Neighborhood(8, is_causal=True))
    for place in range(3):
        tensors = [x.clone() for x in (q, k, v)]
        tensors[place][0, 20, 1, 2] = number
        found = attend(*tensors, geometry=Neighborhood(8, is_causal=True))
        hit = torch.zeros_like(found, dtype=torch.bool)
        hit[0, 20 : 21 if place == 0 else 28, 1] = True
        if place == 2:
            hit &= torch.arange(4) == 2
        assert not found[hit].isfinite().any()
        assert_close(found[~hit], clean[~hit])


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    tensors, options = problem("past")
    options["key_mask"] = torch.arange(70)[None].expand(2, -1) >= 40
    with poisoned_empty():
        found = results(tensors, options)
    for x in (found[0], found[1], found[4]):
        assert (x[:, :40] == 0).all()
    assert all(x.isfinite().all() for x in found)


def test_small_and_large_gradients_are_as_exact() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 30, 2, 8))
    out = attend(q, k, v)
    expected = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    for factor in (2.0**-70, 2.0**40):
        for a, e in zip(
            torch.autograd.grad(out.sum() * factor, (q, k, v), retain_graph=True), expected, strict=True
        ):
            assert_close(a / factor, e)


def test_more_iterations_come_closer_and_tolerance_ends_them() -> None:
    q, k, v = qkv(1, 200, 1, 32)
    expected = local_linear_attention(*(x.double() for x in (q, k, v)), PAST, ridge=1.0, backend="reference")

    def error(iterations: int, tolerance: float) -> float:
        return relative_error(attend(q, k, v, solver=Solver("cg", iterations, tolerance)), expected)

    errors = [error(n, 0.0) for n in (1, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert 1e-5 < error(60, 1e-2) < 1e-1
    assert torch.equal(
        attend(q, k, v, solver=Solver("cg", 500, 1e-6)), attend(q, k, v, solver=Solver("cg", 90, 1e-6))
    )


def test_a_key_too_few_is_noticed() -> None:
    tensors, options = problem("centred")
    wrong = dict(options, key_mask=torch.ones(2, 75, dtype=torch.bool))
    wrong["key_mask"][0, 9] = False
    expected = results([x.double() for x in tensors], options, "reference")
    for number, (a, e) in enumerate(zip(results(tensors, wrong), expected, strict=True)):
        with pytest.raises(AssertionError):
            assert_close(a, e, gradient=number > 0)


def test_the_operators_pass_torchs_own_checks() -> None:
    tensors, options = problem("last three", masked=True)
    leaves = [x.requires_grad_() for x in tensors]
    rest = (9, True, "shift", 30, 1e-6, 0.5)
    torch.library.opcheck(torch.ops.nearfield.native_lla, (*leaves, None, *rest))
    torch.library.opcheck(torch.ops.nearfield.native_lla, (*leaves, options["key_mask"], *rest))
    plain = [x.detach() for x in leaves]
    out, correction = torch.ops.nearfield.native_lla(*plain, None, *rest)
    torch.library.opcheck(torch.ops.nearfield.native_lla_backward, (out, correction, *plain, None, *rest))


@pytest.mark.compile
def test_one_graph_and_the_same_numbers() -> None:
    tensors, options = problem("past", masked=True)
    leaves = [x.requires_grad_() for x in tensors]
    bound = options["geometry"].on(70)

    def call(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> Tensor:
        return native.attend(q, k, v, bound, ridge, options["key_mask"], 20, 1e-6, 0.5)

    expected = call(*leaves)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(x.sum(), leaves) for x in (found, expected)]
    assert all(torch.equal(a, e) for a, e in zip(*grads, strict=True))
    public = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(public(*leaves[:3]), attend(*leaves[:3]))


def test_vmap_is_a_larger_batch() -> None:
    q, k, v = qkv(3, 2, 12, 2, 4)
    found = torch.vmap(attend, (0, 0, 1))(q, k, v.transpose(0, 1))
    assert_close(found, torch.stack([attend(*each) for each in zip(q, k, v, strict=True)]))
    shared = torch.vmap(attend, (0, None, None))(q, k[0], v[0])
    assert_close(shared[1], attend(q[1], k[0], v[0]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(torch.vmap(attend)(*leaves).sum(), leaves)
    for a, e in zip(
        grads, torch.autograd.grad(attend(*(x.flatten(0, 1) for x in leaves)).sum(), leaves), strict=True
    ):
        assert_close(a, e)


def test_autocast_computes_in_half_precision() -> None:
    q, k, v = qkv(1, 20, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(q, k, v)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, attend(*(x.bfloat16() for x in (q, k, v))))


def test_empty_batches_and_no_queries_at_all() -> None:
    q, k, v = qkv(0, 9, 2, 4, requires_grad=True)
    assert all(x.shape == q.shape for x in torch.autograd.grad(attend(q, k, v).sum(), (q, k, v)))
    q, k, v = qkv(2, 9, 2, 4, requires_grad=True)
    with poisoned_empty():
        for grad in torch.autograd.grad(attend(q[:, 9:], k, v).sum(), (q, k, v)):
            assert (grad == 0).all()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    q, k, v = qkv(1, 9, 2, 4)
    k.requires_grad_()
    attend(q, k, v).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None


def test_what_the_kernels_cannot_do_is_refused() -> None:
    q, k, v = qkv(1, 9, 2, 4, requires_grad=True)
    out = attend(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    assert "float64" in str(native.unfit(q.double(), v.double(), 1.0))
    assert "1 to 1024 channels" in str(native.unfit(q.new_zeros(1, 1, 1, 1025), v, 1.0))
    ridge, rest = torch.ones(1, 9, 2), (9, True, "shift", 8, 0.0, 0.5)
    op = torch.ops.nearfield.native_lla
    q, k, v = (x.detach() for x in (q, k, v))
    mask = torch.ones(1, 9, dtype=torch.bool)
    for wrong in (
        lambda: op(q, k[:, :8], v, ridge, None, *rest),
        lambda: op(q, k[:, :8], v[:, :8], ridge, None, *rest),
        lambda: op(q, k, v.double(), ridge, None, *rest),
        lambda: op(q, k, v, ridge[:, :8], None, *rest),
        lambda: op(q, k, v, ridge.double(), None, *rest),
        lambda: op(q, k, v, ridge, mask[:, :8], *rest),
        lambda: op(q[:, :8], k, v, ridge[:, :8], None, 3, False, "shift", 8, 0.0, 0.5),
        lambda: op(q, k, v, ridge, None, 10, False, "shift", 8, 0.0, 0.5),
        lambda: torch.ops.nearfield.native_lla_backward(q, q[:, :8], q, k, v, ridge, None, *rest),
        lambda: torch.ops.nearfield.native_lla_backward(q[..., :3], q, q, k, v, ridge, None, *rest),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            wrong()
