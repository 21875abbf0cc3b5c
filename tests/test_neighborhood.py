"""Laws of neighborhood attention: the reference against loops, every backend against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import nearfield.ops.neighborhood.attention as family
from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.dense import dense_attention
from nearfield.ops.neighborhood import (
    Neighborhood,
    neighborhood_attention,
    neighborhood_attention_decode,
    neighborhood_attention_varlen,
    visible_slots,
    why,
)
from nearfield.ops.window import window_attention
from nearfield.testing import assert_close, poisoned_empty, qkv

FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
FAST = ("tiled", "native") if library.unavailable() is None else ("tiled",)
BACKENDS = ("reference", *FAST)


@dataclass(frozen=True)
class Case:
    """One problem: a grid, a pattern, head counts and dims, and the options that it uses."""

    grid: tuple[int, ...]
    geometry: Neighborhood
    heads: int = 2
    kv_heads: int = 2
    dim: int = 4
    dv: int = 4
    batch: int = 1
    num_queries: int | None = None
    options: tuple[str, ...] = ()
    transposed: bool = False

    def inputs(
        self, dtype: torch.dtype, requires_grad: bool = False
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Query, key and value, and the options by name."""
        shape = (self.batch, *self.grid, self.heads, self.dim)
        tensors = list(qkv(*shape, num_kv_heads=self.kv_heads, value_dim=self.dv, dtype=dtype))
        if self.num_queries is not None:
            tensors[0] = tensors[0][:, -self.num_queries :]
        if self.transposed:  # as from [B, H, N, D]: same values, other strides
            tensors = [x.transpose(1, -2).contiguous().transpose(1, -2) for x in tensors]
        draw = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        sides = [2 * axis.kernel_size - 1 for axis in self.geometry.on(self.grid).axes]
        made = {
            "additional_keys": lambda: normal(self.batch, 3, self.kv_heads, self.dim),
            "additional_values": lambda: normal(self.batch, 3, self.kv_heads, self.dv),
            "bias": lambda: normal(self.heads, *sides),
            "key_mask": lambda: torch.rand(self.batch, *self.grid, generator=draw) < 0.6,
            "sink_logits": lambda: normal(self.heads),
        }
        names = [
            n for n in made if n in self.options or (n.startswith("add") and "additional" in self.options)
        ]
        options = {name: made[name]() for name in names}
        if requires_grad:
            for x in (*tensors, *options.values()):
                x.requires_grad_(x.is_floating_point())
        return tensors, options


LOOPS = {
    "1-D": Case((7,), Neighborhood(3)),
    "even window, stride": Case((9,), Neighborhood(4, stride=2), dv=3),
    "causal stride dilation": Case((9,), Neighborhood(3, 2, 2, is_causal=True), batch=2),
    "decode with sinks": Case(
        (9,), Neighborhood(2, is_causal=True, num_sinks=2), num_queries=4, options=("key_mask",)
    ),
    "sinks of both sides": Case(
        (6,), Neighborhood(3, border="truncate", num_sinks=1), options=("bias", "sink_logits")
    ),
    "few see anything": Case((6,), Neighborhood(1), batch=2, options=("key_mask",)),
    "window beyond the row": Case((3,), Neighborhood(5, is_causal=True, border="pad"), options=("bias",)),
    "2-D": Case((4, 3), Neighborhood((3, 2), (1, 2)), heads=4, options=("additional", "bias")),
    "2-D pad": Case((3, 4), Neighborhood((2, 3), 1, (1, 2), border="pad"), options=("bias", "key_mask")),
    "2-D, all options": Case(
        (2, 3),
        Neighborhood((1, 2), (1, 2), border="pad"),
        kv_heads=1,
        dim=2,
        dv=1,
        options=("additional", "bias", "key_mask", "sink_logits"),
    ),
    "2-D truncate": Case((4, 3), Neighborhood((5, 3), (2, 3), border="truncate"), options=("key_mask",)),
    "2-D pad without a bias": Case((3, 3), Neighborhood(3, 2, border="pad"), options=("sink_logits",)),
    "3-D": Case(
        (2, 3, 3), Neighborhood((2, 2, 3), (1, 2, 1), is_causal=(True, False, False)), options=("bias",)
    ),
}

