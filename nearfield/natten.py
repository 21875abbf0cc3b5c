"""NATTEN's names on our operators, so that code written for it runs where it does not install.

`from nearfield.natten import na2d` takes the place of `from natten import na2d`: arguments and layouts are
those of NATTEN 0.21, and of NATTEN 0.17 for the unfused functions that left it since (`natten2dqkrpb`,
`natten2dav`, `na2d_qk`, `na2d_av` and theirs in one dimension), which models like DiNAT still import. For a
library that says `import natten` itself, `install()` lets that name mean this module until `uninstall()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.core.dims import per_dim
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention, unfused

__all__ = [
    "NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D", "install",
    "merge_attentions", "na1d", "na1d_av", "na1d_qk", "na2d", "na2d_av", "na2d_qk", "na3d", "natten1dav",
    "natten1dqkrpb", "natten2dav", "natten2dqkrpb", "neighborhood_attention_generic", "uninstall",
]  # fmt: skip

__version__ = "0.21.7"  # whose names these are
# How NATTEN's own kernels are to run: accepted, for code that gives them, and of no meaning here.
TUNING = {
    "attention_kwargs", "backend", "backward_kv_splits", "backward_kv_tile_shape", "backward_q_tile_shape",
    "backward_use_pt_reduction", "kernel_schedule", "kv_tile_shape", "q_tile_shape", "run_persistent_kernel",
    "torch_compile",
}  # fmt: skip

Sizes = int | Sequence[int]
Flags = bool | Sequence[bool]


def neighborhood_attention_generic(
    query: Float[Tensor, "b *grid heads dim"],
    key: Float[Tensor, "b *grid kv_heads dim"],
    value: Float[Tensor, "b *grid kv_heads dv"],
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: Float[Tensor, "b extra kv_heads dim"] | None = None,
    additional_values: Float[Tensor, "b extra kv_heads dv"] | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`neighborhood_attention` under NATTEN's name and arguments, on a grid of one to three dimensions.

    Arguments that choose or tune NATTEN's kernels are accepted and mean nothing here.
    """
    unknown = sorted(set(tuning) - TUNING)
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no argument of NATTEN's neighborhood attention.")
    rank = query.dim() - 3
    pattern = Neighborhood(
        per_dim("kernel_size", kernel_size, rank),
        per_dim("stride", stride, rank),
        per_dim("dilation", dilation, rank),
        per_dim("is_causal", bool(is_causal) if is_causal is None else is_causal, rank),
    )
    out, lse = neighborhood_attention(
        query,
        key,
        value,
        pattern,
        additional_keys=additional_keys,
        additional_values=additional_values,
        scale=scale,
        return_lse=True,
    )
    return (out, lse) if return_lse else out


def _of_rank(rank: int) -> Callable[..., Any]:
    def attend(query: Tensor, key: Tensor, value: Tensor, kernel_size: Sizes, *args: Any, **more: Any) -> Any:
        if query.dim() != rank + 3:
            raise ValueError(
                f"na{rank}d takes [batch, {rank} grid sides, heads, head_dim], given {list(query.shape)}."
            )
        return neighborhood_attention_generic(query, key, value, kernel_size, *args, **more)

    attend.__name__ = attend.__qualname__ = f"na{rank}d"
    attend.__doc__ = f"`neighborhood_attention_generic` on grids of {rank} dimension{'s' * (rank > 1)}."
    return attend


na1d, na2d, na3d = (_of_rank(rank) for rank in (1, 2, 3))


def merge_attentions(
    outputs: Sequence[Float[Tensor, "b *places heads dv"]],
    lse_tensors: Sequence[Float[Tensor, "b *places heads"]],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Float[Tensor, "b *places heads dv"], Float[Tensor, "b *places heads"]]:
    """Attentions of the same queries to parts of the keys, as one to all of them: output and log-sum-exp.

    `sum_p exp(lse_p - lse) out_p` with `lse = log sum_p exp(lse_p)`. Gradients are those of this formula,
    whatever computed the parts; the last two arguments of NATTEN's mean nothing here.
    """
    if len(outputs) != len(lse_tensors) or not outputs:
        raise ValueError(f"{len(outputs)} outputs and {len(lse_tensors)} log-sum-exps. Give as many of each.")
    parts = torch.stack(list(lse_tensors))
    lse = parts.logsumexp(0)
    blind = lse == -torch.inf  # a query that saw nothing anywhere
    weights = torch.exp(parts - lse.masked_fill(blind, 0))
    merged = sum(w.unsqueeze(-1) * out.to(w.dtype) for w, out in zip(weights, outputs, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), lse


class _Layer(nn.Module):
    """Neighborhood attention with its projections, named and laid out as NATTEN's."""

    rank: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}.")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.kernel_size = per_dim("kernel_size", kernel_size, self.rank)
        self.stride = per_dim("stride", stride, self.rank)
        self.dilation = per_dim("dilation", dilation, self.rank)
        self.is_causal = per_dim("is_causal", is_causal, self.rank)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b *grid dim"]:
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{type(self).__name__} takes [batch, {self.rank} grid sides, {self.embed_dim}], "
                f"given {list(x.shape)}."
            )
        q, k, v = rearrange(self.qkv(x), "b ... (three h d) -> three b ... h d", three=3, h=self.num_heads)
        pattern = (self.kernel_size, self.stride, self.dilation, self.is_causal)
        out = neighborhood_attention_generic(q, k, v, *pattern, scale=self.scale)
        assert isinstance(out, Tensor)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(_Layer):
    """`na1d` between linear maps."""

    rank = 1


