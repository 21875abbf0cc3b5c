"""Published checkpoint files: read without running anything in them, and their names made ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where training scripts put the weights in what they save; averaged ones first.
WRAPPERS = ("model_ema", "state_dict_ema", "model_state", "state_dict", "model", "module")
State = dict[str, Tensor]


def read(path: Path, *, prefer: Iterable[str] = WRAPPERS) -> State:
    """The tensors of a .safetensors, .pth, .pt, .bin or .tar file by name, out of what wraps them.

    A pickled file is read with `weights_only`: it can hold tensors and plain values, and no code. Raises
    `ValueError` for a file that holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file. Give a .safetensors or .pth file of weights.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _plain(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file ({error}).") from None
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways, all of them the file's fault
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{path} cannot be read as weights and nothing but weights: {first_line}") from None
    prefer = tuple(prefer)
    while isinstance(held, Mapping):
        inner = next((name for name in prefer if isinstance(held.get(name), Mapping)), None)
        if inner is None:
            break
        held = held[inner]  # whatever lies beside it, a best accuracy as a tensor for one
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}, no tensors by name.")
    state = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{path} holds no tensors by name; it has {', '.join(map(str, held)) or 'nothing'}.")
    return _plain(state)


def _plain(state: State) -> State:
    """Without the prefix that DistributedDataParallel gives all names."""
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module."): value for name, value in state.items()} if wrapped else dict(state)


def rename(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str | None]]) -> State:
    """`state` with every name rewritten by each rule in turn: a regular expression and what replaces it.

    None drops what matches. Two tensors that end under one name are refused.
    """
    found: State = {}
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    for name, value in state.items():
        new = _renamed(name, compiled)
        if new is None:
            continue
        if new in found:
            raise ValueError(f"Two tensors of the checkpoint become {new!r}; one of them is {name!r}.")
        found[new] = value
    return found


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str | None]]) -> str | None:
    for pattern, replacement in rules:
        if replacement is not None:
            name = pattern.sub(replacement, name)
        elif pattern.search(name):
            return None
    return name
