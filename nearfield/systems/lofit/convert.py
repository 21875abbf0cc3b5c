"""Learning a task as offsets of few heads: scales under an L1 penalty find the heads, offsets follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nearfield.systems.lofit.steer import PROJECTION, Change, HeadOffsets, heads_of
from nearfield.train import Loss, Recipe, fit
from nearfield.train.lora import CHOSEN, OFFSET, add_head_offsets, head_penalty, head_scores, remove
from nearfield.train.losses import next_token
from nearfield.train.result import LossFunction

Heads = dict[str, tuple[int, ...]]  # site -> heads
PENALTIES = ("sum", "mean")


@dataclass(frozen=True)
class Setting:
    """The figures that differ between the published runs; the rest is `recipe`'s."""

    select_lr: float
    penalty: float
    lr: float
    heads: int

    def recipe(self, lr: float, **other: Any) -> Recipe:
        """5 epochs of batches of 8 by AdamW, linear to 0, no weight decay, gradients clipped at 1."""
        steps = {} if "steps" in other else {"epochs": 5}
        given = {"lr": lr, "batch_size": 8, "schedule": "linear", "clip": 1.0, "seed": 42, **steps}
        return Recipe(**{**given, **other})


PUBLISHED = {
    ("truthfulqa", "llama-2-7b"): Setting(5e-3, 5e-4, 1e-2, 32),
    ("truthfulqa", "llama-2-13b"): Setting(1e-3, 1e-3, 2e-2, 48),
    ("truthfulqa", "gemma-7b"): Setting(5e-3, 5e-4, 2e-2, 16),
    ("mquake", "llama-2-7b"): Setting(5e-3, 1e-3, 1e-2, 32),
    ("mquake", "llama-2-13b"): Setting(1e-3, 1e-3, 8e-3, 48),
    ("mquake", "gemma-7b"): Setting(5e-3, 5e-4, 8e-3, 16),
    ("clutrr", "llama-2-7b"): Setting(5e-4, 5e-3, 1e-2, 32),
    ("clutrr", "llama-2-13b"): Setting(1e-3, 1e-3, 1e-2, 48),
    ("clutrr", "gemma-7b"): Setting(5e-4, 5e-3, 1e-2, 16),
}


@dataclass(frozen=True)
class Selection:
    """Every head with the norm of its scale, the largest first."""

    scores: tuple[tuple[str, int, float], ...]

    def top(self, count: int) -> Heads:
        """The heads that the task asked for most."""
        if not 0 < count <= len(self.scores):
            raise ValueError(
                f"count={count} must lie in 1 to {len(self.scores)}, the heads that were scored."
            )
        return _by_site((site, head) for site, head, _ in self.scores[:count])

    def share(self, part: float = 0.03) -> float:
        """What part of all norms the first heads hold: 1 where all others have been driven to 0."""
        norms = [score for _, _, score in self.scores]
        return sum(norms[: max(1, round(part * len(norms)))]) / max(sum(norms), 1e-30)


