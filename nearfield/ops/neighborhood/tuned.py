"""What `nearfield bench neighborhood --tune` measured on this GPU: boxes of kernels, fastest executors.

Nothing is ever measured at a call. One file a device, Triton version and version of the kernels, in
`$XDG_CACHE_HOME/nearfield`, else `~/.cache/nearfield`; read once, when first asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from nearfield.ops.neighborhood import triton_plan
from nearfield.ops.neighborhood.geometry import Bound
from nearfield.ops.neighborhood.triton_plan import RANK, Tiling

FIELDS = ("q_tile", "kv_tile", "warps", "stages", "way")
KERNELS = ("triton_boxes.py", "triton_forward.py", "triton_backward.py", "gluon_forward.py")
WARPS, STAGES, AREA = (1, 2, 4, 8, 16), range(1, 9), range(1, 257)


@dataclass(frozen=True)
class Measured:
    """Boxes, and seconds of executors, both by `case_key`."""

    tiles: dict[str, Tiling] = field(default_factory=dict)
    executors: dict[str, dict[str, float]] = field(default_factory=dict)


def preferred(
    bound: Bound, kind: Literal["forward", "backward"], item: int, dim: int, device_name: str
) -> str | None:
    """The executor that took least time on this pattern and device; None where nothing was measured.

    `kind` "forward" is a call without gradients, "backward" one with its gradients. `item` is the size of an
    element in bytes, `dim` the wider of head_dim and value_dim. None also while a call is traced: the answer
    would hold for one size, and the trace may serve many.
    """
    if torch.compiler.is_compiling():
        return None
    found = measured(device_name).executors
    seconds = found.get(case_key(bound, kind, item, dim)) if found else None
    return min(seconds, key=seconds.__getitem__) if seconds else None


def tiles(bounds: tuple[Bound, ...], kind: str, item: int, dim: int, device_name: str) -> Tiling | None:
    """The boxes that are being tried or were measured for grids of one pattern, or None."""
    if kind in _trial:
        found: Tiling | None = _trial[kind]
    else:
        stored = measured(device_name).tiles
        largest = max(bounds, key=lambda bound: bound.num_keys) if stored else None
        found = stored.get(case_key(largest, kind, item, dim)) if largest is not None else None
    return None if found is None else triton_plan.fitted(bounds, found, kind)


_trial: dict[str, Tiling] = {}


@contextmanager
def trying(given: Mapping[str, Tiling]) -> Iterator[None]:
    """Boxes by kind of kernel, for every call of this process until the end of the block."""
    before = dict(_trial)
    _trial.update(given)
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)


@lru_cache(maxsize=4096)
def case_key(bound: Bound, kind: str, item: int, dim: int) -> str:
    """A problem in words: pattern, grid, queries, kind of kernel, bytes of an element, channels."""
    axes = " ".join(
        f"{a.size}:k{a.kernel_size}s{a.stride}d{a.dilation}{'c' * a.is_causal}" for a in bound.axes
    )
    pattern = bound.pattern
    return f"{axes} {pattern.border} +{pattern.num_sinks} from {bound.offset}, {kind}, {item} x {dim}"


@lru_cache(maxsize=32)
def device_name(device: torch.device) -> str:
    """The GPU by name; "interpreter" where Triton interprets."""
    module = getattr(torch, device.type)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else "interpreter"


@lru_cache(maxsize=1)
def origin() -> dict[str, str]:
    """The versions that a measurement holds for: Triton's, and a digest of the kernels' sources."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    digest = hashlib.sha256()
    for name in KERNELS:
        digest.update((Path(__file__).parent / name).read_bytes())
    return {"triton": triton, "kernels": digest.hexdigest()[:12]}


def path(device_name: str) -> Path:
    """Where the measurements of a device are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nearfield"
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    found = origin()
    return home / f"tuned-{name}-triton-{found['triton']}-{found['kernels']}.json"


@lru_cache(maxsize=32)
def measured(device_name: str) -> Measured:
    """All that is stored of a device. A file that cannot be trusted is left alone, with one warning."""
    try:
        place = path(device_name)
        text = place.read_text(encoding="utf-8")
    except (OSError, RuntimeError):  # no file, none that may be read, or nobody's home
        return Measured()
    except UnicodeDecodeError:
        text = ""
    try:
        return _understood(json.loads(text), device_name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{place} is ignored ({type(error).__name__}: {error}). Remove it, or write it again by "
            "`nearfield bench neighborhood --tune --device cuda`.",
            RuntimeWarning,
            stacklevel=2,
        )
        return Measured()


def store(device_name: str, found: Measured) -> Path:
    """The file, once it holds what was found beside what it held; a killed write leaves no half behind."""
    with warnings.catch_warnings():  # a broken file is replaced
        warnings.simplefilter("ignore", RuntimeWarning)
        measured.cache_clear()
        before = measured(device_name)
    document = {
        "device": device_name,
        **origin(),
        "tiles": {key: _as_json(tiling) for key, tiling in {**before.tiles, **found.tiles}.items()},
        "executors": {**before.executors, **found.executors},
    }
    place = path(device_name)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)
        measured.cache_clear()
    return place


def _as_json(tiling: Tiling) -> dict[str, Any]:
    return {name: getattr(tiling, name) for name in FIELDS}


def _understood(document: Any, device_name: str) -> Measured:
    """A document as measurements; raises where it is not one of this device and these versions."""
    for name, ours in {"device": device_name, **origin()}.items():
        if document[name] != ours:
            raise ValueError(f"it is of {name} {document[name]!r}, here is {ours!r}")
    found = {key: _tiling(**entry) for key, entry in document["tiles"].items()}
    executors = {
        key: {str(name): float(seconds) for name, seconds in entry.items()}
        for key, entry in document["executors"].items()
    }
    return Measured(found, executors)


def _tiling(q_tile: list[int], kv_tile: list[int], warps: int, stages: int, way: Any) -> Tiling:
    for sides in (q_tile, kv_tile):
        are_powers = len(sides) == RANK and all(type(n) is int and n > 0 and not n & (n - 1) for n in sides)
        if not are_powers or prod(sides) not in AREA:
            raise ValueError(f"sides of a box are {sides}")
    if type(warps) is not int or warps not in WARPS or type(stages) is not int or stages not in STAGES:
        raise ValueError(f"warps and stages are {warps} and {stages}")
    if way not in triton_plan.WAYS:
        raise ValueError(f"way is {way}")
    if way == "groups" and (prod(q_tile) != 128 or prod(kv_tile) not in (64, 128)):
        raise ValueError(f"boxes of groups have {prod(q_tile)} queries and {prod(kv_tile)} keys")
    return Tiling(tuple(q_tile), tuple(kv_tile), warps, stages, True, True, way)
