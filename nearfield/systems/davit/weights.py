"""Official and timm's DaViT checkpoints under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

Rules = tuple[tuple[str, str], ...]

OFFICIAL: Rules = (
    (r"^patch_embeds\.0\.", "stem."),
    (r"^patch_embeds\.(\d)\.norm\.", r"stages.\1.downsample.norm_before."),
    (r"^patch_embeds\.(\d)\.", r"stages.\1.downsample."),
    (r"\.cpe\.0\.proj\.", ".cpe1.proj."),
    (r"\.cpe\.1\.proj\.", ".cpe2.proj."),
    (r"^norms\.", "norm."),
)
TIMM: Rules = (
    (r"^stem\.conv\.", "stem.proj."),
    (r"\.downsample\.conv\.", ".downsample.proj."),
    (r"\.downsample\.norm\.", ".downsample.norm_before."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)
FLORENCE: Rules = (
    (r"^vision_tower\.", ""),
    (r"^convs\.0\.norm\.", "stem.norm."),
    (r"^convs\.0\.", "stem."),
    (r"^convs\.(\d)\.norm\.", r"stages.\1.downsample.norm_before."),
    (r"^convs\.(\d)\.", r"stages.\1.downsample."),
    (r"\.conv1\.fn\.dw\.", ".cpe1.proj."),
    (r"\.conv2\.fn\.dw\.", ".cpe2.proj."),
    (r"\.(window_attn|channel_attn)\.norm\.", ".norm1."),
    (r"\.(window_attn|channel_attn)\.fn\.", ".attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".mlp."),
)
NAMED = (
    (r"\.spatial_block\.", ".0."),
    (r"\.channel_block\.", ".1."),
)  # a unit's two blocks, by name or number
UNIT = re.compile(r"^(?:main_blocks|blocks|stages)\.(\d+)\.(?:blocks\.)?(\d+)\.(\d)\.")


def convert(state: Mapping[str, Tensor]) -> State:
    """The official, timm's, or a Florence-2 tower's tensors under our names."""
    if any(name.startswith(("convs.", "vision_tower.")) for name in state):
        rules: Rules = FLORENCE
    elif any(name.startswith("main_blocks.") for name in state):
        rules = OFFICIAL
    else:
        rules = TIMM
    return {UNIT.sub(_place, name): value for name, value in rename(state, rules + NAMED).items()}


def _place(unit: re.Match[str]) -> str:
    """A unit's blocks stand one after the other here."""
    stage, number, which = unit.groups()
    return f"stages.{stage}.blocks.{2 * int(number) + int(which)}."
