"""The parity environment itself: timm beside a CPU build of torch."""

import torch


def test_timm_runs_beside_a_cpu_torch():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    with torch.no_grad():
        features = model(torch.zeros(1, 3, 224, 224))
    assert features.shape == (1, 192)
