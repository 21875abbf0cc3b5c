"""What is special to the native backend: strides, dtypes, threads, instruction sets, its absence, sweeps."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.core.tolerance import tolerance
from nearfield.ops import kernels
from nearfield.ops.dense import dense_attention
from nearfield.ops.neighborhood import (
    Neighborhood,
    native,
    neighborhood_attention,
    neighborhood_attention_decode,
    neighborhood_attention_varlen,
    why,
)
from nearfield.ops.window import window_attention
from nearfield.testing import assert_close, poisoned_empty, qkv, relative_error
from tests.test_neighborhood import AWKWARD, LOOPS, Case, both, check_backend

compiled = pytest.mark.skipif(library.unavailable() is not None, reason="no compiled CPU kernels")
HALVES = (torch.bfloat16, torch.float16)
ALL = ("additional", "bias", "key_mask", "sink_logits")
TEXT = Neighborhood(6, is_causal=True, num_sinks=2)
# what `both` gives for a problem of 2-D, of text, and of all options at once
TELLING = ("63, causal, sinks, grouped", "2-D 13 x 21", "2-D pad", "strided causal", "3-D")


@pytest.fixture
def call_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every "auto" is "native" or fails."""
    monkeypatch.setenv("NEARFIELD_BACKEND", "native")


@compiled
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [*LOOPS, *AWKWARD])
def test_every_pattern_in_half_precision(name: str, dtype: torch.dtype) -> None:
    check_backend({**LOOPS, **AWKWARD}[name], "native", dtype)


@compiled
@pytest.mark.parametrize("isa", library.isas())
def test_every_instruction_set_equals_the_reference(isa: str) -> None:
    with library.use(isa), poisoned_empty():
        for name in TELLING:
            for dtype in (torch.float32, *HALVES):
                check_backend(AWKWARD[name], "native", dtype)


def slices(dtype: torch.dtype, requires_grad: bool = False) -> tuple[Tensor, ...]:
    """Query, key and value as a fused projection hands them out: slices of one tensor."""
    draw = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 9, 7, 3, 4, 8, generator=draw).to(dtype).requires_grad_(requires_grad)
    return tuple(fused[:, :, :, i] for i in range(3))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_strides_change_nothing(dtype: torch.dtype) -> None:
    geometry = Neighborhood((5, 3))
    q, k, v = slices(dtype)
    pull = torch.randn(2, 4, 8, 9, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": torch.Tensor.contiguous,
        "slices": lambda x: x,
        "heads first": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
        "every second": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, -2)[:, ::2, :, ::2],
        "batch last": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0),
    }
    results = {}
    for name, view in views.items():
        tensors = [view(x).detach().requires_grad_() for x in (q, k, v)]
        out, lse = neighborhood_attention(*tensors, geometry, return_lse=True, backend="native")
        assert out.is_contiguous()
        upstream = [view(pull.permute(0, 3, 4, 1, 2)), torch.ones(()).expand_as(lse)]
        results[name] = [out, lse, *torch.autograd.grad([out, lse], tensors, upstream)]
    for name in results:
        for a, e in zip(results[name], results["contiguous"], strict=True):
            assert torch.equal(a, e), name


@compiled
def test_tensors_that_repeat_themselves_are_read_where_they_are() -> None:
    q, k, v = qkv(2, 9, 4, 8)
    one = [x[:1, :, :1].expand(2, -1, 4, -1) for x in (k, v)]
    expected = neighborhood_attention(q, *(x.contiguous() for x in one), TEXT, backend="native")
    assert torch.equal(neighborhood_attention(q, *one, TEXT, backend="native"), expected)
    flat = k[..., :1].expand(-1, -1, -1, 8)  # channels of stride 0 must be copied
    expected = neighborhood_attention(q, flat.contiguous(), v, TEXT, backend="native")
    assert torch.equal(neighborhood_attention(q, flat, v, TEXT, backend="native"), expected)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["2-D", "text", "all options"])
