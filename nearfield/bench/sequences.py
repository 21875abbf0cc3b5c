"""The linear family on sequences, for `nearfield bench linear|lla|scan`: cases, costs, rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nearfield.bench.cases import Direction
from nearfield.bench.rivals import Unfit
from nearfield.core.errors import MissingPackage, require
from nearfield.ops.linear import LinearResult, delta_rule, gated_linear_attention, linear_attention
from nearfield.ops.lla import Solver, local_linear_attention
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention
from nearfield.ops.scan import selective_scan, ssd

CHUNK = 64  # at which the work of linear attention and SSD is counted
STEPS = 8  # of the solver, in every case of local linear attention
RIVALS = ["tiled", "attention", "sdpa", "loop", "fla", "mamba-ssm"]
SLOWEST = 100  # GFLOP of a rival's call
ANOTHER = ("attention", "sdpa")  # compute something else, at the same shape

Call = Callable[..., Tensor]
Rivals = Mapping[str, Callable[[], Call]]


@dataclass(frozen=True)
class Sequence:
    """One problem: `tokens` positions of `num_heads` heads (channels, for a selective scan).

    `kind` says which operator runs; `state` is the number of states a channel has, of a scan; `window` the
    keys that local linear attention sees.
    """

    id: str
    op: str
    kind: str
    tokens: int
    num_heads: int
    head_dim: int = 64
    batch: int = 1
    state: int = 0
    window: int | None = None
    device: str = "cpu"
    is_hidden: bool = False

    @property
    def pattern(self) -> Neighborhood:
        """Who sees whom: every earlier position, or a window of them."""
        return Neighborhood(self.window or self.tokens, is_causal=True)

    def useful_flops(self, direction: Direction) -> float:
        """Floating point operations of the algorithm that is counted.

        Linear attention and SSD: the chunked form, 2 · 64 · (K + V) within chunks and 4 · K · V for the
        state, a position and head. Local linear attention, a visible pair: products of 2 d for scores, means
        (two), the output and its correction, two for a solver step; backward twelve beside the solver's.
        Selective scan: 7 a channel and state, exp counted as one. Other backwards: 2.5 times the forward.
        """
        places = float(self.batch * self.num_heads * self.tokens)
        dim = self.head_dim
        if self.op == "lla":
            pairs = float(self.batch * self.num_heads) * self.pattern.on((self.tokens,)).num_pairs
            return pairs * 2 * dim * (2 * STEPS + (5 if direction == "forward" else 12))
        if self.kind == "selective":
            forward = 7.0 * places * self.state
        else:
            keys = self.state or dim
            forward = places * (2 * CHUNK * (keys + dim) + 4 * keys * dim)
        return 2.5 * forward if direction == "backward" else forward


CASES: tuple[Sequence, ...] = (
    Sequence("plain-16k", "linear", "plain", 16384, 8),
    Sequence("scalar-16k", "linear", "scalar", 16384, 8),
    Sequence("scalar-64k", "linear", "scalar", 65536, 8),
    Sequence("channel-16k", "linear", "channel", 16384, 8),
    Sequence("channel-64k", "linear", "channel", 65536, 8),
    Sequence("delta-16k", "linear", "delta", 16384, 8),
    Sequence("causal-2k", "lla", "lla", 2048, 4),
    Sequence("causal-8k", "lla", "lla", 8192, 2),
    Sequence("window-512-16k", "lla", "lla", 16384, 2, window=512),
    Sequence("selective-4x640-n1-1k", "scan", "selective", 1024, 640, batch=4, state=1),
    Sequence("selective-1536-n16-4k", "scan", "selective", 4096, 1536, state=16),
    Sequence("ssd-24x64-n128-4k", "scan", "ssd", 4096, 24, state=128),
    Sequence("tiny-channel", "linear", "channel", 40, 2, 16, is_hidden=True),
    Sequence("tiny-delta", "linear", "delta", 40, 2, 16, is_hidden=True),
    Sequence("tiny-lla", "lla", "lla", 40, 2, 16, is_hidden=True),
    Sequence("tiny-selective", "scan", "selective", 40, 32, state=2, is_hidden=True),
    Sequence("tiny-ssd", "scan", "ssd", 40, 2, 16, state=8, is_hidden=True),
)


@dataclass(frozen=True)
class Problem:
    """A case with its tensors: what is timed, and what else computes the same or stands in for it.

    Each of `rivals` takes the same tensors.
    """

    tensors: list[Tensor]
    call: Call
    rivals: Rivals


def problem(case: Sequence, dtype: str, device: str, backend: str) -> Problem:
    """The case in one dtype on one device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(case.batch, case.tokens, *shape, generator=generator).to(
            device, getattr(torch, dtype)
        )

    build = _selective if case.kind == "selective" else _ssd if case.kind == "ssd" else _heads
    return build(case, normal, backend)


