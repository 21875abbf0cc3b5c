"""Official LITv2 checkpoints under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

OFFICIAL = (
    (r"^patch_embed\.", "stem."),
    (r"\.downsample\.dconv\.conv_offset\.", ".downsample.offset."),
    (r"\.downsample\.dconv\.", ".downsample.conv."),
    (r"\.downsample\.norm_layer\.", ".downsample.norm."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
    (r"\.attn\.h_", ".attn.high_"),
    (r"\.attn\.l_", ".attn.low_"),
)
STAGE = re.compile(r"^layers\.(\d)\.(downsample|blocks)\.")


def convert(state: Mapping[str, Tensor]) -> State:
    """The official tensors under our names."""
    return {STAGE.sub(_place, name): value for name, value in rename(state, OFFICIAL).items()}


def _place(stage: re.Match[str]) -> str:
    """A change of resolution ends a stage there and begins the next one here."""
    number, part = stage.groups()
    return f"stages.{int(number) + (part == 'downsample')}.{part}."
