"""What Faster Neighborhood Attention claims, tried here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from nearfield.bench.timing import timed
from nearfield.bench.work import cpu_seconds, peak_growth
from nearfield.catalog import Result
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention

SEEDS = (0, 1, 2)


def tiles_win(*, full: bool = False) -> Result:
    """Tiled attention against full attention under a mask and against gathered keys, forward on 56 x 56."""
    seconds: dict[str, float] = {}
    wins, equal = True, True
    for size in (7, 13) if full else (7,):
        q, k, v = _random(0, (56, 56), num_heads=4, head_dim=32)
        pattern = Neighborhood(size)
        mask = _mask((56, 56), (size, size))
        calls: dict[str, Callable[[], Any]] = {
            "tiled": partial(neighborhood_attention, q, k, v, pattern, backend="tiled"),
            "full with mask": partial(_masked, q, k, v, mask),
            "gather": partial(_gathered, q, k, v, size),
        }
        outputs = [call() for call in calls.values()]
        equal &= all(torch.allclose(outputs[0], other, atol=1e-5) for other in outputs[1:])
        found = {name: cpu_seconds(call, budget=3.0 if full else 0.3) for name, call in calls.items()}
        wins &= found["tiled"] < min(found["full with mask"], found["gather"])
        seconds |= {f"{name}, window {size}": value for name, value in found.items()}
    words = "; ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    return Result(words if equal else f"results differ; {words}", wins and equal, partial(_bars, seconds))


def fused_kernel(*, full: bool = False) -> Result:
    """The compiled CPU kernel against tiles made of library calls, forward on 56 x 56."""
    q, k, v = _random(0, (56, 56), num_heads=4, head_dim=32)
    seconds = {
        name: cpu_seconds(
            partial(neighborhood_attention, q, k, v, Neighborhood(7), backend=name),
            budget=3.0 if full else 0.3,
            most=200,
        )
        for name in ("native", "tiled")
    }
    words = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    return Result(words, seconds["native"] <= seconds["tiled"] / 3, partial(_bars, seconds, scale="linear"))


def linear_memory(*, full: bool = False) -> Result:
    """Growth of the process's peak memory during one forward pass on 128 x 128, window 13 x 13."""
    q, k, v = _random(0, (128, 128), num_heads=8, head_dim=64)
    inputs = sum(x.numel() * x.element_size() for x in (q, k, v))
    _local(*_random(0, (16, 16), num_heads=8, head_dim=64))  # what is loaded once is no part of it
    try:
        peak = max(peak_growth(partial(_local, q, k, v)) for _ in range(3 if full else 1))
    except OSError as error:
        return Result(
            "", None, skipped=f"peak memory is read from Linux's /proc, which is not here ({error})"
        )
    gathered = 2 * 13 * 13 * inputs / 3
    words = f"{peak / 2**20:.0f} MiB, {peak / inputs:.2f} x the inputs; gathered keys and values would take"
    return Result(f"{words} {gathered / 2**30:.1f} GiB", peak <= 3 * inputs)


def per_axis(*, full: bool = False) -> Result:
    """Window (2, 7, 7), causal on time only, against full attention under a mask made from the formulas."""
    worst = 0.0
    grid = (8, 16, 16) if full else (4, 12, 12)
    mask = _mask(grid, (2, 7, 7), is_causal=(True, False, False))
    pattern = Neighborhood((2, 7, 7), is_causal=(True, False, False))
    for seed in SEEDS:
        q, k, v = _random(seed, grid, num_heads=2, head_dim=32)
        out = neighborhood_attention(q, k, v, pattern)
        worst = max(worst, float((out - _masked(q, k, v, mask)).abs().max()))
    return Result(f"largest difference {worst:.1e}", worst <= 1e-5)


def beats_dense_on_gpu(*, full: bool = False) -> Result:
    """Forward in float16 on 256 x 256 against torch's own full attention."""
    draw, shape = torch.Generator("cuda").manual_seed(0), (1, 256, 256, 24 if full else 8, 128)
    q, k, v = (torch.randn(shape, generator=draw, device="cuda", dtype=torch.float16) for _ in range(3))
    dense = partial(F.scaled_dot_product_attention, _flat(q), _flat(k), _flat(v))
    local = partial(neighborhood_attention, q, k, v, Neighborhood(80))
    seconds = {
        "full": timed(dense, "cuda", budget=0.5).seconds,
        "local": timed(local, "cuda", budget=0.5).seconds,
    }
    gain = seconds["full"] / seconds["local"]
    words = f"full {1e3 * seconds['full']:.1f} ms, local {1e3 * seconds['local']:.1f} ms: {gain:.1f} x faster"
    return Result(words, gain >= 5, partial(_bars, seconds))


def _random(
    seed: int, grid: tuple[int, ...], *, num_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, *grid, num_heads, head_dim, generator=draw) for _ in range(3))
    return q, k, v


def _mask(
    grid: tuple[int, ...], kernel_size: tuple[int, ...], is_causal: tuple[bool, ...] | None = None
) -> Bool[Tensor, "n n"]:
    """Which key each query sees, written from the paper's formulas and from nothing of ours."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for n, k, causal in zip(grid, kernel_size, is_causal or (False,) * len(grid), strict=True):
        query, key = torch.arange(n)[:, None], torch.arange(n)[None, :]
        start = (query - k + 1).clamp(min=0) if causal else (query - k // 2).clamp(0, n - k)
        end = query + 1 if causal else start + k
        mask = torch.kron(
            mask, (start <= key) & (key < end)
        )  # the window is the product of the axes' windows
    return mask


def _local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return neighborhood_attention(q, k, v, Neighborhood(13))


def _flat(x: Float[Tensor, "b *grid h d"]) -> Float[Tensor, "b h n d"]:
    return rearrange(x, "b ... h d -> b h (...) d")


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "n n"]) -> Tensor:
    out = F.scaled_dot_product_attention(_flat(q), _flat(k), _flat(v), attn_mask=mask)
    return out.transpose(1, 2).reshape(v.shape)


def _gathered(
    q: Float[Tensor, "1 y x h d"], k: Float[Tensor, "1 y x h d"], v: Float[Tensor, "1 y x h d"], size: int
) -> Float[Tensor, "1 y x h d"]:
    """Neighborhood attention as it is often written: every query gets a copy of its keys and values."""
    index = [
        (torch.arange(n) - size // 2).clamp(0, n - size)[:, None] + torch.arange(size) for n in q.shape[1:3]
    ]
    rows, columns = index[0][:, None, :, None], index[1][None, :, None, :]
    near_k, near_v = (rearrange(x[0, rows, columns], "y x i j h d -> (y x) h (i j) d") for x in (k, v))
    out = F.scaled_dot_product_attention(rearrange(q, "1 y x h d -> (y x) h 1 d"), near_k, near_v)
    return rearrange(out, "(y x) h 1 d -> 1 y x h d", y=q.shape[1])


def _bars(seconds: dict[str, float], axes: Any, scale: str = "log") -> None:
    axes.barh(list(seconds), [1e3 * value for value in seconds.values()])
    axes.set(xlabel="milliseconds (logarithmic)" if scale == "log" else "milliseconds", xscale=scale)
    axes.invert_yaxis()
