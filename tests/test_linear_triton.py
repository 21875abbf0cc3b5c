"""Linear attention by Triton: in its interpreter against the reference, and compiled without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.linear import linear_attention, triton, triton_kernels
from nearfield.testing import qkv

present = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

# In a process of its own: whether Triton interprets is settled when it is imported.
COMPARE = """
import json, torch
from nearfield.ops.linear import triton
from nearfield.testing import poisoned_empty, relative_error
from tests.test_linear import FUNCTIONS, Case, pulled
from nearfield.testing import qkv

triton.CHUNK, triton.LEVELS, triton.STATES = 16, 4, 2
BROKEN = {broken}
if BROKEN:
    triton.LEVELS = 3
errors = {{}}
one = dict(batch=1, heads=1, kv_heads=1)
shapes = [
    dict(one, heads=2), dict(one, tokens=37, has_state=False), dict(one, tokens=17, dim=35, dv=18)
]
for kind in {kinds}:
    for shape in shapes[:1] if BROKEN else shapes:
        inputs = Case(kind, **shape).inputs(torch.float32)
        exact = {{name: x.detach().double().requires_grad_() for name, x in inputs.items()}}
        with poisoned_empty():
            found = pulled(inputs, backend="triton")
        expected = pulled(exact, backend="reference")
        errors[f"{{kind}} {{shape}}"] = [relative_error(a, e) for a, e in zip(found, expected)]
inputs = Case("channel", tokens=17, heads=2).inputs(torch.float32, requires_grad=False)
plain = pulled({{n: x.clone().requires_grad_() for n, x in inputs.items()}}, backend="triton")
views = {{n: x.movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_() for n, x in inputs.items()}}
errors["strides"] = [relative_error(a, e) for a, e in zip(pulled(views, backend="triton"), plain)]
q, k, v = qkv(1, 20, 2, 3)
g, beta = -torch.ones(1, 20, 2, 3), torch.ones(1, 20, 2)
for name in () if BROKEN else ("normalised channel", "inline", "enhanced"):
    outs = [FUNCTIONS[name](q, k, v, g, beta, backend=b).output for b in ("triton", "reference")]
    errors[name] = [relative_error(*outs)]
extreme = [torch.where(torch.rand(1, 20, 1, 3) < 0.3, -50.0, 0.0), torch.zeros(1, 20, 1, 3)]
for gate in extreme:
    q, k, v = qkv(1, 20, 1, 3)
    inputs = dict(query=q, key=k, value=v, g=gate)
    found = pulled({{n: x.requires_grad_() for n, x in inputs.items()}}, backend="triton")
    exact = {{n: x.detach().double().requires_grad_() for n, x in inputs.items()}}
    exact = pulled(exact, backend="reference")
    errors[f"extreme {{float(gate.sum())}}"] = [relative_error(a, e) for a, e in zip(found, exact)]
print(json.dumps(errors))
"""


def errors_of(
    python: Callable[..., Any], kinds: tuple[str, ...], broken: bool = False
) -> dict[str, list[float]]:
    done = python("-c", COMPARE.format(kinds=kinds, broken=broken), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@present
def test_the_interpreted_kernels_equal_the_reference(python: Callable[..., Any]) -> None:
    for name, errors in errors_of(python, ("plain", "head", "channel", "delta", "gated delta")).items():
        assert max(errors[:2]) < 2e-6, name
        assert max(errors) < 5e-6, name


@present
def test_kernels_that_leave_out_a_level_are_noticed(python: Callable[..., Any]) -> None:
    errors = errors_of(python, ("channel", "delta"), broken=True)
    assert all(found[0] > 1e-3 for name, found in errors.items() if name.startswith(("channel", "delta")))


FLOATS = {  # names of tensors between kernels, always float32
    "g", "initial", "states", "last", "scores", "grad_last", "after", "first", "d_scores", "dg", "wanted",
    "forgotten",
}  # fmt: skip
TOKENS = {"q", "k", "v", "grad", "beta", "dq", "dk"}  # in the dtype of the inputs
KERNELS = sorted(name for name in vars(triton_kernels) if name.endswith("_kernel"))


@present
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_every_kernel_compiles_for_a_gpu(name: str) -> None:
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_kernels, name)
    kinds = (1,) if name in ("written_kernel", "delta_states_kernel") else (2,)
    for kind in kinds:
        values = {
            "KIND": kind,
            "C": 16,
            "LEVELS": 4,
            "BK": 16,
            "BV": 16,
            "PRECISION": "tf32",
            "HAS_INITIAL": 1,
        }
        signature, constants = {}, {}
        for parameter in kernel.params:
            own = parameter.name
            if parameter.is_constexpr:
                signature[own], constants[own] = "constexpr", values[own]
            elif own == "out":
                signature[own] = "*bf16" if name in ("outputs_kernel", "value_gradients_kernel") else "*fp32"
            elif own in FLOATS | TOKENS:
                signature[own] = "*fp32" if own in FLOATS else "*bf16"
            else:
                signature[own] = "fp32" if own == "scale" else "i32"
        built = compiler.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_stages": 1},
        )
        assert ".visible .entry" in built.asm["ptx"]


def test_without_a_gpu_the_backend_says_so() -> None:
    q, k, v = qkv(1, 5, 2, 4)
    with pytest.raises(BackendUnavailable, match="need tensors on a GPU, these are on 'cpu'"):
        linear_attention(q, k, v, backend="triton")
    with pytest.raises(BackendUnavailable, match="no form 'recurrent', only 'chunk'"):
        linear_attention(q, k, v, backend="triton", form="recurrent")
    with pytest.raises(BackendUnavailable, match=r"not in torch\.float64"):
        linear_attention(q.double(), k.double(), v.double(), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "head", "channel", "delta", "gated delta"])
def test_on_a_gpu_it_is_what_auto_takes_and_equals_the_reference(kind: str, dtype: torch.dtype) -> None:
    from nearfield.testing import assert_close
    from tests.test_linear import Case, pulled

    inputs = Case(kind, tokens=300, dim=64, dv=48).inputs(dtype)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    on_gpu = {name: x.detach().cuda().requires_grad_() for name, x in inputs.items()}
    for number, (a, e) in enumerate(zip(pulled(on_gpu), pulled(exact, backend="reference"), strict=True)):
        within = 2e-2 if dtype == torch.bfloat16 else None  # states are float32, their inputs are not
        assert_close(a, e, gradient=number > 1, within=within)
    assert triton.missing("cuda") is None
