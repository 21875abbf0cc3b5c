"""The Triton kernels of neighborhood attention: interpreted against the reference, compiled without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood import (
    Neighborhood,
    neighborhood_attention,
    neighborhood_attention_decode,
    neighborhood_attention_varlen,
    triton,
    triton_plan,
    tuned,
    why,
)
from nearfield.ops.neighborhood.geometry import Axis
from nearfield.ops.neighborhood.triton_plan import Config, Sides
from nearfield.testing import assert_close, qkv, relative_error
from tests.test_neighborhood import AWKWARD, FEW, LOOPS, Case, both

installed = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
Python = Callable[..., "subprocess.CompletedProcess[str]"]

# Boxes have 8 tokens where these run, so a few tokens are several boxes.
CASES = {
    "1-D, grouped heads": Case((21,), Neighborhood(5), heads=2, kv_heads=1, dim=20, dv=7),
    "no box needs a mask": Case((32,), Neighborhood(16, stride=8), dim=16, dv=16),
    "whole boxes between masked ones": Case((40,), Neighborhood(29), heads=1, kv_heads=1),
    "causal, strided, dilated, sinks, mask, last queries": Case(
        (27,),
        Neighborhood(6, 2, 2, is_causal=True, num_sinks=3),
        batch=2,
        num_queries=11,
        options=("key_mask", "sink_logits"),
    ),
    "sinks without a mask, dilated": Case(
        (19,), Neighborhood(3, dilation=2, is_causal=True, num_sinks=2), kv_heads=1, options=("additional",)
    ),
    "truncate, sinks of both sides, bias, additional": Case(
        (14,), Neighborhood(5, border="truncate", num_sinks=2), options=("bias", "additional"), dv=5
    ),
    "2-D pad, bias, mask": Case((5, 6), Neighborhood((3, 4), (1, 2), border="pad"), heads=1, kv_heads=1,
                                batch=2, options=("bias", "key_mask")),
    "2-D pad, no bias": Case(
        (5, 4), Neighborhood(3, 2, border="pad"), heads=1, kv_heads=1, options=("sink_logits", "additional")
    ),
    "2-D, strided, dilated, other strides": Case(
        (9, 8), Neighborhood((3, 4), (1, 2), (2, 1)), heads=2, kv_heads=1, transposed=True
    ),
    "2-D whole boxes": Case((8, 8), Neighborhood(6, 2), heads=1, kv_heads=1, options=("bias",)),
    "2-D, all options": replace(LOOPS["2-D, all options"], grid=(4, 5)),
    "3-D, causal in time": Case(
        (3, 4, 5), Neighborhood((2, 3, 3), is_causal=(True, False, False)), heads=1, kv_heads=1,
        options=("sink_logits",),
    ),
    "3-D whole boxes": Case((4, 4, 6), Neighborhood((4, 3, 5)), heads=1, kv_heads=1),
    "few see anything": LOOPS["few see anything"],
    "window beyond the row": LOOPS["window beyond the row"],
}  # fmt: skip
HALVES = ("1-D, grouped heads", "2-D, all options", "causal, strided, dilated, sinks, mask, last queries")

# Triton must know before its import that it is to interpret. At each call of a function inside a kernel it
# looks through the whole of its language, which once per launch and module would do.
PRELUDE = """
import json, torch, triton
from triton.runtime import interpreter

seen, launch = set(), interpreter.GridExecutor.__call__

def launch_afresh(self, *args, **kwargs):
    seen.clear()
    return launch(self, *args, **kwargs)

def call(self, *args, **kwargs):
    home = id(self.fn.__globals__)
    if home not in seen:
        interpreter._patch_lang(self.fn)
        seen.add(home)
    return self.rewrite()(*args, **kwargs)

interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch_afresh, call

patch = interpreter._patch_lang

def patch_lang(function):
    scope = patch(function)
    triton.language.core.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
    return scope

if triton.__version__.startswith("3.6."):  # makes numbers of arrays [1], which NumPy refuses from 2.4 on
    interpreter._patch_lang = patch_lang

from nearfield.ops.neighborhood import triton_plan
for table in triton_plan.TABLES.values():
    table.update(dict.fromkeys(table, (triton_plan.Config(8, 8, 4, 1),)))
triton_plan.BOXED.clear()

