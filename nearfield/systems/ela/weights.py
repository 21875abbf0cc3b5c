"""Gates as copies of the module spell them, and timm's and torchvision's ResNets and timm's MobileNetV2."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

MODULE = (
    (r"(^|\.)con1\.", r"\1conv."),
    (r"(^|\.)(?:GN|gn)\.", r"\1norm."),
)
RESNET = (
    (r"^conv1\.", "stem.conv."),
    (r"^bn1\.", "stem.bn."),
    (r"^layer(\d)\.", r"layer.\1."),
    (r"^fc\.", "head."),
)
MOBILENET = (
    (r"^conv_stem\.", "stem.conv."),
    (r"^bn1\.", "stem.bn."),
    (r"^conv_head\.", "stages.7.downsample.conv."),
    (r"^bn2\.", "stages.7.downsample.bn."),
    (r"^blocks\.0\.0\.conv_pw\.", "stages.0.blocks.0.conv_pwl."),
    (r"^blocks\.0\.0\.bn2\.", "stages.0.blocks.0.bn3."),
    (r"^blocks\.0\.0\.bn1\.", "stages.0.blocks.0.bn2."),
    (r"^blocks\.(\d)\.(\d)\.", r"stages.\1.blocks.\2."),
    (r"^classifier\.", "head."),
)


def convert(state: Mapping[str, Tensor]) -> State:
    """The tensors under our names. A host without gates fits a model built with `gate="none"`."""
    if any(name.startswith("conv_stem.") for name in state):
        return rename(state, MODULE + MOBILENET)
    if any(name.startswith("layer1.") for name in state):
        return {
            re.sub(r"^layer\.(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.", name): value
            for name, value in rename(state, MODULE + RESNET).items()
        }
    return rename(state, MODULE)
