"""Scans: the definition against loops, backends against it, laws, refusals, the Mambas of transformers."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, log1p
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.core.tolerance import tolerance
from nearfield.ops.linear import linear_attention
from nearfield.ops.scan import ScanResult, reference, selective_scan, selective_scan_2d, ssd, tiled
from nearfield.ops.scan.orders import inverse, paths
from nearfield.testing import assert_close, poisoned_empty, relative_error

FAST = ("tiled", "native") if library.unavailable() is None else ("tiled",)
OPTIONS = ("D", "z", "dt_bias", "initial_state")
TOKENS = ("x", "dt", "B", "C", "z")  # what has tokens, and so the dtype of the call


@dataclass(frozen=True)
class Case:
    """A problem, its numbers drawn from `seed`."""

    tokens: int
    channels: int = 3
    states: int = 2
    groups: int = 1
    batch: int = 2
    options: tuple[str, ...] = OPTIONS
    softplus: bool = True
    reverse: bool = False
    ends: tuple[int, ...] | None = None
    seed: int = 0

    @property
    def call(self) -> dict[str, Any]:
        """The options that are no tensors."""
        return {
            "dt_softplus": self.softplus,
            "reverse": self.reverse,
            "cu_seqlens": self.ends,
            "output_final_state": True,
        }

    def tensors(self, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> dict[str, Tensor]:
        """All tensors of the call; tables and states are in float32 at least."""
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        tokens, rows = (self.batch, self.tokens), self.batch if self.ends is None else len(self.ends) - 1
        step = normal(*tokens, self.channels)
        found = {
            "x": normal(*tokens, self.channels),
            "dt": step if self.softplus else step.abs(),
            "A": -normal(self.channels, self.states).abs() - 0.01,
            "B": normal(*tokens, self.groups, self.states),
            "C": normal(*tokens, self.groups, self.states),
            "D": normal(self.channels),
            "z": normal(*tokens, self.channels),
            "dt_bias": normal(self.channels).abs(),
            "initial_state": normal(rows, self.channels, self.states),
        }
        wide = torch.promote_types(dtype, torch.float32)
        return {
            name: x.to(dtype if name in TOKENS else wide).requires_grad_(requires_grad)
            for name, x in found.items()
            if name not in OPTIONS or name in self.options
        }


CASES = {
    "one token": Case(1),
    "bare": Case(5, options=()),
    "all options": Case(9, 4, 3, groups=2),
    "backwards": Case(7, reverse=True),
    "no softplus": Case(6, softplus=False, options=("D", "initial_state")),
}
AWKWARD = {
    **CASES,
    "63 tokens, 17 channels": Case(63, 17, 5),
    "64 tokens, 16 channels": Case(64, 16, 4, options=("z",)),
    "65 tokens, one state": Case(65, 33, 1, batch=1),
    "130 tokens, 16 states, three groups": Case(
        130, 51, 16, groups=3, batch=1, options=("D", "initial_state")
    ),
    "129 tokens backwards": Case(129, 6, 7, reverse=True, groups=2),
    "many blocks": Case(21, 150, 2),
    "many states": Case(40, 2, 70, batch=1),
    "packed": Case(90, 5, 3, batch=1, ends=(0, 1, 1, 70, 90)),
    "packed backwards": Case(90, 5, 3, batch=1, ends=(0, 64, 65, 90), reverse=True),
    "no tokens": Case(0),
    "no batch": Case(5, batch=0),
}


def outcome(case: Case, backend: str, tensors: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and last state, and the gradient of each tensor of the same pull on both."""
    output, state = selective_scan(**tensors, **case.call, backend=backend)
    assert state is not None
    draw = torch.Generator().manual_seed(case.seed + 1)
    pulls = [torch.randn(y.shape, generator=draw).bfloat16().to(y.dtype) for y in (output, state)]
    grads = torch.autograd.grad([output, state], list(tensors.values()), pulls, materialize_grads=True)
    return [output, state], list(grads)


