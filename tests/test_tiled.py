"""What is special to the tiled and flex backends: cuts, merges, caches and memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood import Neighborhood, flex, reference, tiled, tiled_causal, tiled_plan
from nearfield.testing import assert_close, poisoned_empty, qkv, relative_error

ALL = ("additional_keys", "additional_values", "bias", "key_mask", "sink_logits")


def outcomes(
    attend: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor, ...],
    geometry: Neighborhood,
    **options: Tensor,
) -> list[Tensor]:
    """Output, log-sum-exp and the gradient of every floating input, through both results."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    given = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in options.items()}
    grid = tuple(leaves[1].shape[1:-2])
    bound = geometry.on(grid, num_queries=leaves[0].shape[1] if len(grid) == 1 else None)
    out, lse = attend(*leaves, bound, scale=tensors[0].shape[-1] ** -0.5, **given)
    draw = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) for x in (out, lse)]
    seen = lse.isfinite()
    loss = (out * weights[0]).sum() + (lse.masked_fill(~seen, 0) * weights[1]).sum()
    wanted = [*leaves, *(x for x in given.values() if x.requires_grad)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [out, lse, *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True))]


def check(tensors: tuple[Tensor, ...], geometry: Neighborhood, **options: Tensor) -> None:
    found = outcomes(tiled.attend, tensors, geometry, **options)
    expected = outcomes(reference.attend, tensors, geometry, **options)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, within=1e-9)


def make_options(
    names: tuple[str, ...], tensors: tuple[Tensor, ...], geometry: Neighborhood
) -> dict[str, Tensor]:
    query, key, value = tensors
    draw = torch.Generator().manual_seed(2)
    grid = tuple(key.shape[1:-2])
    heads, kv_heads, batch = query.shape[-2], key.shape[-2], len(query)
    shapes = {
        "additional_keys": (batch, 3, kv_heads, key.shape[-1]),
        "additional_values": (batch, 3, kv_heads, value.shape[-1]),
        "bias": (heads, *(2 * axis.kernel_size - 1 for axis in geometry.on(grid).axes)),
        "sink_logits": (heads,),
    }
    made = {k: torch.randn(s, generator=draw, dtype=query.dtype) for k, s in shapes.items()}
    made["key_mask"] = torch.rand(batch, *grid, generator=draw) < 0.6
    return {k: made[k] for k in names}


