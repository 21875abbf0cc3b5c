"""What is special to the kernels of linear attention: strides, dtypes, threads, slow and strong decays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable
from nearfield.ops import kernels
from nearfield.ops.linear import delta_rule, gated_linear_attention, native, reference
from nearfield.testing import assert_close, poisoned_empty, qkv

compiled = pytest.mark.skipif(library.unavailable() is not None, reason="no compiled CPU kernels")
HALVES = (torch.bfloat16, torch.float16)
NAMES = ("query", "key", "value", "beta", "g", "initial_state")
KINDS = ("plain", "head", "channel", "delta", "head delta", "channel delta")


@dataclass(frozen=True)
class Case:
    """One problem of a kind, with a state before it or none."""

    kind: str
    tokens: int = 70
    heads: int = 2
    dim: int = 20
    dv: int = 37
    batch: int = 2
    has_state: bool = True
    dtype: torch.dtype = torch.float32

    def inputs(self) -> dict[str, Tensor | None]:
        """Tensors by the names of an operator's arguments."""
        shape = (self.batch, self.tokens, self.heads, self.dim)
        query, key, value = qkv(*shape, value_dim=self.dv, dtype=self.dtype)
        draw = torch.Generator().manual_seed(1)
        made: dict[str, Tensor | None] = dict.fromkeys(NAMES)
        made |= {"query": query, "key": key, "value": value}
        if "delta" in self.kind:  # stable with keys of length 1
            made["key"] = F.normalize(key.float(), dim=-1).to(self.dtype)
            made["beta"] = torch.rand(shape[:3], generator=draw)
        if "head" in self.kind or "channel" in self.kind:  # some decays hardly, some wholly
            drawn = torch.randn(shape if "channel" in self.kind else shape[:3], generator=draw)
            made["g"] = -F.softplus(3 * drawn - 1)
        if self.has_state:
            made["initial_state"] = torch.randn(self.batch, self.heads, self.dim, self.dv, generator=draw)
        return made


def run(inputs: dict[str, Tensor | None], scale: float = 0.3) -> tuple[Tensor, Tensor]:
    """By the kernels."""
    query, key, value, beta, g, state = (inputs[name] for name in NAMES)
    if beta is None:
        return native.gated(query, key, value, g, state, scale)
    return native.delta(query, key, value, beta, g, state, scale)


def define(inputs: dict[str, Tensor | None], scale: float = 0.3) -> tuple[Tensor, Tensor]:
    """By the definition, in float64 if the inputs are."""
    query, key, value, beta, g, state = (inputs[name] for name in NAMES)
    return reference.attend(query, key, value, g, beta, state, scale=scale, form="chunk")


