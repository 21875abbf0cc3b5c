"""Makes timm importable beside a CPU build of torch, before any test asks for it.

torchvision's wheel brings a CUDA extension that cannot load there, so its operators are never defined and
its fake kernels find nothing to attach to. Their schemas are defined here instead; the operators (nms,
roi_align …) stay unusable, everything else of torchvision and timm works.
"""

from importlib.util import find_spec

import torch

BOXES = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
BOXES_GRAD = (
    "float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
)
DEFORM = "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias"
DEFORM_STEPS = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask"
)
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({BOXES}, int sampling_ratio, bool aligned) -> Tensor",
    f"qroi_align({BOXES}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, {BOXES_GRAD}, "
    "int sampling_ratio, bool aligned) -> Tensor",
    f"ps_roi_align({BOXES}, int sampling_ratio) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    "SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width) -> Tensor",
    f"roi_pool({BOXES}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {BOXES_GRAD}) -> Tensor",
    f"ps_roi_pool({BOXES}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {BOXES_GRAD}) -> Tensor",
    f"deform_conv2d({DEFORM}, {DEFORM_STEPS}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {DEFORM}, {DEFORM_STEPS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def define_torchvision_operators() -> torch.library.Library | None:
    """The library that holds the schemas, to be kept alive; None where torchvision's own extension loads."""
    if find_spec("torchvision") is None or torch.version.cuda:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return library


TORCHVISION = define_torchvision_operators()
