"""NATTEN as an oracle: the same outputs, the same log-sum-exp, and how much longer it takes.

Its pure-Python wheel runs forward on the CPU through eager FlexAttention, for head sizes that are powers of
two.
"""

import random
import time
from math import prod

import natten
import pytest
import torch

from nearfield import natten as ours_by_name
from nearfield.core import library
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.ops.neighborhood import natten as executor

BACKENDS = ("reference", "tiled", *(["native"] if library.kernels() else []))
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:flex_attention called without:UserWarning"
)

TOLERANCE = 2e-6  # float32, largest absolute difference
ATTEND = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
SIDES = {1: (4, 400), 2: (4, 24), 3: (3, 10)}


def drawn(seed: int) -> dict:
    """A random problem: dimensions 1, 2, 3 in turn, everything else per axis."""
    rng = random.Random(seed)
    rank = seed % 3 + 1
    grid, kernel, stride, dilation, causal = [], [], [], [], []
    for _ in range(rank):
        side = rng.randint(*SIDES[rank])
        size = rng.randint(2, side)
        grid.append(side)
        kernel.append(size)
        dilation.append(rng.randint(1, side // size))
        stride.append(rng.choice((1, rng.randint(1, size))))
        causal.append(rng.random() < 0.35)
    if causal == [True] and kernel == grid:
        kernel[0] -= 1  # NATTEN sends this one to dense causal attention, which its CPU path lacks
        stride[0] = min(stride[0], kernel[0])
    num_kv_heads = rng.choice((1, 2))
    return {
        "grid": tuple(grid),
        "kernel_size": tuple(kernel),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "is_causal": tuple(causal),
        "num_heads": num_kv_heads * rng.choice((1, 1, 3)),
        "num_kv_heads": num_kv_heads,
        "head_dim": rng.choice((8, 16, 32, 64)),
        "extra": rng.choice((0, 0, 5)),
    }


@pytest.mark.parametrize("seed", range(60))
def test_outputs_and_lse_equal_natten(seed):
    problem = drawn(seed)
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, problem["head_dim"], generator=generator)

    query = tensor(*problem["grid"], problem["num_heads"])
    key, value = (tensor(*problem["grid"], problem["num_kv_heads"]) for _ in range(2))
    context = {}
    if problem["extra"]:
        more = (problem["extra"], problem["num_kv_heads"])
        context = {"additional_keys": tensor(*more), "additional_values": tensor(*more)}
    pattern = {name: problem[name] for name in ("kernel_size", "stride", "dilation", "is_causal")}
    with torch.no_grad():
        expected, expected_lse = ATTEND[len(problem["grid"])](
            query, key, value, **pattern, **context, return_lse=True
        )
        for backend in BACKENDS:
            out, lse = neighborhood_attention(
                query, key, value, Neighborhood(**pattern), **context, return_lse=True, backend=backend
            )
            assert (out - expected).abs().max() <= TOLERANCE, (backend, problem)
            assert (lse - expected_lse).abs().max() <= TOLERANCE, (backend, problem)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_its_names_here_mean_the_same(rank):
    name, grid = f"NeighborhoodAttention{rank}D", (9, 8, 7)[:rank]
    options = {"kernel_size": 3, "stride": 2, "dilation": 2, "is_causal": True}
    theirs = getattr(natten, name)(64, 4, **options)
    ours = getattr(ours_by_name, name)(64, 4, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, *grid, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < TOLERANCE
        parts = [torch.randn(3, 2, 5, 4, 8).unbind(0), torch.randn(3, 2, 5, 4).unbind(0)]
        merged = zip(
            ours_by_name.merge_attentions(*parts),
            natten.functional.merge_attentions(*map(list, parts), torch_compile=False),
            strict=True,
        )
        assert all((a - b).abs().max() < TOLERANCE for a, b in merged)
    assert set(natten.__all__) >= {name for name in ours_by_name.__all__ if name in vars(natten)}


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_our_executor_asks_natten_for_the_same_problem(seed, monkeypatch):
    monkeypatch.setattr(executor, "DEVICE", "cpu")  # where NATTEN has FlexAttention in the place of kernels
    problem = drawn(seed)
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, problem["head_dim"], generator=generator)

    tensors = [tensor(*problem["grid"], problem[name]) for name in ("num_heads", *["num_kv_heads"] * 2)]
    more = {}
    if problem["extra"]:
        names = ("additional_keys", "additional_values")
        more = {name: tensor(problem["extra"], problem["num_kv_heads"]) for name in names}
    pattern = {name: problem[name] for name in ("kernel_size", "stride", "dilation", "is_causal")}
    geometry = Neighborhood(**pattern)
    bound = geometry.on(problem["grid"])
    assert executor.unfit(tensors[0], bound, scale=0.3) is None
    with torch.no_grad():
        found = executor.attend(*tensors, bound, scale=0.3, **more)
        expected = neighborhood_attention(
            *tensors, geometry, scale=0.3, return_lse=True, backend="reference", **more
        )
    for a, e in zip(found, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() < TOLERANCE
    assert "no compiled kernels" in executor.supports(*tensors, bound, scale=0.3)


def test_the_oracle_would_notice_one_key_more():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 40, 2, 16, generator=generator) for _ in range(3))
    expected = natten.na1d(query, key, value, kernel_size=7)
    wider = neighborhood_attention(query, key, value, Neighborhood(8))
    assert (wider - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(("backend", "factor"), [("native", 300), ("tiled", 100)])
def test_faster_than_natten_on_the_cpu(backend, factor, capsys):
    """56 x 56, kernel size 7, 4 heads of 32, float32, one thread: CPU time, best of each."""
    if backend not in BACKENDS:
        pytest.skip(library.unavailable())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(1, 56, 56, 4, 32, generator=generator) for _ in range(3)]
        with torch.no_grad():
            theirs = _best(lambda: natten.na2d(*tensors, kernel_size=7), 3)
            ours = _best(lambda: neighborhood_attention(*tensors, Neighborhood(7), backend=backend), 30)
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        times = f"NATTEN {1e3 * theirs:.0f} ms, {backend} {1e3 * ours:.2f} ms: {theirs / ours:.0f}x"
        print(f"\n56x56, kernel size 7, forward: {times}")
    assert theirs >= factor * ours


def _best(call, repeats: int) -> float:
    call()
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


def test_problems_cover_what_they_should():
    problems = [drawn(seed) for seed in range(60)]
    assert {len(problem["grid"]) for problem in problems} == {1, 2, 3}
    for name in ("stride", "dilation"):
        assert sum(max(problem[name]) > 1 for problem in problems) >= 15, name
    assert sum(any(problem["is_causal"]) for problem in problems) >= 15
    assert sum(problem["num_heads"] > problem["num_kv_heads"] for problem in problems) >= 10
    assert sum(problem["extra"] > 0 for problem in problems) >= 10
    assert max(prod(problem["grid"]) for problem in problems) >= 300