from nearfield.testing import poisoned_empty, relative_error
from {home} import {function}
print(json.dumps({function}(*{arguments!r})))
"""


def interpreted(python: Python, function: str, *arguments: Any, home: str = __name__) -> Any:
    """What a function of a test file, by default this one, returns where Triton interprets."""
    code = PRELUDE.format(function=function, arguments=arguments, home=home)
    done = python("-W", "ignore", "-c", code, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def errors(names: list[str], dtype: str) -> dict[str, list[float]]:
    """Relative errors of outputs and of every gradient; memory that is not written is NaN."""
    from nearfield.testing import poisoned_empty

    found = {}
    for name in names:
        with poisoned_empty():
            actual, expected = both({**AWKWARD, **LOOPS, **CASES}[name], "triton", getattr(torch, dtype))
        found[name] = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    return found


@installed
def test_interpreted_kernels_equal_the_reference(python: Python) -> None:
    for name, found in interpreted(python, "errors", list(CASES), "float32").items():
        assert max(found[:2]) < 2e-6, (name, found)
        assert max(found) < 5e-6, (name, found)


@installed
def test_interpreted_kernels_equal_the_reference_in_half_precision(python: Python) -> None:
    for name, found in interpreted(python, "errors", HALVES, "float16").items():
        assert max(found[:2]) < 1.5e-3, (name, found)
        assert max(found) < 3e-3, (name, found)


@installed
@pytest.mark.slow
def test_interpreted_kernels_equal_the_reference_on_awkward_shapes(python: Python) -> None:
    names = ["five new tokens", "2-D stride dilation", "3-D"]
    assert not set(names) & set(CASES)
    for name, found in interpreted(python, "errors", names, "float32").items():
        assert max(found[:2]) < 2e-6, (name, found)
        assert max(found) < 5e-6, (name, found)


def conduct() -> dict[str, Any]:
    """What else holds where Triton interprets, by name."""
    found: dict[str, Any] = {}
    geometry = Neighborhood(3, is_causal=True, num_sinks=2)

    # packed sequences are separate calls
    lengths = [5, 9, 0, 4]
    q, k, v = qkv(1, sum(lengths), 2, 4, num_kv_heads=1, value_dim=3, requires_grad=True)
    mask = torch.rand(1, sum(lengths), generator=torch.Generator().manual_seed(4)) < 0.7
    ends = torch.tensor([0, *lengths]).cumsum(0)
    more = [x.requires_grad_() for x in qkv(4, 2, 1, 4, value_dim=3, seed=1)[1:]]
    results = []
    for backend in ("triton", "reference"):
        for key_mask in (mask, None):
            out, lse = neighborhood_attention_varlen(
                q, k, v, geometry, cu_seqlens=ends, key_mask=key_mask, additional_keys=more[0],
                additional_values=more[1], return_lse=True, backend=backend,
            )  # fmt: skip
            loss = out.square().sum() + lse.sin().sum()
            results.append([out, lse, *torch.autograd.grad(loss, (q, k, v, *more))])
    found["packed"] = max(
        relative_error(a, e) for i in (0, 1) for a, e in zip(results[i], results[i + 2], strict=True)
    )
    grids = [(4, 5), (3, 3)]
    q, k, v = (x[0].requires_grad_() for x in qkv(1, 29, 1, 4))
    table = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        out = neighborhood_attention_varlen(
            q, k, v, Neighborhood(3), grids=grids, bias=table, backend=backend
        )
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, table))])
    found["packed grids"] = max(relative_error(a, e) for a, e in zip(*results, strict=True))

    # decoding, the keys split and whole
    from nearfield.ops.neighborhood import triton_decode

    triton_decode.COLUMNS = 8
    table = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(4, generator=torch.Generator().manual_seed(2))
    wide = Neighborhood(5, is_causal=True, num_sinks=1)
    for programs in (1, 64):
        triton_decode.PROGRAMS = programs
        for name, options in {"plain": {}, "bias": {"bias": table, "sink_logits": logits}}.items():
            q, k, v = qkv(2, 21, 4, 8, num_kv_heads=2, value_dim=3)
            pair = [
                neighborhood_attention_decode(
                    q[:, 18:], k, v, wide, return_lse=True, backend=backend,
                    first_position=torch.tensor([0, 20]), **options,
                )
                for backend in ("triton", "reference")
            ]  # fmt: skip
            found[f"decode {name} {programs}"] = max(relative_error(a, e) for a, e in zip(*pair, strict=True))

    # masked keys may hold anything
    tensors = [x.clone() for x in qkv(2, 9, 2, 4)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    clean = neighborhood_attention(
        *tensors, Neighborhood(3, border="truncate"), key_mask=mask, backend="triton"
    )
    for x in tensors[1:]:
        x[:, 6:] = torch.nan
        x.requires_grad_()
    dirty = neighborhood_attention(
        *tensors, Neighborhood(3, border="truncate"), key_mask=mask, backend="triton"
    )
    grads = torch.autograd.grad(dirty.sum(), tensors[1:])
    found["masked keys"] = torch.equal(clean, dirty) and all(x.isfinite().all() for x in grads)

    # scales that are not above zero, with every option
    case = Case((9,), Neighborhood(3, is_causal=True, num_sinks=1), kv_heads=1, dv=3, num_queries=6,
                options=("additional", "bias", "key_mask", "sink_logits"))  # fmt: skip
    tensors, options = case.inputs(torch.float32, requires_grad=True)
    leaves = [x for x in (*tensors, *options.values()) if x.requires_grad]
    for scale in (-0.3, 0.0):
        results = []
        for backend in ("triton", "reference"):
            out, lse = neighborhood_attention(
                *tensors, case.geometry, scale=scale, return_lse=True, backend=backend, **options
            )
            loss = out.square().sum() + lse.sin().sum()
            results.append([out, lse, *torch.autograd.grad(loss, leaves)])
        found[f"scale {scale}"] = max(relative_error(a, e) for a, e in zip(*results, strict=True))

    # torch's citizens
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return neighborhood_attention(q, k, v, Neighborhood(3), backend="triton")

    tensors = qkv(3, 1, 9, 1, 4)
    one = torch.stack([call(*parts) for parts in zip(*tensors, strict=True)])
    found["vmap"] = relative_error(torch.vmap(call)(*tensors), one)
    tensors = qkv(1, 9, 1, 4, requires_grad=True)
    grads = [torch.autograd.grad(call(*tensors).square().sum(), tensors) for _ in range(2)]
    one = call(*tensors)
    found["same bits"] = all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    found["why"] = str(why(*tensors, Neighborhood(3)))

    # boxes that were measured for a kernel that cannot run this call
    alien = {"forward": triton_plan.Tiling((1, 1, 128), (1, 1, 128), 4, 2, True, True, "groups")}
    with tuned.trying(alien):
        found["not by groups"] = torch.equal(call(*tensors), one)

    # broken on purpose
    right = triton_plan.tiling
    triton_plan.tiling = lambda *given: replace(right(*given), partial=False, whole=True)
    case = CASES["whole boxes between masked ones"]
    broken = [relative_error(a, e) for a, e in zip(*both(case, "triton", torch.float32), strict=True)]
    triton_plan.tiling = right
    found["broken"] = broken[:2]
    return found


@installed
def test_interpreted_kernels_conduct_themselves(python: Python) -> None:
    found = interpreted(python, "conduct")
    for name in found:
        if name.startswith(("packed", "decode", "scale", "vmap")):
            assert found[name] < 5e-6, name
    assert found["masked keys"]
    assert found["same bits"]
    assert found["not by groups"]
    told = next(line for line in found["why"].splitlines() if line.strip().startswith("triton"))
    assert "GPU" not in told
    assert min(found["broken"]) > 1e-2


def by_box() -> dict[str, list[Any]]:
    """Whether tokens were fetched by box, and errors of all results, where Triton interprets."""
    right, described = triton_plan.tiling, triton._Problem.boxes_of
    triton_plan.tiling = lambda *given: replace(right(*given), way=given[-1])
    asked: list[Any] = []
    triton._Problem.boxes_of = lambda self, *given: (asked.append(given), described(self, *given))[1]
    found: dict[str, list[Any]] = {}

    def compare(name: str, tensors: Any, geometry: Neighborhood, **options: Any) -> None:
        asked.clear()
        leaves = [x.detach().requires_grad_() for x in tensors]
        pair = []
        for backend in ("triton", "reference"):
            out, lse = neighborhood_attention(*leaves, geometry, return_lse=True, backend=backend, **options)
            loss = out.square().sum() + lse.sin().sum()
            pair.append([out, lse, *torch.autograd.grad(loss, leaves)])
        found[name] = [len(asked), *(relative_error(a, e) for a, e in zip(*pair, strict=True))]

    causal = Neighborhood(5, is_causal=True, num_sinks=1)
    q, k, v = qkv(2, 19, 2, 16, num_kv_heads=1, value_dim=32)
    k[1], v[1] = k[1] + 1, v[1] + 1  # what lies beyond the end of a sample is another one
    compare("1-D", (q[:, 8:], k, v), causal)
    compare("1-D, packed in one tensor", torch.cat([q, q, q], 2).split(2, 2), causal)
    table = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(3))
    compare("2-D", qkv(1, 5, 6, 1, 16), Neighborhood((3, 4), (1, 2), border="pad"))
    compare("by rows: biased", qkv(1, 5, 6, 1, 16), Neighborhood((3, 4), (1, 2), border="pad"), bias=table)
    compare("3-D", qkv(1, 3, 4, 5, 1, 16), Neighborhood((2, 3, 3)))
    compare("by rows: dilated", qkv(1, 9, 1, 16), Neighborhood(3, dilation=2))
    compare("by rows: heads apart", [x.transpose(1, 2) for x in qkv(1, 2, 9, 16)], Neighborhood(3))
    compare("by rows: twenty channels", qkv(1, 9, 1, 20), Neighborhood(3))
    mask = torch.arange(9)[None] < 7
    compare("by rows: masked", qkv(1, 9, 1, 16), Neighborhood(3, border="truncate"), key_mask=mask)
    triton_plan.tiling, triton._Problem.boxes_of = right, described
    return found


@installed
def test_interpreted_boxes_are_fetched_where_the_layout_allows_it(python: Python) -> None:
    for name, (fetched, *found) in interpreted(python, "by_box").items():
        assert fetched == (0 if name.startswith("by rows") else 6), name
        assert max(found[:2]) < 2e-6, (name, found)
        assert max(found) < 5e-6, (name, found)


def opcheck() -> bool:
    """The operators pass torch's own tests; the public function compiles whole."""

    tensors = qkv(1, 3, 4, 1, 4, requires_grad=True)
    geometry = ([3, 2], [1, 1], [1, 1], [False, False], "shift", 0)
    bias = torch.zeros(1, 5, 3, requires_grad=True)
    arguments = (*tensors, None, None, bias, None, None, *geometry, 0.5)
    torch.library.opcheck(torch.ops.nearfield.triton_attention, arguments)
    packed = [x[0].flatten(0, 1).detach().requires_grad_() for x in tensors]
    arguments = (*packed, None, None, None, None, None, [3, 4], *geometry, 0.5)
    torch.library.opcheck(torch.ops.nearfield.triton_attention_varlen, arguments)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return neighborhood_attention(q, k, v, Neighborhood(3), backend="triton")

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for side in (7, 9):
        tensors = qkv(1, side, 1, 4, requires_grad=True)
        pair = [torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (call, compiled)]
        for a, e in zip(*pair, strict=True):
            assert_close(a, e, gradient=True)
    return True