@pytest.fixture
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is cut every few tokens, so that tiny problems have every kind of piece."""
    monkeypatch.setattr(tiled_causal, "SPAN", 8)
    monkeypatch.setattr(tiled_causal, "STEP", 3)
    monkeypatch.setattr(tiled_causal, "LONG", 12)
    monkeypatch.setattr(tiled_causal, "CHUNK_BYTES", 3 * 8 * 2 * 4 * 8)


@pytest.mark.usefixtures("small_cuts")
@pytest.mark.parametrize("window", [1, 7, 12, 19])
def test_text_of_every_length_around_the_cuts(window: int) -> None:
    for length in (1, window, window + 1, window + 9, window + 38):
        for sinks in (0, 2, 9):
            tensors = qkv(1, length, 2, 4, num_kv_heads=1, dtype=torch.float64)
            check(tensors, Neighborhood(window, is_causal=True, num_sinks=sinks))


@pytest.mark.usefixtures("small_cuts")
def test_fewer_queries_than_keys_at_every_cut() -> None:
    for count in (1, 9, 30, 49):
        query, key, value = qkv(2, 50, 4, 4, num_kv_heads=2, dtype=torch.float64)
        for window in (3, 14):
            check((query[:, -count:], key, value), Neighborhood(window, is_causal=True, num_sinks=2))


def test_text_with_the_real_cuts() -> None:
    span = tiled_causal.SPAN
    for window, sinks in ((2 * span + 1, 4), (77, 4), (64, 0)):
        tensors = qkv(1, window + 2 * span + 70, 3, 8, num_kv_heads=1, dtype=torch.float64)
        check(tensors, Neighborhood(window, is_causal=True, num_sinks=sinks))


def test_one_key_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = qkv(1, 200, 2, 8)
    geometry = Neighborhood(40, is_causal=True)
    expected, _ = reference.attend(*tensors, geometry.on(200), scale=0.3)
    right = tiled_causal._window_mask
    monkeypatch.setattr(
        tiled_causal, "_window_mask", lambda rows, keys, w, *rest: right(rows, keys, w - 1, *rest)
    )
    found, _ = tiled.attend(*tensors, geometry.on(200), scale=0.3)
    assert relative_error(found, expected) > 1e-2


@pytest.mark.parametrize(
    ("grid", "geometry"),
    [
        ((50,), Neighborhood(21)),
        ((37,), Neighborhood(9, 4, 3, border="truncate")),
        ((40,), Neighborhood(17, 5, is_causal=True, num_sinks=3)),
        ((22,), Neighborhood(15, border="pad")),
        ((11, 13), Neighborhood((5, 4), 1, (2, 3))),
        ((9, 10), Neighborhood((4, 3), (2, 3), is_causal=(True, False), border="pad")),
        ((3, 5, 6), Neighborhood((2, 2, 3), (1, 2, 1), (1, 2, 1))),
    ],
)
@pytest.mark.parametrize("names", [(), ALL], ids=["plain", "all options"])
def test_chunks_of_any_size(
    grid: tuple[int, ...], geometry: Neighborhood, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearfield.ops.neighborhood import tiled_boxes

    monkeypatch.setattr(tiled_boxes, "WIDE_ROWS", 37)
    tensors = qkv(2, *grid, 2, 4, num_kv_heads=1, value_dim=6, dtype=torch.float64)
    options = make_options(names, tensors, geometry)
    expected = outcomes(reference.attend, tensors, geometry, **options)
    for size in (1, 1 << 14, 1 << 30):
        monkeypatch.setattr(tiled_boxes, "CHUNK_BYTES", size)
        for found, wanted in zip(outcomes(tiled.attend, tensors, geometry, **options), expected, strict=True):
            assert_close(found, wanted, within=1e-9)


@pytest.mark.parametrize(
    ("grid", "geometry"),
    [((9,), Neighborhood(9)), ((7,), Neighborhood(20, border="truncate")), ((4, 5), Neighborhood((4, 5)))],
)
def test_a_window_that_covers_all_is_full_attention(grid: tuple[int, ...], geometry: Neighborhood) -> None:
    tensors = qkv(2, *grid, 4, 8, num_kv_heads=2, dtype=torch.float64)
    assert tiled._kind(geometry.on(grid), None, None) == "dense"
    flat = [x.flatten(1, -3).transpose(1, 2) for x in tensors]
    full = F.scaled_dot_product_attention(*flat, enable_gqa=True).transpose(1, 2)
    out, _ = tiled.attend(*tensors, geometry.on(grid), scale=8**-0.5)
    assert_close(out, full.reshape(out.shape), within=1e-9)
    check(tensors, geometry, **make_options(("additional_keys", "additional_values"), tensors, geometry))


def test_plans_in_the_cache_are_not_mixed_up() -> None:
    tensors = qkv(1, 16, 16, 2, 4, dtype=torch.float64)
    patterns = [Neighborhood(5), Neighborhood((5, 3)), Neighborhood(5, border="truncate"), Neighborhood(5, 5)]
    tiled_plan._kept_chunks.cache_clear()
    for geometry in (*patterns, *patterns):
        bound = geometry.on((16, 16))
        found, _ = tiled.attend(*tensors, bound, scale=0.5)
        assert_close(found, reference.attend(*tensors, bound, scale=0.5)[0], within=1e-9)
    used = tiled_plan._kept_chunks.cache_info()
    assert (used.misses, used.hits) == (len(patterns), len(patterns))


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_plans_too_large_to_keep_give_the_same(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_plan, "CACHED_BYTES", kept)
    tensors = qkv(1, 20, 13, 2, 4, dtype=torch.float64)
    check(tensors, Neighborhood(5), **make_options(("bias",), tensors, Neighborhood(5)))


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def forget() -> None:
            self.now -= size
            self.known.discard(key)

        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, forget)


def peaks(grid: tuple[int, ...], geometry: Neighborhood) -> tuple[int, int, int]:
    """Bytes of query, key and value, and the peaks of forward and backward on top of them."""
    tensors = qkv(1, *grid, 2, 16)
    bound = geometry.on(grid)
    axes = bound.axes
    sizes = [
        [getattr(axis, name) for axis in axes] for name in ("kernel_size", "stride", "dilation", "is_causal")
    ]
    rest = (*tensors, *[None] * 5, *sizes, geometry.border, geometry.num_sinks, 0.25)
    with Peak() as forward:
        out, lse = tiled._forward._init_fn(*rest)
    with Peak() as backward:
        tiled._backward._init_fn(torch.ones_like(out), None, out, lse, *rest, False)
    return sum(x.nbytes for x in tensors), forward.most, backward.most


def test_memory_of_text_is_linear() -> None:
    geometry = Neighborhood(512, is_causal=True, num_sinks=4)
    sizes = [peaks((n,), geometry) for n in (4096, 8192, 16384)]
    for (_, *few), (_, *many) in zip(sizes, sizes[1:], strict=False):
        assert all(b <= 2.2 * a for a, b in zip(few, many, strict=True))
    given, forward, backward = sizes[-1]
    assert forward < 4 * given
    assert backward < 8 * given


def test_memory_of_images_is_linear() -> None:
    given, forward, backward = peaks((128, 128), Neighborhood(13))
    assert forward < 3 * given  # the scores alone, all of them, would be 340 times
    assert backward < 8 * given


@pytest.mark.parametrize("names", [(), ALL], ids=["plain", "all options"])
@pytest.mark.parametrize(
    ("grid", "geometry"),
    [((700,), Neighborhood(530, is_causal=True, num_sinks=2)), ((13, 9), Neighborhood((5, 4), border="pad"))],
)
def test_no_memory_is_left_unwritten(
    grid: tuple[int, ...], geometry: Neighborhood, names: tuple[str, ...]
) -> None:
    tensors = qkv(1, *grid, 2, 8)
    options = make_options(names, tensors, geometry)
    with poisoned_empty():
        found = outcomes(tiled.attend, tensors, geometry, **options)
    assert not any(x.isnan().any() for x in found)
    for x, wanted in zip(found, outcomes(tiled.attend, tensors, geometry, **options), strict=True):
        assert_close(x, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_text_in_every_dtype(dtype: torch.dtype) -> None:
    tensors = qkv(1, 900, 3, 16, num_kv_heads=1, dtype=dtype)
    geometry = Neighborhood(520, is_causal=True, num_sinks=4)
    wide = tuple(x.float() for x in tensors)
    found, expected = outcomes(tiled.attend, tensors, geometry), outcomes(reference.attend, wide, geometry)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_close(a, b, within={2: 2e-2, 4: 1e-5}[dtype.itemsize] if i != 1 else 1e-2)


def test_ops_pass_torchs_own_checks() -> None:
    tensors = qkv(1, 9, 4, 4, num_kv_heads=2, requires_grad=True)
    geometry = Neighborhood(4, is_causal=True, num_sinks=2)
    options = make_options(ALL, tensors, geometry)
    for x in options.values():
        x.requires_grad_(x.is_floating_point())
    rest = ([4], [1], [1], [True], "shift", 2, 0.5)
    torch.library.opcheck(tiled._forward, (*tensors, *(options[k] for k in ALL), *rest))
    detached = [x.detach() for x in (*tensors, *(options[k] for k in ALL))]
    out, lse = tiled._forward(*detached, *rest)
    for want_bias in (False, True):
        torch.library.opcheck(tiled._backward, (out, lse, out, lse, *detached, *rest, want_bias))


def test_vmap_folds_or_loops() -> None:
    bound = Neighborhood(3).on(10)
    query, key, value = qkv(3, 2, 10, 2, 4)
    bias = torch.randn(3, 2, 5)

    def call(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        return tiled.attend(q, k, value[0], bound, bias=bias, scale=0.5)[0]

    for dims in ((0, None, None), (0, 0, 0), (None, 0, 0)):
        given = [x if dim == 0 else x[0] for x, dim in zip((query, key, bias), dims, strict=True)]
        parts = [[x if dim is None else x[i] for x, dim in zip(given, dims, strict=True)] for i in range(3)]
        assert_close(torch.vmap(call, dims)(*given), torch.stack([call(*part) for part in parts]))


def test_second_derivatives_are_refused_with_a_way_out() -> None:
    query, key, value = qkv(1, 8, 1, 4, requires_grad=True)
    out, _ = tiled.attend(query, key, value, Neighborhood(3).on(8), scale=0.5)
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.sum().backward()


@pytest.mark.compile  # torch counts the arguments of the mask function, which a checker of types hides
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(
    ("grid", "geometry"),
    [
        ((700,), Neighborhood(200, is_causal=True, num_sinks=2)),
        ((20, 19), Neighborhood((7, 5), (2, 1), (1, 3))),
    ],
)
def test_flex_blocks_are_those_of_the_mask(grid: tuple[int, ...], geometry: Neighborhood, extra: int) -> None:
    bound = geometry.on(grid)
    made = flex._block_mask(bound, extra, torch.device("cpu"))
    length = bound.num_keys + extra
    expected = create_block_mask(made.mask_mod, None, None, bound.num_queries, length, "cpu")
    assert torch.equal(made.to_dense(), expected.to_dense())
    assert torch.equal(made.full_kv_num_blocks, expected.full_kv_num_blocks)
    assert flex._block_mask(bound, extra, torch.device("cpu")) is made


@pytest.mark.parametrize(
    ("geometry", "dtype", "dim", "grad", "says"),
    [
        (Neighborhood(3, border="pad"), torch.float32, 16, False, "pad"),
        (Neighborhood(3), torch.float64, 16, False, "float64"),
        (Neighborhood(3), torch.float32, 8, False, "16"),
        (Neighborhood(3), torch.float32, 16, True, "gradients"),
    ],
)
def test_flex_says_what_it_cannot(
    geometry: Neighborhood, dtype: torch.dtype, dim: int, grad: bool, says: str
) -> None:
    tensors = qkv(1, 8, 1, dim, dtype=dtype, requires_grad=grad)
    assert says in str(flex.supports(*tensors, geometry.on(8)))
    with pytest.raises(BackendUnavailable, match=says):
        flex.attend(*tensors, geometry.on(8), scale=0.5)