def with_gradients(
    compute: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """Both results and the gradient of every input, by name; what is pulled at has few digits."""
    leaves = {n: x if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    results = compute(leaves)
    draw = torch.Generator().manual_seed(2)
    pulls = [torch.randn(x.shape, generator=draw).to(torch.bfloat16).to(x.dtype) for x in results]
    there = {n: x for n, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(results, list(there.values()), pulls)
    found = dict(zip(("output", "final_state"), results, strict=True))
    return found | {f"gradient of {n}": g for n, g in zip(there, grads, strict=True)}


def check(case: Case) -> None:
    """The kernels against the definition in float64, in everything."""
    inputs = case.inputs()
    with poisoned_empty():
        found = with_gradients(run, inputs)
    exact = {n: x if x is None else x.double() for n, x in inputs.items()}
    for name, expected in with_gradients(define, exact).items():
        assert_close(found[name], expected, gradient="gradient" in name)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_everything_equals_the_definition(kind: str) -> None:
    check(Case(kind))
    check(Case(kind, tokens=1, dim=1, dv=1, has_state=False))
    check(Case(kind, tokens=63, heads=1, dim=64, dv=16, batch=1, has_state=False))
    check(Case(kind, tokens=129, heads=3, dim=5, dv=65, batch=1))


@compiled
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_sums_in_float32(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype=dtype)
    check(case)
    _, state = run(case.inputs())
    assert state.dtype == torch.float32


@compiled
@pytest.mark.parametrize("isa", library.isas())
def test_every_instruction_set_equals_the_definition(isa: str) -> None:
    with library.use(isa):
        for kind in KINDS:
            check(Case(kind))
        check(Case("channel", dtype=torch.bfloat16))


@compiled
def test_the_check_notices_a_wrong_position(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, g, state, scale = inputs
        return gated(*tensors, g.roll(1, 1), state, scale)

    gated = native.gated
    check(Case("head"))
    monkeypatch.setattr(native, "gated", late)
    with pytest.raises(AssertionError, match="relative rms error"):
        check(Case("head"))


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_strides_change_no_bit(kind: str) -> None:
    inputs = Case(kind).inputs()
    expected = with_gradients(run, inputs)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
        "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    }
    for view in views.values():
        found = with_gradients(run, {n: x if x is None else view(x) for n, x in inputs.items()})
        for name, x in expected.items():
            assert torch.equal(found[name], x), name


@compiled
def test_shared_keys_and_constant_decays_are_read_where_they_are() -> None:
    inputs = Case("head").inputs()
    for name in ("key", "value"):
        inputs[name] = inputs[name][:, :, :1].expand(-1, -1, 2, -1)
    inputs["g"] = torch.tensor([-0.03, -0.1]).expand(2, 70, 2)
    copies = {n: x if x is None else x.contiguous() for n, x in inputs.items()}
    found, expected = with_gradients(run, inputs), with_gradients(run, copies)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
    flat = inputs | {
        "key": inputs["key"][..., :1].expand(-1, -1, -1, 20)
    }  # channels of stride 0 must be copied
    assert torch.equal(run(flat)[0], run(flat | {"key": flat["key"].contiguous()})[0])


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind: str) -> None:
    inputs = Case(kind, dim=48, dv=80, batch=1).inputs()
    before, results = torch.get_num_threads(), []
    try:
        with library.grain(0):
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(with_gradients(run, inputs))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(found[name], x), name


@compiled
@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), tokens=st.integers(1, 150), cut=st.floats(0, 1))
def test_two_parts_are_bit_for_bit_the_whole(kind: str, tokens: int, cut: float) -> None:
    whole = Case(kind, tokens=tokens, dim=9, dv=5, batch=1).inputs()
    at = round(cut * tokens)
    first = {n: x if x is None or n == "initial_state" else x[:, :at] for n, x in whole.items()}
    start, state = run(first)
    end, last = run({n: x if x is None else x[:, at:] for n, x in whole.items()} | {"initial_state": state})
    output, final_state = run(whole)
    assert torch.equal(torch.cat([start, end], 1), output)
    assert torch.equal(last, final_state)


@compiled
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_slow_decays_do_not_drift(kind: str) -> None:
    # exp(-1e-4) in float32 is 3e-8 off, which makes 6e-4 of so many steps
    tokens = 20_000
    x = torch.zeros(1, tokens, 1, 2)
    x[:, 0] = 1
    g = torch.full((1, tokens, 1, 2) if kind == "channel" else (1, tokens, 1), -1e-4)
    _, state = native.gated(x, x, x, g, None, 1.0)
    expected = math.exp((tokens - 1) * float(g.flatten()[0]))
    assert_close(state, torch.full_like(state, expected), within=1e-5)  # each step rounds the state


@compiled
@pytest.mark.parametrize("kind", ["head", "channel", "head delta"])
def test_any_decay_is_finite_at_any_length(kind: str) -> None:
    inputs = Case(kind, tokens=3000, heads=1, dim=3, dv=2, batch=1).inputs()
    drawn = torch.randint(0, 4, inputs["g"].shape, generator=torch.Generator().manual_seed(3))
    inputs["g"] = torch.tensor([0.0, -1e-3, -50.0, -1e4])[drawn]
    for name, x in with_gradients(run, inputs).items():
        assert x.isfinite().all(), name
    inputs["g"] = torch.full_like(inputs["g"], -torch.inf)  # nothing is kept
    _, state = run(inputs)
    last = {n: x if x is None else x[:, -1:] for n, x in inputs.items()}
    assert torch.equal(state, run(last | {"initial_state": None, "g": None})[1])


@compiled
def test_gradients_of_strong_decays_are_no_rounding_noise() -> None:
    # A difference of products of states far larger would leave 1e-7 of them.
    inputs = Case("channel", tokens=40).inputs()
    inputs["g"] = torch.full_like(inputs["g"], -20.0)
    found = with_gradients(run, inputs)["gradient of g"]
    exact = {n: x if x is None else x.double() for n, x in inputs.items()}
    expected = with_gradients(define, exact)["gradient of g"]
    assert expected.abs().max() < 1e-5
    assert_close(found, expected, gradient=True)


@compiled
@pytest.mark.parametrize("kind", ["plain", "channel delta"])
def test_nothing_to_do(kind: str) -> None:
    for case in (Case(kind, tokens=0), Case(kind, batch=0), Case(kind, tokens=0, has_state=False)):
        inputs = case.inputs()
        found = with_gradients(run, inputs)
        state = inputs["initial_state"]
        assert found["output"].shape == inputs["value"].shape
        assert torch.equal(found["final_state"], torch.zeros(2, 2, 20, 37) if state is None else state)
    inputs = Case(kind, tokens=0).inputs()
    state = inputs["initial_state"].requires_grad_()
    _, final_state = run(inputs)
    (grad,) = torch.autograd.grad(final_state.sum(), state)
    assert torch.equal(grad, torch.ones_like(state))


@compiled
def test_gradients_of_one_result_alone() -> None:
    inputs = Case("head delta").inputs()
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    both = run(leaves)
    zeros = [torch.zeros_like(x) for x in both]
    for number in (0, 1):
        pulls = list(zeros)
        pulls[number] = torch.ones_like(both[number])
        expected = torch.autograd.grad(both, list(leaves.values()), pulls, retain_graph=True)
        found = torch.autograd.grad(both[number].sum(), list(leaves.values()), retain_graph=True)
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a, e)


