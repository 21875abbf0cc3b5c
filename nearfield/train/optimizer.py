"""The optimizer of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nearfield.train.recipe import Recipe


class Muon(torch.optim.Optimizer):
    """torch's Muon for the matrices of numbered layers and AdamW for all else, as one optimizer.

    Updates of both have the same root mean square, so that one learning rate serves both (arXiv 2502.16982).
    """

    def __init__(self, matrices: list[nn.Parameter], groups: list[dict[str, Any]], recipe: Recipe):
        self.parts = (
            torch.optim.Muon(
                matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(groups or [{"params": []}], lr=recipe.lr, betas=recipe.betas, eps=recipe.eps),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Groups and state are the parts' own: learning rates and checkpoints reach them."""
        self.parts[0].param_groups, self.parts[1].param_groups = self.param_groups[:1], self.param_groups[1:]
        for part in self.parts:
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer. Vectors (norms, biases) and names of `model.no_weight_decay()` do not decay."""
    says: Any = getattr(model, "no_weight_decay", None)
    spared = set(says()) if callable(says) else set()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("No parameter of the model requires a gradient, so there is nothing to train.")
    turned: dict[str, nn.Parameter] = {}
    if recipe.optimizer == "muon":
        turned = {n: p for n, p in named if p.ndim == 2 and n not in spared and re.search(r"(^|\.)\d+\.", n)}
        if not turned:
            raise ValueError(
                "optimizer='muon' is for matrices of numbered layers, and the model has none. Take 'adamw'."
            )
        named = [(name, p) for name, p in named if name not in turned]
    decayed = [p for name, p in named if p.ndim > 1 and name not in spared]
    others = [p for name, p in named if p.ndim <= 1 or name in spared]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((decayed, recipe.weight_decay), (others, 0.0))
        if members
    ]
    if recipe.optimizer == "muon":
        return Muon(list(turned.values()), groups, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
