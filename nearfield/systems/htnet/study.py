"""What surrounds HTNet: its input map, the scores of its field, and testing on persons not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfield.data.motions import optical_flow, optical_strain
from nearfield.systems.htnet.model import BlockAttention, HTNet
from nearfield.train.loop import fit
from nearfield.train.losses import Loss, cross_entropy
from nearfield.train.recipe import Recipe

# Left and right eye, nose, left and right corner of the mouth, x and y in a face of 28 pixels: where official
# code looks if no face is found.
USUAL = ((9.5, 11.1), (21.4, 10.9), (15.4, 17.4), (10.3, 22.1), (20.6, 22.3))
TILED = (0, 1, 3, 4)  # the nose is not used


def motion_map(before: Float[Tensor, "n 1 y x"], after: Float[Tensor, "n 1 y x"]) -> Float[Tensor, "n 3 y x"]:
    """Optical flow along x and along y from the first to the second picture, and its strain."""
    flow = optical_flow(before, after)
    return torch.cat([flow, optical_strain(flow)], 1)


def region_map(
    motion: Float[Tensor, "n channels y x"],
    landmarks: Float[Tensor, "n 5 2"] | None = None,
    *,
    swap_xy: bool = False,
) -> Float[Tensor, "n channels y x"]:
    """The surroundings of both eyes, above those of both corners of the mouth, each half as wide as the map.

    `landmarks` are x and y of eyes, nose and corners of the mouth (the usual places, if left out), moved so
    that no crop leaves the map. `swap_xy` takes x for rows and y for columns, as the published code does.
    """
    side = motion.shape[-1]
    if motion.shape[-2] != side or side % 4:
        raise ValueError(
            f"A map of {tuple(motion.shape[-2:])} has no four tiles. Give a square of 4 n pixels."
        )
    if landmarks is None:
        landmarks = (torch.tensor(USUAL) * side / 28).expand(len(motion), 5, 2)
    half = side // 4
    starts = landmarks[:, TILED].clamp(half, side - half).long() - half  # [N, 4, 2], x first
    if not swap_xy:
        starts = starts.flip(-1)
    span = torch.arange(2 * half, device=motion.device)
    rows, columns = (starts[..., axis, None].to(span) + span for axis in (0, 1))  # [N, 4, 2 half]
    number = torch.arange(len(motion), device=motion.device).view(-1, 1, 1, 1)
    crops = motion.movedim(1, -1)[number, rows[..., None], columns[..., None, :]]
    return rearrange(crops, "n (ny nx) y x c -> n c (ny y) (nx x)", ny=2)


def attention_maps(
    layer: BlockAttention, x: Float[Tensor, "b y x dim"]
) -> Float[Tensor, "b blocks heads n n"]:
    """What each token of a block attends to in it, by block and head."""
    size = layer.block_size
    q, k, _ = rearrange(
        layer.heads(x), "three b (ny y) (nx x) h d -> three b (ny nx) h (y x) d", y=size, x=size
    )
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def silent_parameters(net: HTNet, images: Float[Tensor, "b channels y x"]) -> int:
    """How many of the queries' and keys' weights get no gradient but rounding, whatever the loss.

    That is, at most 1e-5 of what the values' weights beside them get on average.
    """
    outputs = net(images)
    draw = torch.Generator().manual_seed(0)
    weights = [module.qkv.weight for module in net.modules() if isinstance(module, BlockAttention)]
    wanted = torch.randn(outputs.shape, generator=draw).to(outputs)
    grads = torch.autograd.grad(outputs, weights, wanted)
    count = 0
    for grad in grads:
        query, key, value = grad.chunk(3)
        least = 1e-5 * value.square().mean().sqrt()
        count += int((query.abs() <= least).sum()) + int((key.abs() <= least).sum())
    return count


class Scores(NamedTuple):
    """Means over classes of the F1 score and of the recall (UF1 and UAR), of pooled predictions."""

    uf1: float
    uar: float


def scores(truth: Int[Tensor, " n"], predicted: Int[Tensor, " n"], num_classes: int = 3) -> Scores:
    """Both scores. A class neither there nor predicted does not count, nor in the recall one not there."""
    each_f1, each_recall = [], []
    for number in range(num_classes):
        is_class, is_predicted = truth == number, predicted == number
        right = int((is_class & is_predicted).sum())
        both = int(is_class.sum()) + int(is_predicted.sum())
        if both:
            each_f1.append(2 * right / both)
        if is_class.any():
            each_recall.append(right / int(is_class.sum()))
    if not each_recall:
        raise ValueError(f"No clip is of the classes 0 to {num_classes - 1}, so there is nothing to score.")
    return Scores(sum(each_f1) / len(each_f1), sum(each_recall) / len(each_recall))


def leave_one_out(subjects: Int[Tensor, " n"]) -> Iterator[tuple[int, Bool[Tensor, " n"]]]:
    """Each subject, and which samples are theirs."""
    for subject in subjects.unique().tolist():
        yield subject, subjects == subject


class Protocols(NamedTuple):
    """Scores over all subjects left out, by how the epoch was chosen whose predictions count."""

    best_on_test: Scores  # the one that is best on the subject left out, the last of several: as published
    chosen_inside: Scores  # the one that is best on subjects kept from training for this
    last: Scores


def cross_subjects(
    make: Callable[[], nn.Module],
    maps: Float[Tensor, "n channels y x"],
    labels: Int[Tensor, " n"],
    subjects: Int[Tensor, " n"],
    *,
    epochs: int,
    lr: float = 1e-3,
    num_inside: int = 2,
    seed: int = 0,
) -> Protocols:
    """Train a new model for each subject without them, and score predictions on them.

    `num_inside` of the others, the next by number, are kept from training too and choose an epoch. Adam on
    all that is left at once, as published; from one run come all three scores.
    """
    known = subjects.unique().tolist()
    if len(known) < num_inside + 2 or num_inside < 1:
        raise ValueError(
            f"{len(known)} subjects and num_inside={num_inside}: one is tested, {num_inside} choose the "
            "epoch, and one at least must be left to learn from. Give more subjects."
        )
    found = {name: torch.empty_like(labels) for name in Protocols._fields}
    for number, (subject, is_test) in enumerate(leave_one_out(subjects)):
        at = known.index(subject)
        inside = torch.tensor([known[(at + step) % len(known)] for step in range(1, num_inside + 1)])
        is_inside = torch.isin(subjects, inside)
        seen: dict[str, list[Tensor]] = {"test": [], "inside": []}

        def look(
            model: nn.Module,
            seen: dict[str, list[Tensor]] = seen,
            rows: Tensor = is_test,
            more: Tensor = is_inside,
        ) -> dict[str, float]:
            guess = model(torch.cat([maps[rows], maps[more]])).argmax(-1)
            for name, part in zip(seen, guess.split([int(rows.sum()), int(more.sum())]), strict=True):
                seen[name].append(part)
            return {}

        torch.manual_seed(seed + number)
        learned = ~is_test & ~is_inside
        recipe = Recipe(
            steps=epochs,
            batch_size=int(learned.sum()),
            optimizer="adam",
            lr=lr,
            schedule="constant",
            shuffle=False,
            eval_every=1,
            log_every=epochs,
            seed=seed,
        )
        samples = [{"maps": a, "labels": b} for a, b in zip(maps[learned], labels[learned], strict=True)]
        fit(make(), samples, _loss, recipe=recipe, evaluate=look)
        found["last"][is_test] = seen["test"][-1]
        for name, judged, rows in (("best_on_test", "test", is_test), ("chosen_inside", "inside", is_inside)):
            right = torch.stack([(each == labels[rows]).sum() for each in seen[judged]])
            best = int((right == right.max()).nonzero()[-1])
            found[name][is_test] = seen["test"][best]
    classes = int(labels.max()) + 1
    return Protocols(**{name: scores(labels, predicted, classes) for name, predicted in found.items()})


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    return cross_entropy(model(batch["maps"]), batch["labels"])