@compiled
@pytest.mark.parametrize("kind", ["plain", "head", "channel delta"])
def test_torch_knows_the_operators(kind: str) -> None:
    case = Case(kind, tokens=5, dim=3, dv=2, batch=1, has_state=kind != "plain")
    inputs = case.inputs()
    arguments = [inputs[name] if inputs[name] is None else inputs[name].requires_grad_() for name in NAMES]
    torch.library.opcheck(native._forward, (*arguments, 0.5))
    output, state = native._forward(*arguments, 0.5)
    plain = [x if x is None else x.detach() for x in arguments]
    tests = ("test_schema", "test_faketensor")  # second derivatives are refused
    grads = (torch.ones_like(output).detach(), torch.ones_like(state).detach())
    for wanted in (True, False):
        torch.library.opcheck(native._backward, (*grads, *plain, 0.5, wanted, wanted), test_utils=tests)


@compiled
@pytest.mark.compile
def test_a_trace_is_one_graph() -> None:
    def call(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        return delta_rule(query, key, value, beta, g=g, backend="native").output

    traced = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 9):
        inputs = Case("head delta", tokens=tokens, dim=4, dv=3, has_state=False).inputs()
        leaves = [inputs[name].requires_grad_() for name in NAMES[:5]]
        for a, e in zip(
            torch.autograd.grad(traced(*leaves).sum(), leaves),
            torch.autograd.grad(call(*leaves).sum(), leaves),
            strict=True,
        ):
            assert torch.equal(a, e)


