"""The second environment holds what parity needs, beside the same torch."""

from importlib.metadata import version

import pytest
import torch


def test_timm_models_build_and_run():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_torch_is_the_pinned_one():
    assert version("torch").split("+")[0] == "2.13.0"


def test_natten_runs_forward_here():
    natten = pytest.importorskip("natten")
    query, key, value = torch.randn(3, 1, 8, 8, 2, 16).unbind(0)
    assert natten.na2d(query, key, value, kernel_size=3).shape == query.shape
