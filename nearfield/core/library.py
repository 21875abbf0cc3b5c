"""The compiled CPU kernels: where they are, why they are not, and which instruction set they use.

`csrc/nearfield.h` is the other side of what stands here. Nothing is loaded before it is asked for.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from nearfield.core.errors import BackendUnavailable

ABI = 4
ISAS = ("avx512bf16", "avx512", "avx2", "baseline")  # best first
VARIABLE = "NEARFIELD_CPU_ISA"
PATH = Path(__file__).parents[1] / "_kernels.so"
# pip would take torch anew without --no-deps, and its own earlier build without --no-cache-dir
WAY_OUT = (
    "Install a C++ compiler (g++ or clang++) and reinstall nearfield with `pip install --force-reinstall "
    "--no-deps --no-cache-dir --no-binary nearfield nearfield`, or in a checkout run `python hatch_build.py`."
)


class Tensor(ctypes.Structure):
    """An address, and the strides of batch, z, y, x and head in elements; channels lie side by side."""

    _fields_ = [("data", c_void_p), ("stride", c_int64 * 5)]


class Axis(ctypes.Structure):
    """One axis of a grid and the pattern along it."""

    _fields_ = [(name, c_int64) for name in ("size", "kernel_size", "stride", "dilation", "is_causal")]


class Attention(ctypes.Structure):
    """One problem of neighborhood attention."""

    _fields_ = [
        *[(n, c_int64) for n in ("dtype", "border", "batch", "heads", "kv_heads", "head_dim", "value_dim")],
        ("axis", Axis * 3),
        *[(name, c_int64) for name in ("first_query", "num_sinks", "num_additional")],
        ("scale", c_double),
        *[(name, Tensor) for name in ("query", "key", "value", "additional_key", "additional_value")],
        *[(name, c_void_p) for name in ("bias", "key_mask", "sink_logits")],
        *[(name, Tensor) for name in ("out", "lse", "grad_out", "grad_lse")],
        *[(name, Tensor) for name in ("grad_query", "grad_key", "grad_value")],
        *[(name, Tensor) for name in ("grad_additional_key", "grad_additional_value")],
        ("grad_bias", c_void_p),
    ]


class Decode(ctypes.Structure):
    """A few queries against a cache of keys."""

    _fields_ = [
        *[(name, c_int64) for name in ("dtype", "batch", "num_queries", "num_keys")],
        *[(name, c_int64) for name in ("heads", "kv_heads", "head_dim", "value_dim")],
        ("scale", c_double),
        *[(name, Tensor) for name in ("query", "key", "value", "out", "lse")],
        ("visible", c_void_p),
        ("visible_stride", c_int64 * 2),
        ("addend", c_void_p),
        ("addend_stride", c_int64 * 3),
        *[(name, c_int64) for name in ("is_causal", "block_size", "list_length")],
        ("blocks", c_void_p),
        ("block_stride", c_int64 * 3),
    ]


class Shares(ctypes.Structure):
    """Shares of blocks of keys in the attention of a few queries."""

    _fields_ = [
        *[(name, c_int64) for name in ("dtype", "key_dtype", "batch", "num_queries", "num_keys")],
        *[(name, c_int64) for name in ("heads", "kv_heads", "head_dim", "block_size")],
        *[(name, c_int64) for name in ("is_bound", "is_causal")],
        *[(name, c_double) for name in ("scale", "last_part")],
        *[(name, Tensor) for name in ("query", "key")],
        *[(name, c_void_p) for name in ("key_mask", "shares")],
    ]


class Choice(ctypes.Structure):
    """The choice of blocks by their scores."""

    _fields_ = [
        *[(name, c_int64) for name in ("batch", "num_queries", "num_keys", "kv_heads")],
        *[(name, c_int64) for name in ("block_size", "num_blocks", "sink_blocks", "num_recent")],
        ("list_length", c_int64),
        *[(name, c_void_p) for name in ("scores", "chosen")],
    ]


class Scan(ctypes.Structure):
    """A selective scan."""

    _fields_ = [
        *[(name, c_int64) for name in ("dtype", "batch", "tokens", "channels", "groups", "state")],
        *[(name, c_int64) for name in ("sequences", "softplus", "reverse")],
        ("cu_seqlens", c_void_p),
        *[(name, Tensor) for name in ("x", "dt", "z", "B", "C")],
        *[(name, c_void_p) for name in ("A", "D", "dt_bias", "initial_state")],
        ("out", Tensor),
        *[(name, c_void_p) for name in ("final_state", "chunk_states")],
        *[("grad_out", Tensor), ("grad_final_state", c_void_p)],
        *[(f"grad_{name}", Tensor) for name in ("x", "dt", "z", "B", "C")],
        *[(f"grad_{name}", c_void_p) for name in ("A", "D", "dt_bias", "initial_state")],
    ]


class LocalLinear(ctypes.Structure):
    """Local linear attention on a line of tokens."""

    _fields_ = [
        *[(name, c_int64) for name in ("dtype", "border", "batch", "num_queries", "num_keys")],
        *[(name, c_int64) for name in ("heads", "kv_heads", "head_dim", "value_dim")],
        *[(name, c_int64) for name in ("kernel_size", "is_causal", "max_iterations")],
        *[(name, c_double) for name in ("tolerance", "scale")],
        *[(name, Tensor) for name in ("query", "key", "value", "ridge")],
        ("key_mask", c_void_p),
        *[(name, Tensor) for name in ("out", "correction", "grad_out")],
        *[(name, Tensor) for name in ("grad_query", "grad_key", "grad_value", "grad_ridge")],
    ]


class Linear(ctypes.Structure):
    """Linear attention with decays, or the delta rule."""

    _fields_ = [
        *[(name, c_int64) for name in ("dtype", "g_dtype", "gates")],
        *[(name, c_int64) for name in ("batch", "length", "heads", "head_dim", "value_dim")],
        ("scale", c_double),
        *[(name, Tensor) for name in ("query", "key", "value", "out", "g", "beta")],
        *[(name, c_void_p) for name in ("initial_state", "final_state")],
        ("grad_out", Tensor),
        ("grad_final_state", c_void_p),
        *[(name, Tensor) for name in ("grad_query", "grad_key", "grad_value", "grad_g", "grad_beta")],
        ("grad_initial_state", c_void_p),
    ]


FUNCTIONS = {  # name: result, arguments
    "nearfield_attention_forward": (c_int, POINTER(Attention), c_int64, c_int64),
    "nearfield_attention_backward": (c_int, POINTER(Attention), c_int64, c_int64),
    "nearfield_decode_forward": (c_int, POINTER(Decode), c_int64),
    "nearfield_block_shares": (c_int, POINTER(Shares), c_int64),
    "nearfield_choose_blocks": (c_int, POINTER(Choice), c_int64),
    "nearfield_scan_forward": (c_int, POINTER(Scan), c_int64),
    "nearfield_scan_backward": (c_int, POINTER(Scan), c_int64),
    "nearfield_lla_forward": (c_int, POINTER(LocalLinear), c_int64),
    "nearfield_lla_backward": (c_int, POINTER(LocalLinear), c_int64),
    "nearfield_linear_forward": (c_int, POINTER(Linear), c_int64),
    "nearfield_linear_backward": (c_int, POINTER(Linear), c_int64),
    "nearfield_isas": (c_char_p,),
    "nearfield_isa": (c_char_p,),
    "nearfield_use": (c_int, c_char_p),
    "nearfield_set_team": (None, c_void_p),
    "nearfield_set_grain": (None, c_double),
}


def kernels() -> ctypes.CDLL | None:
    """The library with its functions typed, or None where there is none."""
    return _load()[0]


def unavailable() -> str | None:
    """Why there are no kernels, and the way out; None if there are."""
    return _load()[1]


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine and this build of the kernels have in common, best first."""
    library = kernels()
    return () if library is None else tuple(library.nearfield_isas().decode().split())