@compiled
def test_vmap_is_a_larger_batch() -> None:
    inputs = Case("head", batch=3, tokens=9, dim=4, dv=3).inputs()
    stacked = [inputs[n].unflatten(0, (3, 1)) for n in ("query", "key", "value", "g")]
    state = inputs["initial_state"][:1]  # one for all

    def call(query: Tensor, key: Tensor, value: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return native.gated(query, key, value, g, state, 0.3)

    found = torch.vmap(call, in_dims=(0, 0, 1, 0))(
        stacked[0], stacked[1], stacked[2].movedim(0, 1), stacked[3]
    )
    expected = run(inputs | {"initial_state": state.expand(3, -1, -1, -1)})
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a.flatten(0, 1), e)

    pulls = torch.eye(3)  # gradients of several sums at once
    query = inputs["query"][:1].clone().requires_grad_()
    output, _ = call(query, *(inputs[n][:1] for n in ("key", "value", "g")))
    sums = output[0, :, 0].sum(0)
    (batched,) = torch.autograd.grad(sums, query, pulls, is_grads_batched=True, retain_graph=True)
    for pull, a in zip(pulls, batched, strict=True):
        assert torch.equal(a, torch.autograd.grad(sums, query, pull, retain_graph=True)[0])


@compiled
def test_autocast_computes_in_its_dtype() -> None:
    inputs = Case("head", has_state=False).inputs()
    arguments = [inputs[name] for name in ("query", "key", "value", "g")]
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_linear_attention(*arguments, backend="native").output
    assert found.dtype == torch.bfloat16
    halves = [x.bfloat16() for x in arguments[:3]]
    assert_close(found, gated_linear_attention(*halves, arguments[3], backend="native").output)


@compiled
def test_refusals() -> None:
    inputs = Case("plain", tokens=3, has_state=False).inputs()
    query, key, value = (inputs[name] for name in NAMES[:3])
    for call, message in (
        (lambda: native.gated(query, key[:, 1:], value, None, None, 1.0), "do not fit one another"),
        (lambda: native.gated(query, key, value.half(), None, None, 1.0), "do not fit one another"),
        (lambda: native.gated(query, key, value, query[:, :2], None, 1.0), "do not fit one another"),
        (lambda: native.delta(query, key, value, query, None, None, 1.0), "do not fit one another"),
        (lambda: native.gated(query, key, value, None, query, 1.0), "do not fit one another"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert "not in torch.float64" in kernels.unfit(query.double(), value, 1.0)
    assert "1 to 1024 channels, given 20" in kernels.unfit(
        query, value.expand(-1, -1, -1, 37).new_empty(1, 1, 1, 1025), 1.0
    )
    assert "'meta'" in kernels.unfit(query.to("meta"), value, 1.0)
    assert "scale that float32 can hold" in kernels.unfit(query, value, 1e39)
    assert kernels.unfit(query, value, 1.0) is None
    output, _ = native.gated(query.requires_grad_(), key, value, None, None, 1.0)
    (grad,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match='no second derivatives. Call with backend="reference"'):
        grad.sum().backward()


def test_without_kernels_or_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        """Answers every call with one number."""

        def __init__(self, answer: int):
            self.nearfield_linear_forward = lambda problem, threads: answer

    inputs = Case("plain", tokens=3).inputs()
    monkeypatch.setattr(library, "kernels", lambda: None)
    monkeypatch.setattr(library, "unavailable", lambda: "There are none.")
    with pytest.raises(BackendUnavailable, match="needs the CPU kernels: There are none"):
        run(inputs)
    with pytest.raises(BackendUnavailable, match="There are none"):
        gated_linear_attention(
            inputs["query"], inputs["key"], inputs["value"], torch.zeros(2, 3, 2), backend="native"
        )
    monkeypatch.setattr(library, "kernels", lambda: Kernels(kernels.NO_MEMORY))
    with pytest.raises(torch.OutOfMemoryError, match="Give a smaller batch"):
        run(inputs)
    monkeypatch.setattr(library, "kernels", lambda: Kernels(1))
    with pytest.raises(RuntimeError, match="a bug in nearfield"):
        run(inputs)
