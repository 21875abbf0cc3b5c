"""Neighborhood attention of a few new queries against a cache of the sinks and a rolling window."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.core.dims import per_dim
from nearfield.ops.checks import check, check_heads, no_transform, scale_or_default, under_autocast
from nearfield.ops.neighborhood import native, triton, triton_decode
from nearfield.ops.neighborhood.geometry import Axis, Neighborhood

OP = "neighborhood_attention_decode"


class DecodeOptions(TypedDict, total=False):
    """What `neighborhood_attention_decode` takes beside its tensors and the geometry."""

    query_positions: Tensor | None
    key_positions: Tensor | None
    first_position: Tensor | None
    visible: Tensor | None
    bias: Tensor | None
    sink_logits: Tensor | None
    scale: float | None
    backend: str


@overload
def neighborhood_attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Neighborhood,
    *,
    return_lse: Literal[True],
    **options: Unpack[DecodeOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def neighborhood_attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Neighborhood,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DecodeOptions],
) -> Tensor: ...
def neighborhood_attention_decode(
    query: Float[Tensor, "b n heads dim"],
    key: Float[Tensor, "b m kv_heads dim"],
    value: Float[Tensor, "b m kv_heads dv"],
    geometry: Neighborhood,
    *,
    query_positions: Int[Tensor, "#b n"] | None = None,
    key_positions: Int[Tensor, "#b m"] | None = None,
    first_position: Int[Tensor, " b"] | None = None,
    visible: Bool[Tensor, "#b n m"] | None = None,
    bias: Float[Tensor, "heads offsets"] | None = None,
    sink_logits: Float[Tensor, " heads"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "b n heads dv"] | tuple[Float[Tensor, "b n heads dv"], Float[Tensor, "b n heads"]]:
    """The last rows of `neighborhood_attention` in one causal dimension, without the keys that none sees.

        out = neighborhood_attention_decode(
            q, k, v, Neighborhood(1024, is_causal=True, num_sinks=4), query_positions=at, key_positions=slots
        )

    Keys, cached and new ones together, stand in any order: `key_positions` says where in its row each
    belongs, -1 for an empty slot (which must hold finite numbers). Without positions the keys are whole rows
    and the queries their last tokens. `first_position` says where rows padded on the left begin; without it a
    row begins at the smallest position among its keys. Layers whose caches hold the same positions can share
    one `visible = visible_slots(...)`, which then stands for the positions.
    """
    check_heads(query, key, value, rank=(4,), layout="[batch, tokens, heads, head_dim]")
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    axis = _axis(geometry)
    at, slots = _positions(query, key, query_positions, key_positions)
    if visible is None:
        visible = visible_slots(geometry, at, slots, first_position)
    rows = 1 if visible.shape[:1] == (1,) else batch
    check("visible", visible, (rows, num_queries, num_keys), query, torch.bool)
    seen = visible[:, None, None]  # [B or 1, 1, 1, N, M]

    addend = None
    if bias is not None:
        check("bias", bias, (num_heads, 2 * axis.kernel_size - 1), query)
        if axis.border == "pad":
            raise NotImplementedError(
                "Decoding with a bias and border='pad' is missing. Use neighborhood_attention."
            )
        addend = _bias(bias, axis, at, slots).unflatten(1, (num_kv_heads, -1))
    logits = []  # each joins the denominator with the value zero: [B or 1, Hkv or 1, G or 1, N or 1, 1]
    if sink_logits is not None:
        check("sink_logits", sink_logits, (num_heads,), query)
        logits.append(sink_logits.reshape(1, num_kv_heads, -1, 1, 1))
    if axis.border == "pad":
        _, start = _window(axis, at, slots)
        logits.append((-start).clamp(min=0).log()[:, None, None, :, None])  # so many zero keys of logit 0
    factor = scale_or_default(scale, head_dim)

    inputs = [x for x in (query, key, value, bias, sink_logits) if x is not None]
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    def ask_native() -> Verdict:
        if wants_grad:
            return Verdict(
                "the CPU kernels decode without gradients. Use torch.no_grad(), or another backend."
            )
        return Verdict(no_transform() or native.unfit(query, value, factor) or native.missing())

    def ask_triton() -> Verdict:
        if wants_grad:
            return Verdict(
                "the GPU kernels decode without gradients. Use torch.no_grad(), or another backend."
            )
        return Verdict(no_transform() or triton.unfit(query, value, factor))

    def ask_tiled() -> Verdict:
        asked = {"return_lse": return_lse, "sink_logits or border='pad'": bool(logits)}
        return Verdict(
            next((f"torch's fused attention has no {name}." for name, on in asked.items() if on), None)
        )

    ask = {"native": ask_native, "triton": ask_triton, "tiled": ask_tiled, "reference": Verdict}
    name = choose(OP, backend, ask)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if name in ("native", "triton"):
            decode = native.decode if name == "native" else triton_decode.decode
            table = None if addend is None else addend.flatten(1, 2)  # [B or 1, H, N, M]
            return _join(*decode(query, key, value, visible, table, factor), logits, num_kv_heads)
        grouped = query.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, N, D]
        if name == "tiled":
            out, lse = _fused(grouped, key, value, seen, addend, factor), query.new_zeros(())
        else:
            out, lse = _explicit(grouped, key, value, seen, addend, logits, factor)
            lse = lse.flatten(1, 2).transpose(1, 2)
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse

    out, lse = under_autocast(attend, query, key, value)
    return (out, lse) if return_lse else out


def visible_slots(
    geometry: Neighborhood,
    query_positions: Int[Tensor, "#b n"],
    key_positions: Int[Tensor, "#b m"],
    first_position: Int[Tensor, " b"] | None = None,
) -> Bool[Tensor, "#b n m"]:
    """Which cached keys each new query sees, from positions alone: one answer for all layers of a step."""
    seen, _ = _window(_axis(geometry), query_positions, key_positions)
    i, j = query_positions[:, :, None], key_positions[:, None]
    first = torch.zeros_like(j[:, :, :1]) if first_position is None else first_position[:, None, None]
    if geometry.num_sinks:
        if first_position is None:
            beyond = torch.iinfo(j.dtype).max - geometry.num_sinks
            first = j.masked_fill(j < 0, beyond).amin(-1, keepdim=True)
        seen = seen | ((j < first + geometry.num_sinks) & (j <= i))
    return seen & (j >= first)


def _join(out: Tensor, lse: Tensor, logits: list[Tensor], num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, Dv]` and log-sum-exp `[B, N, H]` with `logits` in the denominator as well."""
    if not logits:
        return out, lse
    total = lse
    for x in logits:
        x = x.to(lse.dtype).squeeze(-1).expand(-1, num_kv_heads, lse.shape[-1] // num_kv_heads, -1)
        total = torch.logaddexp(total, x.flatten(1, 2).transpose(1, 2))
    share = (lse - total.masked_fill(total == -torch.inf, 0)).exp()
    return (out * share.unsqueeze(-1)).to(out.dtype), total


def _fused(
    grouped: Tensor, key: Tensor, value: Tensor, seen: Tensor, addend: Tensor | None, scale: float
) -> Tensor:
    """All heads of a group as rows of one problem, so that the cache is read once and never repeated."""
    group, num_queries = grouped.shape[2:4]
    if addend is None:
        mask = seen.expand(-1, -1, group, -1, -1) if num_queries > 1 else seen
    else:
        mask = addend.to(grouped.dtype).masked_fill(~seen, -torch.inf)
    out = F.scaled_dot_product_attention(
        grouped.flatten(2, 3),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask.flatten(2, 3),
        scale=scale,
    )
    return out.unflatten(2, (group, num_queries))


def _explicit(
    grouped: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    addend: Tensor | None,
    logits: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Hkv, G, N, Dv]` and log-sum-exp by the definition."""
    wide = torch.promote_types(grouped.dtype, torch.float32)
    scores = torch.einsum("bhgnd,bmhd->bhgnm", grouped.to(wide), key.to(wide)) * scale
    if addend is not None:
        scores = scores + addend.to(wide)
    scores = scores.masked_fill(~seen, -torch.inf)
    scores = torch.cat([scores, *(x.to(wide).expand(*scores.shape[:-1], 1) for x in logits)], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()[..., : key.shape[1]]
    return torch.einsum("bhgnm,bmhd->bhgnd", weights.to(value.dtype).to(wide), value.to(wide)).to(
        value.dtype
    ), lse


def _axis(geometry: Neighborhood) -> Axis:
    """The one causal axis of the pattern, of no size yet."""
    if not isinstance(geometry, Neighborhood):
        raise TypeError(
            f"geometry is a {type(geometry).__name__}. "
            "Give a Neighborhood, such as Neighborhood(7, is_causal=True)."
        )
    names = ("kernel_size", "stride", "dilation", "is_causal")
    size, stride, dilation, is_causal = (per_dim(name, getattr(geometry, name), 1)[0] for name in names)
    if not is_causal:
        raise ValueError(f"{geometry} cannot decode: new tokens would change old rows. Give is_causal=True.")
    return Axis(0, size, stride, dilation, is_causal, geometry.border)


def _window(axis: Axis, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys lie in each query's window `[B or 1, N, M]` and where it starts `[B or 1, N]`."""
    size = query_positions.amax(-1, keepdim=True) + 1  # rows end at their last query
    i, j = query_positions, key_positions[:, None]
    start, end = axis.interval(i // axis.dilation, i % axis.dilation, size=size)
    at = j // axis.dilation
    inside = (start[:, :, None] <= at) & (at < end[:, :, None])
    if axis.dilation > 1:
        inside = inside & (i[:, :, None] % axis.dilation == j % axis.dilation)
    return inside, start


def _positions(query: Tensor, key: Tensor, at: Tensor | None, slots: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions of queries `[B or 1, N]` and keys `[B or 1, M]`, by default those of whole rows."""
    batch, num_queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
    if (at is None) != (slots is None):
        raise ValueError("query_positions and key_positions belong together. Give both or neither.")
    if at is None or slots is None:
        if num_queries > num_keys:
            raise ValueError(
                f"{num_queries} queries for {num_keys} keys. The new tokens belong to the keys as well."
            )
        slots = torch.arange(num_keys, device=query.device)[None]
        return slots[:, num_keys - num_queries :], slots
    for name, x, count in (("query_positions", at, num_queries), ("key_positions", slots, num_keys)):
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {x.dtype}. It must hold whole numbers, such as torch.int64.")
        if tuple(x.shape) not in ((1, count), (batch, count)):
            raise ValueError(
                f"{name} has shape {list(x.shape)}. It must be [{batch}, {count}], or one row for all."
            )
    return at, slots


def _bias(bias: Tensor, axis: Axis, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """The table's entry of each query and key in the window `[B or 1, H, N, M]`, 0 for a sink outside it."""
    inside, _ = _window(axis, query_positions, key_positions)
    steps = key_positions[:, None] // axis.dilation - query_positions[:, :, None] // axis.dilation
    offset = (steps + axis.kernel_size - 1).clamp(0, 2 * axis.kernel_size - 2)
    return bias[:, offset].transpose(0, 1).masked_fill(~inside[:, None], 0)
