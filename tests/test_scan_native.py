"""What is special to the native scan: instruction sets, threads, its operators and how they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.scan import native, selective_scan
from nearfield.testing import assert_close, poisoned_empty
from tests.test_scan import AWKWARD, CASES, Case, check_backend, outcome

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="no compiled CPU kernels")
HALVES = (torch.bfloat16, torch.float16)
TELLING = ("all options", "65 tokens, one state", "no softplus", "packed backwards")
ORDER = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def arguments(case: Case, requires_grad: bool = True) -> list[Any]:
    """What the operator takes, without the last one."""
    tensors = case.tensors(torch.float32, requires_grad=requires_grad)
    ends = None if case.ends is None else list(case.ends)
    return [*(tensors.get(name) for name in ORDER), ends, case.softplus, case.reverse]


@pytest.mark.parametrize("isa", library.isas())
def test_every_instruction_set_equals_the_reference(isa: str) -> None:
    with library.use(isa), poisoned_empty():
        for name in TELLING:
            for dtype in (torch.float32, *HALVES):
                check_backend(AWKWARD[name], "native", dtype)


@pytest.mark.parametrize("isa", library.isas())
def test_every_instruction_set_heeds_extremes(isa: str) -> None:
    # softplus and decays far from 0 on both sides, where a power of two leaves the range of float
    case = Case(40, 16, 2, batch=1, options=("z", "initial_state"))
    tensors = case.tensors(torch.float32)
    tensors["dt"].copy_(torch.linspace(-80, 80, 40)[None, :, None].expand(1, 40, 16))
    tensors["z"].copy_(torch.linspace(-120, 120, 40)[None, :, None].expand(1, 40, 16))
    tensors["A"].copy_(-torch.logspace(-8, 6, 32).view(16, 2))
    with library.use(isa):
        for x in tensors.values():
            x.requires_grad_()
        exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
        for found, wanted in zip(
            outcome(case, "native", tensors), outcome(case, "reference", exact), strict=True
        ):
            for actual, expected in zip(found, wanted, strict=True):
                assert_close(actual, expected, gradient=True)


@pytest.mark.parametrize("isa", library.isas())
def test_small_steps_keep_their_digits(isa: str) -> None:
    # log(1 + e^x) of a very negative x is e^x: relative to it, not to 1
    x = torch.linspace(-60, 30, 16 * 200).view(1, 200, 16)
    ones, zeros = torch.ones_like(x), torch.zeros(16, 1)
    one = torch.ones(1, 200, 1)
    with library.use(isa):
        # each token alone: the state is the step
        out = selective_scan(
            ones, x, zeros, one, one, dt_softplus=True, cu_seqlens=list(range(201)), backend="native"
        ).output
    expected = torch.nn.functional.softplus(x.double(), threshold=40)
    assert ((out - expected).abs() <= 3e-7 * expected).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["many blocks", "130 tokens, 16 states, three groups", "packed"])
def test_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for _ in range(2):  # once more: who works first differs
            with library.grain(0):
                found = outcome(AWKWARD[name], "native", AWKWARD[name].tensors(dtype, requires_grad=True))
            results.append([x for part in found for x in part])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_ops_pass_torchs_own_checks() -> None:
    ops = torch.ops.nearfield
    for case in (replace(CASES["all options"], batch=1, ends=(0, 3, 9)), CASES["bare"]):
        given = arguments(case)
        torch.library.opcheck(ops.native_scan, (*given, True))
        plain = [x.detach() if isinstance(x, Tensor) else x for x in given]
        torch.library.opcheck(ops.native_scan, (*plain, False))
        out, state, kept = ops.native_scan(*plain, True)
        for pull, state_pull in ((out, state), (None, state)):
            torch.library.opcheck(ops.native_scan_backward, (pull, state_pull, kept, *plain))


def test_operators_called_by_hand_refuse_what_does_not_fit() -> None:
    op, backward = torch.ops.nearfield.native_scan, torch.ops.nearfield.native_scan_backward
    given = arguments(CASES["all options"], requires_grad=False)
    out, state, kept = op(*given, True)

    def changed(name: str, x: Any) -> list[Any]:
        return [x if n == name else y for n, y in zip((*ORDER, "ends", "", ""), given, strict=True)]

    x, _, A, B, *_ = given
    for wrong in (
        changed("dt", x[:, :3]),
        changed("A", A[:, :1]),
        changed("B", B[:, :, :, :2]),
        changed("C", B.double()),
        changed("D", torch.ones(3)),
        changed("initial_state", torch.ones(1, 4, 3)),
        [*changed("B", B[:, :, :0])[:4], B[:, :, :0], *given[5:]],
    ):
        with pytest.raises(ValueError, match="do not fit"):
            op(*wrong, True)
    for pull, state_pull, saved in (
        (out[:, 1:], state, kept),
        (out, state[:1], kept),
        (out, state, kept[:1]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            backward(pull, state_pull, saved, *given)
    with pytest.raises(RuntimeError, match="refused its arguments"):
        op(
            *[y[:1] if isinstance(y, Tensor) and y.dim() > 2 else y for y in given[:8]],
            None,
            [0, 12, 9],
            True,
            False,
            True,
        )


def test_states_are_kept_only_for_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    forward = native._forward

    def watched(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        kept.append(given[-1])
        return forward(*given)

    monkeypatch.setattr(native, "_forward", watched)
    tensors = CASES["bare"].tensors(torch.float32, requires_grad=True)
    selective_scan(**tensors, backend="native")
    with torch.no_grad():
        selective_scan(**tensors, backend="native")
    selective_scan(**{n: x.detach() for n, x in tensors.items()}, backend="native")
    assert kept == [True, False, False]


def test_no_second_derivatives() -> None:
    tensors = CASES["bare"].tensors(torch.float32, requires_grad=True)
    out = selective_scan(**tensors, backend="native").output
    (grad,) = torch.autograd.grad(out.sum(), tensors["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.autograd.grad(grad.sum(), tensors["dt"])


def test_without_kernels_another_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = CASES["all options"].tensors(torch.float32)
    expected = selective_scan(**tensors, backend="tiled").output
    monkeypatch.setattr(native, "missing", lambda: "They are not there.")
    assert torch.equal(selective_scan(**tensors).output, expected)
    with pytest.raises(BackendUnavailable, match="They are not there"):
        selective_scan(**tensors, backend="native")


def test_a_broken_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native._describe

    def without_bias(given: list[Any], *rest: Any) -> Any:
        return right([*given[:7], None, given[8]], *rest)

    monkeypatch.setattr(native, "_describe", without_bias)
    with pytest.raises((AssertionError, RuntimeError)):
        check_backend(CASES["all options"], "native", torch.float32)


@pytest.mark.compile
def test_lengths_may_change_in_a_compiled_function() -> None:
    scan = torch.compile(selective_scan, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (70, 131):
        tensors = Case(tokens, 5, 3).tensors(torch.float32, requires_grad=True)
        plain = {n: x.detach().requires_grad_() for n, x in tensors.items()}
        found = [run(**t, dt_softplus=True).output for run, t in ((scan, tensors), (selective_scan, plain))]
        assert torch.equal(*found)
        for a, b in zip(
            *(
                torch.autograd.grad(y.sum(), list(t.values()))
                for y, t in zip(found, (tensors, plain), strict=True)
            ),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.compile
def test_a_scan_is_exported_with_a_length_to_choose() -> None:
    class Scan(torch.nn.Module):
        def forward(self, x: Tensor, B: Tensor) -> Tensor:
            return selective_scan(x, x.abs(), -torch.ones(4, 2), B, B).output

    length = torch.export.Dim("length", min=2, max=400)
    x, B = torch.randn(1, 9, 4), torch.randn(1, 9, 2)
    exported = torch.export.export(Scan(), (x, B), dynamic_shapes=({1: length}, {1: length})).module()
    for tokens in (9, 150):
        x, B = torch.randn(1, tokens, 4), torch.randn(1, tokens, 2)
        assert torch.equal(exported(x, B), Scan()(x, B))


def test_memory_is_that_of_chunk_starts() -> None:
    x, A = torch.empty(2, 4096, 640), torch.empty(640, 16)
    chunks, blocks, states, lanes = native.chunk_states(x, A, torch.empty(2, 4096, 1, 16), None)
    assert chunks * blocks * states * lanes <= 0.3 * x.numel()


@pytest.mark.native
@pytest.mark.parametrize("seed", range(60))
def test_wide_sweep(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=draw))]

    groups = pick(1, 1, 2, 3)
    case = Case(
        pick(1, 5, 63, 64, 65, 200),
        groups * pick(1, 7, 16, 31, 130),
        pick(1, 2, 4, 7, 16, 33),
        groups,
        pick(1, 2, 3),
        pick((), ("z",), ("D", "initial_state"), ("D", "z", "dt_bias", "initial_state")),
        softplus=pick(True, False),
        reverse=pick(True, False),
        seed=seed,
    )
    if pick(True, False):
        case = replace(case, batch=1, ends=(0, case.tokens // 3, case.tokens // 3, case.tokens))
    for isa in library.isas():
        with library.use(isa), poisoned_empty():
            for dtype in (torch.float32, *HALVES):
                check_backend(case, "native", dtype)


def test_errors_do_not_grow_with_slow_decays() -> None:
    # a thousand equal factors next to 1 act at a time: their errors add up unless each has all its digits
    case = Case(3_000, 16, 1, batch=1, softplus=False, options=())
    tensors = case.tensors(torch.float32)
    tensors["dt"].fill_(1e-3)
    tensors["A"].fill_(-1)
    exact = {name: x.double() for name, x in tensors.items()}
    found = selective_scan(**tensors, backend="native").output
    assert_close(found, selective_scan(**exact, backend="tiled").output, within=1e-6)