@installed
@pytest.mark.compile
@pytest.mark.slow
def test_the_operators_are_good_citizens(python: Python) -> None:
    assert interpreted(python, "opcheck")


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    size = draw(st.integers(1, 17))
    dilation = draw(st.integers(1, min(3, size)))
    border = draw(st.sampled_from(["shift", "truncate", "pad"]))
    kernel = draw(st.integers(1, size // dilation if border == "shift" else 9))
    return Axis(size, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans()), border)


@FEW
@given(axes(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 5))
def test_boxes_are_those_of_brute_force(axis: Axis, q_side: int, kv_side: int, late: int) -> None:
    d = axis.dilation
    sees = {i: set(axis.window(i)) for i in range(axis.size)}
    for group in range(d):
        length = axis.group_size(group)

        def seen(p: int, j: int, group: int = group, length: int = length) -> bool:
            return p < length and j < length and group + j * d in sees[group + p * d]

        for first in range(0, length, q_side):
            rows = range(first, min(first + q_side, length))
            visit = triton_plan.key_boxes(axis, first, rows[-1], group, kv_side)
            boxes = [
                range(visit.start + b * kv_side, visit.start + (b + 1) * kv_side) for b in range(visit.boxes)
            ]
            inside = {j for box in boxes for j in box}
            assert all(j in inside for p in rows for j in range(length) if seen(p, j))
            whole = [b for b, box in enumerate(boxes) if all(seen(p, j) for p in rows for j in box)]
            assert whole == list(range(visit.first_whole, visit.first_whole + visit.whole)), (axis, first)
        for first in range(0, length, kv_side):
            columns = range(first, min(first + kv_side, length))
            visit = triton_plan.query_boxes(axis, first, columns[-1], group, q_side, late)
            boxes = [
                range(visit.start + b * q_side, visit.start + (b + 1) * q_side) for b in range(visit.boxes)
            ]
            inside = {p for box in boxes for p in box}
            assert all(p in inside for j in columns for p in range(late, length) if seen(p, j))
            whole = [b for b, box in enumerate(boxes) if all(seen(p, j) for p in box for j in columns)]
            assert whole == list(range(visit.first_whole, visit.first_whole + visit.whole)), (axis, first)


@pytest.mark.parametrize("inverse", [False, True])
def test_tiles_follow_the_window_and_aligned_strides_need_no_mask(inverse: bool) -> None:
    kind = "keys" if inverse else "forward"
    aligned = Neighborhood((16, 16, 16), (8, 8, 8)).on((32, 32, 32))
    assert not triton_plan.tiling((aligned,), kind, 2, 128).partial
    small = triton_plan.tiling((Neighborhood(7).on((56, 56)),), kind, 2, 64)
    assert max(small.q_tile) <= 16
    assert small.partial
    dense = triton_plan.tiling((Neighborhood(64).on((64,)),), kind, 2, 64)
    assert (dense.partial, dense.whole) == (False, True)
    tiny = triton_plan.tiling((Neighborhood(2).on((3,)),), kind, 4, 8)
    assert tiny.partial


@pytest.mark.parametrize("kind", ["forward", "keys"])
def test_tiles_are_counted_as_boxes_are(kind: str) -> None:
    axis, inverse = Axis(29, 6, 2, 2, False, "shift"), kind == "keys"
    visited = whole = 0
    for group in range(2):
        length = axis.group_size(group)
        for first in range(0, length, 4):
            last = min(first + 4, length) - 1
            boxes = triton_plan.query_boxes if inverse else triton_plan.key_boxes
            found = boxes(axis, first, last, group, 4)
            visited, whole = visited + found.boxes, whole + found.whole
    assert triton_plan.visits(axis, 4, 4, 0, inverse) == (visited, whole)


@pytest.mark.parametrize("kind", triton_plan.TABLES)
def test_boxes_are_fetched_whole_only_where_shared_memory_holds_them(kind: str) -> None:
    bound = Neighborhood(32).on((64, 64))
    ways = {
        arch: triton_plan.tiling((bound,), kind, 2, 128, arch, "boxes").way for arch in (80, 90, 100, 120)
    }
    assert ways == {80: "rows", 90: "boxes", 100: "boxes", 120: "rows"}


def test_without_a_gpu_the_backend_says_so() -> None:
    q, k, v = qkv(1, 5, 2, 4)
    geometry = Neighborhood(3, is_causal=True)
    says = "the GPU kernels need tensors on a GPU, these are on 'cpu'"
    with pytest.raises(BackendUnavailable, match=says):
        neighborhood_attention(q, k, v, geometry, backend="triton")
    with pytest.raises(BackendUnavailable, match=says):
        neighborhood_attention_varlen(q, k, v, geometry, cu_seqlens=[0, 5], backend="triton")
    with pytest.raises(BackendUnavailable, match=says):
        neighborhood_attention_decode(q, k, v, geometry, backend="triton")
    with pytest.raises(BackendUnavailable, match=r"not in torch\.float64"):
        neighborhood_attention(q.double(), k.double(), v.double(), geometry, backend="triton")
    q, k, v = qkv(1, 2, 1, 300)
    with pytest.raises(BackendUnavailable, match="1 to 256 channels, given 300"):
        neighborhood_attention(q, k, v, geometry, backend="triton")
    q, k, v = qkv(1, 5, 2, 4)
    assert "on a GPU" in why(q, k, v, geometry).others["triton"]


def test_gpus_of_other_makers_are_given_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton.arch(torch.device("cuda")) == 90
    assert triton.arch(torch.device("xpu")) < 90
    monkeypatch.setattr(torch.version, "hip", "7.0")  # there 9.0 is another GPU
    assert triton.arch(torch.device("cuda")) < 90


def test_the_module_imports_without_triton(python: Python) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from nearfield.ops.neighborhood import triton, triton_decode; print(triton.missing('cuda'))"
    )
    done = python("-c", code)
    assert "pip install triton" in done.stdout, done.stderr


