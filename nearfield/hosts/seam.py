"""The one place where hosts are entered: every attention call of a model, by name, while a `with` lasts.

Nearly all hosts meet in `F.scaled_dot_product_attention`. transformers models are entered through their own
door (`hosts/transformers.py`), every other module through a function mode (`hosts/torch_nn.py`). What neither
sees: flash-attention packages called directly, `flex_attention`, and scripted modules (refused by name).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

Role = Literal["self", "cross", "joint"]


@dataclass(frozen=True)
class Site:
    """One place in a host where attention is computed, named as the host names its modules.

    `grid` is the spatial grid of the tokens after the first `num_prefix` class or register tokens: (N,) for
    text, (H, W) for images, None where the tokens form no grid that is known.

    `rows` and `keys` are the places of one call's queries and keys in the whole sequence, its padding and
    what a cache holds counted: a decode step at token 40 has rows 40:41. The keys of a window that has moved
    on begin later. Sites that are listed without a call have empty ones.
    """

    name: str
    role: Role
    grid: tuple[int, ...] | None
    num_prefix: int
    is_causal: bool
    num_heads: int
    num_kv_heads: int
    rows: range = field(default=range(0), compare=False, repr=False)
    keys: range = field(default=range(0), compare=False, repr=False)

    @property
    def layer(self) -> int | None:
        """The first number in the name: for decoders and encoders, the layer."""
        return next((int(part) for part in self.name.split(".") if part.isdecimal()), None)


@dataclass
class Call:
    """One attention call. Where `mask` is None and the site is causal, causality is the handler's to apply;
    where `mask` is given it is complete: booleans say who may be seen, floats are added to the scores.

    `host(query, key, value)` is what would follow on these tensors if the handler answered None: outer
    handlers, then the host itself. With the call's own tensors its bits are the host's where `is_exact`.
    """

    site: Site
    module: nn.Module
    query: Float[Tensor, "b n heads d"]
    key: Float[Tensor, "b m kv_heads d"]
    value: Float[Tensor, "b m kv_heads dv"]
    mask: Shaped[Tensor, "..."] | None  # broadcastable to [B, H, N, M]
    scale: float
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap) before the mask
    dropout: float = 0.0
    host: Callable[[Tensor, Tensor, Tensor], Tensor] = field(default=lambda *_: _no_host(), repr=False)
    is_exact: bool = True


def _no_host() -> Tensor:
    raise RuntimeError("This call was made by hand and has no host to go on with.")


Handler = Callable[[Call], Tensor | None]  # [B, N, H, Dv], or None: the host's own computation goes on


@contextmanager
def attention(model: nn.Module, handler: Handler, *, softcap: bool = False) -> Iterator[nn.Module]:
    """Every attention call of `model` in this thread goes to `handler` first, until the `with` ends.

    Where the handler answers None the host goes on bit-equal to a run without it; where it answers a tensor
    `[B, N, heads, Dv]`, that is the site's result (attention dropout is then the handler's own matter).
    Nested: the innermost handler is asked first, the outer one where it answers None. A compiled host runs
    eagerly inside. After the `with`, also after an exception, nothing remains.

    `softcap=True` says that the handler minds `call.softcap`; without it, hosts that cap scores are refused.
    """
    from nearfield.hosts import torch_nn

    guests = _transformers_parts(model)
    with ExitStack() as stack:
        if "" not in guests:
            stack.enter_context(torch_nn.attention(model, handler, leave_out=list(guests.values())))
        for prefix, guest in guests.items():
            from nearfield.hosts import transformers

            stack.enter_context(transformers.attention(guest, _named(handler, prefix), softcap=softcap))
        yield model


def sites(model: nn.Module, *args: Any, **kwargs: Any) -> list[Site]:
    """The attention sites of a model in the order in which one forward with these arguments reaches them."""
    found: dict[str, Site] = {}

    def note(call: Call) -> None:
        found.setdefault(call.site.name, call.site)

    with attention(model, note), torch.no_grad():
        model(*args, **kwargs)
    return list(found.values())


def listed_sites(model: nn.Module) -> list[Site] | None:
    """The sites of a model that can be told without a forward: transformers models; None for others."""
    if "" not in _transformers_parts(model):
        return None
    from nearfield.hosts import transformers

    return transformers.sites(model)


def _transformers_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Prefix -> the outermost transformers models inside `model`; the model itself has the prefix ""."""
    module = sys.modules.get("transformers.modeling_utils")
    known = getattr(module, "PreTrainedModel", None)
    if known is None:  # nobody holds such a model before its package is imported
        return {}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, known) and not any(f"{name}.".startswith(f"{n}.") or n == "" for n in found):
            found[name] = module
    return found


def _named(handler: Handler, prefix: str) -> Handler:
    """The handler, told site names as the whole model spells them."""
    prefix = f"{prefix}.".replace("_orig_mod.", "").removeprefix(".")
    if not prefix:
        return handler

    def renamed(call: Call) -> Tensor | None:
        return handler(replace(call, site=replace(call.site, name=prefix + call.site.name)))

    return renamed