class NeighborhoodAttention2D(_Layer):
    """`na2d` between linear maps."""

    rank = 2


class NeighborhoodAttention3D(_Layer):
    """`na3d` between linear maps."""

    rank = 3


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: Sizes,
    dilation: Sizes,
    additional_keys: Tensor | None,
    is_causal: Flags,
    rpb: Tensor | None,
) -> Tensor:
    _require_rank(rank, query)
    q, k = (x.movedim(1, -2) for x in (query, key))
    found = unfused.scores(q, k, _pattern(rank, kernel_size, dilation, is_causal), bias=rpb).movedim(-2, 1)
    if additional_keys is None:
        return found
    more = query.flatten(2, -2) @ additional_keys.mT  # [B, heads, N, extra]
    return torch.cat([found, more.view(*found.shape[:-1], -1)], -1)


def _av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    dilation: Sizes,
    additional_values: Tensor | None,
    is_causal: Flags,
) -> Tensor:
    _require_rank(rank, value)
    extra = 0 if additional_values is None else additional_values.shape[-2]
    near, far = attn.split([attn.shape[-1] - extra, extra], -1)
    pattern = _pattern(rank, kernel_size, dilation, is_causal)
    out = unfused.weigh(near.movedim(1, -2), value.movedim(1, -2), pattern).movedim(-2, 1)
    if additional_values is None:
        return out
    return out + (far.flatten(2, -2) @ additional_values).view(out.shape)


def _pattern(rank: int, kernel_size: Sizes, dilation: Sizes, is_causal: Flags) -> Neighborhood:
    return Neighborhood(
        per_dim("kernel_size", kernel_size, rank),
        dilation=per_dim("dilation", dilation, rank),
        is_causal=per_dim("is_causal", is_causal, rank),
    )


def _require_rank(rank: int, x: Tensor) -> None:
    if x.dim() != rank + 3:
        raise ValueError(f"Needs [batch, heads, {rank} grid sides, head_dim], given {list(x.shape)}.")


