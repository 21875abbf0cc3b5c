"""Official L2ViT checkpoints under our names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

OFFICIAL = (
    (r"^downsample_layers\.0\.proj\.proj\.", "stem.proj."),
    (r"^downsample_layers\.0\.norm\.", "stem.norm."),
    (r"^downsample_layers\.(\d)\.norm\.", r"stages.\1.downsample.norm_before."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"\.local_mp\.bn\.", ".local.norm."),
    (r"\.local_mp\.", ".local."),
)


def convert(state: Mapping[str, Tensor]) -> State:
    """The official tensors under our names; temperatures lose the sides that broadcast."""
    return {
        name: value.flatten() if name.endswith(".temperature") else value
        for name, value in rename(state, OFFICIAL).items()
    }