KERNELS = {"forward": "forward", "query_gradients": "queries", "key_gradients": "keys"}
FLOATS = {"bias", "sink_logits", "lse", "grad_lse", "level", "less", "shares"}
OPTIONS = ("MASK", "BIAS", "SINK", "MORE", "PLACES", "GRAD_LSE")


def source(name: str, dim: int, dtype: str, tiles: tuple[Config, Sides, Sides], **flags: Any) -> Any:
    """A kernel with the types and sizes that it is compiled for."""
    from triton.compiler import ASTSource

    from nearfield.ops.neighborhood import triton_backward, triton_forward

    config, q_tile, kv_tile = tiles
    kernel = getattr(triton_forward if name == "forward" else triton_backward, name)
    padded = max(16, 1 << (dim - 1).bit_length())
    settings: dict[str, Any] = {
        "TQ": q_tile, "TK": kv_tile, "BM": config.rows, "BN": config.columns, "BL": config.columns, "BO": 32,
        "CAUSAL": (False,) * 3, "BORDER": 0, "D": padded, "DV": padded, "EVEN": dim == padded,
        "EVEN_V": dim == padded, "PACKED": False, "FAR": False, "PARTIAL": True, "WHOLE": True, "RANK": 2,
        "BY_BOX": False, "GROUPED": False,
        **{f"HAS_{option}": False for option in OPTIONS}, **flags,
    }  # fmt: skip
    fetched, sides = (("query", "grad"), q_tile) if name == "key_gradients" else (("key", "value"), kv_tile)
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    aligned: dict[Any, Any] = {}
    for place, own in enumerate(kernel.arg_names):
        whole = [["tt.divisibility", 16]]
        if own in settings:
            signature[own], constants[own] = "constexpr", settings[own]
        elif own in ("grid", "kernel_size", "stride", "dilation"):
            ones = 3 if own == "dilation" else 3 - settings["RANK"]
            signature[own] = ("constexpr",) * ones + ("i32",) * (3 - ones)
            constants.update({(place, i): 1 for i in range(ones)})
        elif own.endswith("_strides"):
            signature[own] = ("i32",) * (3 if own.startswith("more") else 5)
            aligned.update({(place, i): whole for i in range(len(signature[own]))})
        elif own == "scale":
            signature[own] = "fp32"
        elif own in ("head_dim", "value_dim"):
            signature[own] = "i32"
            if dim % 16 == 0:
                aligned[(place,)] = whole
        elif own in FLOATS or (name == "extra_gradients" and own.startswith("d_")):
            signature[own], aligned[(place,)] = "*fp32", whole
        elif own in ("places", "work", "sizes"):
            signature[own] = "*i32"
        elif own == "key_mask":
            signature[own] = "*u8"
        elif settings["BY_BOX"] and own in fetched:
            signature[own] = f"tensordesc<{dtype}[1,{','.join(map(str, sides))},{padded}]>"
        elif own in POINTERS:
            signature[own], aligned[(place,)] = f"*{dtype}", whole
        else:
            signature[own] = "i32"
    return ASTSource(kernel, signature, constants, aligned)


