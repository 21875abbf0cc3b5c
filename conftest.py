"""Fixtures for all tests, those in system folders included: offline, two threads, one seed."""

import os
import sys
from collections.abc import Iterator

import pytest

# Before anything imports huggingface_hub, which reads it once: a test never waits for the network.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Where nothing could be compiled the suite runs as well: the one warning that says so is no error."""
    config.addinivalue_line("filterwarnings", "ignore:.*compiled CPU kernels:RuntimeWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of `make check-native` unless `-m` names them, and GPU tests where there is no GPU."""
    if "native" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("native")])
        items[:] = [item for item in items if not item.get_closest_marker("native")]
    # without importing torch when none was collected
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
