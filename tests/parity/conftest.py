"""Makes torchvision importable beside a CPU build of torch, for timm. Test support only: the library never needs it."""

import contextlib

import torch

BOXES = "Tensor boxes, Tensor scores, float threshold"
REGIONS = "Tensor input, Tensor rois, float scale, SymInt h, SymInt w"
# torchvision's Python code attaches fake kernels to these operators, which its CUDA extension would have defined.
SCHEMAS = (
    f"nms({BOXES}) -> Tensor",
    f"qnms({BOXES}) -> Tensor",
    f"roi_align({REGIONS}, int sampling, bool aligned) -> Tensor",
    f"qroi_align({REGIONS}, int sampling, bool aligned) -> Tensor",
    f"_roi_align_backward({REGIONS}) -> Tensor",
    f"ps_roi_align({REGIONS}, int sampling) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward({REGIONS}) -> Tensor",
    f"roi_pool({REGIONS}) -> (Tensor, Tensor)",
    f"_roi_pool_backward({REGIONS}) -> Tensor",
    f"ps_roi_pool({REGIONS}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward({REGIONS}) -> Tensor",
    "deform_conv2d(Tensor input) -> Tensor",
    "_deform_conv2d_backward(Tensor input) -> Tensor",
)
# Definitions live as long as the library object: keep it.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")

for schema in SCHEMAS:
    with contextlib.suppress(RuntimeError):  # a torchvision that matches its torch has defined it
        LIBRARY.define(schema)
