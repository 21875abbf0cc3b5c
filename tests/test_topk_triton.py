"""Attention to chosen blocks by Triton: interpreted against the reference, and compiled without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.topk import topk_block_attention, triton, triton_kernels
from nearfield.testing import qkv

present = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

# In a process of its own: whether Triton interprets is settled when it is imported.
COMPARE = """
import json, torch
from nearfield.ops.topk import topk_block_attention, triton
from nearfield.testing import poisoned_empty, qkv, relative_error

triton.SPLIT = 16
draw = torch.Generator().manual_seed(0)
BROKEN = {broken}
if BROKEN:
    right = triton._each_once
    triton._each_once = lambda lists, blocks: right(lists, blocks - 1)
errors = []
for rows, keys, size, dim, dv, lists in (
    (1, 70, 16, 8, 5, 1), (5, 70, 20, 20, 33, 5), (9, 9, 7, 16, 8, 1), (2, 40, 64, 4, 4, 2)
):
    q, k, v = qkv(2, keys, 6, dim, num_kv_heads=2, value_dim=dv)
    q, blocks = q[:, -rows:], -(-keys // size)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    index = torch.randint(-2, blocks, (2, lists, 2, 4), generator=draw)
    index[..., 0] = blocks - 1
    mask = torch.rand(2, keys, generator=draw) < 0.7
    for options in (dict(is_causal=True), dict(is_causal=False, key_mask=mask)):
        given = dict(options, block_size=size, return_lse=True)
        with poisoned_empty():
            found = topk_block_attention(q, k, v, index, **given, backend="triton")
        wide = [x.double() for x in (q, k, v)]
        expected = topk_block_attention(*wide, index, **given, backend="reference")
        errors.append(max(relative_error(a, e) for a, e in zip(found, expected)))
print(json.dumps(errors))
"""


def errors_of(python: Callable[..., Any], broken: bool = False) -> list[float]:
    done = python("-c", COMPARE.format(broken=broken), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@present
def test_the_interpreted_kernels_equal_the_reference(python: Callable[..., Any]) -> None:
    assert max(errors_of(python)) < 2e-6


@present
def test_kernels_that_leave_out_the_last_block_are_noticed(python: Callable[..., Any]) -> None:
    assert min(errors_of(python, broken=True)) > 1e-3


@present
@pytest.mark.parametrize("name", ["split_kernel", "merge_kernel"])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_every_kernel_compiles_for_a_gpu(name: str) -> None:
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_kernels, name)
    values = {
        "CAUSAL": True,
        "HAS_MASK": True,
        "ROWS": 16,
        "BN": 64,
        "BD": 64,
        "BDV": 64,
        "PRECISION": "tf32",
    }
    pointers = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "lists": "*i64", "mask": "*u8", "lse": "*fp32"}
    pointers |= {"parts": "*fp32", "part_lse": "*fp32", "out": "*fp32" if name == "split_kernel" else "*bf16"}
    signature, constants = {}, {}
    for parameter in kernel.params:
        own = parameter.name
        if parameter.is_constexpr:
            signature[own], constants[own] = "constexpr", values[own]
        else:
            signature[own] = pointers.get(own, "fp32" if own == "scale" else "i32")
    source = ASTSource(kernel, signature, constants)
    built = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 2})
    assert ".visible .entry" in built.asm["ptx"]


def test_without_a_gpu_the_backend_says_so() -> None:
    q, k, v = qkv(1, 5, 2, 4)
    index = torch.zeros(1, 1, 2, 1, dtype=torch.int64)
    with pytest.raises(BackendUnavailable, match="need tensors on a GPU, these are on 'cpu'"):
        topk_block_attention(q, k, v, index, block_size=4, backend="triton")
    with pytest.raises(BackendUnavailable, match="at least one block|one block"):
        topk_block_attention(q, k, v, index[..., :0], block_size=4, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_what_auto_takes_and_equals_the_reference(dtype: torch.dtype) -> None:
    from nearfield.testing import assert_close

    q, k, v = (x.cuda() for x in qkv(2, 3000, 6, 64, num_kv_heads=2, dtype=dtype))
    index = torch.randint(-1, 47, (2, 3, 2, 20), generator=torch.Generator().manual_seed(0)).cuda()
    found = topk_block_attention(q[:, -3:], k, v, index, block_size=64)
    wide = [x.double().cpu() for x in (q[:, -3:], k, v)]
    assert_close(found, topk_block_attention(*wide, index.cpu(), block_size=64, backend="reference"))
    assert triton.unfit(q, v) is None
