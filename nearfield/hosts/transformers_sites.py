"""Where transformers models compute attention, and what they say of each place."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from nearfield.core import require
from nearfield.hosts.seam import Role, Site

PREFIX_TOKENS = (
    "cls_token",
    "class_embedding",
    "distillation_token",
    "register_tokens",
)  # parameters of embeddings
MOST_PREFIX_TOKENS = 16  # class, distillation and register tokens of known image models


class PatchGrid:
    """The grid of patches that a patch embedding put out last, in each thread."""

    def __init__(self) -> None:
        self.by_thread: dict[int, tuple[int, ...]] = {}
        self.last: tuple[int, ...] | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the patch convolution."""
        self.last = self.by_thread[threading.get_ident()] = tuple(output.shape[2:])

    def fit(self, num_tokens: int) -> tuple[tuple[int, ...] | None, int]:
        """`(grid, class and register tokens)` of so many tokens; no grid where they do not fit."""
        grid = self.by_thread.get(threading.get_ident(), self.last)
        if grid is None:
            return None, 0
        prefix = num_tokens - grid[0] * grid[1]
        return (grid, prefix) if 0 <= prefix <= MOST_PREFIX_TOKENS else (None, 0)


def watch_grids(model: nn.Module, targets: set[nn.Module], stack: ExitStack) -> dict[nn.Module, PatchGrid]:
    """Attention module -> the grid of the patch convolution that is built from the same config object."""
    found: dict[nn.Module, PatchGrid] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if (
            not isinstance(module, nn.Conv2d)
            or module.kernel_size != module.stride
            or max(module.kernel_size) == 1
        ):
            continue
        config = _config_around(name, modules)
        linked = [target for target in targets if config is not None and config_of(target) is config]
        if linked:
            grid = PatchGrid()
            stack.callback(module.register_forward_hook(grid).remove)
            for target in linked:
                found.setdefault(target, grid)
    return found


def sites(model: nn.Module) -> list[Site]:
    """The attention sites of a transformers model as its configs tell them, without a forward.

    The grid is that of the image size, or of the longest text, that the config names; None where it names
    none. `seam.sites` tells what the tokens of one forward form.
    """
    require("transformers", extra="hf")
    prefixes: dict[int, int] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in PREFIX_TOKENS:
            key = id(_config_around(name, modules))
            prefixes[key] = prefixes.get(key, 0) + (1 if parameter.ndim == 1 else parameter.shape[1])
    found = []
    for module, name in names_of(model).items():
        if is_attention(module):
            config, role = config_of(module), role_of(module, name)
            grid = _largest_grid(config) if role == "self" else None
            prefix = prefixes.get(id(config), 0) if grid is not None and len(grid) > 1 else 0
            heads = num_heads_of(module), num_kv_heads_of(module)
            found.append(Site(name, role, grid, prefix, is_causal_site(module), *heads))
    return found


def _largest_grid(config: Any) -> tuple[int, ...] | None:
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is None or patch is None:
        longest = getattr(config, "max_position_embeddings", None)
        return (longest,) if isinstance(longest, int) else None
    (height, width), (down, right) = (
        side if isinstance(side, list | tuple) else (side, side) for side in (image, patch)
    )
    return height // down, width // right


def refuse_unswitchable(model: nn.Module, targets: set[nn.Module], softcap: bool = False) -> None:
    """Raises for attention that does not go through the interface, or is more than SDPA can say.

    `softcap`: capped scores are understood by who asks.
    """
    from transformers import PreTrainedModel

    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        known = part._supports_sdpa or (softcap and is_capped(part))
        if known and part._can_set_attn_implementation():
            continue
        for child, module in part.named_modules():
            if (
                module in targets
                and "attention" in type(module).__name__.lower()
                and config_of(module) in (None, part.config)
            ):
                site = ".".join(filter(None, (name, child)))
                raise NotImplementedError(
                    f"Site {site!r} cannot be entered: transformers has no sdpa form of "
                    f"{type(part).__name__}. Enter only the parts of the model that have one."
                )


