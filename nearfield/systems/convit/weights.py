"""Official and timm's ConViT checkpoints, which have the same names, under ours."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

RULES = ((r"^patch_embed\.", "stem."),)


def convert(state: Mapping[str, Tensor]) -> State:
    """The tensors under our names: positions as a map, and one projection for queries, keys and values."""
    found = rename(state, RULES)
    if "pos_embed" in found:
        _, count, dim = found["pos_embed"].shape
        side = math.isqrt(count)
        if side**2 != count:
            raise ValueError(
                f"pos_embed has {count} positions, no square number. Give those of a square grid."
            )
        found["pos_embed"] = found["pos_embed"].view(1, side, side, dim)
    for name in [name for name in found if ".attn.qk." in name]:
        parts = found.pop(name), found.pop(name.replace(".qk.", ".v."))
        found[name.replace(".qk.", ".qkv.")] = torch.cat(parts)
    return found
