"""Our vision models offered to timm, on request: `nearfield_davit_tiny` in `timm.create_model`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import nn

from nearfield import catalog
from nearfield.build import create, renamed
from nearfield.core.errors import require

PREFIX = "nearfield_"
# What timm calls otherwise.
NAMES = {"in_chans": "in_channels", "drop_path_rate": "drop_path", "img_size": "image_size"}
NO_DROP = (0, 0.0)  # what timm's rates of dropping may be where a model of ours has none
SOURCES = ("file", "url", "state_dict", "hf_hub_id")  # whence timm reads weights

# What the models' authors, and timm for models that it has too, prepare pictures by, where that is not
# `DEFAULT`; and where our weights are that read pictures and that name classes. By system and entry, in the
# order in which they count. `side` is that of a picture, `reduction` that of the last map, None for tokens.
DEFAULT: dict[str, Any] = {
    "side": 224,
    "reduction": 32,
    "crop_pct": 0.875,
    "mean": (0.485, 0.456, 0.406),  # ImageNet's pixels
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "first_conv": "stem.proj",
    "classifier": "head",
}
HALVES = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
PUBLISHED: dict[str, dict[str, Any]] = {
    "convit/*": {"reduction": None},
    "davit/*": {"crop_pct": 0.95},
    "davit/davit_large": {"side": 384},
    "davit/*_fl": {"side": 768},
    "ela/*": {"first_conv": "stem.conv"},
    "ela/ela_resnet8": {"side": 32, "reduction": 4, "crop_pct": 1.0},
    "halonet/*": {"side": 256, "crop_pct": 0.95, "first_conv": "stem.convs.0.layer"},
    "halonet/halonet_h3": {"side": 320},
    "halonet/halonet_h4": {"side": 384},
    "halonet/halonet_h5": {"side": 448},
    "halonet/halonet_h6": {"side": 512},
    "halonet/halonet_h7": {"side": 600},
    "halonet/*ts": {"crop_pct": 0.94},
    "halonet/haloregnetz_b": {"side": 224, "crop_pct": 0.94, **HALVES},
    # maps of 0 to 255 as they are stored
    "htnet/*": {"reduction": 28, "crop_pct": 1.0, "mean": (0.0,) * 3, "std": (1 / 255,) * 3},
    "htnet/htnet_blocks4": {"reduction": 14},
    "inline/inline_deit_*": {"reduction": None},
    "inline/inline_pvt_*": {"first_conv": "stem.patches.proj"},
    "inline/*_384": {"side": 384},
    "l2vit/*": {"first_conv": "stem.proj.0"},
    "l2vit/*_384": {"side": 384},
    "litv2/*_384": {"side": 384},
    "tnt/*": {"reduction": None, "crop_pct": 0.9, "first_conv": "stem.conv", **HALVES},
    "uniformer/*_plus*": {"first_conv": "stem.proj.0"},
    "uniformer/uniformer_x*": {"first_conv": "stem.proj.0", "classifier": ("head", "head_token")},
}

default_cfgs: dict[str, Any] = {}  # where timm's `register_model` looks for them; `register` fills it


def register() -> list[str]:
    """Names under which `timm.create_model` and `timm.list_models` have known our vision models since.

    Those are the models of all cards with the kind model and the domain vision that classify pictures; what
    takes clips is left out, since timm has no such models. timm's options `num_classes`, `in_chans`,
    `img_size`, `drop_path_rate`, `global_pool`, `features_only` and `out_indices` mean what they mean there;
    all others are those of the model. Weights are read from files: `checkpoint_path` takes those under our
    names, `pretrained=True` with `pretrained_cfg_overlay={"file": ...}` the published ones too. Calling it
    again changes nothing.
    """
    registry = require("timm.models", extra="vision")
    found = []
    for card in catalog.cards():
        if "model" not in card.kind or "vision" not in card.domain:
            continue
        for entry in card.params:
            allowed = inspect.signature(catalog.resolve(card.entry[entry])).parameters
            if not {"num_classes", "in_channels"} <= set(allowed) or "_video_" in entry:
                continue
            name = f"{PREFIX}{entry}"
            found.append(name)
            if not registry.is_model(name):
                config = _config(card, entry, allowed)
                default_cfgs.update(registry.generate_default_cfgs({name: config}))
                registry.register_model(_entrypoint(card, entry, name))
    return found


def _config(card: catalog.Card, entry: str, allowed: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """What timm wants to know of a model: its input, its first and its last layer, where it is from."""
    config = dict(DEFAULT)
    for pattern, published in PUBLISHED.items():
        if fnmatch(f"{card.slug}/{entry}", pattern):
            config |= published
    side, reduction = config.pop("side"), config.pop("reduction")
    if "image_size" in allowed:
        side = allowed["image_size"].default
    config["input_size"] = (allowed["in_channels"].default, side, side)
    config["pool_size"] = (-(-side // reduction),) * 2 if reduction else None
    config["num_classes"] = allowed["num_classes"].default
    config["paper_name"], config["paper_ids"] = card.title, f"arXiv:{card.arxiv}"
    if "/" in card.code[0]:
        config["origin_url"] = f"https://github.com/{card.code[0]}"
    return config


def _entrypoint(card: catalog.Card, entry: str, name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        builder = require("timm.models", extra="vision").build_model_with_cfg
        config = options.get("pretrained_cfg")
        sources = [config if isinstance(config, dict) else {}, options.get("pretrained_cfg_overlay") or {}]
        if pretrained and not any(each.get(source) for each in sources for source in SOURCES):
            raise ValueError(
                f"{name} has no weights to download. Leave pretrained out, or name a checkpoint: "
                "pretrained_cfg_overlay={'file': 'weights.pth'}."
            )
        if options.get("feature_cls", "getter") != "getter":
            raise ValueError(
                f"{name} gives its maps itself: leave feature_cls={options['feature_cls']!r} out, or give "
                "'getter'."
            )
        return builder(
            partial(_built, name),
            name,
            pretrained,
            pretrained_filter_fn=lambda state, model: renamed(state, model, card.slug),
            feature_cfg={"feature_cls": "getter", "out_indices": None},  # None: a map of every part
            **options,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{entry} of {card.title} (arXiv {card.arxiv}), as nearfield has it."
    return build


def _built(
    name: str, *, global_pool: str | None = None, device: Any = None, dtype: Any = None, **given: Any
) -> nn.Module:
    """The model by timm's options, where they are asked for on a device and in a type."""
    with nullcontext() if device is None else torch.device(device):
        model = create(name.removeprefix(PREFIX), **_translated(name, given))
    model.output_fmt = "NLC" if model.global_pool == "token" else "NHWC"
    if global_pool is not None:
        model.reset_classifier(model.num_classes, global_pool)
    return model if dtype is None else model.to(dtype=dtype)


def _translated(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """timm's options as ours; one that ours lacks may only say what is so anyway."""
    allowed = inspect.signature(catalog.find_entry(name.removeprefix(PREFIX))[1]).parameters
    options = {}
    for option, value in given.items():
        here = NAMES.get(option, option)
        if here not in allowed:
            if value is None or (option.endswith("_rate") and value in NO_DROP):
                continue
            raise TypeError(f"{name} has no option {option}, given {value!r}. It has: {', '.join(allowed)}.")
        if option == "img_size" and isinstance(value, (tuple, list)):
            value = value[0] if value[0] == value[1] else tuple(value)
            if isinstance(value, tuple) and allowed[here].annotation == "int":
                raise TypeError(f"{name} takes square pictures, given {option}={value}. Give a number.")
        options[here] = value
    return options
