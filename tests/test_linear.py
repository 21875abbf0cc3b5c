"""Laws of linear attention: its five functions, their forms and backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nearfield.core.errors import BackendUnavailable
from nearfield.ops import kernels
from nearfield.ops.linear import (
    LinearResult,
    decay,
    delta_rule,
    enhanced_linear_attention,
    gated_linear_attention,
    inline_attention,
    linear_attention,
    reference,
    tiled,
)
from nearfield.testing import assert_close, poisoned_empty, qkv, relative_error

KINDS = ("plain", "head", "channel", "delta", "gated delta")
FORMS = ("parallel", "chunk", "recurrent")
FAST = ("tiled", "native") if kernels.missing() is None else ("tiled",)
# what a sequence is continued with, in all functions
FUNCTIONS: dict[str, Callable[..., LinearResult]] = {
    "plain": lambda q, k, v, g, beta, **o: linear_attention(q, k, v, **o),
    "normalised": lambda q, k, v, g, beta, **o: linear_attention(q.exp(), k.exp(), v, normalize=True, **o),
    "head": lambda q, k, v, g, beta, **o: gated_linear_attention(q, k, v, g[..., 0], **o),
    "channel": lambda q, k, v, g, beta, **o: gated_linear_attention(q, k, v, g, **o),
    "normalised channel": lambda q, k, v, g, beta, **o: gated_linear_attention(
        q.exp(), k.exp(), v, g, normalize=True, **o
    ),
    "delta": lambda q, k, v, g, beta, **o: delta_rule(q, F.normalize(k, dim=-1), v, beta, **o),
    "gated delta": lambda q, k, v, g, beta, **o: delta_rule(
        q, F.normalize(k, dim=-1), v, beta, g=g[..., 0], **o
    ),
    "inline": lambda q, k, v, g, beta, **o: inline_attention(q, k, v, is_causal=True, **o),
    "enhanced": lambda q, k, v, g, beta, **o: enhanced_linear_attention(
        q, k, v, temperature=q.new_tensor([0.5, 2.0]), min_denominator=2.0, is_causal=True, **o
    ),
}


@dataclass(frozen=True)
class Case:
    """One problem of a kind; `inputs` are all leaves."""

    kind: str
    tokens: int = 21
    heads: int = 4
    kv_heads: int = 2
    dim: int = 5
    dv: int = 3
    batch: int = 2
    has_state: bool = True

    def inputs(self, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> dict[str, Tensor]:
        """Tensors by the names of arguments; gates and states are wide."""
        shape = (self.batch, self.tokens, self.heads, self.dim)
        q, k, v = qkv(*shape, num_kv_heads=self.kv_heads, value_dim=self.dv, dtype=dtype)
        draw = torch.Generator().manual_seed(7)
        wide = torch.promote_types(dtype, torch.float32)

        def gate(*shape: int) -> Tensor:
            return torch.rand(shape, generator=draw, dtype=torch.float64).to(wide)

        found = {"query": q, "key": k, "value": v}
        if "delta" in self.kind:
            found["key"] = F.normalize(k, dim=-1)
            found["beta"] = gate(*shape[:3])
        if self.kind != "plain" and self.kind != "delta":
            found["g"] = -3 * gate(*(shape if self.kind == "channel" else shape[:3])) ** 4
        if self.has_state:
            found["initial_state"] = gate(self.batch, self.heads, self.dim, self.dv) - 0.5
        return {name: x.detach().requires_grad_(requires_grad) for name, x in found.items()}


def solve(inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Output and last state of the function that takes these arguments."""
    function = (
        delta_rule if "beta" in inputs else gated_linear_attention if "g" in inputs else linear_attention
    )
    output, state = function(**inputs, **{"scale": 0.7, "output_final_state": True, **options})
    assert isinstance(state, Tensor)
    return output, state