def is_capped(part: nn.Module) -> bool:
    """Whether a model goes through the interface, and caps its scores, which is what SDPA lacks."""
    config = config_of(part)
    configs = (config, getattr(config, "text_config", None))
    capped = any(getattr(each, "attn_logit_softcapping", None) is not None for each in configs)
    return capped and bool(getattr(part, "_supports_attention_backend", False))


def find(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name in modules and is_attention(modules[name]):
        return modules[name]
    known = [known for known, module in modules.items() if is_attention(module)]
    near = get_close_matches(name, known, n=3, cutoff=0.0) or ["none at all"]
    raise ValueError(f"The model has no attention site {name!r}. Near it: {', '.join(near)}.")


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Module -> dotted name, as the model that was compiled spells it."""
    names = {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}
    return {module: "" if name == "_orig_mod" else name for module, name in names.items()}


def configs_of(modules: set[nn.Module]) -> list[Any]:
    """The distinct config objects of some modules."""
    found = {id(config): config for config in map(config_of, modules) if config is not None}
    return list(found.values())


def _config_around(name: str, modules: dict[str, nn.Module]) -> Any:
    """The config of the innermost module around a module or parameter that has one."""
    while name:
        name = name.rpartition(".")[0]
        config = config_of(modules[name])
        if config is not None:
            return config
    return None


def config_of(module: nn.Module | None) -> Any:
    """The transformers config of a module, None where it has none."""
    from transformers import PreTrainedConfig

    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


def is_attention(module: nn.Module) -> bool:
    named = "attention" in type(module).__name__.lower()
    return named and isinstance(getattr(module, "is_causal", None), bool) and config_of(module) is not None


def is_causal_site(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", True))


def role_of(module: nn.Module, name: str) -> Role:
    crossing = getattr(module, "is_cross_attention", False) or "cross" in type(module).__name__.lower()
    own_name = name.rpartition(".")[2]
    return "cross" if crossing or "cross" in own_name or own_name == "encoder_attn" else "self"


def line_of(module: nn.Module, num_tokens: int) -> tuple[tuple[int, ...] | None, int]:
    """The grid of tokens that no patch convolution tells: a line; none for patches in windows."""
    return (None if "vision" in type(module).__name__.lower() else (num_tokens,)), 0


def layer_type(module: nn.Module) -> str | None:
    """The layer type that the config names for a module, if it names any."""
    kinds, index = getattr(config_of(module), "layer_types", None), getattr(module, "layer_idx", None)
    return kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else None


def native_window(module: nn.Module) -> int | None:
    """The host's own causal sliding window at a site: `w` shows a token w keys, itself counted."""
    kind = layer_type(module)
    if not is_causal_site(module) or kind not in (None, "sliding_attention"):
        return None
    return getattr(config_of(module), "sliding_window", None)


def num_heads_of(module: nn.Module) -> int:
    """Query heads of a site."""
    for owner in (module, config_of(module)):
        for name in ("num_attention_heads", "num_heads"):
            number = getattr(owner, name, None)
            if isinstance(number, int):
                return number
    raise NotImplementedError(f"It is not known how many heads a {type(module).__name__} has.")


def num_kv_heads_of(module: nn.Module) -> int:
    """Key/value heads of a site."""
    for owner in (module, config_of(module)):
        number = getattr(owner, "num_key_value_heads", None)
        if isinstance(number, int):
            return number
    return num_heads_of(module)


def head_dim_of(module: nn.Module) -> int:
    config = config_of(module)
    for owner, name in ((module, "head_dim"), (module, "attention_head_size"), (config, "head_dim")):
        number = getattr(owner, name, None)
        if isinstance(number, int):
            return number
    return config.hidden_size // config.num_attention_heads
