"""Keeping built or converted models in a folder.

A folder holds `config.json` and `model.safetensors`, as on the Hugging Face Hub; a converted model adds
`nearfield.json` and belongs to `nearfield.convert`. Loading is strict always.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from nearfield.build import BUILT, WEIGHTS, create

CONFIG, CONVERTED = "config.json", "nearfield.json"


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
