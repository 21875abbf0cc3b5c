"""Our vision models offered to timm, on request: `nearfield_davit_tiny` in `timm.create_model`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nearfield import catalog
from nearfield.build import create, renamed
from nearfield.core.errors import require

PREFIX = "nearfield_"
# What timm calls otherwise. What it has and a model of ours lacks must say nothing to be passed over.
NAMES = {"in_chans": "in_channels", "drop_path_rate": "drop_path"}
SILENT: dict[str, tuple[Any, ...]] = {
    "drop_rate": (0, 0.0),
    "global_pool": ("avg", "token", ""),
    "img_size": (),
}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
SOURCES = ("file", "url", "state_dict", "hf_hub_id")  # whence timm reads weights

default_cfgs: dict[str, Any] = {}  # where timm's `register_model` looks for them; `register` fills it


def register() -> list[str]:
    """Names under which `timm.create_model` and `timm.list_models` have known our vision models since.

    Those are the models of all cards with the kind model and the domain vision that classify. timm's options
    `in_chans`, `drop_path_rate`, `num_classes`, `features_only` and `out_indices` mean what they mean there;
    all others are those of the model. Calling it again changes nothing.
    """
    registry = require("timm.models", extra="vision")
    found = []
    for card in catalog.cards():
        if "model" not in card.kind or "vision" not in card.domain:
            continue
        for entry in card.params:
            allowed = inspect.signature(catalog.resolve(card.entry[entry])).parameters
            if not {"num_classes", "in_channels"} <= set(allowed):
                continue
            name = f"{PREFIX}{entry}"
            found.append(name)
            if not registry.is_model(name):
                default_cfgs.update(registry.generate_default_cfgs({name: _config(card, allowed)}))
                registry.register_model(_entrypoint(card, entry, name))
    return found


def _config(card: catalog.Card, allowed: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """What timm wants to know of a model: its input, its classes, where it is from."""
    side = next((allowed[n].default for n in ("image_size", "side") if n in allowed), 224)
    height, width = side if isinstance(side, tuple) else (side, side)
    channels = allowed["in_channels"].default
    return {
        "input_size": (channels, height, width),
        "num_classes": allowed["num_classes"].default,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": MEAN if channels == 3 else (0.5,) * channels,
        "std": DEVIATION if channels == 3 else (0.5,) * channels,
        "classifier": "head",
        "paper_name": card.title,
        "paper_ids": f"arXiv:{card.arxiv}",
        "origin_url": f"https://github.com/{card.code[0]}",
    }


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
        return builder(
            lambda **given: create(entry, **_translated(name, given)),
            name,
            pretrained,
            pretrained_filter_fn=lambda state, model: renamed(state, model, card.slug),
            feature_cfg={"feature_cls": "getter", "out_indices": None},  # None: a map of every part
            **options,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{entry} of {card.title} (arXiv {card.arxiv}), as nearfield has it."
    return build


def _translated(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """timm's options as ours; one that ours lacks may only say what is so anyway."""
    entry = name.removeprefix(PREFIX)
    allowed = inspect.signature(catalog.find_entry(entry)[1]).parameters
    options = {}
    for option, value in given.items():
        here = NAMES.get(option, option)
        if here in allowed or option not in SILENT:
            options[here] = value
        elif value is not None and value not in SILENT[option]:
            raise TypeError(f"{name} has no option {option}, given {value!r}. It has: {', '.join(allowed)}.")
    return options
