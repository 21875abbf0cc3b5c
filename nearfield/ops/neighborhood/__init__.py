"""Neighborhood attention: the geometry at once, what needs torch when it is first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nearfield.ops.neighborhood.geometry import Neighborhood

if TYPE_CHECKING:
    from nearfield.ops.neighborhood.attention import neighborhood_attention, why
    from nearfield.ops.neighborhood.decode import neighborhood_attention_decode, visible_slots
    from nearfield.ops.neighborhood.varlen import neighborhood_attention_varlen

__all__ = [
    "Neighborhood",
    "neighborhood_attention",
    "neighborhood_attention_decode",
    "neighborhood_attention_varlen",
    "visible_slots",
    "why",
]

_HOMES = {
    "neighborhood_attention": "attention",
    "neighborhood_attention_decode": "decode",
    "neighborhood_attention_varlen": "varlen",
    "visible_slots": "decode",
    "why": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
