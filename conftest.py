"""Fixtures for all tests, those in system folders included: offline, two threads, one seed."""

import os
import sys
from collections.abc import Iterator

import pytest

# Before anything imports huggingface_hub, which reads it once: a test never waits for the network.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU, without importing torch when none was collected."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Two threads, seed 0, default dtype: no test inherits the state of another."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    torch.set_num_threads(2)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
