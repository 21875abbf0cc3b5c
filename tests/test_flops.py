"""Counted operations are those counted by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nearfield.core import library
from nearfield.measure.flops import FORMULAS, count_flops, counted
from nearfield.nn.attention import Attention, WindowAttention
from nearfield.ops.dense import dense_attention
from nearfield.ops.linear import gated_linear_attention
from nearfield.ops.lla import Solver, local_linear_attention
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention, neighborhood_attention_varlen
from nearfield.ops.scan import selective_scan
from nearfield.ops.topk import block_scores, topk_block_attention
from nearfield.ops.window import window_attention
from nearfield.testing import qkv

FAST = ("tiled", "native") if library.unavailable() is None else ("tiled",)
native = pytest.mark.skipif(library.unavailable() is not None, reason="the CPU kernels are not built")


def pairs(geometry: Neighborhood, *grid: int) -> int:
    """Visible pairs, one by one."""
    bound = geometry.on(grid)
    return sum(len(bound.keys(query)) for query in range(bound.num_queries))


def test_products_and_convolutions_count_two_a_multiplication() -> None:
    x = torch.randn(2, 5, 6)
    assert count_flops(lambda: nn.Linear(6, 7)(x)) == 2 * 2 * 5 * 6 * 7
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    assert count_flops(lambda: conv(torch.randn(1, 4, 5, 6))) == 2 * 5 * 6 * 8 * 2 * 9


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("geometry", "grid"),
    [
        (Neighborhood(3), (9,)),
        (Neighborhood((3, 5), dilation=(2, 1)), (7, 6)),
        (Neighborhood(4, is_causal=True), (9,)),
        (Neighborhood(3, border="truncate"), (5, 4)),
    ],
)
def test_attention_counts_the_pairs_that_are_seen(
    geometry: Neighborhood, grid: tuple[int, ...], backend: str
) -> None:
    q, k, v = qkv(2, *grid, 4, 8, num_kv_heads=2, value_dim=6)
    expected = 2 * 2 * 4 * pairs(geometry, *grid) * (8 + 6)
    assert count_flops(lambda: neighborhood_attention(q, k, v, geometry, backend=backend)) == expected
    for x in (q, k, v):
        x.requires_grad_()
    out = neighborhood_attention(q, k, v, geometry, backend=backend)
    assert count_flops(lambda: out.sum().backward()) == round(2.5 * expected)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_windows_and_dense_attention_count_all_their_pairs(backend: str) -> None:
    q, k, v = qkv(1, 4, 6, 2, 8)
    count = count_flops(lambda: window_attention(q, k, v, window_size=2, backend=backend))
    assert count == 2 * 2 * 24 * 4 * 16 or backend == "reference"  # which multiplies what it masks
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    assert count_flops(lambda: dense_attention(q, k, v, backend=backend)) == 2 * 2 * 24 * 24 * 16
    few = (k[:, :9], v[:, :9])
    assert count_flops(lambda: dense_attention(q, *few, backend=backend)) == 2 * 2 * 24 * 9 * 16
    causal = count_flops(lambda: dense_attention(q[:, -10:], k, v, is_causal=True, backend=backend))
    assert causal == 2 * 2 * sum(range(15, 25)) * 16 or backend != "native"  # others multiply what they mask


def test_torchs_fused_attention_is_counted_on_the_cpu() -> None:
    q, k, v = (x.transpose(1, 2) for x in qkv(1, 6, 2, 8))
    full = 2 * 2 * 6 * 6 * 16
    with torch.no_grad():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == full
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)) == 2 * 2 * 21 * 16


@native
def test_packed_sequences_count_each_of_their_own() -> None:
    q, k, v = (x[0] for x in qkv(1, 11, 2, 8))
    geometry = Neighborhood(3)
    count = count_flops(
        lambda: neighborhood_attention_varlen(q, k, v, geometry, cu_seqlens=[0, 4, 11], backend="native")
    )
    assert count == 2 * 2 * (pairs(geometry, 4) + pairs(geometry, 7)) * 16


def test_the_linear_family_counts_what_it_does() -> None:
    q, k, v = qkv(1, 40, 2, 8, value_dim=4)
    gates = -torch.rand(1, 40, 2)
    count = count_flops(lambda: gated_linear_attention(q, k, v, gates, backend="tiled"))
    assert 40 * 2 * 4 * 8 * 4 < count <= 40 * 2 * (2 * 64 * 12 + 4 * 8 * 4)
    steps = Solver(method="cg", max_iterations=3, tolerance=0.0)
    past = Neighborhood(40, is_causal=True)
    q, k, v = qkv(1, 40, 2, 8)
    count = count_flops(
        lambda: local_linear_attention(q, k, v, past, ridge=1.0, solver=steps, backend="tiled")
    )
    assert count == 2 * 2 * pairs(past, 40) * 8 * (5 + 2 * 3)
    x, dt, b, c = torch.randn(1, 12, 6), torch.rand(1, 12, 6), torch.randn(1, 12, 3), torch.randn(1, 12, 3)
    if "native" in FAST:
        count = count_flops(lambda: selective_scan(x, dt, -torch.rand(6, 3), b, c, backend="native"))
        assert count == 7 * 12 * 6 * 3


@native
def test_a_step_counts_the_blocks_that_are_listed() -> None:
    q, k, v = qkv(2, 40, 4, 8, num_kv_heads=2, value_dim=6)
    q, lists = q[:, -1:], torch.tensor([0, 3]).expand(2, 1, 2, 2)
    call = partial(topk_block_attention, q, k, v, lists, block_size=8, backend="native")
    assert count_flops(call) == 2 * 2 * 4 * 16 * (8 + 6)
    shares = partial(block_scores, q, k, block_size=8, score="mass", backend="native")
    assert count_flops(shares) == 2 * 2 * 4 * 40 * 8


def test_every_opaque_operator_has_its_cost() -> None:
    """One without would count as free."""
    there = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nearfield::")}
    assert there - counted() == set()
    names = [name for each in FORMULAS.values() for name in each]
    assert len(names) == len(set(names))


def test_layers_count_the_same_whatever_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 6, 8, 16)
    for layer in (Attention(16, 2), WindowAttention(16, 2, 2)):
        found = set()
        for backend in FAST:
            monkeypatch.setenv("NEARFIELD_BACKEND", backend)
            with torch.no_grad():
                found.add(count_flops(lambda layer=layer: layer(x)))  # type: ignore[misc]
        assert len(found) == 1