def na1d_qk(
    query: Float[Tensor, "b heads n dim"],
    key: Float[Tensor, "b heads n dim"],
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_keys: Float[Tensor, "b heads extra dim"] | None = None,
    is_causal: Flags = False,
    rpb: Float[Tensor, "heads offsets"] | None = None,
) -> Float[Tensor, "b heads n keys"]:
    """NATTEN 0.17's products of queries with the keys of their windows, additional keys last; not scaled."""
    return _qk(1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na2d_qk(
    query: Float[Tensor, "b heads y x dim"],
    key: Float[Tensor, "b heads y x dim"],
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_keys: Float[Tensor, "b heads extra dim"] | None = None,
    is_causal: Flags = False,
    rpb: Float[Tensor, "heads rows columns"] | None = None,
) -> Float[Tensor, "b heads y x keys"]:
    """`na1d_qk` in two dimensions, rows of the window first."""
    return _qk(2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na1d_av(
    attn: Float[Tensor, "b heads n keys"],
    value: Float[Tensor, "b heads n dim"],
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_values: Float[Tensor, "b heads extra dim"] | None = None,
    is_causal: Flags = False,
) -> Float[Tensor, "b heads n dim"]:
    """NATTEN 0.17's weighted sums of the values of each window, in the order of `na1d_qk`."""
    return _av(1, attn, value, kernel_size, dilation, additional_values, is_causal)


def na2d_av(
    attn: Float[Tensor, "b heads y x keys"],
    value: Float[Tensor, "b heads y x dim"],
    kernel_size: Sizes,
    dilation: Sizes = 1,
    additional_values: Float[Tensor, "b heads extra dim"] | None = None,
    is_causal: Flags = False,
) -> Float[Tensor, "b heads y x dim"]:
    """`na1d_av` in two dimensions."""
    return _av(2, attn, value, kernel_size, dilation, additional_values, is_causal)


def natten1dqkrpb(
    query: Float[Tensor, "b heads n dim"],
    key: Float[Tensor, "b heads n dim"],
    rpb: Float[Tensor, "heads offsets"] | None,
    kernel_size: Sizes,
    dilation: Sizes = 1,
) -> Float[Tensor, "b heads n keys"]:
    """`na1d_qk` under the name and arguments that it had first."""
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(
    query: Float[Tensor, "b heads y x dim"],
    key: Float[Tensor, "b heads y x dim"],
    rpb: Float[Tensor, "heads rows columns"] | None,
    kernel_size: Sizes,
    dilation: Sizes = 1,
) -> Float[Tensor, "b heads y x keys"]:
    """`na2d_qk` under the name and arguments that it had first."""
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten1dav(
    attn: Float[Tensor, "b heads n keys"],
    value: Float[Tensor, "b heads n dim"],
    kernel_size: Sizes,
    dilation: Sizes = 1,
) -> Float[Tensor, "b heads n dim"]:
    """`na1d_av` under the name that it had first."""
    return na1d_av(attn, value, kernel_size, dilation)


def natten2dav(
    attn: Float[Tensor, "b heads y x keys"],
    value: Float[Tensor, "b heads y x dim"],
    kernel_size: Sizes,
    dilation: Sizes = 1,
) -> Float[Tensor, "b heads y x dim"]:
    """`na2d_av` under the name that it had first."""
    return na2d_av(attn, value, kernel_size, dilation)


DINAT = "transformers.models.dinat.modeling_dinat"
_before: dict[str, Any] = {}  # what `install` found, while it lasts


def install() -> None:
    """From now on `import natten` gives these names, to transformers' DiNAT too. `uninstall()` ends it.

    This is the one thing in nearfield that changes what the whole process sees. Calling it again changes
    nothing. A NATTEN that is installed is hidden meanwhile. Where transformers is installed its DiNAT is
    imported: version 5 hands its tensors over with heads and columns exchanged, which is put right there.
    """
    if _before:
        return
    names = [name for name in sys.modules if name == "natten" or name.startswith("natten.")]
    _before["modules"] = {name: sys.modules.pop(name) for name in names}
    for name in ("natten", "natten.functional"):
        sys.modules[name] = _stand_in(name)
    sys.modules["natten"].functional = sys.modules["natten.functional"]  # type: ignore[attr-defined]
    _ask_again()
    known = sys.modules.get(DINAT)
    try:
        dinat = import_module(DINAT)
    except ModuleNotFoundError:
        return
    unknown = dict.fromkeys(("natten2dav", "natten2dqkrpb"), _gone)
    _before["dinat"] = {name: getattr(dinat, name) if known else gone for name, gone in unknown.items()}
    exchanged = {"natten2dav": _dinat_av, "natten2dqkrpb": _dinat_qkrpb}
    plain = {"natten2dav": natten2dav, "natten2dqkrpb": natten2dqkrpb}
    _give(dinat, exchanged if _exchanges(dinat) else plain)


def uninstall() -> None:
    """`import natten` means again what it meant before `install()`; without that, nothing happens.

    A DiNAT that was not imported before refuses to compute from now on.
    """
    if not _before:
        return
    for name in ("natten", "natten.functional"):
        sys.modules.pop(name, None)
    sys.modules.update(_before["modules"])
    if "dinat" in _before:
        _give(sys.modules[DINAT], _before["dinat"])
    _before.clear()
    _ask_again()


def _stand_in(name: str) -> ModuleType:
    """A module that import machinery takes for a real one: it asks for the spec."""
    module = ModuleType(name, __doc__)
    module.__spec__ = ModuleSpec(name, None, is_package=name == "natten")
    if name == "natten":
        module.__path__ = []
    module.__dict__.update({public: globals()[public] for public in __all__}, __version__=__version__)
    return module


def _exchanges(dinat: ModuleType) -> bool:
    """Whether this DiNAT calls with [batch, columns, rows, heads, head_dim]: seen by letting it call."""
    shapes: list[torch.Size] = []

    def look(query: Tensor, *others: Any) -> Tensor:
        shapes.append(query.shape)
        raise StopIteration

    _give(dinat, {"natten2dqkrpb": look})
    config = SimpleNamespace(qkv_bias=True, attention_probs_dropout_prob=0.0)
    with suppress(StopIteration), torch.device("meta"):  # no number of anybody's seed is drawn
        layer = dinat.NeighborhoodAttention(config, dim=6, num_heads=3, kernel_size=1, dilation=1)
        layer(torch.empty(1, 4, 5, 6))
    return [tuple(shape) for shape in shapes] == [(1, 5, 4, 3, 2)]


def _dinat_qkrpb(query: Tensor, key: Tensor, *others: Any) -> Tensor:
    return natten2dqkrpb(query.transpose(1, 3), key.transpose(1, 3), *others)


def _dinat_av(attn: Tensor, value: Tensor, *others: Any) -> Tensor:
    return natten2dav(attn, value.transpose(1, 3), *others)


def _give(module: ModuleType, functions: Mapping[str, Any]) -> None:
    for name, function in functions.items():
        setattr(module, name, function)


def _gone(*args: Any, **options: Any) -> Any:
    raise RuntimeError("nearfield.natten was uninstalled. Call nearfield.natten.install() before this model.")


def _ask_again() -> None:
    """transformers remembers whether there is a NATTEN."""
    utils = sys.modules.get("transformers.utils.import_utils")
    forget = getattr(getattr(utils, "is_natten_available", None), "cache_clear", None)
    if forget is not None:
        forget()
