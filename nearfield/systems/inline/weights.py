"""Official InLine checkpoints of the four hosts under our names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

COMMON = (
    (r"\.relative_position_index$|\.attn_mask$", None),  # made anew from the sides of the map
    (r"\.relative_position_bias_table$", ".relative_bias"),
    (r"\.residual\.0\.", ".residual.fc1."),
    (r"\.residual\.2\.", ".residual.fc2."),
)
PVT = (
    (r"^pos_embed1$", "stem.pos_embed"),
    (r"^patch_embed1\.", "stem.patches."),
    (r"\.attn\.sr\.", ".attn.reduce.proj."),
    (r"\.attn\.norm\.", ".attn.reduce.norm."),
)
CSWIN = (
    (r"^stage1_conv_embed\.0\.", "stem.proj."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^(stage\d+\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"\.attns\.0\.residual\.", ".attn.residual."),
    (r"\.attns\.(\d)\.get_v\.", r".attn.positions.\1."),
    (r"^merge(\d)\.conv\.", r"merge\1.proj."),
)
OTHERS = ((r"^patch_embed\.", "stem."), (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."))
# stages of PVT and CSwin count from 1; what leads to a stage of Swin and CSwin belongs to the one before
STAGE = re.compile(r"^(?:block|stage)(\d+)\.(\d+)\.")
DOWN = re.compile(r"^(?:layers\.(\d+)\.downsample|merge(\d+)|patch_embed(\d+)|(pos_embed)(\d+)$)")


def convert(state: Mapping[str, Tensor]) -> State:
    """The tensors of a DeiT, PVT, Swin or CSwin, wholly or partly InLine, under our names."""
    rules: tuple[tuple[str, str], ...]
    if any(name.startswith("stage1_conv_embed.") for name in state):
        rules = CSWIN
    elif any(name.startswith("patch_embed1.") for name in state):
        rules = PVT
    else:
        rules = OTHERS
    found = rename(state, rules + COMMON)
    found = {_down(STAGE.sub(_block, name)): value for name, value in found.items()}
    for name in list(found):
        if name.endswith("pos_embed") and name != "pos_embed":  # DeiT's has a place for the class token
            found[name] = _as_map(name, found[name])
    for prefix in {name.split(".residual.")[0] for name in found if ".residual." in name}:
        for kind in ("weight", "bias"):
            if f"{prefix}.kv.{kind}" in found:
                parts = found.pop(f"{prefix}.q.{kind}"), found.pop(f"{prefix}.kv.{kind}")
                found[f"{prefix}.qkv.{kind}"] = torch.cat(parts)
            if f"{prefix}.positions.0.{kind}" in found:
                found[f"{prefix}.position.{kind}"] = found.pop(f"{prefix}.positions.0.{kind}")
    return found


def _block(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) - 1}.blocks.{match[2]}."


def _down(name: str) -> str:
    match = DOWN.match(name)
    if match is None:
        return name
    layer, merge, patches, positions, number = match.groups()
    rest = name[match.end() :]
    if layer is not None:
        return f"stages.{int(layer) + 1}.downsample{rest}"
    if merge is not None:
        return f"stages.{int(merge)}.downsample{rest}"
    if patches is not None:
        return f"stages.{int(patches) - 1}.downsample.patches{rest}"
    return f"stages.{int(number) - 1}.downsample.{positions}"


def _as_map(name: str, positions: Tensor) -> Tensor:
    side = math.isqrt(positions.shape[1])
    if side**2 != positions.shape[1]:
        raise ValueError(f"{name} has {positions.shape[1]} positions. Give those of a square picture.")
    return positions.unflatten(1, (side, side))