def lofit(
    model: nn.Module,
    data: Sequence[Mapping[str, Any]],
    *,
    setting: Setting = PUBLISHED["clutrr", "llama-2-7b"],
    loss: LossFunction | None = None,
    layers: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> HeadOffsets:
    """The offsets that teach a frozen model a task: both steps, as published.

    offsets = lofit(model, samples)        # samples: {"ids": ..., "labels": ...}, see `completion`
    with offsets(model): ...               # for a while; `fold(model, offsets)` for good
    """
    found = select(
        model,
        data,
        recipe=setting.recipe(setting.select_lr),
        penalty=setting.penalty,
        loss=loss,
        layers=layers,
        generator=generator,
    )
    heads, recipe = found.top(setting.heads), setting.recipe(setting.lr)
    return tune(model, data, heads, recipe=recipe, loss=loss, generator=generator)


def select(
    model: nn.Module,
    data: Sequence[Mapping[str, Any]],
    *,
    recipe: Recipe,
    penalty: float,
    reduction: Literal["sum", "mean"] = "sum",
    loss: LossFunction | None = None,
    layers: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> Selection:
    """The heads of a frozen model by what a task asks of them: a scale for each, trained under an L1 penalty.

    The loss is the task's + penalty · Σ|scale|, over all heads and not divided by their number (so the
    published penalties depend on the model's size); `reduction="mean"` divides. The scales are then dropped.
    """
    if reduction not in PENALTIES:
        raise ValueError(f"reduction={reduction!r} is unknown. Choose sum or mean.")
    task = loss or completion
    with _frozen(model):
        heads = {site: tuple(range(count)) for site, count in _in_layers(model, layers).items()}
        held = _add(model, heads, "scale", generator)
        parts = sum(p.numel() for each in held.values() for p in each.parameters(False) if p.requires_grad)
        weight = penalty / (parts if reduction == "mean" else 1)

        def penalised(model: nn.Module, batch: dict[str, Any]) -> Loss:
            found = task(model, batch)
            found = found if isinstance(found, Loss) else Loss(found, 1.0)
            return Loss(found.total + weight * head_penalty(model) * found.count, found.count)

        try:
            fit(model, data, penalised, recipe=recipe)
            scores = tuple((name.removesuffix(f".{PROJECTION}"), h, s) for name, h, s in head_scores(model))
        finally:
            remove(model)
    return Selection(scores)


def tune(
    model: nn.Module,
    data: Sequence[Mapping[str, Any]],
    heads: Mapping[str, Sequence[int]],
    *,
    recipe: Recipe,
    loss: LossFunction | None = None,
    generator: torch.Generator | None = None,
) -> HeadOffsets:
    """Offsets of these heads, trained on a task; the model is left as it was."""
    with _frozen(model):
        held = _add(model, heads, "offset", generator)
        try:
            fit(model, data, loss or completion, recipe=recipe)
            found = {
                name.removesuffix(f".{PROJECTION}"): Change(
                    tuple(getattr(layer, CHOSEN).tolist()), getattr(layer, OFFSET).detach().clone()
                )
                for name, layer in held.items()
            }
        finally:
            remove(model)
    return HeadOffsets(found)


def completion(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Cross-entropy of the response alone: `labels` are `ids`, with -100 where there is prompt or padding."""
    ids, mask = batch["ids"], batch.get("mask")
    return next_token(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, batch["labels"])


def preference(model: nn.Module, batch: Mapping[str, Tensor], beta: float = 0.5) -> Loss:
    """DPO: the response that is wanted above the one that is not, by how much more than the base model.

    A sample is `wanted`, `wanted_labels`, `other`, `other_labels`, and what `with_reference` adds.
    """
    gains = [
        log_probability(model, batch[kind], batch[f"{kind}_labels"]) - batch[f"{kind}_reference"]
        for kind in ("wanted", "other")
    ]
    return Loss(-F.logsigmoid(beta * (gains[0] - gains[1])).sum(), float(len(gains[0])))


@torch.no_grad()
def with_reference(model: nn.Module, data: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The samples of `preference` with the base model's own log-probabilities, to be made before tuning."""
    return [
        {
            **each,
            **{
                f"{kind}_reference": log_probability(model, each[kind][None], each[f"{kind}_labels"][None])[0]
                for kind in ("wanted", "other")
            },
        }
        for each in data
    ]


def log_probability(
    model: nn.Module, ids: Int64[Tensor, "b t"], labels: Int64[Tensor, "b t"]
) -> Float[Tensor, " b"]:
    """log p of each row's response, a sum over its tokens."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    wanted = labels[:, 1:]
    each = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    return (each * (wanted >= 0)).sum(-1)


def _add(
    model: nn.Module,
    heads: Mapping[str, Sequence[int]],
    train: Literal["scale", "offset"],
    generator: torch.Generator | None,
) -> dict[str, nn.Linear]:
    counts = heads_of(model)
    unknown = [site for site in heads if site not in counts]
    if unknown or not heads or len({counts[site] for site in heads}) > 1:
        raise ValueError(
            f"heads names {', '.join(unknown) or 'no sites, or sites with unlike numbers of heads'}. Sites "
            f"whose heads an {PROJECTION} reads: {', '.join(counts) or 'none in this model'}."
        )
    named = {f"{site}.{PROJECTION}": numbers for site, numbers in heads.items()}
    number = counts[next(iter(heads))]
    return add_head_offsets(
        model, f"*{PROJECTION}", num_heads=number, train=train, heads=named, generator=generator
    )


def _in_layers(model: nn.Module, layers: Iterable[int] | None) -> dict[str, int]:
    counts = heads_of(model)
    if layers is None:
        return counts
    wanted = set(layers)
    return {s: n for s, n in counts.items() if wanted & {int(p) for p in s.split(".") if p.isdecimal()}}


def _by_site(heads: Iterable[tuple[str, int]]) -> Heads:
    found: dict[str, list[int]] = {}
    for site, head in heads:
        found.setdefault(site, []).append(head)
    return {site: tuple(sorted(numbers)) for site, numbers in found.items()}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Which parameters ask for gradients is put back afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