def test_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    case = {
        "2-D": Case((40, 37), Neighborhood((7, 5), (1, 2)), heads=4, kv_heads=2, dim=16, dv=16, batch=2),
        "text": Case((700,), Neighborhood(90, is_causal=True, num_sinks=3), heads=4, kv_heads=2),
        "all options": Case((60, 21), Neighborhood((9, 4)), heads=3, kv_heads=1, options=ALL),
    }[name]
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found = []
        for _ in range(2):  # once more: who works first differs
            tensors, options = case.inputs(dtype, requires_grad=True)
            wanted = [x for x in (*tensors, *options.values()) if x.requires_grad]
            with library.grain(0):
                out, lse = neighborhood_attention(
                    *tensors, case.geometry, return_lse=True, backend="native", **options
                )
                grads = torch.autograd.grad(out.float().square().sum() + lse.sum(), wanted)
            found.append([out, lse, *grads])
        results.extend(found)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_ops_pass_torchs_own_checks() -> None:
    tensors = qkv(2, 9, 4, 4, num_kv_heads=2, value_dim=3)
    _, more_keys, more_values = qkv(2, 2, 4, 4, num_kv_heads=2, value_dim=3, seed=1)
    bias, logits = torch.randn(4, 11), torch.randn(4)
    mask = torch.rand(2, 9) < 0.7
    floats = [x.requires_grad_() for x in (*tensors, more_keys, more_values, bias, logits)]
    pattern = ([6], [1], [1], [True], "shift", 2, 0.5)

    def checks(forward: Any, backward: Any, *arguments: Any) -> None:
        torch.library.opcheck(forward, arguments)
        plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        out, lse = forward(*plain)
        for want_bias in (False, True):
            torch.library.opcheck(backward, (out, lse, out, lse, *plain, want_bias))

    ops = torch.ops.nearfield
    plain = (*floats[:3], None, None, None, None, None, *pattern)
    checks(ops.native_attention, ops.native_attention_backward, *plain)
    given = (*floats[:6], mask, logits, *pattern)
    checks(ops.native_attention, ops.native_attention_backward, *given)
    packed = [x[0].detach().requires_grad_() for x in floats[:3]]
    given = (*packed, more_keys, more_values, bias, mask[0], logits, [5, 4], *pattern)
    checks(ops.native_attention_varlen, ops.native_attention_varlen_backward, *given)
    q, k, v = (x.detach() for x in tensors)
    for addend in (None, torch.randn(1, 4, 3, 9)):
        torch.library.opcheck(ops.native_decode, (q[:, -3:], k, v, torch.rand(1, 3, 9) < 0.7, addend, 0.5))


@compiled
def test_operators_called_by_hand_refuse_what_does_not_fit() -> None:
    q, k, v = qkv(2, 9, 4, 4, num_kv_heads=2)
    pattern = ([6], [1], [1], [True], "shift", 2, 0.5)
    op, packed, decode = (
        getattr(torch.ops.nearfield, f"native_{name}") for name in ("attention", "attention_varlen", "decode")
    )
    nothing = (None,) * 5
    mask = torch.ones(2, 9, dtype=torch.bool)
    for wrong in (
        lambda: op(q, k[:, :8], v, *nothing, *pattern),
        lambda: op(q, k, v.double(), *nothing, *pattern),
        lambda: op(q, k, v, k, None, None, None, None, *pattern),
        lambda: op(q, k, v, None, None, torch.zeros(4, 9), None, None, *pattern),
        lambda: op(q, k, v, None, None, None, mask[:1], None, *pattern),
        lambda: op(q, k, v, None, None, None, None, torch.zeros(2), *pattern),
        lambda: packed(q[0], k[0], v[0], *nothing, [5, 5], *pattern),
        lambda: packed(q[0], k[0], v[0], k, v, None, None, None, [5, 3, 1], *pattern),
        lambda: decode(q, k, v, mask, None, 0.5),
        lambda: decode(q, k[:, :8], v, mask[:, None], None, 0.5),
    ):
        with pytest.raises(ValueError, match="do not fit|Fewer queries"):
            wrong()