def check_backend(case: Case, backend: str, dtype: torch.dtype, within: float | None = None) -> None:
    """Fail unless the backend gives what the reference gives in float64 for the same numbers."""
    tensors = case.tensors(dtype, requires_grad=True)
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    results, grads = outcome(case, backend, tensors)
    wanted, wanted_grads = outcome(case, "reference", exact)
    for actual, expected in zip(results, wanted, strict=True):
        assert_close(actual, expected, within=within and max(within, tolerance(actual.dtype)))
    for name, actual, expected in zip(tensors, grads, wanted_grads, strict=True):
        assert actual.dtype == tensors[name].dtype
        # tables are summed from rounded tokens in float32: they are as exact as that
        assert_close(actual, expected, gradient=True)


def loops(case: Case, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The equations of the docstring, number by number."""
    rows = case.batch if case.ends is None else len(case.ends) - 1
    bounds = [(b, 0, case.tokens) for b in range(rows)]
    if case.ends is not None:
        bounds = [(0, begin, end) for begin, end in pairwise(case.ends)]
    output = torch.zeros(case.batch, case.tokens, case.channels, dtype=torch.float64)
    states = torch.zeros(rows, case.channels, case.states, dtype=torch.float64)
    for row, (b, begin, end) in enumerate(bounds):
        for c in range(case.channels):
            group = c // (case.channels // case.groups)
            h = [
                float(t["initial_state"][row, c, n]) if "initial_state" in t else 0.0
                for n in range(case.states)
            ]
            times: Iterable[int] = range(begin, end)
            for i in reversed(range(begin, end)) if case.reverse else times:
                step = float(t["dt"][b, i, c]) + (float(t["dt_bias"][c]) if "dt_bias" in t else 0.0)
                step = log1p(exp(step)) if case.softplus else step
                x = float(t["x"][b, i, c])
                y = x * float(t["D"][c]) if "D" in t else 0.0
                for n in range(case.states):
                    h[n] = exp(step * float(t["A"][c, n])) * h[n] + step * float(t["B"][b, i, group, n]) * x
                    y += float(t["C"][b, i, group, n]) * h[n]
                if "z" in t:
                    z = float(t["z"][b, i, c])
                    y *= z / (1 + exp(-z))
                output[b, i, c] = y
            states[row, c] = torch.tensor(h, dtype=torch.float64)
    return output, states


@pytest.mark.parametrize("name", [*CASES, "packed backwards"])
def test_the_definition_is_what_the_loops_say(name: str) -> None:
    case = {**CASES, "packed backwards": Case(7, batch=1, ends=(0, 2, 2, 7), reverse=True)}[name]
    tensors = case.tensors()
    for actual, expected in zip(
        selective_scan(**tensors, **case.call, backend="reference"), loops(case, tensors), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("name", ["all options", "backwards"])
def test_gradients_are_slopes(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "SEGMENT", 3)
    case = replace(CASES[name], batch=1)
    tensors = case.tensors(requires_grad=True)

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        output, state = selective_scan(
            **dict(zip(tensors, values, strict=True)), **case.call, backend=backend
        )
        assert state is not None
        return output, state

    assert torch.autograd.gradcheck(scan, tuple(tensors.values()))
    if backend == "reference":
        small = replace(case, tokens=2, channels=2, states=1, groups=1).tensors(requires_grad=True)
        assert torch.autograd.gradgradcheck(scan, tuple(small.values()))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", AWKWARD)
def test_backends_equal_the_definition(name: str, backend: str) -> None:
    with poisoned_empty():
        check_backend(AWKWARD[name], backend, torch.float32)


@pytest.mark.parametrize("name", ["all options", "packed", "129 tokens backwards"])
def test_tiled_is_exact_in_float64(name: str) -> None:
    check_backend(AWKWARD[name], "tiled", torch.float64)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_states_in_float32(dtype: torch.dtype, backend: str) -> None:
    case = AWKWARD["63 tokens, 17 channels"]
    check_backend(case, backend, dtype)
    output, state = selective_scan(**case.tensors(dtype), **case.call, backend=backend)
    assert output.dtype == dtype and state is not None and state.dtype == torch.float32


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("states", [1, 4, 16])
def test_errors_stay_at_a_millionth_whatever_the_step(states: int, backend: str) -> None:
    torch.manual_seed(1)
    # The sheet asks for steps up to 10 and thousands of tokens; slow and fast decays are both there.
    case = Case(1024, 3, states, batch=1, softplus=False, options=("D",))
    tensors = case.tensors(torch.float32, requires_grad=True)
    with torch.no_grad():
        tensors["dt"].copy_(10 ** (-3 + 4 * torch.rand(1, 1024, 3)))  # 0.001 to 10
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    # the definition in all but name: autograd through its loop takes half a minute here
    for found, wanted in zip(outcome(case, backend, tensors), outcome(case, "tiled", exact), strict=True):
        for actual, expected in zip(found, wanted, strict=True):
            assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("states", [1, 4, 16])
def test_a_hundred_thousand_tokens_neither_overflow_nor_stop(states: int) -> None:
    length = 100_000 if "native" in FAST else 5_000
    case = Case(length, 16, states, batch=1, softplus=False, options=())
    tensors = case.tensors(torch.float32, requires_grad=True)
    with torch.no_grad():
        tensors["dt"].uniform_(0, 10)
        tensors["dt"][:, ::3] = 0  # where the step is 0 nothing is forgotten
    results, grads = outcome(case, FAST[-1], tensors)
    assert all(x.isfinite().all() for x in (*results, *grads))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_step_of_0_changes_no_bit_of_a_state(backend: str) -> None:
    case = Case(200, 5, 3, softplus=False, options=("initial_state",))
    tensors = case.tensors(torch.float32)
    tensors["dt"].zero_()
    _, state = selective_scan(**tensors, **case.call, backend=backend)
    assert state is not None and torch.equal(state, tensors["initial_state"])


@pytest.mark.parametrize("backend", ["reference", *FAST])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_laws(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.integers(1, 2))
    case = Case(
        draw(st.integers(2, 70)),
        groups * draw(st.integers(1, 9)),
        draw(st.integers(1, 5)),
        groups,
        softplus=draw(st.booleans()),
        reverse=draw(st.booleans()),
        options=draw(st.sets(st.sampled_from(OPTIONS)).map(lambda s: tuple(sorted(s)))),
        seed=draw(st.integers(0, 99)),
    )
    t = case.tensors(torch.float32)
    whole, last = selective_scan(**t, **case.call, backend=backend)
    assert last is not None

    # backwards is forwards over flipped tokens
    flipped = {name: x.flip(1) if name in TOKENS else x for name, x in t.items()}
    other, state = selective_scan(**flipped, **replace(case, reverse=not case.reverse).call, backend=backend)
    assert_close(other.flip(1), whole, within=1e-6)
    assert state is not None
    assert_close(state, last, within=1e-6)

    # the state at any cut continues the sequence, down to single tokens
    cut = draw(st.sampled_from([1, case.tokens - 1, draw(st.integers(1, case.tokens - 1))]))
    halves = [
        {n: x[:, s] if n in TOKENS else x for n, x in t.items()} for s in (slice(cut), slice(cut, None))
    ]
    first, second = reversed(halves) if case.reverse else halves
    out_1, state = selective_scan(**first, **case.call, backend=backend)
    out_2, state = selective_scan(**{**second, "initial_state": state}, **case.call, backend=backend)
    joined = torch.cat([out_2, out_1] if case.reverse else [out_1, out_2], 1)
    assert_close(joined, whole, within=1e-6)
    assert state is not None
    assert_close(state, last, within=1e-6)

    # what comes later on the way is not seen, not even a NaN
    blind = {n: x.clone() for n, x in t.items()}
    later = slice(cut) if case.reverse else slice(cut, None)
    for name in set(TOKENS) & set(t):
        blind[name][:, later] = torch.nan
    out, _ = selective_scan(**blind, **case.call, backend=backend)
    seen = slice(cut, None) if case.reverse else slice(cut)
    assert torch.equal(out[:, seen], whole[:, seen])

    # packed sequences are separate ones
    single = {n: x[:1] if n in (*TOKENS, "initial_state") else x for n, x in t.items()}
    single.pop("initial_state", None)
    ends = (0, cut, case.tokens)
    packed, states = selective_scan(**single, **replace(case, ends=ends).call, backend=backend)
    assert states is not None
    for row, part in enumerate((slice(cut), slice(cut, None))):
        alone = {n: x[:, part] if n in TOKENS else x for n, x in single.items()}
        out, state = selective_scan(**alone, **case.call, backend=backend)
        assert_close(packed[:, part], out, within=1e-6)
        assert state is not None
        assert_close(states[row : row + 1], state, within=1e-6)


def test_the_state_comes_only_if_it_is_asked_for() -> None:
    tensors = CASES["bare"].tensors()
    assert selective_scan(**tensors).final_state is None
    assert isinstance(selective_scan(**tensors), ScanResult)


@pytest.mark.parametrize("backend", FAST)
def test_a_gradient_may_come_from_the_state_alone(backend: str) -> None:
    case = CASES["all options"]
    grads = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        tensors = {n: x.to(dtype).detach().requires_grad_() for n, x in case.tensors(torch.float32).items()}
        state = selective_scan(**tensors, **case.call, backend=name).final_state
        assert state is not None
        wanted = [tensors[n] for n in ("x", "dt", "A", "B", "initial_state")]
        grads.append(torch.autograd.grad(state.square().sum(), wanted))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, gradient=True)


@pytest.mark.parametrize("backend", FAST)
def test_strides_change_nothing(backend: str) -> None:
    case = Case(19, 6, 4, groups=2)
    plain = case.tensors(torch.float32)
    views = {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
        "slices": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    }
    for x in plain.values():
        x.requires_grad_()
    expected = [y for part in outcome(case, backend, plain) for y in part]
    for view in views.values():
        given = {n: (view(x) if n in TOKENS else x).detach().requires_grad_() for n, x in plain.items()}
        found = [y for part in outcome(case, backend, given) for y in part]
        for a, b in zip(found, expected, strict=True):  # torch may sum in another order
            assert torch.equal(a, b) if backend == "native" else relative_error(a, b) < 1e-6
    repeated = {n: x[:1].expand_as(x) if n in TOKENS else x for n, x in plain.items()}
    whole = {n: x.contiguous() for n, x in repeated.items()}
    out = selective_scan(**repeated, backend=backend).output
    assert_close(out, selective_scan(**whole, backend=backend).output, within=1e-6)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_vmap_is_a_batch(backend: str) -> None:
    case = Case(6, 4, 3, options=("z", "D", "initial_state"))
    t = case.tensors(torch.float32)
    many = {n: torch.stack([x, x.flip(0)]) for n, x in t.items() if n in (*TOKENS, "initial_state")}

    def scan(mapped: dict[str, Tensor]) -> Tensor:
        return selective_scan(**{**t, **mapped}, backend=backend).output

    found = torch.vmap(scan)(many)
    for i in range(2):
        assert_close(found[i], scan({n: x[i] for n, x in many.items()}), within=1e-6)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_lowers_tokens_only(backend: str) -> None:
    case = CASES["all options"]
    t = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = selective_scan(**t, **case.call, backend=backend)
    low = {n: x.bfloat16() if n in TOKENS else x for n, x in t.items()}
    expected, _ = selective_scan(**low, **case.call, backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert state is not None and state.dtype == torch.float32


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_the_public_function_compiles_whole(backend: str) -> None:
    case = Case(3, 2, 2, batch=1)
    compiled = torch.compile(
        lambda t: selective_scan(**t, **case.call, backend=backend), fullgraph=True, backend="aot_eager"
    )
    results = []
    for run in (compiled, lambda t: selective_scan(**t, **case.call, backend=backend)):
        tensors = case.tensors(torch.float32, requires_grad=True)
        out, state = run(tensors)
        results.append(
            [out, state, *torch.autograd.grad(out.square().sum() + state.sum(), list(tensors.values()))]
        )
    for a, b in zip(*results, strict=True):
        assert_close(a, b, within=1e-6)


@pytest.mark.compile
def test_grids_and_heads_compile_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    x, dt = torch.randn(1, 2, 3, 4, generator=draw), torch.rand(1, 2, 3, 4, 4, generator=draw)
    B, A = torch.randn(1, 2, 3, 4, 2, generator=draw), -torch.rand(4, 4, 2, generator=draw)
    over_grid = torch.compile(selective_scan_2d, fullgraph=True, backend="eager")
    assert_close(over_grid(x, dt, A, B, B), selective_scan_2d(x, dt, A, B, B))
    heads = (x[:, 0, :, :, None], dt[:, 0, :, 0], A[:, 0, 0], B[:, 0, :, 0], B[:, 0, :, 0])
    assert_close(torch.compile(ssd, fullgraph=True, backend="eager")(*heads).output, ssd(*heads).output)


def test_derivatives_of_higher_order() -> None:
    tensors = CASES["bare"].tensors(requires_grad=True)
    jacobian = torch.func.jacrev(
        lambda x: selective_scan(x, **{n: t for n, t in tensors.items() if n != "x"}).output
    )
    assert jacobian(tensors["x"]).shape == (2, 5, 3, 2, 5, 3)
    out = selective_scan(**tensors, backend="tiled").output
    (grad,) = torch.autograd.grad(out.sum(), tensors["dt"], create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.autograd.grad(grad.sum(), tensors["dt"])


@pytest.mark.parametrize("name", ["all options", "packed"])
def test_a_broken_backend_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_backend(AWKWARD[name], "tiled", torch.float32)
    right = tiled._states

    def late(x: Tensor, step: Tensor, B: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return right(x, step, B.roll(1, 0), A, state)

    monkeypatch.setattr(tiled, "_states", late)
    with pytest.raises(AssertionError, match="relative rms error"):
        check_backend(AWKWARD[name], "tiled", torch.float32)


def test_wrong_calls_are_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    t = Case(4, 6, 2, options=()).tensors(torch.float32)

    def refused(kind: type[Exception], words: str, **changed: Any) -> None:
        with pytest.raises(kind, match=words):
            selective_scan(**{**t, **changed})

    refused(ValueError, "x has shape .* must be .batch, tokens, channels.", x=t["x"][0])
    refused(TypeError, "x is a list", x=[1.0])
    refused(TypeError, "x has dtype torch.int64", x=t["x"].long())
    refused(ValueError, r"dt has shape \[2, 3, 6\]. It must be \[2, 4, 6\]", dt=t["dt"][:, 1:])
    refused(TypeError, "dt has dtype torch.float64, x torch.float32. Cast one", dt=t["dt"].double())
    refused(ValueError, "A has shape", A=t["A"][:, :1])
    refused(ValueError, "6 channels cannot share 4 groups of B", B=t["B"].expand(-1, -1, 4, -1))
    refused(ValueError, r"C has shape \[2, 4\]. It must be", C=t["C"][..., 0, 0])
    refused(ValueError, "D has shape", D=torch.ones(5))
    refused(TypeError, "z is a float. Give a tensor", z=1.0)
    refused(ValueError, "initial_state has shape", initial_state=torch.zeros(1, 6, 2))
    refused(ValueError, "Pack the sequences into a batch of 1", cu_seqlens=[0, 4])
    one = {n: x[:1] if n in TOKENS else x for n, x in t.items()}
    refused(ValueError, "must rise from 0 to the 4 tokens", **one, cu_seqlens=[0, 3])
    refused(ValueError, "backend='tile' is unknown. Did you mean", backend="tile")
    refused(ValueError, "on meta, x on cpu", D=torch.ones(6, device="meta"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(BackendUnavailable, "need tensors on a GPU", backend="triton")
    many = {**t, "A": torch.zeros(6, 300), "B": torch.zeros(2, 4, 300), "C": torch.zeros(2, 4, 300)}
    if "native" in FAST:
        refused(BackendUnavailable, "1 to 256 states, given 300", **many, backend="native")
        refused(BackendUnavailable, "not in torch.float64", **Case(4).tensors(), backend="native")
    assert selective_scan(**many).output.shape == (2, 4, 6)  # "auto" finds another
    with pytest.raises(ValueError, match="Did you mean 'raster'"):
        selective_scan_2d(*[t["x"]] * 5, order="rasters")


# Grids


@given(height=st.integers(1, 7), width=st.integers(1, 7), order=st.sampled_from(["snake", "raster"]))
@settings(max_examples=40, deadline=None)
def test_paths_visit_every_token_once(height: int, width: int, order: str) -> None:
    for path in paths(height, width, order):
        assert sorted(path) == list(range(height * width))
        assert [path[time] for time in inverse(path)] == list(range(height * width))
        if order == "snake":
            steps = [abs(a // width - b // width) + abs(a % width - b % width) for a, b in pairwise(path)]
            assert set(steps) <= {1}


def test_snakes_are_those_of_the_paper_on_even_squares() -> None:
    n = 4

    def rows(r0: int, c0: int, dr: int, dc: int) -> list[int]:
        columns = [[j if i % 2 == 0 else n - 1 - j for j in range(n)] for i in range(n)]
        return [(r0 + dr * i) * n + c0 + dc * c for i in range(n) for c in columns[i]]

    def columns(r0: int, c0: int, dr: int, dc: int) -> list[int]:
        lines = [[i if j % 2 == 0 else n - 1 - i for i in range(n)] for j in range(n)]
        return [(r0 + dr * r) * n + c0 + dc * j for j in range(n) for r in lines[j]]

    expected = [rows(0, 0, 1, 1), rows(3, 0, -1, 1), columns(3, 0, -1, 1), columns(3, 3, -1, -1)]
    assert [list(path) for path in paths(n, n, "snake")] == expected
    by_row = list(range(6))
    assert [list(path) for path in paths(2, 3, "raster")] == [
        by_row, [0, 3, 1, 4, 2, 5], by_row[::-1], [5, 2, 4, 1, 3, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("order", ["snake", "raster"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (5, 2)])
def test_a_scan_of_a_grid_is_four_scans(grid: tuple[int, int], order: str, backend: str) -> None:
    height, width = grid
    draw = torch.Generator().manual_seed(0)
    dtype = torch.float64 if backend != "native" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    x, dt, B, C = (normal(2, height, width, *rest) for rest in ((3,), (4, 3), (4, 2), (4, 2)))
    A, D, bias = (-normal(4, 3, 2).abs()).detach().requires_grad_(), normal(4, 3), normal(4, 3)
    tensors = (x, dt, A, B, C, D, bias)
    ours = selective_scan_2d(
        x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, order=order, backend=backend
    )
    theirs = torch.zeros_like(x)
    for k, path in enumerate(paths(height, width, order)):
        y, s, b, c = (m.flatten(1, 2)[:, list(path)] for m in (x, dt[..., k, :], B[..., k, :], C[..., k, :]))
        out = selective_scan(y, s, A[k], b, c, D=D[k], dt_bias=bias[k], dt_softplus=True, backend="reference")
        theirs = theirs + out.output[:, list(inverse(path))].unflatten(1, grid)
    assert_close(ours, theirs)
    pull = torch.randn(ours.shape, generator=draw, dtype=torch.float64).to(dtype)
    found = [torch.autograd.grad(y, tensors, pull) for y in (ours, theirs)]
    for a, b in zip(*found, strict=True):
        assert_close(a, b, gradient=True)


# Mamba-2


def heads_of(groups: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(groups)
    shapes = {
        "x": (2, 21, 4, 5), "dt": (2, 21, 4), "A": (4,), "B": (2, 21, groups, 3), "C": (2, 21, groups, 3),
        "D": (4,), "z": (2, 21, 4, 5), "dt_bias": (4,), "initial_state": (2, 4, 5, 3),
    }  # fmt: skip
    found = {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in shapes.items()}
    found["A"] = -found["A"].abs()
    return {n: x.to(dtype).requires_grad_() for n, x in found.items()}


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_is_a_selective_scan_with_one_decay_a_head(groups: int, backend: str) -> None:
    for dtype in (torch.float64, torch.float32):
        t = heads_of(groups, dtype)
        exact = {n: x.detach().double().requires_grad_() for n, x in t.items()}
        out, state = ssd(**t, dt_softplus=True, output_final_state=True, backend=backend)
        wanted, last = reference.ssd(**exact, dt_softplus=True)
        assert state is not None
        assert_close(out, wanted)
        assert_close(state, last)
        found = torch.autograd.grad(out.square().sum() + state.sum(), list(t.values()))
        expected = torch.autograd.grad(wanted.square().sum() + last.sum(), list(exact.values()))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, gradient=True)


def test_ssd_is_a_masked_product() -> None:
    t = heads_of(4)
    step = F.softplus(t["dt"])
    decay = (step * t["A"]).cumsum(1).transpose(1, 2)  # [B, H, T]
    mask = (decay[..., :, None] - decay[..., None, :]).tril().exp().tril()
    scores = torch.einsum("bthn,bshn->bhts", t["C"], t["B"]) * mask
    expected = torch.einsum("bhts,bshp->bthp", scores, step[..., None] * t["x"])
    assert_close(ssd(*(t[n] for n in ("x", "dt", "A", "B", "C")), dt_softplus=True).output, expected)


def test_ssd_without_decay_is_linear_attention() -> None:
    t = heads_of(4)
    ones, zeros = torch.ones_like(t["dt"]), torch.zeros_like(t["A"])
    out = ssd(t["x"], ones, zeros, t["B"], t["C"]).output
    assert_close(out, linear_attention(t["C"], t["B"], t["x"], scale=1.0).output)


def test_ssd_continues_and_packs() -> None:
    t = {n: x.detach() for n, x in heads_of(2).items()}
    tokens = ("x", "dt", "B", "C", "z")
    one = {n: x[:1] if n in (*tokens, "initial_state") else x for n, x in t.items()}
    whole, last = ssd(**one, output_final_state=True)
    parts = [{n: x[:, s] if n in tokens else x for n, x in one.items()} for s in (slice(8), slice(8, None))]
    first, state = ssd(**parts[0], output_final_state=True)
    second, state = ssd(**{**parts[1], "initial_state": state}, output_final_state=True)
    assert state is not None and last is not None
    assert_close(torch.cat([first, second], 1), whole)
    assert_close(state, last)
    both = {**one, "initial_state": one["initial_state"].expand(2, -1, -1, -1)}
    packed, states = ssd(**both, cu_seqlens=[0, 8, 21], output_final_state=True)
    alone = [ssd(**part, output_final_state=True) for part in parts]
    assert_close(packed, torch.cat([y.output for y in alone], 1))
    assert states is not None
    assert_close(states, torch.cat([y.final_state for y in alone if y.final_state is not None]))


def test_ssd_refuses_what_does_not_fit() -> None:
    t = {n: x.detach() for n, x in heads_of(2).items()}
    for words, changed in (
        ("4 heads cannot share 3 groups of B", {"B": torch.ones(2, 21, 3, 3).double()}),
        (r"D has shape \[5\]. It must be \[4\]", {"D": torch.ones(5)}),
        ("A has shape", {"A": torch.ones(4, 1)}),
        (r"initial_state has shape", {"initial_state": torch.ones(2, 4, 3, 5)}),
    ):
        with pytest.raises(ValueError, match=words):
            ssd(**{**t, **changed})


# Against transformers


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_mamba_of_transformers(backend: str) -> None:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    torch.manual_seed(0)
    config = module.MambaConfig(hidden_size=8, state_size=4, time_step_rank=3, expand=2, use_mambapy=False)
    mixer = module.MambaMixer(config, layer_idx=0).eval()
    tokens = torch.randn(2, 11, 8)
    with torch.no_grad():
        mixer.D.normal_()
        expected = mixer(tokens)
        u, z = mixer.in_proj(tokens).chunk(2, -1)
        u = F.silu(mixer.conv1d(u.transpose(1, 2))[..., : tokens.shape[1]]).transpose(1, 2)
        dt, B, C = mixer.x_proj(u).split([3, 4, 4], -1)
        out = selective_scan(
            u,
            F.linear(dt, mixer.dt_proj.weight),
            -mixer.A_log.exp(),
            B,
            C,
            D=mixer.D,
            z=z,
            dt_bias=mixer.dt_proj.bias,
            dt_softplus=True,
            backend=backend,
        ).output
        assert_close(mixer.out_proj(out), expected, within=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mamba_2_of_transformers(backend: str) -> None:
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    torch.manual_seed(0)
    config = module.Mamba2Config(
        hidden_size=8, state_size=4, num_heads=4, head_dim=4, expand=2, n_groups=2, chunk_size=4
    )
    mixer = module.Mamba2Mixer(config, layer_idx=0).eval()
    tokens = torch.randn(2, 11, 8)
    with torch.no_grad():
        mixer.D.normal_()
        mixer.dt_bias.normal_()
        expected = mixer(tokens)
        gate, u, dt = mixer.in_proj(tokens).split([16, 16 + 2 * 2 * 4, 4], -1)
        u = F.silu(mixer.conv1d(u.transpose(1, 2))[..., : tokens.shape[1]]).transpose(1, 2)
        x, B, C = u.split([16, 8, 8], -1)
        out = ssd(
            x.unflatten(2, (4, 4)),
            dt,
            -mixer.A_log.exp(),
            B.unflatten(2, (2, 4)),
            C.unflatten(2, (2, 4)),
            D=mixer.D,
            dt_bias=mixer.dt_bias,
            dt_softplus=True,
            backend=backend,
        ).output
        assert_close(mixer.out_proj(mixer.norm(out.flatten(2), gate)), expected, within=1e-5)
