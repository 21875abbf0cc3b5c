"""Official and timm's TNT checkpoints under our names."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

OFFICIAL = (  # to timm's names
    (r"^outer_tokens$", None),  # a tensor that nothing reads
    (r"^outer_pos$", "patch_pos"),
    (r"^inner_pos$", "pixel_pos"),
    (r"^patch_embed\.", "pixel_embed."),
    (r"(^|\.)proj_norm([12])\.", r"\1norm\2_proj."),
    (r"\.inner_norm1\.", ".norm_in."),
    (r"\.inner_attn\.", ".attn_in."),
    (r"\.inner_norm2\.", ".norm_mlp_in."),
    (r"\.inner_mlp\.", ".mlp_in."),
    (r"\.outer_norm1\.", ".norm_out."),
    (r"\.outer_attn\.", ".attn_out."),
    (r"\.outer_norm2\.", ".norm_mlp."),
    (r"\.outer_mlp\.", ".mlp."),
)
TIMM = (
    (r"^pixel_embed\.proj\.", "stem.conv."),
    (r"^pixel_pos$", "stem.pos_embed"),
    (r"^norm([12])_proj\.", r"stem.compose.norm\1."),
    (r"^proj\.", "stem.compose.proj."),
    (r"^(blocks\.\d+)\.norm([12])_proj\.", r"\1.inner.compose.norm\2."),
    (r"^(blocks\.\d+)\.proj\.", r"\1.inner.compose.proj."),
    (r"\.norm_in\.", ".inner.norm1."),
    (r"\.attn_in\.", ".inner.attn."),
    (r"\.norm_mlp_in\.", ".inner.norm2."),
    (r"\.mlp_in\.", ".inner.mlp."),
    (r"\.norm_out\.", ".norm1."),
    (r"\.attn_out\.", ".attn."),
    (r"\.norm_mlp\.", ".norm2."),
)


def convert(state: Mapping[str, Tensor]) -> State:
    """The tensors under our names: one projection for queries, keys and values, positions as a map."""
    found = rename(state, OFFICIAL + TIMM)
    if "patch_pos" in found:
        positions = found.pop("patch_pos")
        _, count, dim = positions.shape
        side = math.isqrt(count - 1)
        if side**2 != count - 1:
            raise ValueError(f"patch_pos has {count - 1} patches, no square number. Give a square grid's.")
        found["pos_embed_token"], found["pos_embed"] = (
            positions[:, :1],
            positions[:, 1:].reshape(1, side, side, dim),
        )
    if "stem.pos_embed" in found:
        words = found["stem.pos_embed"][0]  # [c, 4, 4] of timm, [16, c] of the official files
        found["stem.pos_embed"] = words.flatten(1).mT if words.dim() == 3 else words
    for name in [name for name in found if ".attn.qk." in name]:
        parts = found.pop(name), found.pop(name.replace(".qk.", ".v."))
        found[name.replace(".qk.", ".qkv.")] = torch.cat(parts)
    return found