@compiled
@pytest.mark.parametrize("name", ["few see anything", "2-D, all options"])
def test_gradients_are_slopes(name: str) -> None:
    case = LOOPS[name]
    tensors, options = case.inputs(torch.float32, requires_grad=True)
    leaves = [x for x in (*tensors, *options.values()) if x.requires_grad]
    draw = torch.Generator().manual_seed(5)
    ways = [torch.randn(x.shape, generator=draw) for x in leaves]

    def loss(step: float) -> Tensor:
        for x, way in zip(leaves, ways, strict=True):
            x.data.add_(way, alpha=step)
        out, lse = neighborhood_attention(
            *tensors, case.geometry, return_lse=True, backend="native", **options
        )
        for x, way in zip(leaves, ways, strict=True):
            x.data.sub_(way, alpha=step)
        return out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()

    slope = sum((g * way).sum() for g, way in zip(torch.autograd.grad(loss(0.0), leaves), ways, strict=True))
    assert_close(slope, (loss(1e-2) - loss(-1e-2)) / 2e-2, within=5e-3)


@compiled
def test_only_what_is_asked_for_gets_a_gradient() -> None:
    q, k, v = qkv(1, 9, 2, 4)
    table = torch.randn(2, 11)
    whole = [x.clone().requires_grad_() for x in (q, k, v, table)]
    out = neighborhood_attention(*whole[:3], TEXT, bias=whole[3], backend="native")
    expected = torch.autograd.grad(out.sum(), whole)
    for i in range(4):
        given = [x.clone().requires_grad_(j == i) for j, x in enumerate((q, k, v, table))]
        out = neighborhood_attention(*given[:3], TEXT, bias=given[3], backend="native")
        out.sum().backward()
        assert torch.equal(given[i].grad, expected[i])
        assert all(x.grad is None for j, x in enumerate(given) if j != i)
    lse_only = [x.clone().requires_grad_() for x in (q, k, v)]
    _, lse = neighborhood_attention(*lse_only, TEXT, return_lse=True, backend="native")
    lse.sum().backward()
    assert (lse_only[2].grad == 0).all()
    assert lse_only[0].grad.any()


@compiled
def test_a_gradient_of_nan_where_nothing_is_seen_goes_nowhere() -> None:
    tensors = qkv(1, 5, 1, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True]])
    logits = torch.tensor([-torch.inf], requires_grad=True)
    _, lse = neighborhood_attention(
        *tensors, Neighborhood(1), key_mask=mask, sink_logits=logits, return_lse=True, backend="native"
    )
    pull = torch.ones_like(lse).masked_fill(lse == -torch.inf, torch.nan)
    for grad in torch.autograd.grad(lse, (*tensors, logits), pull):
        assert grad.isfinite().all()


@compiled
def test_masked_keys_may_hold_anything_in_packed_and_dense_calls() -> None:
    q, k, v = qkv(1, 20, 2, 4)
    seen = torch.arange(20) % 5 != 2
    dirty = [x.masked_fill(~seen[:, None, None], torch.nan).requires_grad_() for x in (k, v)]
    for call in (
        partial(neighborhood_attention_varlen, geometry=TEXT, cu_seqlens=[0, 11, 20], key_mask=seen[None]),
        partial(dense_attention, mask=seen),
        partial(dense_attention, mask=seen, is_causal=True),
    ):
        out = call(q, *dirty, backend="native")
        assert torch.equal(out, call(q, k, v, backend="native"))
        for grad in torch.autograd.grad(out.sum(), dirty):
            assert (grad[:, ~seen] == 0).all()
            assert grad.isfinite().all()


@compiled
def test_a_row_of_nan_stays_a_row() -> None:
    for grid, geometry in (((70,), Neighborhood(9)), ((9, 10), Neighborhood((3, 5)))):
        q, k, v = qkv(2, *grid, 2, 4)
        clean = neighborhood_attention(q, k, v, geometry, backend="native")
        q[0, 4, ..., 1, 2] = torch.nan
        dirty = neighborhood_attention(q, k, v, geometry, backend="native")
        hit = q.isnan().any(-1)
        assert dirty[hit].isnan().all()
        assert torch.equal(dirty[~hit], clean[~hit])


