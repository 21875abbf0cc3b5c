"""Checkpoints of the official training script, one a subject, under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

OFFICIAL = (
    (r"^to_patch_embedding\.1\.", "stem.proj."),
    (r"^layers\.(\d)\.0\.pos_emb$", r"stages.\1.pos_emb"),
    (r"^layers\.(\d)\.0\.layers\.(\d+)\.0\.norm\.", r"stages.\1.blocks.\2.norm1."),
    (r"^layers\.(\d)\.0\.layers\.(\d+)\.0\.fn\.to_qkv\.", r"stages.\1.blocks.\2.attn.qkv."),
    (r"^layers\.(\d)\.0\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"stages.\1.blocks.\2.attn.proj."),
    (r"^layers\.(\d)\.0\.layers\.(\d+)\.1\.norm\.", r"stages.\1.blocks.\2.norm2."),
    (r"^layers\.(\d)\.0\.layers\.(\d+)\.1\.fn\.net\.0\.", r"stages.\1.blocks.\2.mlp.fc1."),
    (r"^layers\.(\d)\.0\.layers\.(\d+)\.1\.fn\.net\.3\.", r"stages.\1.blocks.\2.mlp.fc2."),
    (r"^layers\.(\d)\.1\.0\.", r"stages.+\1.downsample.conv."),
    (r"^layers\.(\d)\.1\.1\.", r"stages.+\1.downsample.norm."),
    (r"^mlp_head\.0\.", "norm."),
    (r"^mlp_head\.2\.", "head."),
    (r"\.g$", ".weight"),
    (r"\.b$", ".bias"),
)
KEPT = (".downsample.conv.weight",)  # a convolution here too; the others of 1 x 1 are linear layers


def convert(state: Mapping[str, Tensor]) -> State:
    """The official tensors under our names: what merges two levels belongs to the later one here."""
    found: State = {}
    for name, value in rename(state, OFFICIAL).items():
        name = re.sub(r"^stages\.\+(\d)", lambda m: f"stages.{int(m[1]) + 1}", name)
        if name == "stem.proj.weight" and tuple(value.shape[2:]) == (1, 1):
            size = round((value.shape[1] / 3) ** 0.5)  # of a patch in three channels, these last
            value = value.view(-1, size, size, 3).movedim(-1, 1)
        elif value.dim() == 4 and not name.endswith((*KEPT, "stem.proj.weight")):
            value = value.flatten(0, -1) if value.shape[0] == 1 else value.flatten(1)
        found[name] = value
    return found