AWKWARD = {
    "125 tokens": Case((125,), Neighborhood(7), heads=4, dim=16, dv=16),
    "63, causal, sinks, grouped": Case(
        (63,),
        Neighborhood(16, is_causal=True, num_sinks=3),
        heads=6,
        dim=60,
        dv=60,
        batch=2,
        options=("key_mask",),
    ),
    "kernel is the side": Case((31,), Neighborhood(31), dim=8, dv=12),
    "dilation times kernel is the side": Case((30,), Neighborhood(5, dilation=6), transposed=True),
    "causal kernel is the side": Case((33,), Neighborhood(33, is_causal=True), heads=4, transposed=True),
    "five new tokens": Case((70,), Neighborhood(9, is_causal=True, num_sinks=2), num_queries=5, dim=8, dv=8),
    "strided causal": Case((67,), Neighborhood(12, 5, 2, is_causal=True), options=("bias", "sink_logits")),
    "one key": Case((17,), Neighborhood(1)),
    "2-D 13 x 21": Case((13, 21), Neighborhood((7, 4)), heads=4, dim=8, dv=5, options=("bias", "additional")),
    "2-D stride dilation": Case((19, 12), Neighborhood((5, 4), (3, 4), (3, 2)), transposed=True),
    "2-D pad": Case(
        (9, 10), Neighborhood((5, 4), (1, 2), border="pad"), batch=2, options=("bias", "key_mask")
    ),
    "2-D truncate": Case((11, 9), Neighborhood(20, border="truncate"), options=("key_mask", "sink_logits")),
    "3-D": Case(
        (4, 7, 6), Neighborhood((3, 3, 2), is_causal=(True, False, False)), batch=2, options=("bias",)
    ),
}


def widest(backend: str) -> torch.dtype:
    """The most precise dtype that a backend computes in."""
    return torch.float32 if backend == "native" else torch.float64


def loops(
    query: Tensor, key: Tensor, value: Tensor, geometry: Neighborhood, **options: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, one query at a time, from the windows of the geometry."""
    grid, heads = key.shape[1:-2], query.shape[-2]
    bound = geometry.on(tuple(grid), num_queries=query.shape[1] if len(grid) == 1 else None)
    group, scale = heads // key.shape[-2], query.shape[-1] ** -0.5
    mask = options.get("key_mask", torch.ones(key.shape[:-2], dtype=torch.bool))
    out, lse = (
        query.new_zeros(*query.shape[:-1], value.shape[-1]),
        query.new_full(query.shape[:-1], -torch.inf),
    )
    places = list(product(*map(range, query.shape[1:-2])))
    for b, (number, place), h in product(range(len(query)), enumerate(places), range(heads)):
        at = bound.coordinates(number + bound.offset)
        spans = []
        for axis, i in zip(bound.axes, at, strict=True):
            start, end = axis.interval(i // axis.dilation, i % axis.dilation)
            if geometry.border != "pad":
                start, end = max(start, 0), min(end, axis.group_size(i % axis.dilation))
            steps = range(start - i // axis.dilation, end - i // axis.dilation)
            spans.append([(i + step * axis.dilation, step + axis.kernel_size - 1) for step in steps])
        q, scores, values, seen = query[(b, *place, h)], [], [], set()

        for steps in product(*spans):
            j = tuple(step[0] for step in steps)
            extra = options["bias"][(h, *(step[1] for step in steps))] if "bias" in options else 0.0
            if not all(0 <= x < side for x, side in zip(j, grid, strict=True)):
                scores.append(query.new_zeros(()) + extra)
                values.append(value.new_zeros(value.shape[-1]))
            elif mask[(b, *j)]:
                seen.add(j)
                scores.append(q @ key[(b, *j, h // group)] * scale + extra)
                values.append(value[(b, *j, h // group)])
        if geometry.num_sinks:
            for j in torch.nonzero(mask[b])[: geometry.num_sinks, 0].tolist():
                if (j,) not in seen and (not bound.axes[0].is_causal or j <= at[0]):
                    scores.append(q @ key[b, j, h // group] * scale)
                    values.append(value[b, j, h // group])
        if "additional_keys" in options:
            scores.extend(options["additional_keys"][b, :, h // group] @ q * scale)
            values.extend(options["additional_values"][b, :, h // group])
        if "sink_logits" in options:
            scores.append(options["sink_logits"][h])
            values.append(value.new_zeros(value.shape[-1]))
        if scores:
            lse[(b, *place, h)] = torch.stack(scores).logsumexp(0)
            out[(b, *place, h)] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out, lse


def both(case: Case, backend: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output, log-sum-exp and every gradient: by the backend in `dtype`, by the reference in float64."""
    results = []
    for name, kind in ((backend, dtype), ("reference", torch.float64)):
        tensors, options = case.inputs(dtype)
        tensors = [x.to(kind).requires_grad_() for x in tensors]
        options = {n: x.to(kind).requires_grad_() if x.is_floating_point() else x for n, x in options.items()}
        out, lse = neighborhood_attention(*tensors, case.geometry, return_lse=True, backend=name, **options)
        draw = torch.Generator().manual_seed(2)
        pull = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(kind) for x in (out, lse)]
        loss = (out * pull[0]).sum() + (lse.masked_fill(lse == -torch.inf, 0) * pull[1]).sum()
        wanted = [x for x in (*tensors, *options.values()) if x.requires_grad]
        results.append([out, lse, *torch.autograd.grad(loss, wanted)])
    return results[0], results[1]