def isa() -> str:
    """The instruction set in use; "none" without kernels."""
    library = kernels()
    return "none" if library is None else library.nearfield_isa().decode()


@contextmanager
def use(name: str) -> Iterator[None]:
    """Another instruction set inside the `with`, for all threads: a way for tests to reach every one."""
    library = kernels()
    if library is None:
        raise BackendUnavailable(unavailable())
    before = isa()
    _choose(library, "isa", name)
    try:
        yield
    finally:
        _choose(library, "isa", before)


@contextmanager
def grain(milliseconds: float) -> Iterator[None]:
    """Inside, a job takes a further thread for so much work. With 0 each job takes them all."""
    library = kernels()
    if library is None:
        raise BackendUnavailable(unavailable())
    library.nearfield_set_grain(milliseconds)
    try:
        yield
    finally:
        library.nearfield_set_grain(-1.0)


def run_on_threads_of(user: Path) -> bool:
    """From now on jobs run on the OpenMP threads of `user`, a library that is loaded; True if it has any."""
    library = kernels()
    if library is None or not hasattr(os, "RTLD_NOLOAD"):
        return False
    try:
        team = ctypes.CDLL(str(user), mode=os.RTLD_NOW | os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):  # another kind of threads, or another name
        return False
    library.nearfield_set_team(ctypes.cast(team, c_void_p))
    return True


@cache
def warn_once() -> None:
    """Say, once in a process, that the kernels are missing and how to get them."""
    if reason := unavailable():
        warnings.warn(f"{reason} Until then slower code does their work.", RuntimeWarning, stacklevel=2)


@cache  # no lock, which a fork could leave locked: two threads at once may both load, to the same effect
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    wanted = os.environ.get(VARIABLE)
    if wanted:
        _check(VARIABLE, wanted)
    if not PATH.is_file():
        return None, f"This installation has no compiled CPU kernels. {WAY_OUT}"
    try:
        library = ctypes.CDLL(str(PATH))
        library.nearfield_abi.restype = c_int64
        abi = library.nearfield_abi()
    except (OSError, AttributeError) as error:
        return None, f"The compiled CPU kernels do not load here ({error}). {WAY_OUT}"
    if abi != ABI:
        return None, f"The compiled CPU kernels have another interface ({abi}, not {ABI}). {WAY_OUT}"
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    best = library.nearfield_isas().decode().partition(" ")[0]
    if not best:
        return None, "This machine executes none of the instruction sets that the CPU kernels know."
    _choose(library, VARIABLE, wanted or best)
    return library, None


def _choose(library: ctypes.CDLL, source: str, name: str) -> None:
    _check(source, name)
    if library.nearfield_use(name.encode()):
        there = ", ".join(library.nearfield_isas().decode().split())
        raise BackendUnavailable(
            f"{source}={name!r} cannot be used: this machine and this build of the CPU kernels have {there}."
        )


def _check(source: str, name: str) -> None:
    if name not in ISAS:
        near = get_close_matches(name, ISAS, n=2) or ISAS
        raise ValueError(f"{source}={name!r} is unknown. Did you mean {' or '.join(map(repr, near))}?")
