"""Building what the cards offer, and keeping built or converted models in a folder.

A folder holds `config.json` and `model.safetensors`, as on the Hugging Face Hub; a converted model adds
`nearfield.json` and belongs to `nearfield.convert`. Loading is strict always.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from nearfield import catalog

CONFIG, WEIGHTS, CONVERTED = "config.json", "model.safetensors", "nearfield.json"
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


def save(model: Any, folder: str | Path) -> Path:
    """The folder, holding a model that `create` built or that was converted: all of it or nothing.

    Raises `FileExistsError` if the folder is there and holds anything.
    """
    folder = Path(folder)
    if not hasattr(model, BUILT):
        from nearfield.convert import save as save_converted

        return Path(save_converted(model, folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and not empty. Choose a new folder, or empty this one.")
    try:
        config = json.dumps({BUILT: getattr(model, BUILT)}, indent=2, allow_nan=False)
    except (TypeError, ValueError):
        raise TypeError(
            f"The options that built this model ({getattr(model, BUILT)['options']}) do not fit in JSON. "
            "Build it with numbers, texts, lists and truth values only."
        ) from None
    from safetensors.torch import save_model

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    unfinished.mkdir()
    try:
        save_model(model, str(unfinished / WEIGHTS))
        (unfinished / CONFIG).write_text(
            config + "\n", encoding="utf-8"
        )  # last: without it nothing can be loaded
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def load(folder: str | Path) -> Any:
    """The model that a folder holds, whether `create` built it or `nearfield convert` made it local.

    Raises `FileNotFoundError` or `ValueError` for a folder that holds no whole model of ours.
    """
    folder = Path(folder)
    if (folder / CONVERTED).is_file():
        from nearfield.convert import load as load_converted

        return load_converted(folder)
    config = folder / CONFIG
    if not config.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {CONVERTED} and no {CONFIG}. Give a folder that nearfield.save or "
            "`nearfield convert --out` wrote."
        )
    try:
        built = json.loads(config.read_text(encoding="utf-8"))[BUILT]
        name, options = str(built["name"]), dict(built["options"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{config} does not say which entry of nearfield built the model. Models of other libraries are "
            "loaded by those."
        ) from None
    return create(name, weights=folder, **options)


def _fill(name: str, model: Any, weights: Path, slug: str) -> None:
    """Load weights into the model, exactly those that it has."""
    path = weights / WEIGHTS if weights.is_dir() else weights
    if not hasattr(model, "load_state_dict"):
        raise TypeError(f"{name} has no weights to load. Leave weights={str(weights)!r} out.")
    from nearfield.hosts import checkpoints

    state = checkpoints.read(path)
    converter = catalog.HOME / slug / "weights.py"
    try:
        if not state.keys() <= model.state_dict().keys() and converter.is_file():
            state = import_module(f"nearfield.systems.{slug}.weights").convert(state)
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
