"""The one place where hosts are entered: every attention call of a model, by name, while a `with` lasts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Shaped
from torch import Tensor, nn

Role = Literal["self", "cross", "joint"]


@dataclass(frozen=True)
class Site:
    """One place in a host where attention is computed, named as the host names its modules.

    `grid` is the spatial grid of the tokens after the first `num_prefix` class or register tokens: (N,) for
    text, (H, W) for images, None where the tokens form no grid that is known.
    """

    name: str
    role: Role
    grid: tuple[int, ...] | None
    num_prefix: int
    is_causal: bool
    num_heads: int
    num_kv_heads: int


@dataclass
class Call:
    """One attention call. Where `mask` is None and the site is causal, causality is the handler's to apply;
    where `mask` is given it is complete: booleans say who may be seen, floats are added to the scores."""

    site: Site
    module: nn.Module
    query: Float[Tensor, "b n heads d"]
    key: Float[Tensor, "b m kv_heads d"]
    value: Float[Tensor, "b m kv_heads dv"]
    mask: Shaped[Tensor, "..."] | None  # broadcastable to [B, H, N, M]
    scale: float


Handler = Callable[[Call], Tensor | None]  # [B, N, H, Dv], or None: the host's own computation goes on


@contextmanager
def attention(model: nn.Module, handler: Handler) -> Iterator[nn.Module]:
    """Every attention call of `model` goes to `handler` first, until the `with` ends; then nothing remains."""
    with _adapter(model)(model, handler):
        yield model


def sites(model: nn.Module, *args: Any, **kwargs: Any) -> list[Site]:
    """The attention sites of a model in the order in which one forward with these arguments reaches them."""
    import torch

    found: dict[str, Site] = {}

    def note(call: Call) -> None:
        found.setdefault(call.site.name, call.site)

    with attention(model, note), torch.no_grad():
        model(*args, **kwargs)
    return list(found.values())


def _adapter(model: nn.Module) -> Callable[[nn.Module, Handler], Any]:
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from nearfield.hosts.transformers import attention as adapter
    else:
        from nearfield.hosts.torch_nn import attention as adapter
    return adapter