def _heads(case: Sequence, normal: Callable[..., Tensor], backend: str) -> Problem:
    q, k, v = (normal(case.num_heads, case.head_dim) for _ in range(3))
    if case.op == "lla":
        solver = Solver(method="cg", max_iterations=STEPS, tolerance=0.0)
        attend = partial(local_linear_attention, geometry=case.pattern, ridge=1.0, solver=solver)
        rivals: Rivals = {
            "tiled": lambda: partial(attend, backend="tiled"),
            "attention": lambda: lambda q, k, v: neighborhood_attention(q, k, v, case.pattern),
            "sdpa": partial(_full, case),
        }
        return Problem([q, k, v], partial(attend, backend=backend), rivals)
    tensors = [q, k, v]
    operator: Callable[..., LinearResult] = linear_attention
    if case.kind in ("scalar", "channel"):
        gates = normal(case.num_heads) if case.kind == "scalar" else normal(case.num_heads, case.head_dim)
        tensors.append(F.logsigmoid(gates.float()) / 16)
        operator = gated_linear_attention
    elif case.kind == "delta":
        tensors = [q, F.normalize(k, dim=-1), v, normal(case.num_heads).sigmoid()]
        operator = delta_rule

    def run(*given: Tensor, backend: str) -> Tensor:
        return operator(*given, backend=backend).output

    return Problem(
        tensors,
        partial(run, backend=backend),
        {
            "tiled": lambda: partial(run, backend="tiled"),
            "sdpa": partial(_full, case),
            "fla": partial(_fla, case.kind),
        },
    )


def _selective(case: Sequence, normal: Callable[..., Tensor], backend: str) -> Problem:
    channels, states = case.num_heads, case.state
    x, dt = normal(channels), normal(channels)
    rates = -torch.arange(1.0, states + 1).expand(channels, states).contiguous().to(x.device)
    tensors = [x, dt, rates, normal(states), normal(states)]

    def run(*given: Tensor, backend: str) -> Tensor:
        return selective_scan(*given, dt_softplus=True, backend=backend).output

    rivals: Rivals = {
        "tiled": lambda: partial(run, backend="tiled"),
        "loop": lambda: _loop,
        "mamba-ssm": _mamba,
    }
    return Problem(tensors, partial(run, backend=backend), rivals)


def _ssd(case: Sequence, normal: Callable[..., Tensor], backend: str) -> Problem:
    heads = case.num_heads
    x, dt = normal(heads, case.head_dim), F.softplus(normal(heads) - 3)
    rates = -torch.linspace(1, 16, heads, device=x.device)
    tensors = [x, dt, rates, normal(1, case.state), normal(1, case.state)]

    def run(*given: Tensor, backend: str) -> Tensor:
        return ssd(*given, backend=backend).output

    return Problem(tensors, partial(run, backend=backend), {"tiled": lambda: partial(run, backend="tiled")})


def _full(case: Sequence) -> Call:
    """Attention over all tokens, where one call is affordable."""
    gflop = 2e-9 * case.batch * case.num_heads * case.head_dim * case.tokens**2
    if case.device == "cpu" and gflop > SLOWEST:
        raise Unfit(f"too slow: {gflop:,.0f} GFLOP for one call, above the bound of {SLOWEST:,}")
    return _sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over all tokens: what the linear family replaces."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _loop(x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan one position after the other, all channels at once: the fastest form in plain torch."""
    dt = F.softplus(dt.float()).transpose(0, 1).contiguous()  # [T, B, C]
    drive = (dt * x.float().transpose(0, 1)).unsqueeze(-1) * b.float().transpose(0, 1).unsqueeze(2)
    decay = torch.exp(dt.unsqueeze(-1) * rates)  # [T, B, C, N]
    state, states = torch.zeros_like(drive[0]), []
    for step in range(len(drive)):
        state = decay[step] * state + drive[step]
        states.append(state)
    out = torch.einsum("tbcn,tbn->btc", torch.stack(states), c.float().transpose(0, 1))
    return out.to(x.dtype)


def _fla(kind: str) -> Call:
    """flash-linear-attention's chunked kernel of the same recurrence."""
    try:
        ops = require("fla.ops", package="flash-linear-attention")
    except MissingPackage:
        raise Unfit("flash-linear-attention is not installed here") from None
    if not torch.cuda.is_available():
        raise Unfit("flash-linear-attention runs on GPUs only")
    name, arguments = {
        "plain": ("chunk_linear_attn", {"normalize": False}),
        "scalar": ("chunk_simple_gla", {}),
        "channel": ("chunk_gla", {}),
        "delta": ("chunk_delta_rule", {}),
    }[kind]
    chunked: Any = getattr(ops, name)
    return lambda *given: chunked(*given, **arguments)[0]


def _mamba() -> Call:
    """The CUDA kernel of mamba-ssm, in its own layout."""
    try:
        scan = require("mamba_ssm.ops.selective_scan_interface", package="mamba-ssm").selective_scan_fn
    except MissingPackage:
        raise Unfit("mamba-ssm is not installed here") from None

    def run(x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor) -> Tensor:
        x, dt, b, c = (each.transpose(1, 2).contiguous() for each in (x, dt, b, c))
        return scan(x, dt, rates, b, c, delta_softplus=True).transpose(1, 2)

    return run
