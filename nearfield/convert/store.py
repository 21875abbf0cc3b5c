"""A converted model in a folder: the host's own files, and `nearfield.json` with the plan or the policy.

A save is all or nothing: files are written beside the folder and moved there when the last one is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

import nearfield
from nearfield.convert.swap import PLAN, POLICY, convert, is_transformers
from nearfield.core.errors import require
from nearfield.hosts.headers import check_json, check_model
from nearfield.hosts.packaged import quiet
from nearfield.plan.pattern import SitePlan, plan_from_json, plan_to_json, read_json
from nearfield.plan.reuse import ReusePolicy

PLAN_FILE = "nearfield.json"
FORMATS = {1: "plan", 2: "policy"}  # what a file of each format holds beside its origin
LONGEST = 64 << 20  # bytes of a nearfield.json that anyone could mean


def save(
    model: Any, folder: str | Path, *, tokenizer: Any = None, extra: Mapping[str, str] | None = None
) -> Path:
    """The folder, holding a converted transformers model: config.json, model.safetensors, nearfield.json, and
    the tokenizer. `extra` are further text files by name.

    Raises `FileExistsError` where the folder holds anything, `OSError` where it cannot be written (a full
    disk); neither leaves anything behind that could be loaded.
    """
    folder = Path(folder).resolve()  # so that it has a name, whatever it was called
    plan: dict[str, SitePlan] | None = getattr(model, PLAN, None)
    policy: ReusePolicy | None = getattr(model, POLICY, None)
    if plan is None and policy is None:
        raise ValueError(
            "The model is not converted, so there is no plan to save. Call nearfield.convert.convert first."
        )
    if not is_transformers(model):
        raise NotImplementedError(
            f"Saving a converted {type(model).__name__}: only transformers models describe themselves in a "
            "config. Save its state_dict, and the plan with nearfield.plan.pattern.plan_to_json."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and not empty. Choose a new folder, or empty this one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        with quiet():
            model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        for name, text in (extra or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        described: dict[str, Any] = {"format": 1 if policy is None else 2}
        described |= {"nearfield": nearfield.__version__, "model": type(model).__name__}
        if policy is not None:
            described["policy"] = policy.to_json()
        elif plan is not None:
            described["plan"] = plan_to_json(plan)
        (unfinished / PLAN_FILE).write_text(
            json.dumps(described, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        for path in unfinished.iterdir():
            _flush(path)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:  # what safetensors says of a full disk is no OSError
        raise OSError(
            f"{folder} could not be written ({getattr(error, 'strerror', None) or error}). Nothing was kept "
            "there; free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load(folder: str | Path) -> nn.Module:
    """The converted model of a folder, in eval mode, patterns in place. Strict: no weight is missing or left.

    Raises `FileNotFoundError` or `ValueError` where the folder holds no whole converted model.
    """
    folder = Path(folder)
    path = folder / PLAN_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {PLAN_FILE}. Give a folder that `nearfield convert --out` wrote."
        )
    if path.stat().st_size > LONGEST:
        raise ValueError(f"{path} is {path.stat().st_size:,} bytes long; a plan is at most {LONGEST:,}.")
    try:
        described = read_json(path.read_bytes())
        held = described.get("format") if isinstance(described, dict) else None
        kind = FORMATS.get(held, "plan") if type(held) is int else "plan"
        if not isinstance(described, dict) or set(described) != {"format", "nearfield", "model", kind}:
            raise ValueError(f"it must hold format, nearfield, model and {kind}, and nothing else")
        if type(held) is not int or held not in FORMATS:
            raise ValueError(f"its format is {held!r}; this version reads {' and '.join(map(str, FORMATS))}")
        plan: dict[str, SitePlan] | ReusePolicy
        plan = plan_from_json(described["plan"]) if held == 1 else ReusePolicy.from_json(described["policy"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no plan of ours: {error}") from None
    model = _host(folder, described["model"])
    convert(model, plan)
    return model


def _host(folder: Path, architecture: Any) -> nn.Module:
    transformers = require("transformers", extra="hf")
    check_model(folder)
    named = check_json(folder / "config.json").get("architectures")
    if named != [architecture]:
        raise ValueError(
            f"config.json in {folder} names the model {named!r} and {PLAN_FILE} {architecture!r}. "
            "They must agree: give a folder as `nearfield convert --out` wrote it."
        )
    kind: Any = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"{folder / PLAN_FILE} names the model {architecture!r}, which transformers does not have."
        )
    try:
        with quiet():
            host: Any = kind
            model, info = host.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="auto",
                output_loading_info=True,
            )
    except Exception as error:  # whatever a foreign parser raises, the reader gets one sentence
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{folder} cannot be opened as a {architecture}: {first}") from error
    wrong = {
        name: sorted(map(str, info[name]))
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(name)
    }
    if wrong:
        words = "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:3])}" for name, keys in wrong.items())
        raise ValueError(f"The weights in {folder} do not fit {architecture} exactly ({words}).")
    return model.eval()


def _flush(path: Path) -> None:
    """The file's bytes are on the disk before its name is: a power cut leaves the whole or nothing."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
