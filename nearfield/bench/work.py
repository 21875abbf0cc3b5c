"""CPU seconds and memory of a call, by counters that other work on the machine hardly moves."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch


def cpu_seconds(call: Callable[[], object], *, budget: float = 0.3, least: int = 2, most: int = 20) -> float:
    """The least CPU seconds of some calls on one thread, after one untimed call.

    For comparisons that must come out the same on a busy machine; a figure for a user is wall clock, `timed`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()
        found: list[float] = []
        while len(found) < least or (sum(found) < budget and len(found) < most):
            begin = time.thread_time()
            call()
            found.append(time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return min(found)


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the process's memory rose at most. Raises `OSError` where Linux's /proc is absent."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:  # memory that the allocator kept would be taken again unseen
        give_back(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
