"""Local attention: compute it, build with it, convert models to it, steer, measure and plan it.

    from nearfield import Neighborhood, neighborhood_attention
    from nearfield.convert import convert

Names are looked up when they are first used: importing nearfield imports neither torch nor anything else.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Neighborhood": "nearfield.ops.neighborhood.geometry",
    "create": "nearfield.build",
    "load": "nearfield.store",
    "neighborhood_attention": "nearfield.ops.neighborhood.attention",
    "save": "nearfield.store",
    "why": "nearfield.ops.neighborhood.attention",
}

TYPE_CHECKING = False  # type checkers take this name for true; to import typing would cost more than the rest

__all__ = ["Neighborhood", "create", "load", "neighborhood_attention", "save", "why"]

if TYPE_CHECKING:
    from nearfield.build import create
    from nearfield.ops.neighborhood import neighborhood_attention, why
    from nearfield.ops.neighborhood.geometry import Neighborhood
    from nearfield.store import load, save


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'nearfield' has no attribute {name!r}. It offers {', '.join(__all__)}.")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