@compiled
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_key_that_is_no_number_is_no_number_for_all_who_see_it(value: float) -> None:
    q, k, v = qkv(1, 90, 2, 4)
    k[:, 40] = value
    expected = neighborhood_attention(q, k, v, Neighborhood(7), return_lse=True, backend="reference")
    found = neighborhood_attention(q, k, v, Neighborhood(7), return_lse=True, backend="native")
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        assert_close(a, e)


@compiled
def test_huge_scores_neither_overflow_nor_vanish() -> None:
    for factor in (1e3, 1e18):
        q, k, v = (x * factor if i < 2 else x for i, x in enumerate(qkv(1, 50, 2, 8)))
        tensors = [x.requires_grad_() for x in (q, k, v)]
        out, lse = neighborhood_attention(*tensors, TEXT, return_lse=True, backend="native")
        expected = neighborhood_attention(
            *(x.detach().double() for x in tensors), TEXT, return_lse=True, backend="reference"
        )
        assert_close(out, expected[0], within=1e-3)  # products of this size are rounded to whole numbers
        assert_close(lse, expected[1])
        if factor == 1e3:  # beyond, a rounding of the score is an exponent that overflows
            for grad in torch.autograd.grad(out.sum(), tensors):
                assert grad.isfinite().all()


@compiled
def test_empty_batches_and_no_queries_at_all() -> None:
    q, k, v = qkv(0, 9, 2, 4, requires_grad=True)
    out, lse = neighborhood_attention(q, k, v, TEXT, return_lse=True, backend="native")
    assert out.shape == (0, 9, 2, 4)
    assert lse.shape == (0, 9, 2)
    assert all(x.shape == (0, 9, 2, 4) for x in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))
    q, k, v = qkv(2, 9, 2, 4, requires_grad=True)
    with poisoned_empty():
        out = neighborhood_attention(q[:, 9:], k, v, TEXT, backend="native")
        for grad in torch.autograd.grad(out.sum(), (q, k, v)):
            assert (grad == 0).all()
    more = [x[:, :0] for x in qkv(2, 3, 2, 4)[1:]]
    found = neighborhood_attention(
        q, k, v, TEXT, additional_keys=more[0], additional_values=more[1], backend="native"
    )
    assert torch.equal(found, neighborhood_attention(q, k, v, TEXT, backend="native"))


@compiled
@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (partial(neighborhood_attention, geometry=TEXT), (2, 9, 2, 4)),
        (partial(neighborhood_attention_varlen, geometry=TEXT, cu_seqlens=[0, 4, 9]), (1, 9, 2, 4)),
        (partial(dense_attention, is_causal=True), (2, 9, 2, 4)),
        (partial(window_attention, window_size=3), (2, 9, 2, 4)),
    ],
)
def test_second_derivatives_are_refused_with_a_way_out(call: Callable[..., Tensor], shape: Any) -> None:
    tensors = qkv(*shape, requires_grad=True)
    (grad,) = torch.autograd.grad(call(*tensors, backend="native").sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match='"native" .* backend="reference"'):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(call(*tensors, backend="reference").sum(), tensors[0], create_graph=True)
    grad.sum().backward()


@compiled
@pytest.mark.usefixtures("call_native")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_every_function(dtype: torch.dtype) -> None:
    tensors = qkv(1, 12, 2, 4)
    calls: list[Callable[..., Any]] = [
        partial(neighborhood_attention, geometry=TEXT),
        partial(neighborhood_attention_varlen, geometry=TEXT, cu_seqlens=[0, 5, 12]),
        partial(dense_attention, is_causal=True),
        partial(window_attention, window_size=4),
        lambda q, k, v: neighborhood_attention_decode(q[:, -2:], k, v, TEXT),
    ]
    for call in calls:
        with torch.autocast("cpu", dtype):
            out = call(*tensors)
        assert out.dtype == dtype
        assert torch.equal(out, call(*(x.to(dtype) for x in tensors)))


