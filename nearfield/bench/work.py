"""CPU seconds of a call on one thread: a figure that other work on the machine hardly moves."""

from __future__ import annotations

import time
from collections.abc import Callable

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
