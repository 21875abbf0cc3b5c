"""Official UniFormer checkpoints under our names, and the weights of a picture model for clips."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nearfield.hosts.checkpoints import State, rename

OFFICIAL: tuple[tuple[str, str | None], ...] = (
    (r"^backbone\.", ""),
    (r"^aux_head\.", None),  # of token labelling, a classifier of positions
    (r"^norm_cls\.", "norm_token."),
    (r"^head_cls\.", "head_token."),
    (r"^cls_token$", "stages.2.cls_token"),
    (r"^cls_upsample\.", "stages.3.widen."),
    (r"\.pos_embed\.", ".pos_embed.proj."),
    (r"\.gamma_(\d)$", r".scale\1.gamma"),
    (r"\.t_(norm|attn)\.", r".time_\1."),
    # a local block holds the convolutions themselves, where others hold an attention layer
    (r"\.attn\.(weight|bias)$", r".attn.affinity.\1"),
    (r"\.conv1\.", ".attn.value."),
    (r"\.conv2\.", ".attn.proj."),
    (r"^norm\.", "norm.norm."),
    (r"^patch_embed1\.", "stem."),
    # of overlapping changes of resolution: a convolution, then a batch norm
    (r"^(patch_embed\d\.)proj\.0\.", r"\1proj."),
    (r"^(patch_embed\d\.)proj\.1\.", r"\1norm.norm."),
)
PLACE = re.compile(r"^(patch_embed|blocks)(\d)\.")
DENSE = re.compile(r"^norm[1-4]\.")  # of the maps that a detector takes
MATRIX = re.compile(r"\.(?:attn\.value|attn\.proj|mlp\.fc[12])\.weight$")


def convert(state: Mapping[str, Tensor]) -> State:
    """The official tensors of a model of pictures, of clips, or a light one under our names.

    Those of a detector's backbone become the names of `FeaturePyramid`. Convolutions of one position are
    matrices here.
    """
    if any(name.startswith("backbone.") for name in state):  # the rest is a detector's
        state = {name: value for name, value in state.items() if name.startswith("backbone.")}
    named = rename(state, OFFICIAL)
    local = {name.rsplit(".attn.affinity.", 1)[0] for name in named if ".attn.affinity." in name}
    is_dense = any(DENSE.match(name) for name in named)
    found: State = {}
    for name, value in named.items():
        if MATRIX.search(name):
            value = value.flatten(1)
        elif name.endswith(".gamma"):
            value = value.flatten()
        block = re.match(r"^blocks\d\.\d+", name)
        if block and block[0] in local:
            name = re.sub(r"\.(norm[12])\.", r".\1.norm.", name)
        name = PLACE.sub(_place, name)
        if is_dense:
            name = f"norms.{int(name[4]) - 1}{name[5:]}" if DENSE.match(name) else f"backbone.{name}"
        found[name] = value
    return found


def _place(part: re.Match[str]) -> str:
    kind, number = part[1], int(part[2]) - 1
    return f"stages.{number}.{'blocks' if kind == 'blocks' else 'downsample'}."


def inflate(state: Mapping[str, Tensor], clips: Mapping[str, Tensor], *, centred: bool = False) -> State:
    """A picture model's tensors for a model of clips whose own are `clips`, both under our names.

    Kernels go over the frames by equal parts of what they are in a picture, or `centred` in the middle frame
    alone, with which a clip of equal frames gives what the picture gives. What pictures do not have,
    attention through time, and a classifier of other classes stay those of `clips`.
    """
    if state.keys() - clips.keys():
        raise ValueError(
            f"The model of clips has no {', '.join(sorted(state.keys() - clips.keys()))}. Give weights of a "
            "picture model with the same stages, under our names (convert)."
        )
    found: State = {}
    for name, own in clips.items():
        value = state.get(name)
        is_other = value is not None and name.startswith("head.") and value.shape != own.shape
        if ".time_" in name or is_other:
            value = own
        elif value is None:
            raise ValueError(f"The picture model has no {name}, which the model of clips needs.")
        elif own.dim() == value.dim() + 1 and own.shape[:2] + own.shape[3:] == value.shape:
            frames = own.shape[2]
            wide = value.unsqueeze(2)
            if centred:
                value = wide.new_zeros(own.shape)
                value[:, :, frames // 2] = wide[:, :, 0]
            else:
                value = wide.expand(own.shape) / frames
        elif value.shape != own.shape:
            raise ValueError(
                f"{name} has the shape {list(value.shape)}, which time does not make {list(own.shape)}."
            )
        found[name] = value
    return found
