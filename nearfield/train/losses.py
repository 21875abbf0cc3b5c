"""Losses as a sum and a count, so that they can be averaged exactly over batches and processes.

A mean of means is wrong where padding differs; a sum of totals over a sum of counts is right however the
tokens were dealt out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100  # torch's own mark of a target that does not count


@dataclass(frozen=True)
class Loss:
    """`total` over `count` targets; their quotient is what falls."""

    total: Tensor
    count: Tensor | float

    @property
    def mean(self) -> Tensor:
        """The loss of one target; 0 where there is none."""
        count = torch.as_tensor(self.count, dtype=self.total.dtype, device=self.total.device)
        return self.total / count.clamp(min=1e-12)


def cross_entropy(
    logits: Float[Tensor, "*n classes"],
    target: Int[Tensor, "*n"] | Float[Tensor, "*n classes"],
    *,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
) -> Loss:
    """Cross-entropy with classes by number, or with a distribution over them (mixup, a teacher's votes)."""
    rows = _wide(logits).flatten(0, -2) if logits.ndim > 1 else _wide(logits)[None]
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(f"Soft targets are {list(target.shape)}; the logits are {list(logits.shape)}.")
        wanted = target.to(rows.dtype).reshape(rows.shape)
        total = F.cross_entropy(rows, wanted, reduction="sum", label_smoothing=label_smoothing)
        return Loss(total, len(rows))
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"Targets are {list(target.shape)}; logits of {list(logits.shape)} need "
            f"{list(logits.shape[:-1])}."
        )
    total = F.cross_entropy(
        rows,
        target.reshape(-1),
        reduction="sum",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return Loss(total, (target != ignore_index).sum())


def next_token(
    logits: Float[Tensor, "b t vocabulary"],
    tokens: Int[Tensor, "b t"],
    *,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
) -> Loss:
    """Cross-entropy of each token given those before it: position t of the logits answers for token t + 1."""
    return cross_entropy(
        logits[:, :-1], tokens[:, 1:], ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def distillation(
    student: Float[Tensor, "*n classes"],
    teacher: Float[Tensor, "*n classes"],
    *,
    temperature: float = 1.0,
    mask: Bool[Tensor, "*n"] | None = None,
) -> Loss:
    """temperature² · KL(teacher ‖ student) of the softened distributions, over the rows where `mask` is true.

    The square keeps the size of the gradient when the temperature rises.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must lie above 0.")
    _same("student and teacher", student, teacher)
    ours = F.log_softmax(_wide(student) / temperature, -1)
    theirs = F.log_softmax(_wide(teacher.detach()) / temperature, -1)
    rows = (theirs.exp() * (theirs - ours)).sum(-1) * temperature**2
    return _masked(rows, mask)


def hidden_states(
    students: Sequence[Float[Tensor, "*n dim"]],
    teachers: Sequence[Float[Tensor, "*n dim"]],
    *,
    mask: Bool[Tensor, "*n"] | None = None,
) -> Loss:
    """Σ over layers of ‖h_student − h_teacher‖² / dim, for each token where `mask` is true."""
    _layers(students, teachers)
    rows = torch.stack([_gap(s, t).mean(-1) for s, t in zip(students, teachers, strict=True)]).sum(0)
    return _masked(rows, mask)


def attention_outputs(
    students: Sequence[Float[Tensor, "b t heads d"]],
    teachers: Sequence[Float[Tensor, "b t heads d"]],
    *,
    factor: float = 1000.0,
    mask: Bool[Tensor, "b t"] | None = None,
) -> Loss:
    """`factor` · mean over layers of the squared error of heads' outputs, before the output projection."""
    _layers(students, teachers)
    gaps = [_gap(s, t).mean((-2, -1)) for s, t in zip(students, teachers, strict=True)]
    return _masked(torch.stack(gaps).mean(0) * factor, mask)


def weighted_sum(*terms: tuple[Loss, float]) -> Loss:
    """Several losses as one: `weighted_sum((xent, 1.0), (kl, 0.5))`, counted as the first is.

    Exact over batches and processes if the terms count the same targets; otherwise each later term is a mean
    over its batch.
    """
    first = terms[0][0]
    total = first.total * terms[0][1]
    for loss, weight in terms[1:]:
        total = total + weight * loss.mean * first.count
    return Loss(total, first.count)


def _wide(x: Tensor) -> Tensor:
    """At least float32: sums over a vocabulary lose too much in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _gap(student: Tensor, teacher: Tensor) -> Tensor:
    _same("a layer of the student and of the teacher", student, teacher)
    return (_wide(student) - _wide(teacher.detach())).square()


def _masked(rows: Tensor, mask: Tensor | None) -> Loss:
    if mask is None:
        return Loss(rows.sum(), rows.numel())
    _same("mask and rows", mask, rows)
    return Loss(rows.masked_fill(~mask, 0.0).sum(), mask.sum())


def _same(what: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"The shapes of {what} are {list(a.shape)} and {list(b.shape)}; they must agree.")


def _layers(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    if not students or len(students) != len(teachers):
        raise ValueError(
            f"{len(students)} layers of the student and {len(teachers)} of the teacher; give equally many, "
            "at least one."
        )
