"""Kernels of others under our geometry: NATTEN, and FlashAttention 4 through FlexAttention.

Stand-ins compute what theirs would by the reference, with the rules and the lacks of the real ones: what is
asked of them, in which order of tokens, what is refused, and every gradient are checked for real.
"""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import product
from math import prod
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from nearfield import natten as stand_in
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood import (
    Neighborhood,
    attention,
    flash,
    flash_boxes,
    natten,
    neighborhood_attention,
    tuned,
    why,
)
from nearfield.testing import assert_close, qkv

FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
CPU = torch.device("cpu")


class WithoutGradient(torch.autograd.Function):
    """Differentiable by its looks; the gradient is dropped, as theirs is."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def fake_na(rank):
    def attend(
        query, key, value, kernel_size, stride, dilation, is_causal, scale=None, additional_keys=None,
        additional_values=None, return_lse=False,
    ):  # fmt: skip
        grid = query.shape[1:-2]
        for n, k, s, d, c in zip(grid, kernel_size, stride, dilation, is_causal, strict=True):
            assert len(grid) == rank
            assert type(c) is bool
            if not (n >= 2 and k >= 2 and 1 <= s <= k and k * d <= n):  # its own rules
                raise ValueError(f"{n=} {k=} {s=} {d=}")
        out, lse = neighborhood_attention(
            query, key, value, Neighborhood(kernel_size, stride, dilation, is_causal),
            additional_keys=additional_keys, additional_values=additional_values,
            scale=scale or query.shape[-1] ** -0.5, return_lse=True, backend="reference",
        )  # fmt: skip
        return (out, WithoutGradient.apply(lse)) if return_lse else out

    return attend


def fake_natten(kernels=("hopper-fna", "flex-fna")):
    module = ModuleType("natten")
    module.__spec__ = ModuleSpec("natten", None)
    module.HAS_LIBNATTEN = True
    module.backends = SimpleNamespace(
        get_compatible_backends=lambda query, key, value, torch_compile: list(kernels)
    )
    for rank in (1, 2, 3):
        setattr(module, f"na{rank}d", fake_na(rank))
    return module


@pytest.fixture
def with_natten(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", fake_natten())
    monkeypatch.setattr(natten, "DEVICE", "cpu")


def fake_kernel(*geometry):
    """FlexAttention on the blocks that the mask lists, and on no others."""

    def run(query, key, value, mask, scale):
        rows, columns = mask.BLOCK_SIZE
        slots = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
        assert mask.seq_lengths == (query.shape[2], key.shape[2])
        assert all(n % size == 0 for n, size in zip(mask.seq_lengths, mask.BLOCK_SIZE, strict=True))
        inside = mask.mask_mod(0, 0, *slots)
        seen = torch.zeros_like(inside)
        for counts, lists, is_whole in (
            (mask.kv_num_blocks, mask.kv_indices, False),
            (mask.full_kv_num_blocks, mask.full_kv_indices, True),
        ):
            for i, (count, blocks) in enumerate(zip(counts[0, 0], lists[0, 0], strict=True)):
                for j in blocks[:count].tolist():
                    part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                    assert not seen[part].any()
                    seen[part] = True if is_whole else inside[part]
        assert seen.any(1).all()  # a row without keys has no softmax
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ value, scores.logsumexp(-1).detach()

    return run


@pytest.fixture
def with_flash(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash, "DEVICE", "cpu")
    monkeypatch.setattr(flash, "DTYPES", (torch.float32, torch.bfloat16, torch.float16))
    monkeypatch.setattr(flash, "_major", lambda device: 9)
    monkeypatch.setattr(flash, "_kernel", fake_kernel)
    monkeypatch.setattr(flash, "KV_AREA", 16)
    monkeypatch.setattr(flash, "Q_AREAS", {9: 32})
    flash._block_mask.cache_clear()
    yield
    flash._block_mask.cache_clear()


def problem(grid, *, heads=2, kv_heads=2, dim=8, dv=8, extra=0, batch=2, dtype=torch.float32):
    tensors = list(qkv(batch, *grid, heads, dim, num_kv_heads=kv_heads, value_dim=dv, dtype=dtype))
    if extra:
        tensors += [x.to(dtype) for x in qkv(batch, extra, kv_heads, dim, value_dim=dv, seed=1)[1:]]
    return [x.requires_grad_() for x in tensors]


def results(tensors, geometry, backend, **options):
    """Output, log-sum-exp and the gradients of a loss of both."""
    names = ("additional_keys", "additional_values")
    more = dict(zip(names, tensors[3:], strict=False))
    out, lse = neighborhood_attention(
        *tensors[:3], geometry, return_lse=True, backend=backend, **more, **options
    )
    draw = torch.Generator().manual_seed(2)
    loss = sum((x.float() * torch.randn(x.shape, generator=draw).to(x.device)).sum() for x in (out, lse))
    return out, lse, *torch.autograd.grad(loss, tensors)


def agree(tensors, geometry, backend, **options):
    found = results(tensors, geometry, backend, **options)
    expected = results(tensors, geometry, "reference", **options)
    for number, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert_close(a, e, gradient=number > 1)


CASES = {
    "1-D": ((40,), Neighborhood(7), {}),
    "even window, stride, dilation": ((41,), Neighborhood(6, 4, 3), {}),
    "causal": ((40,), Neighborhood(9, is_causal=True), {"heads": 4}),
    "causal, strides and groups": ((37,), Neighborhood(5, 3, 2, is_causal=True), {"extra": 5}),
    "causal, longer than the axis": ((16,), Neighborhood(64, 48, 2, is_causal=True), {}),
    "causal, cut": ((16,), Neighborhood(5, is_causal=True, border="truncate"), {}),
    "window = grid": ((12, 6), Neighborhood((12, 6)), {"dv": 16}),
    "2-D": ((9, 14), Neighborhood((4, 5), (2, 1), (1, 2)), {"heads": 4, "kv_heads": 1, "extra": 3}),
    "2-D, blocks": ((16, 16), Neighborhood(8, 8), {"extra": 130, "batch": 1}),
    "3-D": ((4, 5, 9), Neighborhood((2, 3, 4), (2, 1, 3), (2, 1, 1)), {"dv": 24}),
    "3-D, causal in time": (
        (6, 6, 5), Neighborhood((3, 3, 2), is_causal=(True, False, False)), {"kv_heads": 1, "extra": 2}
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["natten", "flash"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_asked_of_others_is_our_problem(name, backend, with_natten, with_flash):
    grid, geometry, sizes = CASES[name]
    agree(problem(grid, **sizes), geometry, backend, scale=0.3)


@st.composite
def drawn(draw):
    rank = draw(st.integers(1, 3))
    grid = tuple(draw(st.integers(2, (40, 9, 5)[rank - 1])) for _ in range(rank))
    kernel = tuple(draw(st.integers(2, n)) for n in grid)
    dilation = tuple(draw(st.integers(1, n // k)) for n, k in zip(grid, kernel, strict=True))
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    causal = tuple(draw(st.booleans()) for _ in grid)
    return grid, Neighborhood(kernel, stride, dilation, causal)


@FEW
@given(case=drawn(), extra=st.sampled_from([0, 0, 3]))
def test_any_pattern_is_passed_on_whole(case, extra, with_natten, with_flash):
    for backend in ("natten", "flash"):
        agree(problem(case[0], extra=extra, batch=1), case[1], backend)


@FEW
@given(case=drawn(), areas=st.sampled_from([(4, 8), (8, 4), (16, 16)]))
def test_boxes_hold_what_the_geometry_says(case, areas):
    grid, geometry = case
    bound = geometry.on(grid)
    boxes = flash_boxes.cut(bound, *areas, CPU)
    for order, area in zip((boxes.queries, boxes.keys), areas, strict=True):
        assert order.token[order.slot].tolist() == list(range(prod(grid)))
        idle = torch.zeros(len(order.token), dtype=torch.bool) if order.idle is None else order.idle
        assert sorted(order.token[~idle].tolist()) == list(range(prod(grid)))
        assert len(order.token) % area == 0
    visible = flash._visible(boxes, boxes.place, 0)(None, None, *_slots(boxes))
    keys = boxes.keys.token.tolist()
    idle = [False] * len(keys) if boxes.keys.idle is None else boxes.keys.idle.tolist()
    for row, query in zip(visible, boxes.queries.token.tolist(), strict=True):
        seen = {key for key, sees, none in zip(keys, row.tolist(), idle, strict=True) if sees and not none}
        assert seen == set(bound.keys(query))
        assert int(row.sum()) == len(seen)
    blocks = visible.unflatten(0, (-1, areas[0])).unflatten(2, (-1, areas[1]))
    assert torch.equal(boxes.some, blocks.any(1).any(-1))
    assert torch.equal(boxes.whole, blocks.all(1).all(-1))


def _slots(boxes):
    return torch.arange(len(boxes.queries.token))[:, None], torch.arange(len(boxes.keys.token))


def test_aligned_patterns_need_no_mask_at_all():
    bound = Neighborhood(48, 16).on((64, 96))
    boxes = flash_boxes.cut(bound, 128, 128, CPU)
    assert torch.equal(boxes.some, boxes.whole)
    assert boxes.some.float().mean().item() == pytest.approx(bound.kept)
    assert boxes.queries.idle is None


def test_the_gradient_of_a_moved_tensor_is_moved_back():
    order = flash_boxes.cut(Neighborhood(3).on((5, 6)), 16, 16, CPU).queries
    x = torch.randn(1, 30, 2, 3, dtype=torch.float64, requires_grad=True)
    moved = flash._into(x, order)
    real = ~order.idle
    upstream = torch.randn_like(moved) * real[:, None, None]  # of idle slots nobody asks
    (found,) = torch.autograd.grad(moved, x, upstream)
    assert torch.equal(found[:, order.token[real]], upstream[:, real])


@pytest.mark.parametrize("backend", ["natten", "flash"])
def test_the_loss_pays_for_the_gradient_of_lse_only_where_it_has_one(
    backend, with_natten, with_flash, monkeypatch
):
    calls = []
    fakes = {"natten": (sys.modules["natten"], "na1d"), "flash": (flash, "_attend")}
    owner, name = fakes[backend]
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **b: calls.append(1) or real(*a, **b))
    tensors = problem((32,))
    for with_lse, expected in ((False, 1), (True, 2)):
        calls.clear()
        out, lse = neighborhood_attention(*tensors, Neighborhood(5), return_lse=True, backend=backend)
        (out.sum() + (lse.sum() if with_lse else 0)).backward()
        assert len(calls) == expected
    with torch.no_grad():
        _, lse = neighborhood_attention(*tensors, Neighborhood(5), return_lse=True, backend=backend)
        assert not lse.requires_grad


def test_a_broken_stand_in_is_noticed(with_natten, with_flash, monkeypatch):
    wrong = sys.modules["natten"]
    right = wrong.na1d
    monkeypatch.setattr(
        wrong, "na1d", lambda q, k, v, kernel_size, **o: right(q, k, v, (kernel_size[0] + 1,), **o)
    )
    with pytest.raises(AssertionError, match="rms error"):
        agree(problem((40,)), Neighborhood(7), "natten")

    cut = flash_boxes.cut

    def too_whole(*arguments):
        boxes = cut(*arguments)
        return flash_boxes.Boxes(**{**vars(boxes), "whole": boxes.some})

    monkeypatch.setattr(flash_boxes, "cut", too_whole)
    with pytest.raises(AssertionError, match="rms error"):
        agree(problem((40,)), Neighborhood(7), "flash")


@pytest.mark.parametrize(
    ("backend", "grid", "geometry", "options", "reason"),
    [
        ("natten", (16,), Neighborhood(5), {"bias": torch.zeros(2, 9)}, "mask or sinks, given bias"),
        ("natten", (16,), Neighborhood(5, is_causal=True, num_sinks=1), {}, "given num_sinks"),
        ("natten", (16,), Neighborhood(5, border="truncate"), {}, 'no border but "shift"'),
        ("natten", (16,), Neighborhood(5, is_causal=True, border="pad"), {}, 'no border but "shift"'),
        ("natten", (16,), Neighborhood(1), {}, "windows of 2 or more"),
        ("natten", (1, 16), Neighborhood((1, 3)), {}, "sides and windows of 2 or more"),
        ("natten", (17,), Neighborhood(16, dilation=2, is_causal=True), {}, "shortest dilation group"),
        ("natten", (16,), Neighborhood(5), {"scale": 0.0}, "a scale of 0 for none"),
        ("flash", (16,), Neighborhood(5), {"key_mask": torch.ones(2, 16).bool()}, "given key_mask"),
        ("flash", (16,), Neighborhood(5), {"sink_logits": torch.zeros(2)}, "given sink_logits"),
        ("flash", (16,), Neighborhood(5, border="pad"), {}, "no keys outside the grid"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_missing(backend, grid, geometry, options, reason, with_natten, with_flash):
    with pytest.raises(BackendUnavailable, match=reason):
        neighborhood_attention(*problem(grid), geometry, backend=backend, **options)
    assert reason in str(why(*problem(grid), geometry, **options))


def test_refusals_of_tensors(with_natten, with_flash, monkeypatch):
    few = [x[:, -4:] if i == 0 else x for i, x in enumerate(problem((16,)))]
    causal = Neighborhood(5, is_causal=True)
    for backend in ("natten", "flash"):
        with pytest.raises(BackendUnavailable, match="as many queries as keys, given 4 for 16"):
            neighborhood_attention(*few, causal, backend=backend)
        attend = partial(neighborhood_attention, geometry=causal, backend=backend)
        with pytest.raises(BackendUnavailable, match="no torch.func transform"):
            torch.vmap(lambda q, attend=attend: attend(q, q, q))(torch.randn(2, 1, 16, 2, 8))
    with pytest.raises(BackendUnavailable, match="multiple of 8 up to 128"):
        neighborhood_attention(*problem((16,), dim=12), causal, backend="flash")
    monkeypatch.setattr(flash, "_major", lambda device: 8)
    with pytest.raises(BackendUnavailable, match="capability 9 and 10, this one has 8"):
        neighborhood_attention(*problem((16,)), causal, backend="flash")
    monkeypatch.setattr(flash, "_major", lambda device: 9)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(BackendUnavailable, match="not deterministic"):
        neighborhood_attention(*problem((16,)), causal, backend="flash")
    monkeypatch.undo()
    with pytest.raises(BackendUnavailable, match="tensors on a GPU"):
        neighborhood_attention(*problem((16,)), causal, backend="natten")
    with pytest.raises(BackendUnavailable, match="float16 and bfloat16"):
        neighborhood_attention(*problem((16,)), causal, backend="flash")


def test_packages_that_are_absent_or_hollow(monkeypatch):
    monkeypatch.setattr(natten, "DEVICE", "cpu")
    tensors, geometry = problem((16,)), Neighborhood(5)

    def refused(backend, reason):
        with pytest.raises(BackendUnavailable, match=reason):
            neighborhood_attention(*tensors, geometry, backend=backend)

    monkeypatch.setitem(sys.modules, "natten", None)
    refused("natten", "natten is not installed")
    monkeypatch.setitem(sys.modules, "kernels", None)
    refused("natten-hub", "pip install kernels")
    monkeypatch.setitem(sys.modules, "natten", fake_natten(["flex-fna"]))
    refused("natten", "no kernel for torch.float32, head_dim 8")
    hollow = fake_natten()
    hollow.HAS_LIBNATTEN = False
    monkeypatch.setitem(sys.modules, "natten", hollow)
    refused("natten", "no compiled kernels")
    monkeypatch.delitem(sys.modules, "natten")
    stand_in.install()
    try:  # nearfield's own stand-in must not be taken for NATTEN: it would call us again
        refused("natten", "no compiled kernels")
    finally:
        stand_in.uninstall()


def test_kernels_of_the_hub_come_when_asked_for_by_name(monkeypatch):
    asked = []

    def get_kernel(repository, *, version):
        asked.append((repository, version))
        return fake_natten()

    kernels = ModuleType("kernels")
    kernels.__spec__ = ModuleSpec("kernels", None)
    kernels.get_kernel = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setitem(sys.modules, "natten", None)
    monkeypatch.setattr(natten, "DEVICE", "cpu")
    natten._downloaded.cache_clear()
    try:
        tensors = problem((16,))
        assert "downloads kernels" in why(*tensors, Neighborhood(5)).others["natten-hub"]
        assert asked == []
        agree(tensors, Neighborhood(5), "natten-hub")
        assert asked == [("kernels-community/natten", 1)]
        natten._downloaded.cache_clear()
        kernels.get_kernel = lambda *a, **b: fake_natten(["flex-fna"])
        with pytest.raises(BackendUnavailable, match="no kernel for"):
            neighborhood_attention(*tensors, Neighborhood(5), backend="natten-hub")
        natten._downloaded.cache_clear()
        kernels.get_kernel = lambda *a, **b: (_ for _ in ()).throw(OSError("no network"))
        with pytest.raises(BackendUnavailable, match="OSError: no network"):
            neighborhood_attention(*tensors, Neighborhood(5), backend="natten-hub")
    finally:
        natten._downloaded.cache_clear()


def test_auto_takes_what_was_measured_to_be_fastest_and_can(with_natten, with_flash, monkeypatch):
    tensors, geometry = problem((16,)), Neighborhood(5)
    taken = {}
    for name in (None, "triton", "natten", "flash"):
        monkeypatch.setattr(attention, "_fastest", lambda *given, name=name: name)
        taken[name] = why(*tensors, geometry).backend
    assert taken[None] == taken["triton"] not in ("natten", "flash")
    assert (taken["natten"], taken["flash"]) == ("natten", "flash")
    choice = why(*tensors, geometry, sink_logits=torch.zeros(2))
    assert choice.backend == taken[None]
    assert "given sink_logits" in choice.others["flash"]
    monkeypatch.setattr(attention, "_fastest", lambda *given: None)
    assert "not measured to be the fastest" in why(*tensors, geometry).others["natten"]


def test_the_measured_choice_is_asked_for_by_kind_of_call(monkeypatch):
    asked = []
    monkeypatch.setattr(tuned, "preferred", lambda *given: asked.append(given[1:]) or "natten")
    monkeypatch.setattr(tuned, "device_name", lambda device: "some GPU")
    bound = Neighborhood(5).on((16,))

    class OnGPU:
        device = SimpleNamespace(type="cuda")
        requires_grad, shape = True, (1, 16, 2, 64)

        def element_size(self):
            return 2

    x = OnGPU()
    assert attention._fastest(x, x, x, bound) == "natten"
    with torch.no_grad():
        attention._fastest(x, x, x, bound)
    assert asked == [("backward", 2, 64, "some GPU"), ("forward", 2, 64, "some GPU")]
    assert attention._fastest(*problem((16,)), bound) is None


@pytest.mark.compile
def test_natten_is_traced_whole_with_its_lse(with_natten):
    tensors = problem((16,), batch=1)

    def call(*tensors):
        out, lse = neighborhood_attention(*tensors, Neighborhood(5), return_lse=True, backend="natten")
        return out.sin().sum() + lse.cos().sum()

    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
    expected = call(*tensors)
    grads = [torch.autograd.grad(x, tensors) for x in (found, expected)]
    for a, e in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        assert_close(a, e, gradient=True)


@pytest.mark.parametrize("name", ["2-D", "causal, strides and groups"])
def test_flex_attention_itself_reads_the_mask(name, with_flash, monkeypatch):
    grid, geometry, sizes = CASES[name]
    tensors = [x.detach() for x in problem(grid, **{**sizes, "dim": 16, "dv": 16})]

    def kernel(*geometry):
        def run(query, key, value, mask, scale):
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
            return flex_attention(query, key, value, block_mask=mask, scale=scale, return_lse=True)

        return run

    monkeypatch.setattr(flash, "_kernel", kernel)
    more = dict(zip(("additional_keys", "additional_values"), tensors[3:], strict=True))
    found = neighborhood_attention(*tensors[:3], geometry, return_lse=True, backend="flash", **more)
    expected = neighborhood_attention(*tensors[:3], geometry, return_lse=True, backend="reference", **more)
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e)


SMALL = {
    "flux": ((64, 64), Neighborhood(20), {}),
    "flux, strided": ((64, 64), Neighborhood(32, 16), {"extra": 77}),
    "hunyuan": ((6, 24, 20), Neighborhood((6, 12, 12), (2, 4, 4)), {"dv": 64}),
    "1-D, causal": ((3000,), Neighborhood(256, is_causal=True), {"heads": 8}),
    "vision": ((28, 28), Neighborhood(7, dilation=2), {"dim": 32, "dv": 32, "batch": 3}),
    "window = grid": ((1024,), Neighborhood(1024), {}),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("backend", "dtype", "name"),
    list(product(["triton", "natten", "flash"], [torch.bfloat16, torch.float16], SMALL)),
)
def test_on_a_gpu_all_executors_agree_with_the_reference(backend, dtype, name):
    grid, geometry, sizes = SMALL[name]
    given = {"heads": 4, "dim": 128, "dv": 128, "batch": 1, "kv_heads": 2, **sizes}
    tensors = [x.detach().to("cuda", dtype).requires_grad_() for x in problem(grid, **given)]
    try:
        agree(tensors, geometry, backend)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