def check_backend(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Fail where the backend differs from the reference by more than rounding."""
    actual, expected = both(case, backend, dtype)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a.to(dtype), e, gradient=number > 1)


@pytest.mark.parametrize("name", LOOPS)
def test_the_reference_is_the_definition(name: str) -> None:
    tensors, options = LOOPS[name].inputs(torch.float64)
    expected = loops(*tensors, LOOPS[name].geometry, **options)
    found = neighborhood_attention(
        *tensors, LOOPS[name].geometry, return_lse=True, backend="reference", **options
    )
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("name", ["few see anything", "2-D, all options"])
def test_the_reference_has_all_derivatives(name: str) -> None:
    case = LOOPS[name]
    tensors, options = case.inputs(torch.float64, requires_grad=True)
    names = [n for n, x in options.items() if x.is_floating_point()]

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        given = {**options, **dict(zip(names, inputs[3:], strict=True))}
        out, lse = neighborhood_attention(
            *inputs[:3], case.geometry, return_lse=True, backend="reference", **given
        )
        return out, lse.masked_fill(lse == -torch.inf, 0)

    inputs = (*tensors, *(options[n] for n in names))
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_a_query_that_sees_nothing_gets_zero_and_zero_gradient() -> None:
    for backend in BACKENDS:
        tensors = qkv(1, 5, 1, 4, requires_grad=True)
        mask = torch.tensor([[True, True, False, True, True]])
        out, lse = neighborhood_attention(
            *tensors, Neighborhood(1), key_mask=mask, return_lse=True, backend=backend
        )
        assert (out[0, 2] == 0).all()
        assert (lse[0, 2] == -torch.inf).all()
        assert lse[0, [0, 1, 3, 4]].isfinite().all()
        for grad in torch.autograd.grad(out.sum(), tensors):
            assert grad.isfinite().all()
            assert (grad[0, 2] == 0).all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", AWKWARD)
def test_fast_equals_the_reference(name: str, backend: str) -> None:
    check_backend(AWKWARD[name], backend)


@pytest.mark.compile
@pytest.mark.slow
def test_flex_equals_the_reference() -> None:
    q, k, v = qkv(1, 130, 2, 16)
    geometry = Neighborhood(9, is_causal=True)
    try:
        found = neighborhood_attention(q, k, v, geometry, return_lse=True, backend="flex")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    expected = neighborhood_attention(q, k, v, geometry, return_lse=True, backend="reference")
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("tiled", torch.float64), *product(FAST, [torch.bfloat16, torch.float16])],
)
def test_fast_in_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    check_backend(AWKWARD["63, causal, sinks, grouped"], backend, dtype)
    check_backend(AWKWARD["2-D 13 x 21"], backend, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_reference_in_half_precision_is_near_itself_in_double(dtype: torch.dtype) -> None:
    check_backend(AWKWARD["2-D 13 x 21"], "reference", dtype)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["63, causal, sinks, grouped", "2-D pad", "3-D", "2-D stride dilation"])
def test_no_memory_is_left_unwritten(name: str, backend: str) -> None:
    with poisoned_empty():
        assert torch.empty(3).isnan().all()
        check_backend(AWKWARD[name], backend)
    assert not torch.empty(3).fill_(0).isnan().any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["125 tokens", "2-D 13 x 21"])
def test_a_backend_that_misses_one_key_is_caught(
    name: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = family.MODULES[backend].attend

    def attend(query, key, value, bound, **options):
        mask = torch.ones(key.shape[:-2], dtype=torch.bool)
        mask.view(-1)[len(mask.view(-1)) // 2] = False
        return right(query, key, value, bound, **{**options, "key_mask": mask})

    monkeypatch.setitem(family.MODULES, backend, SimpleNamespace(attend=attend))
    with pytest.raises(AssertionError, match="relative rms error"):
        check_backend(AWKWARD[name], backend, dtype)


@st.composite
def axes(draw: st.DrawFn, *, max_side: int = 12, dilated: bool = True) -> tuple[int, int, int, int]:
    """Side, kernel size, stride and dilation of one axis."""
    side = draw(st.integers(2, max_side))
    kernel = draw(st.integers(1, side))
    dilation = draw(st.integers(1, side // kernel)) if dilated else 1
    return side, kernel, draw(st.integers(1, kernel)), dilation


@FEW
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.sampled_from(BACKENDS), st.booleans())
def test_kernel_of_the_side_is_full_attention(grid: list[int], backend: str, causal: bool) -> None:
    q, k, v = qkv(2, *grid, 4, 8, num_kv_heads=2, dtype=widest(backend))
    causal = causal and len(grid) == 1
    out = neighborhood_attention(q, k, v, Neighborhood(tuple(grid), is_causal=causal), backend=backend)
    full = dense_attention(
        q.flatten(1, -3), k.flatten(1, -3), v.flatten(1, -3), is_causal=causal, backend="reference"
    )
    assert_close(out.flatten(1, -3), full)


@FEW
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3),
    st.sampled_from(BACKENDS),
)
def test_kernel_equal_to_stride_is_window_attention(tiles: list[tuple[int, int]], backend: str) -> None:
    size = tuple(a for a, _ in tiles)
    q, k, v = qkv(1, *(a * n for a, n in tiles), 2, 4, dtype=widest(backend))
    out = neighborhood_attention(q, k, v, Neighborhood(size, stride=size), backend=backend)
    assert_close(out, window_attention(q, k, v, window_size=size, backend="tiled"))


@FEW
@given(axes(dilated=False), st.integers(2, 3), st.booleans(), st.sampled_from(["shift", "truncate", "pad"]))
def test_dilation_is_that_many_interleaved_problems(
    axis: tuple[int, int, int, int], dilation: int, causal: bool, border: str
) -> None:
    side, kernel, stride, _ = axis
    for backend in BACKENDS:
        tensors = qkv(1, side * dilation, 2, 4, dtype=widest(backend))
        whole = neighborhood_attention(
            *tensors, Neighborhood(kernel, stride, dilation, causal, border), backend=backend
        )
        for group in range(dilation):
            parts = (x[:, group::dilation] for x in tensors)
            part = neighborhood_attention(
                *parts, Neighborhood(kernel, stride, 1, causal, border), backend="reference"
            )
            assert_close(whole[:, group::dilation], part)


@FEW
@given(st.tuples(axes(max_side=9), axes(max_side=9)), st.sampled_from(BACKENDS))
def test_interior_rows_shift_with_the_input(
    both_axes: tuple[tuple[int, int, int, int], ...], backend: str
) -> None:
    sides, kernels, strides, dilations = zip(*both_axes, strict=True)
    moves = [s * d for s, d in zip(strides, dilations, strict=True)]
    margins = [k * d for k, d in zip(kernels, dilations, strict=True)]
    grid = [n + m + 2 * b for n, m, b in zip(sides, moves, margins, strict=True)]
    large = qkv(1, *grid, 1, 4, dtype=widest(backend))
    geometry = Neighborhood(kernels, strides, dilations)
    spans = [slice(m, None) for m in moves]
    ends = [slice(None, n - m) for n, m in zip(grid, moves, strict=True)]
    here = neighborhood_attention(*(x[(slice(None), *ends)] for x in large), geometry, backend=backend)
    there = neighborhood_attention(*(x[(slice(None), *spans)] for x in large), geometry, backend=backend)
    inner = [slice(b + m, n - m - b) for b, m, n in zip(margins, moves, grid, strict=True)]
    moved = [slice(b, n - 2 * m - b) for b, m, n in zip(margins, moves, grid, strict=True)]
    assert_close(there[(slice(None), *moved)], here[(slice(None), *inner)])


@FEW
@given(axes(), st.booleans(), st.sampled_from(["shift", "truncate"]), st.sampled_from(BACKENDS))
def test_rows_sum_to_one(axis: tuple[int, int, int, int], causal: bool, border: str, backend: str) -> None:
    side, kernel, stride, dilation = axis
    q, k, v = qkv(1, side, 2, 4, dtype=widest(backend))
    out = neighborhood_attention(
        q, k, torch.ones_like(v), Neighborhood(kernel, stride, dilation, causal, border), backend=backend
    )
    assert_close(out, torch.ones_like(v))


@FEW
@given(axes(), st.integers(0, 11), st.integers(0, 2), st.sampled_from(BACKENDS))
def test_causal_output_ignores_a_poisoned_future(
    axis: tuple[int, int, int, int], now: int, sinks: int, backend: str
) -> None:
    side, kernel, _, dilation = axis  # with a stride the end of the row, too, moves the last window
    now = min(now, side - 1)
    q, k, v = qkv(1, side, 2, 4, dtype=widest(backend))
    geometry = Neighborhood(kernel, 1, dilation, is_causal=True, num_sinks=sinks)
    short = neighborhood_attention(*(x[:, : now + 1] for x in (q, k, v)), geometry, backend="reference")
    for x in (k, v):
        x[:, now + 1 :] = 1e30
    out = neighborhood_attention(q, k, v, geometry, backend=backend)
    assert_close(out[:, : now + 1], short)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_may_hold_anything(backend: str) -> None:
    tensors = [x.clone() for x in qkv(2, 9, 2, 4)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    geometry = Neighborhood(3, border="truncate")
    clean = neighborhood_attention(*tensors, geometry, key_mask=mask, backend=backend)
    for x in tensors[1:]:
        x[:, 6:] = torch.nan
        x.requires_grad_()
    dirty = neighborhood_attention(*tensors, geometry, key_mask=mask, backend=backend)
    assert torch.equal(clean, dirty)
    for grad in torch.autograd.grad(dirty.sum(), tensors[1:]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_parts_merge_by_their_lse(backend: str) -> None:
    q, k, v = qkv(1, 6, 6, 2, 8, dtype=widest(backend))
    _, more_k, more_v = qkv(1, 5, 2, 8, dtype=widest(backend), seed=3)
    options = {"return_lse": True, "backend": backend}
    whole, _ = neighborhood_attention(
        q, k, v, Neighborhood(3), additional_keys=more_k, additional_values=more_v, **options
    )
    near, near_lse = neighborhood_attention(q, k, v, Neighborhood(3), **options)
    scores = torch.einsum("bxyhd,blhd->bxyhl", q, more_k) * 8**-0.5
    far = torch.einsum("bxyhl,blhd->bxyhd", scores.softmax(-1), more_v)
    share = torch.sigmoid(near_lse - scores.logsumexp(-1))[..., None]
    assert_close(near * share + far * (1 - share), whole)


@pytest.mark.compile
@pytest.mark.parametrize(("backend", "rank"), [("reference", 1), *product(FAST, [1, 2])])
def test_the_public_function_compiles_whole_with_moving_sizes(backend: str, rank: int) -> None:
    geometry = Neighborhood(5, is_causal=rank == 1, num_sinks=2 if rank == 1 else 0)
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, geometry, backend=backend)

    # the reference is plain torch: its capture is the claim
    compiler = "eager" if backend == "reference" else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    for side in (9, 23):
        tensors = qkv(2, *[side + i for i in range(rank)], 2, 8, requires_grad=True)
        found, expected = compiled(*tensors), call(*tensors)
        assert_close(found, expected)
        for a, e in zip(
            *(torch.autograd.grad(x.square().sum(), tensors) for x in (found, expected)), strict=True
        ):
            assert_close(a, e, gradient=True)


@pytest.mark.compile
@pytest.mark.parametrize("rank", [1, 2])
def test_the_reference_exports_with_moving_sides(rank: int) -> None:
    geometry = Neighborhood((3, 5)[:rank], is_causal=rank == 1)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return neighborhood_attention(q, k, v, geometry, backend="reference")

    sides = {i + 1: torch.export.Dim(f"side{i}", min=8, max=512) for i in range(rank)}
    program = torch.export.export(Module(), qkv(1, *(12, 14)[:rank], 2, 8), dynamic_shapes=(sides,) * 3)
    other = qkv(1, *(31, 17)[:rank], 2, 8)
    assert_close(program.module()(*other), Module()(*other))


@pytest.mark.parametrize("backend", FAST)
def test_fast_ops_are_good_citizens(backend: str) -> None:
    tensors = qkv(1, 4, 5, 2, 4, requires_grad=True)
    geometry = ([3, 2], [1, 1], [1, 1], [False, False], "shift", 0)
    arguments = (*tensors, None, None, torch.zeros(2, 5, 3, requires_grad=True), None, None, *geometry, 0.5)
    torch.library.opcheck(getattr(torch.ops.nearfield, f"{backend}_attention"), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_the_lower_precision(backend: str) -> None:
    tensors = qkv(2, 40, 2, 8)
    geometry = Neighborhood(5, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = neighborhood_attention(*tensors, geometry, return_lse=True, backend=backend)
    plain, _ = neighborhood_attention(
        *(x.bfloat16() for x in tensors), geometry, return_lse=True, backend=backend
    )
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_a_batch(backend: str) -> None:
    tensors = qkv(3, 2, 12, 2, 4)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, Neighborhood(3), backend=backend)

    expected = torch.stack([call(*parts) for parts in zip(*tensors, strict=True)])
    assert_close(torch.vmap(call)(*tensors), expected)


def test_auto_leaves_function_transforms_to_the_reference() -> None:
    q, k, v = qkv(1, 20, 2, 4)

    def call(query: Tensor, backend: str = "auto") -> Tensor:
        return neighborhood_attention(query, k, v, Neighborhood(3), backend=backend)

    _, tangent = torch.func.jvp(call, (q,), (torch.ones_like(q),))
    step = 1e-3
    assert_close(tangent, (call(q + step) - call(q - step)) / (2 * step), within=1e-2)
    with torch.autograd.forward_ad.dual_level():
        dual = call(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    x = q.clone().requires_grad_()
    assert_close(torch.func.grad(lambda q: call(q).sum())(q), torch.autograd.grad(call(x).sum(), x)[0])
    for backend in FAST:
        with pytest.raises(BackendUnavailable, match=r"torch\.func"):
            torch.func.jvp(lambda q, backend=backend: call(q, backend), (q,), (q,))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_lengths_packed_are_separate_calls(backend: str) -> None:
    lengths = [5, 9, 5, 0, 12]
    q, k, v = qkv(1, sum(lengths), 4, 4, num_kv_heads=2, value_dim=3)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.rand(1, sum(lengths), generator=torch.Generator().manual_seed(4)) < 0.7
    geometry = Neighborhood(3, is_causal=True, num_sinks=2)
    out, lse = neighborhood_attention_varlen(
        q, k, v, geometry, cu_seqlens=ends, key_mask=mask, return_lse=True, backend=backend
    )
    assert out.shape == (1, sum(lengths), 4, 3)
    for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        if a == b:
            continue
        part = neighborhood_attention(
            q[:, a:b],
            k[:, a:b],
            v[:, a:b],
            geometry,
            key_mask=mask[:, a:b],
            return_lse=True,
            backend="reference",
        )
        assert_close(out[:, a:b], part[0])
        assert_close(lse[:, a:b], part[1])


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_grids_packed_are_separate_calls(backend: str) -> None:
    grids = [(4, 5), (3, 3), (4, 5)]
    q, k, v = (x[0] for x in qkv(1, 49, 2, 4))
    _, more_k, more_v = qkv(3, 2, 2, 4, seed=1)
    table = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    options = {"bias": table, "backend": backend}
    out = neighborhood_attention_varlen(
        q, k, v, Neighborhood(3), grids=grids, additional_keys=more_k, additional_values=more_v, **options
    )
    first = 0
    for i, (y, x) in enumerate(grids):
        part = (t[first : first + y * x].reshape(1, y, x, 2, 4) for t in (q, k, v))
        expected = neighborhood_attention(
            *part,
            Neighborhood(3),
            additional_keys=more_k[i : i + 1],
            additional_values=more_v[i : i + 1],
            **options,
        )
        assert_close(out[first : first + y * x], expected.flatten(0, 2))
        first += y * x


@pytest.mark.parametrize("backend", ["auto", *(name for name in BACKENDS if name != "tiled")])
@pytest.mark.parametrize(
    "geometry",
    [
        Neighborhood(6, is_causal=True, num_sinks=2),
        Neighborhood(4, stride=3, is_causal=True),
        Neighborhood(3, dilation=3, is_causal=True, num_sinks=1),
        Neighborhood(50, is_causal=True, border="pad"),
    ],
)
def test_decoding_from_a_rolling_cache_is_the_end_of_the_whole(geometry: Neighborhood, backend: str) -> None:
    length, new = 23, 3
    pads = torch.tensor([0, 6])
    q, k, v = qkv(2, length, 6, 8, num_kv_heads=2, value_dim=4)
    at = torch.arange(length)
    mask = at >= pads[:, None]
    logits = torch.randn(6, generator=torch.Generator().manual_seed(1))
    whole, whole_lse = neighborhood_attention(
        q, k, v, geometry, key_mask=mask, sink_logits=logits, return_lse=True, backend="reference"
    )
    reach = geometry.kernel_size * geometry.dilation + new  # keys that the cache rolls over
    slots = torch.full((2, geometry.num_sinks + reach + 2), -1)
    for row, pad in enumerate(pads.tolist()):
        held = sorted(
            {*range(pad, min(pad + geometry.num_sinks, length)), *range(max(pad, length - reach), length)}
        )
        places = torch.randperm(slots.shape[1], generator=torch.Generator().manual_seed(row))[: len(held)]
        slots[row, places] = torch.tensor(held)
    caches = [x.gather(1, slots.clamp(min=0)[:, :, None, None].expand(-1, -1, *x.shape[2:])) for x in (k, v)]
    options = {
        "query_positions": at[None, -new:],
        "key_positions": slots,
        "first_position": pads,
        "backend": backend,
    }
    out, lse = neighborhood_attention_decode(
        q[:, -new:], *caches, geometry, sink_logits=logits, return_lse=True, **options
    )
    assert_close(out, whole[:, -new:])
    assert_close(lse, whole_lse[:, -new:])
    plain = neighborhood_attention(q, k, v, geometry, key_mask=mask, backend="reference")
    assert_close(neighborhood_attention_decode(q[:, -new:], *caches, geometry, **options), plain[:, -new:])
    one = {**options, "query_positions": at[None, -1:]}
    assert_close(neighborhood_attention_decode(q[:, -1:], *caches, geometry, **one), plain[:, -1:])


def test_decoding_whole_rows_needs_no_positions_and_layers_share_a_mask() -> None:
    geometry = Neighborhood(5, is_causal=True, num_sinks=1)
    q, k, v = qkv(2, 14, 4, 8, num_kv_heads=1)
    table = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    for bias in (None, table):
        whole = neighborhood_attention(q, k, v, geometry, bias=bias)[:, 9:]
        assert_close(neighborhood_attention_decode(q[:, 9:], k, v, geometry, bias=bias), whole)
    at = torch.arange(14)[None]
    seen = visible_slots(geometry, at[:, 9:], at)
    shared = neighborhood_attention_decode(q[:, 9:], k, v, geometry, visible=seen)
    assert_close(shared, neighborhood_attention(q, k, v, geometry)[:, 9:])


@pytest.mark.compile
def test_decoding_compiles_whole_with_moving_sizes() -> None:
    geometry = Neighborhood(8, is_causal=True, num_sinks=2)

    def call(q: Tensor, k: Tensor, v: Tensor, at: Tensor, slots: Tensor) -> Tensor:
        return neighborhood_attention_decode(q, k, v, geometry, query_positions=at, key_positions=slots)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for held in (12, 20):
        q, k, v = qkv(2, held, 4, 8, num_kv_heads=2)
        slots = torch.arange(held).expand(2, -1)
        arguments = (q[:, -1:], k, v, slots[:, -1:], slots)
        assert_close(compiled(*arguments), call(*arguments))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"geometry": Neighborhood(3)}, ValueError, "is_causal=True"),
        ({"geometry": Neighborhood((3, 3), is_causal=True)}, ValueError, "1 dimension"),
        ({"query_positions": torch.arange(2)[None]}, ValueError, "both or neither"),
        ({"key": torch.zeros(1, 1, 1, 4), "value": torch.zeros(1, 1, 1, 4)}, ValueError, "new tokens"),
        ({"visible": torch.ones(1, 2, 4, dtype=torch.bool)}, ValueError, "visible"),
        ({"backend": "flex"}, BackendUnavailable, "flex"),
        ({"backend": "tiled", "return_lse": True}, BackendUnavailable, "return_lse"),
    ],
)
def test_decoding_refuses_wrong_arguments(changes: dict, error: type[Exception], says: str) -> None:
    q, k, v = qkv(1, 5, 1, 4)
    given = {"query": q[:, -2:], "key": k, "value": v, "geometry": Neighborhood(3, is_causal=True), **changes}
    with pytest.raises(error, match=says):
        neighborhood_attention_decode(**given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "either cu_seqlens"),
        ({"cu_seqlens": [0, 3]}, "rise from 0 to the 5"),
        ({"cu_seqlens": [0, 4, 2, 5]}, "rise from 0 to the 5"),
        ({"grids": [2, 2]}, "4 tokens; 5 were given"),
        ({"grids": [2, 3], "query": torch.zeros(2, 5, 1, 4)}, "packed"),
    ],
)
def test_packed_calls_refuse_wrong_arguments(changes: dict, says: str) -> None:
    q, k, v = qkv(1, 5, 1, 4)
    given = {"query": q, "key": k, "value": v, "geometry": Neighborhood(2), **changes}
    with pytest.raises(ValueError, match=says):
        neighborhood_attention_varlen(**given)


def bad(**changes: object) -> object:
    """The call with some arguments replaced."""
    q, k, v = qkv(2, 8, 4, 4, num_kv_heads=2)
    return neighborhood_attention(
        **{"query": q, "key": k, "value": v, "geometry": Neighborhood(3), **changes}
    )


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"geometry": 3}, TypeError, "Give a Neighborhood"),
        ({"query": torch.zeros(2, 8, 4)}, ValueError, "grid sides"),
        ({"query": torch.zeros(2, 8, 3, 4)}, ValueError, "multiple"),
        ({"query": torch.zeros(2, 8, 4, 5)}, ValueError, "to fit"),
        ({"query": torch.zeros(2, 8, 4, 4, dtype=torch.int64)}, TypeError, "floating"),
        ({"query": torch.zeros(2, 9, 4, 4)}, ValueError, "Fewer queries"),
        ({"value": torch.zeros(2, 7, 2, 4)}, ValueError, "value has shape"),
        ({"value": torch.zeros(2, 8, 2, 4, dtype=torch.float64)}, TypeError, "dtype"),
        ({"key": torch.zeros(2, 8, 2, 4, device="meta")}, ValueError, "one device"),
        ({"additional_keys": torch.zeros(2, 1, 2, 4)}, ValueError, "both or neither"),
        ({"bias": torch.zeros(4, 3)}, ValueError, "[4, 5]"),
        ({"key_mask": torch.ones(2, 8)}, TypeError, "torch.bool"),
        ({"key_mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, "[2, 8]"),
        ({"sink_logits": torch.zeros(2)}, ValueError, "[4]"),
        ({"scale": torch.ones(())}, TypeError, "multiply the query"),
        ({"geometry": Neighborhood(9)}, ValueError, "kernel_size=9"),
        ({"geometry": Neighborhood((3, 3))}, ValueError, "1 dimension"),
        ({"backend": "tilde"}, ValueError, "'tiled'"),
        ({"backend": "triton"}, BackendUnavailable, "need tensors on a GPU"),
        (
            {
                **dict.fromkeys(("query", "key", "value"), torch.zeros(2, 8, 4, 4).double()),
                "backend": "native",
            },
            BackendUnavailable,
            "not in torch.float64",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_a_way_out(changes: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        bad(**changes)
    assert says in str(caught.value)


def test_the_environment_replaces_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEARFIELD_BACKEND", "triton")
    with pytest.raises(BackendUnavailable):
        bad()
    bad(backend="reference")
    monkeypatch.setenv("NEARFIELD_BACKEND", "fast")
    with pytest.raises(ValueError, match="NEARFIELD_BACKEND"):
        bad()


def test_why_names_the_backend_and_the_reasons() -> None:
    choice = why(*qkv(1, 8, 1, 4), Neighborhood(3))
    assert choice.backend == FAST[-1]
    assert all(name in str(choice) for name in ("tiled", "native", "triton", "flex", "reference"))
    assert all(choice.others.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_inputs_pass_through(backend: str) -> None:
    q, k, v = qkv(1, 9, 1, 4)
    q[:, 4] = torch.nan
    out = neighborhood_attention(q, k, v, Neighborhood(3), backend=backend)
    assert out[:, 4].isnan().all()
    assert out[:, [0, 8]].isfinite().all()
