"""The Triton scan without a GPU: in Triton's interpreter on tiny problems, and compiled ahead of time."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.scan import selective_scan, triton, triton_kernels
from tests.test_scan import CASES

installed = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

INTERPRETED = """
from dataclasses import replace
import torch
from nearfield.ops.scan import triton, triton_kernels
from nearfield.testing import poisoned_empty
from tests.test_scan import CASES, TOKENS, Case, check_backend, outcome

triton.ROWS, triton.LANES = 4, 2
cases = {
    "bare": CASES["bare"],
    "two chunks, a block and a lane": Case(5, 3, 3, batch=1),
    "groups": Case(4, 4, 1, batch=1, groups=2, options=("z",), softplus=False),
    "packed": Case(7, 2, 2, batch=1, ends=(0, 0, 5, 7), seed=1),
    "packed backwards": Case(7, 2, 2, batch=1, ends=(0, 5, 6, 7), reverse=True, options=("D",)),
    "no tokens": Case(0),
}
for name, case in cases.items():
    with poisoned_empty():
        check_backend(case, "triton", torch.float32)
    print(name)

# strides
case = cases["two chunks, a block and a lane"]
tensors = case.tensors(torch.float32)
views = {n: x.transpose(0, 1).contiguous().transpose(0, 1) if n in TOKENS else x for n, x in tensors.items()}
for x in (*tensors.values(), *views.values()):
    x.requires_grad_()
for found, wanted in zip(outcome(case, "triton", views), outcome(case, "triton", tensors)):
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))

# no pull on one of the results; nothing seen of the future
state = torch.ops.nearfield.triton_scan(*[tensors.get(n) for n in
    ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")], None, True, False, True)[1]
assert torch.autograd.grad(state.sum(), tensors["A"])[0].isfinite().all()

# broken on purpose
right = triton._settings
triton._settings = lambda *given: {**right(*given), "SOFTPLUS": False}
try:
    check_backend(case, "triton", torch.float32)
except AssertionError:
    print("noticed")
"""


@installed
def test_the_interpreter_agrees_with_the_definition(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = python("-c", INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "noticed"
    assert "packed backwards" in done.stdout


TOKENS = {"x", "dt", "B", "C_", "z", "out", "grad", "grad_x", "grad_dt", "grad_z"}
FLOATS = {
    *("A", "D", "bias", "initial", "final", "kept", "grad_final"),
    *("grad_B", "grad_C", "grad_A", "grad_D", "grad_bias", "grad_initial"),
}
FLAGS = {"SOFTPLUS", "REVERSE", "HAS_D", "HAS_Z", "HAS_BIAS", "HAS_ENDS"}


@installed
@pytest.mark.parametrize(
    ("name", "flags", "warps"),
    [
        ("scan_kernel", {"HAS_INITIAL", "KEEP"}, triton.WARPS),
        ("scan_backward_kernel", {"HAS_FINAL"}, triton.BACKWARD_WARPS),
    ],
)
def test_kernels_compile_for_a_gpu(name: str, flags: set[str], warps: int) -> None:
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_kernels, name)
    constants = {**dict.fromkeys(FLAGS | flags, True), "R": triton.ROWS, "L": triton.LANES, "W": 4}
    kinds = {
        **dict.fromkeys(TOKENS, "*bf16"),
        **dict.fromkeys(FLOATS, "*fp32"),
        **dict.fromkeys(constants, "constexpr"),
        "ends": "*i64",
    }
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names}
    made = compiler.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    assert ".target sm_90" in made.asm["ptx"]


def test_on_a_cpu_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="the GPU kernels need tensors on a GPU"):
        selective_scan(**CASES["bare"].tensors(torch.float32), backend="triton")


def test_the_module_imports_without_triton(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from nearfield.ops.scan import selective_scan, triton; print(triton.installed())"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CASES))
def test_a_gpu_agrees_with_the_definition(name: str) -> None:
    case = CASES[name]
    on_gpu = {n: x.cuda() for n, x in case.tensors(torch.float32).items()}
    found = selective_scan(**on_gpu, **case.call, backend="triton").output
    expected = selective_scan(**case.tensors(), **case.call, backend="reference").output
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-5)