def built(name: str, arch: int, dim: int, dtype: str, config: Config, **flags: Any) -> tuple[Any, int]:
    """A kernel compiled for a GPU of compute capability `arch`, and how many bytes of registers it spills."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget

    made = compiler.compile(
        source(name, dim, dtype, (config, SQUARE[config.rows], SQUARE[config.columns]), **flags),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    return made, spilled_bytes(made)


def spilled_bytes(made: Any) -> int:
    """How many bytes of registers a compiled kernel spills."""
    import triton as compiler

    tool = Path(compiler.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        command = [tool, "--dump-resource-usage", cubin]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", told.stdout)[-1])


POINTERS = {
    "query", "key", "value", "more_key", "more_value", "grad", "out", "d_query", "d_key", "d_value",
}  # fmt: skip
SQUARE = {16: (1, 4, 4), 32: (1, 4, 8), 64: (1, 8, 8), 128: (1, 8, 16)}
SMEM = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


# Bytes with which a kernel was measured to be faster on a GPU than any that spills nothing; a product in
# float32, without matrix units, holds whole rows of both operands in registers.
SPILLED = {
    ("query_gradients", 128, "fp32"): 24,
    ("query_gradients", 256, "fp32"): 328,
    ("query_gradients", 128, "rows"): 16,
    ("query_gradients", 256, "boxes"): 320,
    ("key_gradients", 64, "boxes"): 312,
    ("key_gradients", 128, "rows"): 80,
    ("key_gradients", 128, "boxes"): 176,
    ("key_gradients", 256, "boxes"): 208,
    ("forward", 256, "boxes"): 24,
}


def check_compiled(name: str, arch: int, dim: int, dtype: str, config: Config, **flags: Any) -> Any:
    """It compiles, fits, spills (nearly) nothing, has no atomics and uses the matrix units of its GPU."""
    made, spilled = built(name, arch, dim, dtype, config, **flags)
    ptx = made.asm["ptx"]
    what = dtype if dtype == "fp32" else "boxes" if flags.get("BY_BOX") else "rows"
    allowed = max(SPILLED.get((name, dim, what), 0), 0 if 90 <= arch < 120 else 128)
    assert spilled <= allowed, f"{spilled} bytes spilled"
    assert made.metadata.shared <= SMEM[arch]
    assert not re.search(r"\b(atom|red)\.global", ptx)
    if dtype == "fp32":
        assert "tf32" not in ptx
    elif arch == 90 and max(config.rows, config.columns) >= 64:
        assert "wgmma.mma_async" in ptx
    return made


@installed
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("name", "dim"), [("forward", 128), ("key_gradients", 64)])
def test_kernels_compile_for_hopper(name: str, dim: int) -> None:
    check_compiled(name, 90, dim, "bf16", triton_plan.TABLES[KERNELS[name]][2, dim][0])


@installed
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_boxes_are_fetched_by_the_hardware_of_hopper() -> None:
    made = check_compiled("forward", 90, 128, "bf16", triton_plan.BOXED["forward", 2, 128][0], BY_BOX=True)
    assert "cp.async.bulk.tensor.5d" in made.asm["ptx"]


VARIANTS = [  # kernel, compute capability, channels, dtype
    ("forward", 80, 128, "bf16"),
    ("forward", 100, 128, "bf16"),
    ("forward", 120, 128, "bf16"),
    ("key_gradients", 120, 128, "bf16"),
    ("query_gradients", 90, 128, "fp16"),
    ("key_gradients", 90, 128, "bf16"),
    ("forward", 90, 32, "bf16"),
    ("key_gradients", 90, 64, "bf16"),
    ("forward", 90, 256, "bf16"),
    ("query_gradients", 90, 256, "bf16"),
    ("key_gradients", 90, 256, "bf16"),
    ("forward", 90, 64, "fp32"),
    ("forward", 90, 128, "fp32"),
    ("query_gradients", 90, 128, "fp32"),
    ("key_gradients", 90, 128, "fp32"),
]


@installed
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("name", "arch", "dim", "dtype"), VARIANTS)
def test_configurations_fit_their_gpus(name: str, arch: int, dim: int, dtype: str) -> None:
    for way in ("rows", "boxes"):
        for config in triton_plan.configs(KERNELS[name], 4 if dtype == "fp32" else 2, dim, arch, way):
            check_compiled(name, arch, dim, dtype, config, BY_BOX=way == "boxes")


class Understood(Exception):
    """The compiler has read a kernel; the rest of its work is left out."""


FORMS: list[dict[str, Any]] = [
    {"RANK": 1, "CAUSAL": (False, False, True)},
    {"RANK": 3, "CAUSAL": (True, False, False), "FAR": True, "BORDER": 1},
    {"RANK": 1, "PACKED": True, "WHOLE": False, "BORDER": 1, "options": True},
    {"RANK": 2, "WHOLE": False, "BORDER": 2, "options": True},
    {"RANK": 2, "BORDER": 2, "HAS_SINK": True},
]


@installed
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_every_option_is_understood_by_the_compiler(form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    right = ASTSource.make_ir

    def make_ir(*arguments: Any) -> None:
        assert "tt.func" in str(right(*arguments))
        raise Understood

    monkeypatch.setattr(ASTSource, "make_ir", make_ir)
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    flags = dict(FORMS[form])
    if flags.pop("options", False):
        flags |= {f"HAS_{option}": True for option in OPTIONS}
    tiles = (Config(32, 32, 4, 1), SQUARE[32], SQUARE[32])
    for name in (*KERNELS, "extra_gradients", "bias_gradients"):
        with pytest.raises(Understood):
            compiler.compile(source(name, 40, "bf16", tiles, **flags), target=GPUTarget("cuda", 90, 32))


GPU_CASES = {
    "1-D causal, sinks": Case(
        (1000,), Neighborhood(128, is_causal=True, num_sinks=4), heads=4, kv_heads=2, dim=64, dv=64, batch=2
    ),
    "1-D, mask, bias": Case(
        (517,), Neighborhood(31), heads=2, dim=128, dv=96, options=("key_mask", "bias", "sink_logits")
    ),
    "2-D": Case((56, 56), Neighborhood(7), heads=4, kv_heads=4, dim=32, dv=32, batch=2, options=("bias",)),
    "2-D whole boxes": Case((64, 64), Neighborhood(32, 16), heads=2, dim=128, dv=128),
    "2-D pad": Case((33, 40), Neighborhood(9, border="pad"), heads=2, dim=60, dv=60, options=("additional",)),
    "2-D dilated": Case((40, 44), Neighborhood(5, (1, 5), (3, 4)), heads=2, dim=64, dv=64, transposed=True),
    "3-D": Case(
        (8, 20, 22), Neighborhood((4, 9, 8), is_causal=(True, False, False)), heads=2, dim=128, dv=128
    ),
    "1-D causal, sinks, additional, wider": Case(
        (700,),
        Neighborhood(200, is_causal=True, num_sinks=4),
        heads=4,
        kv_heads=2,
        dim=128,
        dv=128,
        options=("additional", "sink_logits"),
    ),
    "wide": Case((300,), Neighborhood(64), heads=2, dim=256, dv=256),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*GPU_CASES, *AWKWARD, *LOOPS])
def test_on_a_gpu_it_is_what_auto_takes_and_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    case = {**LOOPS, **AWKWARD, **GPU_CASES}[name]
    tensors, options = case.inputs(dtype)
    moved = [x.cuda() for x in tensors]
    given = {n: x.cuda() for n, x in options.items()}
    assert why(*moved, case.geometry, **given).backend == "triton"
    results = []
    for kind, backend in ((dtype, "triton"), (torch.float64, "reference")):
        inputs = [x.to(kind).requires_grad_() for x in moved]
        extra = {n: x.to(kind).requires_grad_() if x.is_floating_point() else x for n, x in given.items()}
        out, lse = neighborhood_attention(*inputs, case.geometry, return_lse=True, backend=backend, **extra)
        draw = torch.Generator().manual_seed(2)
        pull = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) for x in (out, lse)]
        loss = (out * pull[0]).sum() + (lse.masked_fill(lse == -torch.inf, 0) * pull[1]).sum()
        wanted = [x for x in (*inputs, *extra.values()) if x.requires_grad]
        results.append([out, lse, *torch.autograd.grad(loss, wanted)])
    for number, (a, e) in enumerate(zip(*results, strict=True)):
        assert_close(a.to(dtype), e, gradient=number > 1)
    assert triton.missing("cuda") is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["1-D causal, sinks", "2-D", "2-D whole boxes", "3-D", "wide"])
def test_on_a_gpu_boxes_fetched_by_the_hardware_are_the_same(name: str) -> None:
    case = GPU_CASES[name]
    tensors, options = case.inputs(torch.bfloat16)
    given = {n: x.cuda() for n, x in options.items()}
    results = []
    for way in ("rows", "boxes"):
        inputs = [x.cuda().requires_grad_() for x in tensors]
        bound = case.geometry.on(case.grid)
        tiles = {
            kind: replace(triton_plan.tiling((bound,), kind, 2, max(case.dim, case.dv)), way=way)
            for kind in triton_plan.TABLES
        }
        with tuned.trying(tiles):
            out, lse = neighborhood_attention(
                *inputs, case.geometry, return_lse=True, backend="triton", **given
            )
            results.append([out, lse, *torch.autograd.grad(out.sum() + lse.sin().sum(), inputs)])
    for rows, boxes in zip(*results, strict=True):
        assert torch.equal(rows, boxes)


@pytest.mark.gpu
def test_on_a_gpu_decoding_and_packing_equal_the_reference() -> None:
    geometry = Neighborhood(300, is_causal=True, num_sinks=4)
    q, k, v = qkv(2, 3000, 8, 128, num_kv_heads=2, dtype=torch.bfloat16, device="cuda")
    pair = [
        neighborhood_attention_decode(q[:, -1:].to(d), k.to(d), v.to(d), geometry, backend=b)
        for d, b in ((torch.bfloat16, "triton"), (torch.float64, "reference"))
    ]
    assert_close(*pair)
    ends = [0, 700, 701, 701, 3000]
    pair = [
        neighborhood_attention_varlen(
            q[:1].to(d), k[:1].to(d), v[:1].to(d), geometry, cu_seqlens=ends, backend=b
        )
        for d, b in ((torch.bfloat16, "triton"), (torch.float64, "reference"))
    ]
    assert_close(*pair)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_gpu_a_graph_replays_it(dim: int) -> None:
    tensors = qkv(1, 40, 40, 2, dim, dtype=torch.float16, device="cuda")
    run = lambda: neighborhood_attention(*tensors, Neighborhood(7), backend="triton")  # noqa: E731
    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