@compiled
@pytest.mark.usefixtures("call_native")
def test_vmap_is_a_batch_of_every_function() -> None:
    tensors = qkv(3, 1, 12, 2, 4)
    table = torch.randn(3, 2, 11)
    calls: list[Callable[..., Any]] = [
        lambda q, k, v, table: neighborhood_attention(q, k, v, TEXT),
        lambda q, k, v, table: neighborhood_attention(q, k, v, TEXT, bias=table),
        lambda q, k, v, table: neighborhood_attention_varlen(q, k, v, TEXT, cu_seqlens=[0, 5, 12]),
        lambda q, k, v, table: neighborhood_attention_decode(q[:, -2:], k, v, TEXT, bias=table),
        lambda q, k, v, table: dense_attention(q, k, v, is_causal=True),
        lambda q, k, v, table: window_attention(q, k, v, window_size=4),
    ]
    for call in calls:
        expected = torch.stack([call(*parts) for parts in zip(*tensors, table, strict=True)])
        assert_close(torch.vmap(call)(*tensors, table), expected)
        assert_close(
            torch.vmap(call, (0, None, None, None))(tensors[0], tensors[1][0], tensors[2][0], table[0]),
            torch.stack([call(q, tensors[1][0], tensors[2][0], table[0]) for q in tensors[0]]),
        )


@compiled
@pytest.mark.compile
@pytest.mark.usefixtures("call_native")
def test_every_function_compiles_whole_with_moving_sizes() -> None:
    calls: list[Callable[..., Any]] = [
        lambda q, k, v: neighborhood_attention(q, k, v, TEXT, return_lse=True)[0],
        lambda q, k, v: neighborhood_attention_varlen(
            q[:1], k[:1], v[:1], TEXT, cu_seqlens=[0, 5, q.shape[1]]
        ),
        lambda q, k, v: dense_attention(q, k, v, is_causal=True),
        lambda q, k, v: dense_attention(q, k, v),
        lambda q, k, v: window_attention(q, k, v, window_size=3),
    ]
    for call in calls:
        torch._dynamo.reset()
        whole = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for side in (9, 24):
            tensors = qkv(2, side, 4, 8, num_kv_heads=2, requires_grad=True)
            results = []
            for function in (whole, call):
                out = function(*tensors)
                results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
            for a, e in zip(*results, strict=True):
                assert torch.equal(a, e)


@compiled
@pytest.mark.compile
def test_it_exports_with_a_moving_side() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return neighborhood_attention(q, k, v, TEXT, backend="native")

    side = {1: torch.export.Dim("side", min=8, max=512)}
    program = torch.export.export(Module(), qkv(1, 12, 2, 8), dynamic_shapes=(side,) * 3)
    other = qkv(1, 31, 2, 8)
    assert torch.equal(program.module()(*other), Module()(*other))


