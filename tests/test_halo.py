"""Laws of halo attention."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.dense import dense_attention
from nearfield.ops.halo import halo_attention, native, tiled
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.ops.window import window_attention
from nearfield.testing import assert_close, poisoned_empty, qkv

FAST = ("tiled", "native") if library.unavailable() is None else ("tiled",)
BACKENDS = ("reference", *FAST)
GEOMETRIES = [  # grid, block, halo
    ((12,), 4, 1),
    ((5,), 1, 2),
    ((8, 12), (4, 3), (2, 0)),
    ((6, 6), 6, 2),
    ((4, 8), 4, 9),
    ((9, 6), 3, 1),
]


def problem(
    grid: tuple[int, ...],
    block: int | tuple[int, ...],
    halo: int | tuple[int, ...],
    *,
    query_stride: int = 1,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Query, key and value with 3 heads, 5 channels and values of 7, and the tables."""
    query, key, value = qkv(batch, *grid, 3, 5, value_dim=7, dtype=dtype)
    query = query[(slice(None), *(slice(None, None, query_stride) for _ in grid))]
    draw = torch.Generator().manual_seed(1)
    tables = {}
    for axis, name in zip(range(len(grid)), ("height_rel", "width_rel")[-len(grid) :], strict=True):
        sizes = [x[axis] if isinstance(x, tuple) else x for x in (block, halo)]
        side = 2 * (sizes[0] + 2 * sizes[1]) - 1
        tables[name] = torch.randn(side, 5, generator=draw, dtype=torch.float64).to(dtype)
    return (query, key, value), tables


def loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: tuple[int, int],
    halo_size: tuple[int, int],
    height_rel: Tensor | None = None,
    width_rel: Tensor | None = None,
    query_stride: int = 1,
    border: str = "zero",
    rel_stride: str = "exact",
    scale: float,
    scale_positions: bool = False,
) -> Tensor:
    """The definition on a grid of two axes, one query at a time."""
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    (by, bx), (hy, hx) = block_size, halo_size
    wy, wx = by + 2 * hy, bx + 2 * hx
    for b, y, x, h in product(*map(range, query.shape[:-1])):
        q, scores, values = query[b, y, x, h], [], []
        (ny, i), (nx, j) = divmod(y, by // query_stride), divmod(x, bx // query_stride)
        step = query_stride if rel_stride == "exact" else 1
        for m, n in product(range(wy), range(wx)):
            ky, kx = ny * by - hy + m, nx * bx - hx + n
            inside = 0 <= ky < key.shape[1] and 0 <= kx < key.shape[2]
            if border == "mask" and not inside:
                continue
            score = scale * q @ key[b, ky, kx, h] if inside else q.new_zeros(())
            if height_rel is not None and width_rel is not None:
                position = q @ height_rel[wy - 1 + m - i * step] + q @ width_rel[wx - 1 + n - j * step]
                score = score + position * (scale if scale_positions else 1)
            scores.append(score)
            values.append(value[b, ky, kx, h] if inside else torch.zeros_like(value[0, 0, 0, 0]))
        out[b, y, x, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize(
    ("query_stride", "rel_stride", "with_tables", "scale_positions"),
    [
        (1, "exact", True, False),
        (1, "exact", False, False),
        (2, "exact", True, True),
        (2, "timm", True, False),
    ],
)
def test_the_reference_is_the_definition(
    border: str, query_stride: int, rel_stride: str, with_tables: bool, scale_positions: bool
) -> None:
    tensors, tables = problem((4, 2), (4, 2), (1, 2), query_stride=query_stride, batch=1)
    options: dict[str, Any] = {
        "block_size": (4, 2),
        "halo_size": (1, 2),
        "query_stride": query_stride,
        "border": border,
        "rel_stride": rel_stride,
        "scale": 0.3,
        "scale_positions": scale_positions,
        **(tables if with_tables else {}),
    }
    assert_close(halo_attention(*tensors, **options, backend="reference"), loops(*tensors, **options))


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_the_reference_has_all_derivatives(border: str) -> None:
    tensors, tables = problem((4, 2), 2, 1, batch=1)
    inputs = [x[..., :2, :2] for x in tensors] + [x[..., :2] for x in tables.values()]
    inputs = [x.clone().requires_grad_() for x in inputs]

    def call(query: Tensor, key: Tensor, value: Tensor, height_rel: Tensor, width_rel: Tensor) -> Tensor:
        return halo_attention(
            query, key, value, block_size=2, halo_size=1, height_rel=height_rel, width_rel=width_rel,
            border=border, backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def results(
    backend: str, tensors: tuple[Tensor, ...], tables: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """Output and the gradient of every tensor."""
    inputs = [x.to(dtype).requires_grad_() for x in (*tensors, *tables.values())]
    given = dict(zip(tables, inputs[3:], strict=True))
    out = halo_attention(*inputs[:3], **given, **options, backend=backend)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return [out, *torch.autograd.grad((out * pull).sum(), inputs)]


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize(("grid", "block", "halo"), GEOMETRIES)
def test_fast_equals_reference_in_output_and_gradients(
    grid: tuple[int, ...], block: Any, halo: Any, border: str, fast: str
) -> None:
    for dtype in (torch.float32, torch.bfloat16) if fast == "native" else (torch.float32, torch.float64):
        tensors, tables = problem(grid, block, halo, dtype=dtype)
        options = {"block_size": block, "halo_size": halo, "border": border}
        for some in (tables, {}):
            found = results(fast, tensors, some, dtype, **options)
            expected = results("reference", tensors, some, torch.float64, **options)
            for number, (a, e) in enumerate(zip(found, expected, strict=True)):
                assert_close(a, e, gradient=number > 0)


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("rel_stride", ["exact", "timm"])
def test_strided_queries_run_in_tiles(rel_stride: str, border: str) -> None:
    for grid, block, halo in (((8, 4), (4, 2), 1), ((12,), 6, 2)):
        tensors, tables = problem(grid, block, halo, query_stride=2)
        options = {"block_size": block, "halo_size": halo, "border": border, "query_stride": 2}
        options |= {"rel_stride": rel_stride, "scale_positions": True}
        found = results("auto", tensors, tables, torch.float32, **options)
        expected = results("reference", tensors, tables, torch.float64, **options)
        for number, (a, e) in enumerate(zip(found, expected, strict=True)):
            assert_close(a, e, gradient=number > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_strides_take_every_second_query_and_timm_differs(backend: str) -> None:
    (query, key, value), tables = problem((8, 8), 4, 1, dtype=torch.float32)
    options = {"block_size": 4, "halo_size": 1, **tables}
    whole = halo_attention(query, key, value, **options, backend=backend)[:, ::2, ::2]
    few = query[:, ::2, ::2]
    assert_close(halo_attention(few, key, value, **options, query_stride=2), whole)
    with pytest.raises(AssertionError, match="error"):
        assert_close(halo_attention(few, key, value, **options, query_stride=2, rel_stride="timm"), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_strides(backend: str) -> None:
    tensors, tables = problem((8, 6), 2, 1, dtype=torch.float32)
    query, key, value = tensors
    odd = (query.transpose(1, 2).contiguous().transpose(1, 2), key[:, :, :, :1].expand_as(key), value)
    odd = (*odd[:2], value.movedim(-1, 1).contiguous().movedim(1, -1))
    options = {"block_size": 2, "halo_size": 1, **tables}
    expected = halo_attention(query, odd[1].contiguous(), value, **options, backend="reference")
    assert_close(halo_attention(*odd, **options, backend=backend), expected)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_fast_equals_reference_on_any_geometry(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2))
    block = tuple(data.draw(st.integers(1, 4)) for _ in range(rank))
    halo = tuple(data.draw(st.integers(0, 5)) for _ in range(rank))
    grid = tuple(size * data.draw(st.integers(1, 3)) for size in block)
    border = data.draw(st.sampled_from(("zero", "mask")))
    tensors, tables = problem(grid, block, halo, dtype=torch.float32, batch=1)
    given_tables = tables if data.draw(st.booleans()) else {}
    options = {"block_size": block, "halo_size": halo, "border": border, **given_tables}
    expected = halo_attention(*tensors, **options, backend="reference")
    for backend in FAST:
        assert_close(halo_attention(*tensors, **options, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_block_without_halo_is_dense_attention_with_relative_positions(backend: str) -> None:
    (query, key, value), tables = problem((4, 4), 4, 0, dtype=torch.float32)
    out = halo_attention(query, key, value, block_size=4, halo_size=0, **tables, backend=backend)
    place = torch.arange(4)
    offset = 3 + place - place[:, None]
    height = torch.einsum("byxhd,ymd->bhyxm", query, tables["height_rel"][offset])
    width = torch.einsum("byxhd,xmd->bhyxm", query, tables["width_rel"][offset])
    bias = (height[..., :, None] + width[..., None, :]).flatten(4).flatten(2, 3)
    flat = (x.flatten(1, 2) for x in (query, key, value))
    assert_close(out, dense_attention(*flat, mask=bias, backend="reference").unflatten(1, (4, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_one_slide_and_blocks_without_halo_are_windows(backend: str) -> None:
    tensors, _ = problem((6, 4), 1, 1, dtype=torch.float32)
    for border, theirs in (("zero", "pad"), ("mask", "truncate")):
        out = halo_attention(*tensors, block_size=1, halo_size=1, border=border, backend=backend)
        slid = neighborhood_attention(*tensors, Neighborhood(3, border=theirs), backend="reference")
        assert_close(out, slid)
    out = halo_attention(*tensors, block_size=2, halo_size=0, backend=backend)
    assert_close(out, window_attention(*tensors, window_size=2, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shifting_the_input_by_a_block_shifts_the_output(backend: str) -> None:
    tensors, tables = problem((16, 4), 4, 2, dtype=torch.float32)
    options = {"block_size": 4, "halo_size": 2, **tables, "backend": backend}
    out = halo_attention(*tensors, **options)
    moved = halo_attention(*(x.roll(4, 1) for x in tensors), **options).roll(-4, 1)
    assert_close(moved[:, 4:8], out[:, 4:8])  # these see no border and nothing that came around it
    moved = halo_attention(*(x.roll(2, 1) for x in tensors), **options).roll(-2, 1)
    assert not torch.allclose(moved[:, 6:8], out[:, 6:8], atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_beyond_the_halo_are_unseen(backend: str) -> None:
    tensors, tables = problem((8, 8), 2, 1, dtype=torch.float32)
    query, key, value = tensors
    options = {"block_size": 2, "halo_size": 1, **tables, "backend": backend}
    before = halo_attention(query, key, value, **options)
    key[:, 5:], value[:, 5:] = 1e30, 1e30
    after = halo_attention(query, key, value, **options)
    assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4], before[:, 4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_weights_sum_to_one_and_zero_keys_take_their_share(backend: str) -> None:
    (query, key, _), tables = problem((4, 4), 2, 1, dtype=torch.float32)
    ones = torch.ones(*key.shape[:-1], 1)
    options = {"block_size": 2, "halo_size": 1, **tables, "backend": backend}
    assert_close(halo_attention(query, key, ones, border="mask", **options), ones)
    share = halo_attention(query, key, ones, **options)
    assert (share > 0).all() and (share < 1).all()  # each block of this grid has a border


@pytest.mark.parametrize("backend", FAST)
def test_large_position_logits_do_not_overflow(backend: str) -> None:
    tensors, tables = problem((4, 4), 2, 1, dtype=torch.float32)
    tables = {name: table * 100 for name, table in tables.items()}
    for border in ("zero", "mask"):
        options = {"block_size": 2, "halo_size": 1, "border": border}
        found = results(backend, tensors, tables, torch.float32, **options)
        expected = results("reference", tensors, tables, torch.float64, **options)
        # logits of 1000 carry errors of 1e-4, which the softmax hands on
        for a, e in zip(found, expected, strict=True):
            assert_close(a, e, within=2e-3)


@pytest.mark.parametrize("backend", FAST)
def test_no_memory_is_left_unwritten(backend: str) -> None:
    tensors, tables = problem((8, 4), (4, 2), 1)
    options = {"block_size": (4, 2), "halo_size": 1}
    clean = results(backend, tensors, tables, torch.float32, **options)
    with poisoned_empty():
        poisoned = results(backend, tensors, tables, torch.float32, **options)
    for a, e in zip(poisoned, clean, strict=True):
        assert_close(a, e, within=1e-6)


def test_few_rows_of_blocks_at_a_time_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, tables = problem((12, 4), 2, 1, dtype=torch.float32)
    options = {"block_size": 2, "halo_size": 1, **tables, "border": "mask", "backend": "tiled"}
    whole = halo_attention(*tensors, **options)
    monkeypatch.setattr(tiled, "AT_ONCE", 9000)
    assert_close(halo_attention(*tensors, **options), whole)


@pytest.mark.parametrize("backend", FAST)
def test_a_backend_one_key_off_is_noticed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, tables = problem((8, 4), 4, 1, dtype=torch.float32)
    options = {"block_size": 4, "halo_size": 1, **tables}
    expected = halo_attention(*tensors, **options, backend="reference")
    if backend == "tiled":
        windows = tiled._windows
        monkeypatch.setattr(tiled, "_windows", lambda x, blocks: windows(x.roll(1, 1), blocks))
    else:
        places = native._places
        monkeypatch.setattr(native, "_places", lambda *a: (places(*a)[0].roll(1, 1), places(*a)[1]))
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(halo_attention(*tensors, **options, backend=backend), expected)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_it_compiles_whole_with_moving_sizes(backend: str) -> None:
    torch._dynamo.reset()

    def call(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        return halo_attention(query, key, value, block_size=4, halo_size=1, width_rel=table, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for side in (8, 12):
        tensors, tables = problem((side,), 4, 1, dtype=torch.float32)
        inputs = (*tensors, tables["width_rel"])
        assert_close(compiled(*inputs), call(*inputs))


@pytest.mark.compile
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_exports_with_a_side_that_may_change(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return halo_attention(query, key, value, block_size=4, halo_size=1, backend=backend)

    side = {1: 4 * torch.export.Dim("blocks", min=2, max=64)}
    made = qkv(2, 16, 2, 4)
    program = torch.export.export(Layer(), made, dynamic_shapes=(side, side, side), strict=False)
    other = qkv(2, 24, 2, 4)
    assert_close(program.module()(*other), Layer()(*other))


@pytest.mark.compile
def test_its_derivatives_survive_functionalization() -> None:
    torch._dynamo.reset()

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return halo_attention(query, key, value, block_size=2, halo_size=2, backend="tiled")

    tensors = [x.requires_grad_() for x in problem((4, 4), 2, 2, dtype=torch.float32)[0]]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    pairs = [torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, call)]
    for a, e in zip(*pairs, strict=True):
        assert_close(a, e, gradient=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's fused attention under vmap
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_vmap_is_a_batch(backend: str) -> None:
    tensors, tables = problem((4, 4), 2, 1, dtype=torch.float32, batch=3)
    options = {"block_size": 2, "halo_size": 1, **tables, "backend": backend}
    found = torch.vmap(lambda *x: halo_attention(*x, **options))(*(x.unsqueeze(1) for x in tensors))
    assert_close(found.squeeze(1), halo_attention(*tensors, **options))


def test_transforms_take_a_backend_that_has_them() -> None:
    tensors, tables = problem((4, 4), 2, 1, dtype=torch.float64, batch=1)

    def loss(query: Tensor, backend: str) -> Tensor:
        return halo_attention(
            query, *tensors[1:], block_size=2, halo_size=1, **tables, backend=backend
        ).square().sum()  # fmt: skip

    pull = torch.func.grad(loss)
    assert_close(pull(tensors[0], "auto"), pull(tensors[0], "reference"), gradient=True)
    along = [
        torch.func.jvp(lambda q, b=b: loss(q, b), (tensors[0],), (tensors[0],))[1]
        for b in ("auto", "reference")
    ]
    assert_close(*along)
    with pytest.raises(BackendUnavailable, match="forward-mode"):
        torch.func.jvp(lambda q: loss(q, "tiled"), (tensors[0],), (tensors[0],))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_the_lower_precision(backend: str) -> None:
    tensors, tables = problem((4, 4), 2, 1, dtype=torch.float32)
    options = {"block_size": 2, "halo_size": 1, **tables, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        out = halo_attention(*tensors, **options)
    assert torch.equal(out, halo_attention(*(x.bfloat16() for x in tensors), **options))


def test_an_empty_batch_is_an_empty_output() -> None:
    for backend in BACKENDS:
        tensors = [x[:0] for x in problem((4, 4), 2, 1, dtype=torch.float32)[0]]
        assert halo_attention(*tensors, block_size=2, halo_size=1, backend=backend).shape == (0, 4, 4, 3, 7)


def test_wrong_arguments_are_refused_with_a_way_out() -> None:
    tensors, tables = problem((8, 6), 2, 1, dtype=torch.float32)
    query, key, value = tensors
    right = {"block_size": 2, "halo_size": 1}
    for options, says in (
        ({"block_size": 4}, r"Pad the tokens to \(8, 8\)"),
        ({"block_size": 0}, "blocks of at least 1"),
        ({"halo_size": -1}, "halos of at least 0"),
        ({"query_stride": 3}, "does not divide block_size"),
        ({"query_stride": 2}, r"on a grid of \(4, 3\)"),
        ({"border": "shift"}, "'zero' or 'mask'"),
        ({"rel_stride": "torch"}, "'exact' or 'timm'"),
        ({"width_rel": tables["width_rel"]}, "Give both or neither"),
        ({**tables, "halo_size": 2}, r"It must be \[11, 5\]"),
    ):
        with pytest.raises(ValueError, match=says):
            halo_attention(query, key, value, **{**right, **options})
    with pytest.raises(ValueError, match="shares no keys"):
        halo_attention(query, key[..., :1, :], value[..., :1, :], **right)
    flat = [x.flatten(1, 2) for x in tensors]
    with pytest.raises(ValueError, match="as width_rel"):
        halo_attention(*flat, **right, height_rel=tables["height_rel"])
    with pytest.raises(BackendUnavailable, match="as many queries as keys"):
        halo_attention(query[:, ::2, ::2], key, value, **right, query_stride=2, backend="native")
    with pytest.raises(BackendUnavailable, match="no such backend"):
        halo_attention(*tensors, **right, backend="triton")
