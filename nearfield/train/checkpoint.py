"""Checkpoints: everything that the next step depends on, in safetensors and JSON.

Accelerate's `save_state` pickles the optimizer and the random numbers. It loads them with `weights_only`,
but goes on silently where random numbers cannot be read, and loads registered objects without that
protection. Here no file can run code, and what cannot be read is an error.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE, FORMAT, KEPT = "state.json", 1, 2
Tensors = dict[str, dict[str, Tensor]]  # by file, then by name


def write(folder: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    """The folder `step-…` with a checkpoint: whole under that name, or not there. Keeps the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, unfinished = folder / f"step-{step:09d}", folder / f".step-{step:09d}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        sizes = {}
        for name, group in tensors.items():
            path = unfinished / f"{name}.safetensors"
            save_file(_apart(group), str(path))
            sizes[path.name] = path.stat().st_size
        text = json.dumps({"format": FORMAT, "step": step, "sizes": sizes, **state}, allow_nan=False)
        (unfinished / STATE).write_text(text, encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            _flush(path)
        shutil.rmtree(whole, ignore_errors=True)
        unfinished.rename(whole)
        _flush(folder)
    except (OSError, SafetensorError) as error:  # what safetensors says of a full disk is no OSError
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"The checkpoint {whole} could not be written ({getattr(error, 'strerror', None) or error}). "
            "The ones before it are whole; free some space and start again to go on from the last."
        ) from error
    for old in _folders(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return whole


def newest(folder: Path) -> tuple[dict[str, Any], Tensors] | None:
    """State and tensors of the newest whole checkpoint; `None` without one. Others are passed over."""
    for path in _folders(folder):
        state = _state(path)
        if state is not None:
            try:
                return state, {
                    Path(name).stem: load_file(path / name)
                    for name in state["sizes"]
                    if (path / name).is_file()
                }
            except (OSError, SafetensorError):
                continue
    return None


def clear(folder: Path) -> None:
    """Remove the checkpoints of a folder, and nothing else."""
    for path in (*_folders(folder), *folder.glob(".step-*.part")):
        shutil.rmtree(path)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training may change: trainable parameters and buffers. The frozen rest is where it came from."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


@torch.no_grad()
def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put `tensors` into the model. Raises `ValueError` unless it has exactly those."""
    mine = model_tensors(model)
    wrong = sorted(mine.keys() ^ tensors.keys())
    wrong += [n for n in sorted(mine.keys() & tensors.keys()) if mine[n].shape != tensors[n].shape]
    if wrong:
        raise ValueError(
            f"The checkpoint is of another model: {', '.join(wrong[:3])}{' …' if wrong[3:] else ''} "
            "differ. Take another folder, or --fresh."
        )
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by number of the parameter: "3/exp_avg"."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the optimizer's state back; learning rates and the like come from the recipe."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _folders(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in state["sizes"].items())
        return state if whole and state["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _apart(group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies where tensors share memory, as tied weights do: safetensors refuses those."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in group.items():
        place = tensor.untyped_storage().data_ptr()
        fresh = place not in seen and tensor.is_contiguous()
        apart[name] = (
            tensor.detach() if fresh else tensor.detach().clone(memory_format=torch.contiguous_format)
        )
        seen.add(place)
    return apart


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
