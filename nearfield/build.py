"""Building what the cards offer, with weights that fit exactly."""

from __future__ import annotations

import inspect
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from nearfield import catalog

WEIGHTS = "model.safetensors"
BUILT = "nearfield_entry"  # in config.json, and on the instance: which entry with which options built it


def create(name: str, weights: str | Path | None = None, **options: Any) -> Any:
    """Anything that a card offers, built: `create("davit_tiny", num_classes=10)`.

    A class, and a function that makes a model, is called with `options`. Any other function comes back with
    `options` bound: `create("neighborhood_attention", scale=1.0)(query, key, value, geometry)`. `weights` is
    a folder or file that `save` wrote, or a published checkpoint of the model (.safetensors, .pth), whose
    names the system's `weights.py` makes ours; it must fit exactly. Raises `LookupError` with the nearest
    right names.
    """
    card, entry = catalog.find_entry(name)
    name = name.replace("-", "_")
    allowed = inspect.signature(entry).parameters
    unknown = [option for option in options if option not in allowed]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in allowed.values()):
        raise TypeError(f"{name} has no option {', '.join(unknown)}. It has: {', '.join(allowed)}.")
    if inspect.isclass(entry) or name in card.params:
        built = entry(**options)
    else:
        built = partial(entry, **options) if options else entry
    if weights is not None:
        _fill(name, built, Path(weights), card.slug)
    if hasattr(built, "state_dict"):
        setattr(built, BUILT, {"name": name, "options": options})
    return built


def renamed(state: dict[str, Any], model: Any, slug: str) -> dict[str, Any]:
    """Tensors under the names of `model`: as they are if these are its own, else made so by the system."""
    converter = catalog.HOME / slug / "weights.py"
    if state.keys() <= model.state_dict().keys() or not converter.is_file():
        return state
    return dict(import_module(f"nearfield.systems.{slug}.weights").convert(state))


def _fill(name: str, model: Any, weights: Path, slug: str) -> None:
    """Load weights into the model, exactly those that it has."""
    path = weights / WEIGHTS if weights.is_dir() else weights
    if not hasattr(model, "load_state_dict"):
        raise TypeError(f"{name} has no weights to load. Leave weights={str(weights)!r} out.")
    from nearfield.hosts import checkpoints

    state = checkpoints.read(path)
    try:
        state = renamed(state, model, slug)
        model.load_state_dict(_with_shared(state, model), strict=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit {name}: {error}") from None


def _with_shared(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """`state` with what the model has under several names, and `save` wrote once, under all of them."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    for shared in names.values():
        there = next((name for name in shared if name in state), None)
        if there is not None:
            state = {**dict.fromkeys(shared, state[there]), **state}
    return state
