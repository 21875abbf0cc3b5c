"""A vision model as timm's tools expect one: features, intermediate maps, and a head that can be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Backbone(nn.Module):
    """`embed`, then `parts` one after the other, `finish`, `pool`, `head`.

    What runs from part to part is whatever the model likes, a map or several tensors; `as_map` shows it. A
    subclass gives these five, sets `feature_info` (a dict with `num_chs`, `reduction` and `module` for each
    part) and calls `self.initialise()` at its end.
    """

    feature_info: list[dict[str, Any]]
    norm: nn.Module
    head: nn.Module
    parts_name = "stages"  # the attribute that holds the parts
    global_pool = "avg"  # timm's word for how it pools: "token" a class token alone, "" not at all
    normed_anywhere = False  # whether the final norm fits behind each part, as in a plain transformer

    def __init__(self, num_features: int, num_classes: int):
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} must be at least 0; 0 leaves the classifier out.")
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.grad_checkpointing = False

    def embed(self, images: Tensor) -> Any:
        """What the first part takes."""
        raise NotImplementedError(f"{type(self).__name__} must say how it embeds images.")

    def as_map(self, state: Any) -> Float[Tensor, "b *grid dim"]:
        """The map in what runs between parts; the state itself in a pyramid."""
        return state

    def finish(self, state: Any) -> Tensor:
        """Features of the last part's state, normalised."""
        raise NotImplementedError(f"{type(self).__name__} must say how it ends.")

    def pool(self, features: Tensor) -> Float[Tensor, "b dim"]:
        """One vector a picture: the mean over the map."""
        return features.flatten(1, -2).mean(1)

    def unpooled(self, features: Tensor) -> Tensor:
        """What the classifier takes where nothing is pooled."""
        return features

    @property
    def parts(self) -> nn.ModuleList:
        """The modules whose outputs are the intermediate features."""
        return getattr(self, self.parts_name)

    def forward_features(self, x: Float[Tensor, "b channels *sides"]) -> Tensor:
        """The last features, channels last, before pooling."""
        state = self.embed(x)
        for part in self.parts:
            state = self._step(part, state)
        return self.finish(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of features, or with `pre_logits` the pooled vector that the classifier takes."""
        pooled = self.pool(x) if self.global_pool else self.unpooled(x)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Float[Tensor, "b channels *sides"]) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Float[Tensor, "b channels *sides"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the parts `indices` (an int: the last so many; None: all), with the final features.

        `norm` applies the final norm to the map of the last part, and to the others where these are as wide.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown. Choose NCHW or NHWC.")
        wanted = self._indices(indices)
        maps: list[Tensor] = []
        state = self.embed(x)
        last = len(self.parts) - 1
        for number, part in enumerate(self.parts):
            if stop_early and intermediates_only and number > max(wanted):
                break
            state = self._step(part, state)
            if number in wanted:
                fits = number == last or self.normed_anywhere
                shown = self.as_map(self._normed(state) if norm and fits else state)
                maps.append(shown.movedim(-1, 1) if output_fmt == "NCHW" else shown)
        return maps if intermediates_only else (self.finish(state), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the parts behind the last of `indices`, and with them, or by `prune_head`, the classifier."""
        wanted = self._indices(indices)
        cut = max(wanted) + 1 < len(self.parts)
        setattr(self, self.parts_name, self.parts[: max(wanted) + 1])
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[max(wanted)]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0)
        return wanted

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for `num_classes`, none for 0.

        There is one way of pooling a model, its own; `global_pool=""` leaves it out.
        """
        own = type(self).global_pool
        if global_pool not in (None, own, ""):
            raise ValueError(
                f"global_pool={global_pool!r}: {type(self).__name__} pools in its own way only, {own!r}; "
                "'' leaves pooling out."
            )
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.head = self.make_head(num_classes).to(weight.device, weight.dtype)

    def make_head(self, num_classes: int) -> nn.Module:
        """A linear classifier, or nothing for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        initialise(head)
        return head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the inside of each part in the backward pass instead of keeping it."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for learning rates that decay by layer."""
        inside = rf"^{self.parts_name}\.(\d+)"
        finer = [
            (rf"{inside}\.downsample", (0,)),
            (rf"{inside}\.blocks\.(\d+)", None),
            (inside, None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^(?:stem|pos_embed|cls_token)", "blocks": inside if coarse else finer}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, besides biases and norms."""
        return set()

    def initialise(self) -> None:
        """Linear weights normal with deviation 0.02, cut off at two; biases 0; all else as torch makes it."""
        self.apply(initialise)

    def _step(self, part: nn.Module, state: Any) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, state, use_reentrant=False)
        return part(state)

    def _normed(self, state: Any) -> Any:
        """The state as `finish` leaves it, in a form that `as_map` takes."""
        return self.finish(state)

    def _indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.parts)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices={indices}: the model has {count} parts; ask for 1 to {count}.")
            return list(range(count - indices, count))
        wrong = [index for index in indices if not -count <= index < count]
        if wrong or not indices:
            raise ValueError(f"indices={list(indices)}: give some of 0 to {count - 1}.")
        return sorted(index % count for index in indices)


def initialise(module: nn.Module) -> None:
    """The usual start of a vision transformer's linear layers and norms."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
