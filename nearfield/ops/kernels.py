"""What every operator that the C++ kernels compute does: see whether they can, and call them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearfield.core import library
from nearfield.core.errors import BackendUnavailable

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the numbers of csrc/nearfield.h
NO_MEMORY = 2
WIDEST = 1024  # channels
LARGEST_SCALE = torch.finfo(torch.float32).max


def missing() -> str | None:
    """Why there are no kernels here, or None."""
    return library.unavailable()


def warn() -> None:
    """Say, once in a process, that the kernels are missing."""
    library.warn_once()


# To a trace the library is a constant. torch.compiler.assume_constant_result says so, but imports Dynamo.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unfit(query: Tensor, value: Tensor, scale: float) -> str | None:
    """Why the kernels could not run on such queries and values even if they were here, or None."""
    if query.device.type != "cpu":
        return f"the CPU kernels cannot read tensors on {query.device.type!r}."
    if query.dtype not in DTYPES:
        return f"the CPU kernels compute in float32, bfloat16 and float16, not in {query.dtype}."
    if not 1 <= query.shape[-1] <= WIDEST or not 1 <= value.shape[-1] <= WIDEST:
        return (
            f"the CPU kernels take 1 to {WIDEST} channels, given {query.shape[-1]} of queries and keys, "
            f"{value.shape[-1]} of values."
        )
    if not abs(scale) <= LARGEST_SCALE:
        return f"the CPU kernels need a scale that float32 can hold, given {scale}."
    return None


def call(name: str, *arguments: Any) -> None:
    """Run one function of csrc/nearfield.h on the threads that torch may use."""
    kernels = library.kernels()
    if kernels is None:
        raise BackendUnavailable(f"This operator needs the CPU kernels: {library.unavailable()}")
    share_threads()
    error = getattr(kernels, name)(*arguments, torch.get_num_threads())
    if error == NO_MEMORY:
        raise torch.OutOfMemoryError("The CPU kernels got no memory to work in. Give a smaller batch.")
    if error:
        raise RuntimeError(
            f"{name} refused its arguments (code {error}), which were checked before: a bug in nearfield."
        )


@cache
def share_threads() -> bool:
    """Let the kernels run on torch's own threads, if those are OpenMP's; False if not.

    They wait, spinning, for what comes after torch's last operation, where others would have to be woken.
    """
    return library.run_on_threads_of(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The derivative of a backward by formula: there is none."""
    raise NotImplementedError(
        'The "native" backend has no second derivatives. Call with backend="reference", which has them.'
    )


def by_batch(op: Callable[..., tuple[Tensor, ...]], tensors: int) -> Callable[..., tuple[Any, Any]]:
    """vmap of an operator whose first `tensors` arguments all begin with a batch: a larger one."""

    def map_(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        folded = list(arguments)
        for i, (x, dim) in enumerate(zip(arguments[:tensors], in_dims, strict=False)):
            if x is not None:
                x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                folded[i] = x.flatten(0, 1)
        found = op(*folded)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0,) * len(found)

    return map_


def side_by_side(x: Tensor) -> Tensor:
    """`x` if its last dimension is contiguous, otherwise a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
