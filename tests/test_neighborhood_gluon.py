"""The Gluon forward of neighborhood attention: compiled without a GPU, and on one against the reference."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention, triton_plan, tuned
from nearfield.ops.neighborhood.triton_plan import Sides, Tiling
from nearfield.testing import assert_close, poisoned_empty
from tests.test_neighborhood import Case
from tests.test_neighborhood_triton import SMEM, Python, spilled_bytes

TILES: dict[int, tuple[Sides, Sides]] = {
    1: ((1, 1, 128), (1, 1, 128)),
    2: ((1, 8, 16), (1, 8, 16)),
    3: ((2, 8, 8), (4, 4, 8)),
}
SPILLED = 40  # bytes, all of them before and after the loops


def compiled(dim: int, rank: int, dtype: str, **flags: Any) -> Any:
    """The kernel as it is launched on a GPU of compute capability 9.0."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from nearfield.ops.neighborhood import gluon_forward

    gl = gluon_forward.gl
    (q_tile, kv_tile), (config,) = TILES[rank], {**triton_plan.GROUPS, **triton_plan.UNTIMED}[2, dim]
    half = gluon_forward.halved(q_tile)
    settings: dict[str, Any] = {
        "TQ": q_tile, "TH": half, "TK": kv_tile, "CAUSAL": (False,) * 3, "BORDER": 0, "D": dim, "RANK": rank,
        "STAGES": config.stages, "FEW": gluon_forward.FEW, "MANY": gluon_forward.MANY, **flags,
    }  # fmt: skip
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    for place, own in enumerate(gluon_forward.forward.arg_names):
        if own in settings:
            signature[own], constants[own] = "constexpr", settings[own]
        elif own in ("query", "key", "value", "out"):
            sides = ", ".join(map(str, kv_tile if own in ("key", "value") else half))
            layout = gl.NVMMASharedLayout(128, 16, 5)
            signature[own] = f"tensordesc<{dtype}[1, {sides}, {dim}],{layout!r}>"
        elif own in ("grid", "kernel_size", "stride"):
            signature[own] = ("constexpr",) * (3 - rank) + ("i32",) * rank
            constants.update({(place, i): 1 for i in range(3 - rank)})
        else:
            signature[own] = {"lse": "*fp32", "scale": "fp32"}.get(own, "i32")
    return compiler.compile(
        GluonASTSource(gluon_forward.forward, signature, constants, {}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.warps, "maxnreg": gluon_forward.REGISTERS},
    )


@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("dim", "rank", "dtype"), [(128, 2, "bf16"), (128, 3, "bf16"), (64, 1, "fp16")])
def test_it_compiles_for_hopper(dim: int, rank: int, dtype: str) -> None:
    made = compiled(dim, rank, dtype, CAUSAL=(rank == 3, False, False))
    ptx = made.asm["ptx"]
    assert spilled_bytes(made) <= SPILLED
    assert made.metadata.shared <= SMEM[90]
    for wanted in ("wgmma.mma_async", "cp.async.bulk.tensor.5d", "setmaxnreg.dec"):
        assert wanted in ptx
    assert not re.search(r"\b(atom|red)\.global", ptx)


@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
def test_a_triton_that_is_not_known_runs_without_it(python: Python) -> None:
    code = (
        "import triton; triton.__version__ = {!r}\n"
        "from nearfield.ops.neighborhood import gluon_forward; print(gluon_forward.gluon is None)"
    )
    for version, is_off in (("3.10.0", "True"), ("3.9.0", "False")):
        done = python("-W", "ignore", "-c", code.format(version))
        assert done.stdout.split() == [is_off], done.stderr


CASES = {
    "1-D, grouped heads": Case((300,), Neighborhood(37), heads=4, kv_heads=2, dim=64, dv=64, batch=2),
    "1-D, causal, strided": Case(
        (300,), Neighborhood(37, 4, is_causal=True, border="truncate"), dim=128, dv=128, batch=2
    ),
    "1-D, last queries": Case(
        (517,), Neighborhood(129, is_causal=True), kv_heads=1, dim=128, dv=128, batch=2, num_queries=200
    ),
    "1-D, one query": Case((517,), Neighborhood(129, is_causal=True), dim=64, dv=64, num_queries=1),
    "1-D, one key": Case((5,), Neighborhood(1), heads=1, kv_heads=1, dim=64, dv=64),
    "1-D, window beyond the row": Case((50,), Neighborhood(200, border="truncate"), dim=64, dv=64),
    "2-D": Case((30, 41), Neighborhood((7, 9)), dim=128, dv=128, batch=2),
    "2-D, strided": Case((30, 41), Neighborhood((12, 16), (4, 8)), heads=4, kv_heads=1, dim=64, dv=64),
    "2-D, causal in one": Case(
        (48, 64), Neighborhood((24, 32), (2, 1), is_causal=(True, False)), dim=128, dv=128
    ),
    "3-D": Case((9, 10, 21), Neighborhood((5, 6, 7)), kv_heads=1, dim=128, dv=128, batch=2),
    "3-D, aligned": Case((16, 16, 16), Neighborhood((8, 8, 8), (4, 4, 8)), dim=128, dv=128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    from nearfield.ops.neighborhood import gluon_forward

    if gluon_forward.gluon is None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0 and a Triton with Gluon")
    case = CASES[name]
    tensors, _ = case.inputs(dtype)
    tiles = {"forward": Tiling(*TILES[len(case.grid)], 4, 2, True, True, "groups")}
    results = []
    for kind, backend in ((dtype, "triton"), (torch.float64, "reference")):
        inputs = [x.cuda().to(kind).requires_grad_() for x in tensors]
        with tuned.trying(tiles), poisoned_empty():
            out, lse = neighborhood_attention(*inputs, case.geometry, return_lse=True, backend=backend)
            draw = torch.Generator().manual_seed(2)
            pull = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)
            results.append([out, lse, *torch.autograd.grad((out * pull).sum() + lse.sum(), inputs)])
    for number, (a, e) in enumerate(zip(*results, strict=True)):
        assert_close(a.to(dtype), e, gradient=number > 1)


@pytest.mark.gpu
def test_on_a_gpu_wide_plain_patterns_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from nearfield.ops.neighborhood import gluon_forward

    taken = []
    right = gluon_forward.launch
    monkeypatch.setattr(gluon_forward, "launch", lambda *given: (taken.append(given[-1].way), right(*given)))
    q, k, v = (torch.randn(1, 64, 64, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = neighborhood_attention(q, k, v, Neighborhood(32))
    mask = torch.ones(1, 64, 64, dtype=torch.bool, device="cuda")
    masked = neighborhood_attention(q, k, v, Neighborhood(32), key_mask=mask)
    is_hopper = gluon_forward.gluon is not None and torch.cuda.get_device_capability() == (9, 0)
    assert taken == ["groups"] * is_hopper
    assert_close(out, masked)