PERTURBED = {
    "one key too few": lambda given: {**given, "kernel_size": tuple(k - 1 for k in given["kernel_size"])},
    "one key too many": lambda given: {**given, "kernel_size": tuple(k + 1 for k in given["kernel_size"])},
    "another scale": lambda given: {**given, "scale": given["scale"] * 1.1},
    "cut at the border": lambda given: {**given, "border": "truncate"},
    "one sink more": lambda given: {**given, "num_sinks": given["num_sinks"] + 1},
}


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", PERTURBED)
def test_a_kernel_that_does_something_else_is_caught(
    what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("kernel_size", "stride", "dilation", "is_causal", "border", "num_sinks", "scale")
    right = native._blank

    def wrong(specs: Any, *given: Any) -> bytes:
        return right(specs, *PERTURBED[what](dict(zip(names, given, strict=True))).values())

    case = Case((125,), Neighborhood(7, num_sinks=1), heads=4, dim=16, dv=16)
    check_backend(case, "native", dtype)
    monkeypatch.setattr(native, "_blank", wrong)
    with pytest.raises(AssertionError, match="relative rms error"):
        check_backend(case, "native", dtype)


@compiled
@pytest.mark.parametrize("idle", ["nearfield_attention_forward", "nearfield_attention_backward"])
def test_a_kernel_that_does_nothing_is_caught(idle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: None if name == idle else right(name, *rest))
    with poisoned_empty(), pytest.raises(AssertionError, match="relative rms error"):
        check_backend(AWKWARD["2-D 13 x 21"], "native")


@compiled
@pytest.mark.parametrize(
    ("code", "error", "says"),
    [(kernels.NO_MEMORY, torch.OutOfMemoryError, "smaller batch"), (1, RuntimeError, "bug in nearfield")],
)
def test_what_the_library_refuses_is_raised(
    code: int, error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        @staticmethod
        def nearfield_attention_forward(*arguments: Any) -> int:
            return code

    monkeypatch.setattr(library, "kernels", Refusing)
    with pytest.raises(error, match=says):
        neighborhood_attention(*qkv(1, 9, 1, 4), TEXT, backend="native")


@compiled
def test_a_real_refusal_of_the_library_is_raised() -> None:
    problem = library.Attention()
    with pytest.raises(RuntimeError, match="nearfield_attention_forward refused"):
        kernels.call("nearfield_attention_forward", problem, 1)


@compiled
def test_why_names_native_and_what_it_cannot() -> None:
    q, k, v = qkv(1, 8, 1, 4)
    choice = why(q, k, v, Neighborhood(3))
    assert choice.backend == "native"
    assert "comes first" in choice.others["tiled"]
    for tensors, says in (
        ([x.double() for x in (q, k, v)], "not in torch.float64"),
        ([x.to("meta") for x in (q, k, v)], "'meta'"),
        (qkv(1, 8, 1, 1025), "1 to 1024 channels"),
        (qkv(1, 8, 1, 4, value_dim=1025), "1 to 1024 channels"),
    ):
        choice = why(*tensors, Neighborhood(3))
        assert choice.backend == "tiled"
        assert says in choice.others["native"]
    assert "scale" in why(q, k, v, Neighborhood(3), scale=1e39).others["native"]


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where nothing was compiled."""
    library.warn_once.cache_clear()
    reason = "This installation has no compiled CPU kernels. Install a C++ compiler."
    monkeypatch.setattr(library, "kernels", lambda: None)
    monkeypatch.setattr(library, "unavailable", lambda: reason)
    yield
    library.warn_once.cache_clear()


@pytest.mark.usefixtures("without_library")
def test_without_the_library_tiled_runs_and_says_so_once() -> None:
    q, k, v = qkv(1, 9, 2, 4)
    assert why(q, k, v, TEXT).backend == "tiled"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = neighborhood_attention(q, k, v, TEXT)
            packed = neighborhood_attention_varlen(q, k, v, TEXT, cu_seqlens=[0, 9])
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "no compiled CPU kernels" in str(caught[0].message)
    assert torch.equal(found, neighborhood_attention(q, k, v, TEXT, backend="tiled"))
    assert torch.equal(packed, found)


@pytest.mark.usefixtures("without_library")
def test_without_the_library_nothing_is_said_where_it_would_not_have_run() -> None:
    q, k, v = qkv(1, 9, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        neighborhood_attention(*(x.double() for x in (q, k, v)), TEXT)
        neighborhood_attention(q, k, v, TEXT, backend="tiled")
        neighborhood_attention(q, k, v, TEXT, backend="reference")
        torch.func.jvp(lambda q: neighborhood_attention(q, k, v, TEXT), (q,), (q,))
        dense_attention(q, k, v)  # torch's own fused attention is no slow way
        window_attention(q, k, v, window_size=3)
        neighborhood_attention_decode(q[:, -1:], k, v, TEXT)


@pytest.mark.usefixtures("without_library")
def test_without_the_library_what_asks_for_it_is_refused_with_the_way_out() -> None:
    q, k, v = qkv(1, 9, 2, 4)
    for call in (
        partial(neighborhood_attention, geometry=TEXT),
        partial(neighborhood_attention_varlen, geometry=TEXT, cu_seqlens=[0, 9]),
        partial(neighborhood_attention_decode, geometry=TEXT),
        dense_attention,
        partial(window_attention, window_size=3),
    ):
        with pytest.raises(BackendUnavailable, match=r"Install a C\+\+ compiler"):
            call(q, k, v, backend="native")
    with pytest.raises(BackendUnavailable, match="needs the CPU kernels"):
        native.attend(q, k, v, TEXT.on(9), scale=0.5)


def draw_case(seed: int) -> tuple[Case, torch.dtype]:
    """A random problem of `neighborhood_attention`."""
    r = random.Random(seed)
    rank = r.choice((1, 1, 2, 3))
    grid = tuple(r.randint(1, {1: 40, 2: 12, 3: 6}[rank]) for _ in range(rank))
    border: Any = r.choice(("shift", "truncate", "pad"))
    kernels, strides, dilations, causal = [], [], [], []
    for side in grid:
        causal.append(r.random() < 0.35)
        dilations.append(r.choice((1, 1, r.randint(1, side))))
        fits = border == "shift" and not causal[-1]
        kernels.append(r.randint(1, side // dilations[-1] if fits else side + 4))
        strides.append(r.choice((1, r.randint(1, kernels[-1]))))
    sinks = r.choice((0, 0, 1, 3)) if rank == 1 else 0
    kv_heads = r.randint(1, 3)
    case = Case(
        grid,
        Neighborhood(tuple(kernels), tuple(strides), tuple(dilations), tuple(causal), border, sinks),
        heads=kv_heads * r.randint(1, 3),
        kv_heads=kv_heads,
        dim=r.choice((1, 3, 4, 8, 16, 33, 60)),
        dv=r.choice((1, 3, 4, 8, 16, 33, 60)),
        batch=r.randint(1, 2),
        num_queries=r.randint(1, grid[0]) if rank == 1 and causal[0] and r.random() < 0.4 else None,
        options=tuple(name for name in ALL if r.random() < 0.3),
        transposed=r.random() < 0.5,
    )
    return case, r.choice((torch.float32, torch.float32, *HALVES))


def outcomes_of_case(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    case, dtype = draw_case(seed)
    return both(case, "native", dtype)


def outcomes_of_packed(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Output, log-sum-exp and gradients of a random packed problem: native, and the reference in float64."""
    r = random.Random(seed)
    rank, count, dtype = r.choice((1, 1, 2, 3)), r.randint(1, 5), r.choice((torch.float32, *HALVES))
    largest = {1: 30, 2: 7, 3: 4}[rank]
    grids = [tuple(r.randint(0 if i else 1, largest) for _ in range(rank)) for i in range(count)]
    r.shuffle(grids)
    kernel = tuple(r.randint(1, 6) for _ in range(rank))
    sinks = r.choice((0, 2)) if rank == 1 else 0
    border: Any = r.choice(("truncate", "pad"))
    geometry = Neighborhood(kernel, 1, r.randint(1, 2), r.random() < 0.4, border, sinks)
    kv_heads, tokens = r.randint(1, 2), sum(map(prod, grids))
    heads, dim, dv = kv_heads * r.randint(1, 2), r.choice((3, 8, 20)), r.choice((4, 9))
    shapes = {
        "query": (tokens, heads, dim),
        "key": (tokens, kv_heads, dim),
        "value": (tokens, kv_heads, dv),
        "additional_keys": (count, 3, kv_heads, dim),
        "additional_values": (count, 3, kv_heads, dv),
        "bias": (heads, *(2 * k - 1 for k in kernel)),
        "sink_logits": (heads,),
    }
    extra, bias, logits, masked = (r.random() < 0.4 for _ in range(4))
    used = dict(zip(shapes, (True, True, True, extra, extra, bias, logits), strict=True))
    results = []
    for backend, wide in (("native", dtype), ("reference", torch.float64)):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, draw: torch.Generator = draw, wide: torch.dtype = wide) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).to(wide)

        given: Any = {name: normal(*shapes[name]).requires_grad_() for name in shapes if used[name]}
        mask = torch.rand(tokens, generator=draw) < 0.7 if masked else None
        out, lse = neighborhood_attention_varlen(
            **given, geometry=geometry, grids=grids, key_mask=mask, return_lse=True, backend=backend
        )
        loss = (out * normal(*out.shape)).sum() + (
            lse.masked_fill(lse == -torch.inf, 0) * normal(*lse.shape)
        ).sum()
        # the reference leaves out the additional keys of sequences without tokens
        grads = torch.autograd.grad(loss, given.values(), materialize_grads=True)
        results.append([out, lse, *grads])
    return results[0], results[1]


