"""timm's HaloNet checkpoints under our names; the paper published none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

LAYERS = r"(^norm|^stem\.convs\.\d|\.conv1|\.conv2|\.mix|\.shortcut)"
RULES = (
    (r"^stem\.conv1\.", "stem.convs.0."),
    (r"^stem\.conv2\.", "stem.convs.1."),
    (r"^stem\.conv3\.", "stem.convs.2."),
    (r"^stem\.(conv|bn)\.", r"stem.convs.0.\1."),  # a stem of one convolution
    (r"^final_conv\.", "norm."),
    (r"^head\.fc\.", "head."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.conv1_1x1\.", ".conv1."),
    (r"\.conv2_kxk\.", ".mix."),
    (r"\.conv3_1x1\.", ".conv2."),
    (r"\.self_attn\.(pos_embed\.)?", ".mix.layer."),
    (r"\.post_attn\.", ".mix.norm."),
    (r"\.attn\.", ".gate."),
    (rf"{LAYERS}\.conv\.", r"\1.layer."),
    (rf"{LAYERS}\.bn\.", r"\1.norm."),
)
JOINT = "qkv.weight"


def convert(state: Mapping[str, Tensor]) -> State:
    """timm's tensors under our names."""
    named = rename(state, RULES)
    found: State = {}
    for name, value in named.items():
        if name.endswith(JOINT):  # global attention: all queries, all keys, all values
            home = name.removesuffix(JOINT)
            heads = rearrange(value, "(three h d) c y x -> three h d c y x", three=3, d=_width(named, home))
            found[f"{home}q.weight"] = heads[0].flatten(0, 1)
            found[f"{home}kv.weight"] = torch.cat([heads[1], heads[2]], 1).flatten(0, 1)
        elif ".gate.fc" in name and value.dim() == 4:  # a 1 x 1 convolution
            found[name] = value.flatten(1)
        else:
            found[name] = value
    return found


def _width(named: State, home: str) -> int:
    """Channels of a head."""
    return named[f"{home}height_rel"].shape[1]