def pulled(inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Output, last state, and all gradients of a sum over both."""
    output, state = solve(inputs, **options)
    draw = torch.Generator().manual_seed(3)
    loss = output.new_zeros((), dtype=state.dtype)
    for x in (output, state):
        loss = loss + (torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) * x).sum()
    return [output, state, *torch.autograd.grad(loss, list(inputs.values()))]


def loops(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The definition, one position and head at a time."""
    q, k, v = (inputs[name].detach() for name in ("query", "key", "value"))
    (batch, tokens, heads, dim), group = q.shape, q.shape[2] // k.shape[2]
    output, states = q.new_zeros(*q.shape[:3], v.shape[-1]), []
    for b in range(batch):
        for h in range(heads):
            state = q.new_zeros(dim, v.shape[-1])
            if "initial_state" in inputs:
                state = inputs["initial_state"][b, h].detach()
            for t in range(tokens):
                if "g" in inputs:
                    state = state * inputs["g"][b, t, h].detach().exp().reshape(-1, 1)
                row, new = k[b, t, h // group], v[b, t, h // group]
                if "beta" in inputs:
                    new = inputs["beta"][b, t, h].detach() * (new - row @ state)
                state = state + torch.outer(row, new)
                output[b, t, h] = 0.7 * q[b, t, h] @ state
            states.append(state)
    return output, torch.stack(states).unflatten(0, (batch, heads))


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    """The problems here are many small ones, in which threads only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and stretches so small that few tokens have several of both."""
    monkeypatch.setattr(reference, "PIECE", 6)
    monkeypatch.setattr(tiled, "CHUNK", 4)
    monkeypatch.setattr(tiled, "CHUNKS", 2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_the_definition(kind: str) -> None:
    for case in (Case(kind), Case(kind, tokens=1, has_state=False), Case(kind, tokens=8, kv_heads=4)):
        inputs = case.inputs(requires_grad=False)
        expected = loops(inputs)
        for backend in ("reference", "tiled"):
            for form in ("auto", *FORMS):
                for a, e in zip(solve(inputs, form=form, backend=backend), expected, strict=True):
                    assert_close(a, e, within=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_the_reference_has_all_derivatives(kind: str, form: str) -> None:
    inputs = Case(kind, tokens=3, heads=2, kv_heads=1, dim=2, dv=2, batch=1).inputs()

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return solve(dict(zip(inputs, tensors, strict=True)), form=form, backend="reference")

    tensors = tuple(inputs.values())
    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=form == "parallel", fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


SHAPES = {
    "odd, shared": {},
    "one token": {"tokens": 1},
    "a chunk and no state": {"tokens": 8, "has_state": False},
    "one channel": {"tokens": 13, "dim": 1, "dv": 1, "heads": 3, "kv_heads": 1},
    "wide": {"tokens": 17, "dim": 60, "dv": 33, "heads": 1, "kv_heads": 1, "batch": 1},
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_fast_equals_reference_in_output_state_and_gradients(kind: str, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES.values():
            inputs = Case(kind, **shape).inputs(dtype)
            exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
            with poisoned_empty():
                found = pulled(inputs, backend=backend)
            for number, (a, e) in enumerate(zip(found, pulled(exact, backend="reference"), strict=True)):
                # gates and states are float32, but what reaches them was rounded to the dtype of the output
                within = 2e-2 if dtype == torch.bfloat16 and number > 0 else None
                assert_close(a, e, gradient=number > 1, within=within)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["channel", "gated delta"])
def test_strides_change_nothing(kind: str, backend: str) -> None:
    inputs = Case(kind, kv_heads=4).inputs(torch.float32, requires_grad=False)
    expected = solve(inputs, backend=backend)
    views: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
    )
    for view in views:
        for a, e in zip(
            solve({name: view(x) for name, x in inputs.items()}, backend=backend), expected, strict=True
        ):
            assert_close(a, e)
    one = {name: x[:1, :, :1].expand(2, -1, 4, *x.shape[3:]) for name, x in inputs.items() if name == "key"}
    full = {name: x.contiguous() for name, x in one.items()}
    for a, e in zip(
        solve({**inputs, **one}, backend=backend), solve({**inputs, **full}, backend=backend), strict=True
    ):
        assert_close(a, e)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_nothing_overflows_in_a_long_sequence(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "CHUNKS", 64)
    tokens = 100_000
    inputs = Case(kind, tokens=tokens, heads=1, kv_heads=1, dim=1, dv=1, batch=1).inputs(torch.float32, False)
    rare = torch.rand(inputs["g"].shape, generator=torch.Generator().manual_seed(1)) < 0.02
    inputs["g"] = torch.where(rare, -50.0, -1e-3)
    inputs["g"][:, 20_000:] = 0.0
    inputs["g"][:, 90_000:] = -50.0
    given = {name: x.requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    for a, e in zip(pulled(given, backend=backend), pulled(exact, backend="tiled"), strict=True):
        assert a.isfinite().all()
        assert_close(a, e, within=1e-5)  # roundings of a state that forgets nothing for long add up


def test_what_the_backward_needs_grows_with_the_tokens_and_no_faster() -> None:
    def kept(tokens: int) -> int:
        sizes: list[int] = []

        def count(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        inputs = Case("gated delta", tokens=tokens, dim=16, dv=16).inputs(torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            solve(inputs, backend="tiled")
        return sum(sizes)

    assert kept(2048) <= 2 * kept(1024)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_state_handed_over_continues_the_sequence(name: str) -> None:
    q, k, v = qkv(2, 19, 2, 3, value_dim=4, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    g = -torch.rand(q.shape, generator=draw, dtype=torch.float64)
    beta = torch.rand(q.shape[:3], generator=draw, dtype=torch.float64)
    tensors, function = (q, k, v, g, beta), FUNCTIONS[name]
    whole = function(*tensors, output_final_state=True)
    assert function(*tensors).final_state is None

    @settings(max_examples=10, deadline=None)
    @given(
        cuts=st.lists(st.integers(0, 19), max_size=4).map(sorted),
        form=st.sampled_from(FORMS),
        backend=st.sampled_from(["reference", "tiled"]),
    )
    def law(cuts: list[int], form: str, backend: str) -> None:
        state, outs = None, []
        for a, b in zip([0, *cuts], [*cuts, 19], strict=True):
            out, state = function(
                *(x[:, a:b] for x in tensors),
                initial_state=state,
                output_final_state=True,
                form=form,
                backend=backend,
            )
            outs.append(out)
        assert_close(torch.cat(outs, 1), whole.output, within=1e-12)
        parts, expected = (s if isinstance(s, tuple) else (s,) for s in (state, whole.final_state))
        for a, e in zip(parts, expected, strict=True):
            assert_close(a, e, within=1e-12)

    law()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_packed_sequences_are_separate_runs(name: str) -> None:
    ends = [0, 5, 5, 75, 84]
    q, k, v = qkv(1, 84, 2, 3, value_dim=4, dtype=torch.float64)
    g, beta = -torch.ones_like(q) / 4, torch.full(q.shape[:3], 0.5, dtype=q.dtype)
    tensors, function = (q, k, v, g, beta), FUNCTIONS[name]
    few = (torch.cat([x[:, i : i + 2] for i in range(4)]) for x in tensors)  # some state for each sequence
    first = function(*few, output_final_state=True).final_state
    for state in (None, first):
        packed = function(
            *tensors, cu_seqlens=torch.tensor(ends), initial_state=state, output_final_state=True
        )
        for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
            own = None if state is None else _map(lambda x, i=i: x[i : i + 1], state)
            alone = function(*(x[:, a:b] for x in tensors), initial_state=own, output_final_state=True)
            assert_close(packed.output[:, a:b], alone.output)
            _map(lambda x, y, i=i: assert_close(x[i : i + 1], y), packed.final_state, alone.final_state)


def _map(function: Callable[..., Any], *states: Any) -> Any:
    if isinstance(states[0], tuple):
        return tuple(function(*parts) for parts in zip(*states, strict=True))
    return function(*states)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_past_ignores_a_poisoned_future(name: str) -> None:
    tensors = (*qkv(1, 9, 2, 3), -torch.ones(1, 9, 2, 3), torch.ones(1, 9, 2))
    before = FUNCTIONS[name](*tensors, backend="tiled").output[:, :4]
    poisoned = [x.clone() for x in tensors]
    for x in poisoned[1:3]:
        x[:, 4:] = 40.0
    assert torch.equal(FUNCTIONS[name](*poisoned, backend="tiled").output[:, :4], before)


def test_a_gate_of_zero_is_plain_and_one_number_a_head_is_a_constant_gate() -> None:
    q, k, v = qkv(2, 40, 2, 3, value_dim=4, dtype=torch.float64)
    expected = linear_attention(q, k, v).output
    for shape in (q.shape, q.shape[:3], q.shape[2:3]):
        assert_close(gated_linear_attention(q, k, v, q.new_zeros(shape)).output, expected)
    constant = q.new_tensor([-0.1, -0.7])
    found = gated_linear_attention(q, k, v, constant).output
    assert_close(found, gated_linear_attention(q, k, v, constant.expand(q.shape[:3])).output)
    fade = (torch.arange(40)[:, None] - torch.arange(40)).clamp(min=0) * constant[:, None, None]
    weights = torch.einsum("bthd,bshd->bhts", q, k).tril() * fade.exp() * 3**-0.5
    assert_close(found, torch.einsum("bhts,bshd->bthd", weights, v))


def test_normalised_rows_sum_to_one() -> None:
    q, k, _ = qkv(2, 40, 2, 3, dtype=torch.float64)
    ones = torch.ones(2, 40, 2, 1, dtype=q.dtype)
    gate = -torch.rand(q.shape, generator=torch.Generator().manual_seed(0), dtype=q.dtype)
    for out in (
        linear_attention(q.exp(), k.exp(), ones, normalize=True),
        linear_attention(q.exp(), k.exp(), ones, normalize=True, is_causal=False),
        gated_linear_attention(q.exp(), k.exp(), ones, gate, normalize=True),
    ):
        assert_close(out.output, ones, within=1e-9)  # but for the 1e-10 in the denominator


def test_the_same_key_again_overwrites_and_another_direction_stays() -> None:
    key = F.normalize(torch.tensor([[1.0, 2.0, 2.0], [2.0, -2.0, 1.0], [1.0, 2.0, 2.0]]), dim=-1)
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    k, v = key[None, :, None].double(), value[None, :, None].double()
    for backend in ("reference", "tiled"):
        _, state = delta_rule(
            k, k, v, torch.ones(1, 3, 1), scale=1.0, output_final_state=True, backend=backend
        )
        assert_close(key[2].double() @ state[0, 0], v[0, 2, 0], within=1e-7)
        assert_close(key[1].double() @ state[0, 0], v[0, 1, 0], within=1e-7)


def weights_of(function: Callable[..., LinearResult], q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """The matrix of weights [B, H, N, M] of a linear attention, read from what it does to one-hot values."""
    count = k.shape[1]
    one_hot = torch.eye(count, dtype=k.dtype)[None, :, None].expand(*k.shape[:3], count)
    return function(q, k, one_hot, **options).output.transpose(1, 2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_inline_weights_are_those_of_the_paper_and_sum_to_one(is_causal: bool, form: str) -> None:
    q, k, _ = qkv(2, 9, 4, 3, num_kv_heads=2, dtype=torch.float64)
    found = weights_of(inline_attention, q, k, is_causal=is_causal, form=form, backend="reference")
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 3**-0.5
    seen = torch.ones(9, 9, dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    count = seen.sum(-1, keepdim=True)
    mean = (scores * seen).sum(-1, keepdim=True) / count
    assert_close(found, torch.where(seen, (scores - mean + 1) / count, 0))
    assert_close(found.sum(-1), torch.ones(2, 4, 9, dtype=q.dtype))


def test_collinear_queries_see_differently_only_where_attention_is_injective() -> None:
    q, k, _ = qkv(1, 6, 1, 4, dtype=torch.float64)
    q = torch.cat([q[:, :1], 3 * q[:, :1]], 1)
    inline = weights_of(inline_attention, q, k)
    assert relative_error(inline[:, :, 0], inline[:, :, 1]) > 0.1
    floor = {"temperature": torch.ones(1), "min_denominator": 1e-6}
    enhanced = weights_of(enhanced_linear_attention, q, k, **floor)
    assert_close(enhanced[:, :, 0], enhanced[:, :, 1])


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_masked_key_is_seen_by_nobody_whatever_it_holds(is_causal: bool) -> None:
    q, k, v = qkv(2, 7, 2, 3, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()
    for x in (k, v):
        x[~mask] = torch.nan
    found = inline_attention(q, k, v, key_mask=mask, is_causal=is_causal).output
    seen = mask[0].nonzero()[:, 0]
    alone = inline_attention(q[:1, seen], k[:1, seen], v[:1, seen], is_causal=is_causal).output
    assert_close(found[:1, seen], alone)
    if is_causal:
        assert not found[0, 0].any()  # it has seen no key yet
    assert_close(found[1:], inline_attention(q[1:], k[1:], v[1:], is_causal=is_causal).output)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("floor", [1e-6, 4.0, 100.0])
def test_enhanced_is_its_explicit_form(floor: float, is_causal: bool) -> None:
    q, k, v = qkv(2, 40, 2, 3, value_dim=4, dtype=torch.float64)
    temperature = q.new_tensor([0.3, 2.0]).requires_grad_()
    options = {"temperature": temperature, "min_denominator": floor, "is_causal": is_causal}
    scores = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
    scores = scores.tril() if is_causal else scores
    weights = temperature[:, None, None] * scores / scores.sum(-1, keepdim=True).clamp(min=floor)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)
    slope = torch.autograd.grad(expected.square().sum(), temperature)[0]
    for backend in ("reference", "tiled"):
        found = enhanced_linear_attention(q, k, v, **options, backend=backend).output
        assert_close(found, expected)
        assert_close(torch.autograd.grad(found.square().sum(), temperature)[0], slope, gradient=True)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("form", FORMS)
def test_without_order_a_grid_is_a_row_of_tokens(form: str, backend: str) -> None:
    if backend == "tiled" and form == "recurrent":
        return
    q, k, v = qkv(2, 3, 4, 4, 5, num_kv_heads=2, value_dim=6, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=q.dtype)
    options = {"is_causal": False, "initial_state": state, "output_final_state": True, "form": form}
    found = linear_attention(q, k, v, backend=backend, **options)
    scores = torch.einsum("bihd,bjhd->bhij", q.flatten(1, 2), k.flatten(1, 2).repeat_interleave(2, 2))
    expected = torch.einsum("bhij,bjhd->bihd", scores, v.flatten(1, 2).repeat_interleave(2, 2))
    expected = (expected + torch.einsum("bihd,bhde->bihe", q.flatten(1, 2), state)) * 5**-0.5
    assert_close(found.output, expected.unflatten(1, (3, 4)))
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found.output, expected)]
    for a, e in zip(*grads, strict=True):
        assert_close(a, e, gradient=True)
    causal = linear_attention(*(x.flatten(1, 2) for x in (q, k, v)), **{**options, "is_causal": True})
    assert_close(found.final_state, causal.final_state)
    few = linear_attention(q[:, :, :2], k, v, backend=backend, **options).output
    assert_close(few, found.output[:, :, :2])


def test_steps_of_decoding_are_one_run() -> None:
    inputs = Case("gated delta", tokens=6).inputs(torch.float32, requires_grad=False)
    output, last = solve(inputs)
    state = inputs.pop("initial_state")
    for t in range(6):
        step, state = solve({n: x[:, t : t + 1] for n, x in inputs.items()} | {"initial_state": state})
        assert_close(step, output[:, t : t + 1])
    assert_close(state, last)


def test_states_stay_wide_and_autocast_lowers_the_rest() -> None:
    inputs = Case("head").inputs(torch.float32, requires_grad=False)
    half = {n: x.bfloat16() if n in ("query", "key", "value") else x for n, x in inputs.items()}
    for backend in ("reference", *FAST):
        with torch.autocast("cpu", torch.bfloat16):
            output, state = solve(inputs, backend=backend)
        assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
        for a, e in zip((output, state), solve(half, backend=backend), strict=True):
            assert torch.equal(a, e)
    # sums of 300 products do not fit in float16, their quotient does
    q, k, v = (x.abs() * 20 for x in qkv(1, 300, 1, 16, dtype=torch.float16))
    found = linear_attention(q, k, v, normalize=True).output
    assert_close(found, linear_attention(q.double(), k.double(), v.double(), normalize=True).output)


def test_vmap_is_a_batch() -> None:
    inputs = Case("gated delta", batch=3).inputs(torch.float32, requires_grad=False)
    parts = {name: x[:, None] for name, x in inputs.items()}
    shared = parts.pop("beta")[0]
    for backend in ("reference", "tiled"):
        found = torch.vmap(lambda p, b=backend: solve({**p, "beta": shared}, backend=b))(parts)
        expected = solve({**inputs, "beta": shared.expand(3, -1, -1)}, backend=backend)
        for a, e in zip(found, expected, strict=True):
            assert_close(a[:, 0], e)


def test_the_tiled_operator_passes_torchs_own_checks() -> None:
    ops, constants = torch.ops.nearfield, (0.5, 4, 8)
    for kind in ("channel", "gated delta"):
        inputs = Case(kind, tokens=9, batch=1, has_state=kind != "channel").inputs(torch.float32)
        names = ("query", "key", "value", "g", "beta", "initial_state")
        tensors = [inputs.get(name) for name in names]
        torch.library.opcheck(ops.tiled_linear, (*tensors, *constants))
        plain = [None if x is None else x.detach() for x in tensors]
        kept = ops.tiled_linear(*plain, *constants)
        torch.library.opcheck(ops.tiled_linear_backward, (*kept, *plain, *constants))


def test_tiled_refuses_second_derivatives_and_transforms_go_to_the_reference() -> None:
    inputs = Case("head", tokens=5).inputs()
    slope = torch.autograd.grad(solve(inputs, backend="tiled")[0].sum(), inputs["key"], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(slope.sum(), inputs["query"])
    rest = {name: x.detach() for name, x in inputs.items() if name != "key"}

    def loss(key: Tensor, backend: str = "auto") -> Tensor:
        return solve({**rest, "key": key}, backend=backend)[0].sum()

    assert_close(torch.func.grad(loss)(inputs["key"]), slope, gradient=True)
    with pytest.raises(BackendUnavailable, match=r"torch\.func"):
        torch.func.grad(lambda key: loss(key, "tiled"))(inputs["key"])


@pytest.mark.compile
@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_compiles_whole_with_moving_sizes(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=True, backend="eager")
    for tokens in (5, 40):
        draw = torch.Generator().manual_seed(0)
        gates = (-torch.rand(1, tokens, 2, 3, generator=draw), torch.rand(1, tokens, 2, generator=draw))
        tensors = (*qkv(1, tokens, 2, 3), *gates)
        found = compiled(*tensors, output_final_state=True)
        assert_close(found.output, FUNCTIONS[name](*tensors).output)
        _map(assert_close, found.final_state, FUNCTIONS[name](*tensors, output_final_state=True).final_state)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_gradients_compile(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, solve):
        inputs = Case("gated delta", tokens=9, batch=1).inputs(torch.float32)
        output, state = run(inputs, backend=backend)
        results.append(torch.autograd.grad(output.square().sum() + state.sum(), list(inputs.values())))
    for a, e in zip(*results, strict=True):
        assert_close(a, e, gradient=True)


@pytest.mark.compile
def test_it_exports_with_a_moving_length() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            return gated_linear_attention(q, k, v, g, normalize=True).output

    def inputs(tokens: int) -> tuple[Tensor, ...]:
        return (*(x.abs() for x in qkv(1, tokens, 2, 3)), -torch.ones(1, tokens, 2))

    length = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(Layer(), inputs(40), dynamic_shapes=[{1: length}] * 4)
    for tokens in (7, 90):
        assert_close(exported.module()(*inputs(tokens)), Layer()(*inputs(tokens)))


@pytest.mark.usefixtures("small")
def test_a_broken_backend_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Case("channel").inputs(torch.float32, requires_grad=False)
    expected = solve(inputs, backend="reference")[0]
    assert_close(solve(inputs, backend="tiled")[0], expected)
    monkeypatch.setattr(decay.ChannelDecay, "scores", decay.NoDecay.scores)
    with pytest.raises(AssertionError, match="relative rms error"):
        assert_close(solve(inputs, backend="tiled")[0], expected)


def test_wrong_shapes_are_refused_with_a_way_out() -> None:
    q, k, v = qkv(1, 6, 2, 4)
    gate = -torch.ones(1, 6, 2)
    grid = qkv(1, 2, 3, 2, 4)
    for wrong, says in (
        (lambda: linear_attention(*grid), "no causal order"),
        (lambda: linear_attention(q[:, :3], k, v), "initial_state"),
        (lambda: gated_linear_attention(q, k, v, gate[:, :5]), r"\[1, 6, 2\]"),
        (lambda: gated_linear_attention(q, k, v, gate[..., None]), r"\[1, 6, 2, 4\]"),
        (lambda: gated_linear_attention(q, k, v, gate[0, 0, :1]), r"\[2\]"),
        (lambda: delta_rule(q, k, v, gate[..., 0]), r"\[1, 6, 2\]"),
        (lambda: linear_attention(q, k, v, initial_state=torch.zeros(1, 2, 4, 3)), r"\[1, 2, 4, 4\]"),
        (lambda: linear_attention(q, k, v, normalize=True, initial_state=q), "must hold 2"),
        (lambda: linear_attention(q, k, v, cu_seqlens=[0, 4]), "must rise from 0 to the 6 tokens"),
        (
            lambda: linear_attention(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), cu_seqlens=[0, 6]),
            "packed",
        ),
        (lambda: enhanced_linear_attention(q, k, v, temperature=torch.ones(3)), r"\[2\]"),
        (
            lambda: enhanced_linear_attention(q, k, v, temperature=torch.ones(2), min_denominator=0.0),
            "above 0",
        ),
        (lambda: inline_attention(q, k, v, key_mask=torch.ones(1, 5, dtype=torch.bool)), r"\[1, 6\]"),
    ):
        with pytest.raises(ValueError, match=says):
            wrong()


def test_what_cannot_run_is_refused_with_a_way_out() -> None:
    q, k, v = qkv(1, 6, 2, 4)
    with pytest.raises(ValueError, match="'parallel'"):
        linear_attention(q, k, v, form="paralel")
    for options, says in (
        ({"backend": "triton"}, "on a GPU"),
        ({"backend": "flex"}, "no such backend"),
        ({"backend": "native", "form": "parallel"}, "only 'chunk' and 'recurrent'"),
        ({"backend": "native", "is_causal": False}, "two matrix products"),
        ({"backend": "tiled", "is_causal": False, "form": "recurrent"}, "no steps"),
    ):
        with pytest.raises(BackendUnavailable, match=says):
            linear_attention(q, k, v, **options)