def outcomes_of_decoding(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Output and log-sum-exp of a random step against a cache: native, and the reference in float64."""
    r, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = r.choice((torch.float32, *HALVES))
    batch, rows, keys, kv_heads = r.randint(1, 3), r.randint(1, 4), r.randint(4, 70), r.randint(1, 3)
    heads, dim, dv = kv_heads * r.randint(1, 4), r.choice((1, 5, 8, 33, 64)), r.choice((1, 4, 17, 64))
    kernel, border = r.randint(1, 80), r.choice(("shift", "truncate", "pad"))
    geometry = Neighborhood(
        kernel, r.choice((1, r.randint(1, kernel))), r.randint(1, 3), True, border, r.choice((0, 0, 1, 4))
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    tensors = [
        normal(batch, rows, heads, dim),
        normal(batch, kv_heads, keys, dim).transpose(1, 2),  # as caches lie
        normal(batch, kv_heads, keys, dv).transpose(1, 2),
    ]
    last = r.randint(rows - 1, keys + 9)
    at = torch.arange(last - rows + 1, last + 1)[None]
    places = [torch.randperm(keys + 10, generator=draw)[:keys] for _ in range(batch)]
    slots = torch.stack([x.masked_fill(torch.rand(keys, generator=draw) < 0.2, -1) for x in places])
    options: dict[str, Any] = {"query_positions": at, "key_positions": slots}
    if r.random() < 0.3:
        options["first_position"] = torch.randint(0, 4, (batch,), generator=draw)
    if r.random() < 0.3:
        options = {"visible": torch.rand(r.choice((1, batch)), rows, keys, generator=draw) < 0.6}
    floats = {}
    if r.random() < 0.4 and border != "pad":
        floats["bias"] = normal(heads, 2 * kernel - 1)
    if r.random() < 0.4:
        floats["sink_logits"] = normal(heads)
    results = []
    for backend, wide in (("native", dtype), ("reference", torch.float64)):
        q, k, v, *more = (x.to(wide) for x in (*tensors, *floats.values()))
        given = options | dict(zip(floats, more, strict=True))
        found = neighborhood_attention_decode(q, k, v, geometry, return_lse=True, backend=backend, **given)
        results.append(list(found))
    return results[0], results[1]


def sweep(outcomes: Callable[[int], tuple[list[Tensor], list[Tensor]]], seeds: range) -> None:
    """Fail with the seeds of all random problems whose results are too far from the reference."""
    failed = []
    for seed in seeds:
        actual, expected = outcomes(seed)
        for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
            # More than is allowed elsewhere: few numbers do not average their errors, and the sums of
            # gradients over all tokens that make one number of a bias or sink logit may nearly cancel.
            allowed = (4 if a.numel() > 8 else 40) * tolerance(actual[0].dtype, gradient=number > 1)
            error = relative_error(a, e)
            if not error <= allowed:
                failed.append(f"seed {seed}, result {number} ({a.dtype}): {error:.3g}, allowed {allowed:.3g}")
    assert not failed, "\n".join([f"{outcomes.__name__}:", *failed])


KINDS = [outcomes_of_case, outcomes_of_packed, outcomes_of_decoding]


@compiled
@pytest.mark.parametrize(("outcomes", "count"), list(zip(KINDS, (100, 25, 25), strict=True)))
def test_random_problems(outcomes: Any, count: int) -> None:
    sweep(outcomes, range(count))


@compiled
@pytest.mark.native
@pytest.mark.parametrize("part", range(20))
@pytest.mark.parametrize(("outcomes", "count"), list(zip(KINDS, (400, 60, 40), strict=True)))
def test_ten_thousand_random_problems(outcomes: Any, count: int, part: int) -> None:
    sweep(outcomes, range(1000 + part * count, 1000 + (part + 1) * count))


@compiled
@pytest.mark.native
@pytest.mark.parametrize("isa", library.isas())
def test_random_problems_in_every_instruction_set(isa: str) -> None:
    with library.use(isa), poisoned_empty():
        for outcomes, count in zip(KINDS, (100, 25, 25), strict=True):
            sweep(outcomes, range(count))
