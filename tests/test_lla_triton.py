"""The Triton kernels of local linear attention: interpreted against the reference, and compiled for a GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from nearfield.ops.lla import Solver, first_order_attention, local_linear_attention
from nearfield.ops.lla import triton as lla_triton
from nearfield.ops.neighborhood import Neighborhood
from nearfield.testing import assert_close, qkv

installed = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

CASES = """
import torch
from nearfield.ops.lla import Solver, first_order_attention, local_linear_attention, triton
from nearfield.ops.neighborhood import Neighborhood
from nearfield.testing import assert_close, poisoned_empty, qkv

triton.ROWS[16], triton.COLUMNS = 16, 16  # so that few tokens are several tiles
SOLVER = Solver("cg", 20, 1e-7)

def results(backend, dtype, geometry, tokens, queries, masked, ridge_grad, given):
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(2, tokens, 2, 5, num_kv_heads=1, value_dim=3))
    draw = torch.Generator().manual_seed(1)
    more = torch.randn(2, queries, 2, 5, generator=draw)
    more = more if given else more[..., 0].abs() + 0.5
    more = more.to(dtype).requires_grad_()
    mask = torch.rand(2, tokens, generator=draw) < 0.7 if masked else None
    late = q[:, tokens - queries:]
    if given:
        out = first_order_attention(late, k, v, more, geometry, key_mask=mask, backend=backend)
    else:
        options = {"ridge": more, "ridge_grad": ridge_grad, "solver": SOLVER}
        out = local_linear_attention(late, k, v, geometry, key_mask=mask, backend=backend, **options)
    pull = torch.randn(out.shape, generator=draw).to(dtype)
    return [out, *torch.autograd.grad((out * pull).sum(), (q, k, v, more))]

def check(*case):
    expected = results("reference", torch.float64, *case)
    with poisoned_empty():
        found = results("triton", torch.float32, *case)
    for number, (a, e) in enumerate(zip(found, expected)):
        assert_close(a, e, gradient=number > 0)

past, centred, cut = Neighborhood(99, is_causal=True), Neighborhood(6), Neighborhood(5, border="truncate")
window = Neighborhood(9, is_causal=True)
check(window, 21, 21, False, "exact", False)
print("window")
check(past, 19, 5, True, "detached", False)
print("past, last five, masked, detached")
check(centred, 21, 21, False, "exact", False)
print("centred")
check(cut, 18, 18, True, "exact", True)
print("cut, masked, a given correction")
triton._grid = lambda rows, tile, problems: (max(1, rows // tile), problems)  # the last tile is left out
try:
    check(window, 21, 21, False, "exact", False)
except AssertionError:
    print("a tile left out is noticed")
"""
INTERPRETED = (
    "window",
    "past, last five, masked, detached",
    "centred",
    "cut, masked, a given correction",
    "a tile left out is noticed",
)


def test_without_a_gpu_it_says_so_and_auto_does_without() -> None:
    tensors = qkv(1, 5, 2, 4)
    text = lla_triton.unfit(tensors[0], tensors[2])
    assert text is not None
    assert "on a GPU" in text
    local_linear_attention(*tensors, Neighborhood(3, is_causal=True))


@pytest.fixture(scope="module")
def interpreted(python: Callable[..., subprocess.CompletedProcess[str]]) -> subprocess.CompletedProcess[str]:
    """All cases in one process: Triton must know before its import that it is to interpret."""
    return python("-c", CASES, TRITON_INTERPRET="1")


@installed
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernels_equal_the_reference(
    name: str, interpreted: subprocess.CompletedProcess[str]
) -> None:
    assert name in interpreted.stdout.splitlines(), interpreted.stderr[-2000:]


@installed
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", ["forward", "backward_rows", "backward_columns"])
@pytest.mark.parametrize("solve", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_kernels_compile_for_a_gpu(kernel: str, dtype: str, solve: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nearfield.ops.lla import triton_kernels

    function = getattr(triton_kernels, kernel)
    settings = {
        "D": 64, "DV": 64, "BLOCK_M": lla_triton.ROWS[64], "BLOCK_N": lla_triton.COLUMNS, "CAUSAL": True,
        "SHIFT": True, "HAS_MASK": solve, "SOLVE": solve, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "DETACHED": not solve,
    }  # fmt: skip
    inputs = ("query", "key", "value", "grad", "out", "d_query", "d_key", "d_value")
    signature = {}
    for name in function.arg_names:
        if name in settings:
            signature[name] = "constexpr"
        elif name in inputs:
            signature[name] = f"*{dtype}"
        elif name == "key_mask":
            signature[name] = "*u8"
        elif name in ("scale", "tolerance"):
            signature[name] = "fp32"
        elif name in (
            "ridge", "correction", "solved", "lse_in", "lse_out", "key_mean_in", "key_mean_out",
            "value_mean_in", "value_mean_out", "d_ridge", "result", "levels",
        ):  # fmt: skip
            signature[name] = "*fp32"
        else:
            signature[name] = "i32"
    constants = {name: value for name, value in settings.items() if name in function.arg_names}
    source = ASTSource(function, signature, constants)
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": lla_triton.WARPS[64], "num_stages": 1}
    )
    assert ".visible .entry" in made.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.global", made.asm["ptx"])
    assert made.metadata.shared <= 227 * 1024  # what a block of such a GPU has


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [20, 64, 128])
def test_on_a_gpu_it_equals_the_reference(dtype: torch.dtype, width: int) -> None:
    geometry = Neighborhood(100, is_causal=True)
    found, expected = [], []
    for target, backend, wide in ((found, "triton", dtype), (expected, "reference", torch.float64)):
        tensors = [
            x.to(wide).requires_grad_()
            for x in qkv(2, 333, 4, width, num_kv_heads=2, value_dim=40, dtype=dtype, device="cuda")
        ]
        ridge = torch.full((4,), 1.0, device="cuda", requires_grad=True)
        solver = Solver("cg", 30, 1e-7)
        out = local_linear_attention(*tensors, geometry, ridge=ridge, solver=solver, backend=backend)
        out = out + first_order_attention(*tensors, tensors[0] / 4, geometry, backend=backend)
        pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        target.extend([out, *torch.autograd.grad((out * pull).sum(), (*tensors, ridge))])
    for number, (a, e) in enumerate(zip(found, expected, strict=True)):
        # the ridge's gradient is float32 of rounded inputs, products of corrections are in tf32
        assert_close(a, e, gradient=number > 0, within=None if dtype == torch.float32 else 2e-2)
