"""What PAINT claims, tried here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from nearfield.bench.resolution import draw_lines
from nearfield.bench.seeds import by_seed, draw_seeds
from nearfield.catalog import Result
from nearfield.data import scenes
from nearfield.data.scenes import Scene, World
from nearfield.hosts.pocket import Pocket
from nearfield.hosts.seam import Site
from nearfield.steer import Steer
from nearfield.systems.imbalanced_attention import study
from nearfield.systems.imbalanced_attention.steer import InformedBoost
from nearfield.systems.imbalanced_attention.study import Informed, chair, informed_tokens

SEEDS = (0, 1, 2)
HELD_OUT = 20_000  # the seed of scenes that the pocket model never learnt from


def fewer_hallucinations(*, full: bool = False) -> Result:
    """CHAIR of greedy captions with the boost and with its rivals, guidance left out of all."""
    pocket = _Pocket()
    here = [scenes.scene(n, seed=HELD_OUT, world=World(broken=True)) for n in range(200 if full else 4)]
    ways: dict[str, Callable[[list[Informed]], Steer | None]] = {
        "none": lambda tokens: None,
        "informed": InformedBoost,
        "all tokens": lambda tokens: InformedBoost([Informed(tuple(range(1, 257)), ())], alpha=0.5),
        "random tokens": lambda tokens: InformedBoost(_shuffled(tokens)),
    }
    told = {name: pocket.captions(here, way) for name, way in ways.items()}
    told["none, cut"] = [
        " ".join(plain.split()[: len(short.split())])
        for plain, short in zip(told["none"], told["informed"], strict=True)
    ]
    counts = {name: _counts(here, captions) for name, captions in told.items()}
    gains = {name: _difference(counts["informed"], counts[name]) for name in counts if name != "informed"}
    words = "; ".join(
        f"{name}: CHAIR-I {chair(each).instances:.3f}, recall {float(chair(each).recall):.3f}, "
        f"{sum(len(text.split()) for text in told[name]) / len(here):.1f} words"
        for name, each in counts.items()
    )
    less = ", ".join(f"{name} {low:+.3f} to {high:+.3f}" for name, (low, high) in gains.items())
    words = f"{len(here)} scenes. {words}; informed less the others, 95 %: {less}"
    return Result(words, all(high < 0 for _, high in gains.values()), partial(_scatter, counts))


def share_by_depth(*, full: bool = False) -> Result:
    """The newest token's attention to the image behind true captions, layer by layer."""
    pocket = _Pocket()
    plain, boosted = [], []
    for number in range(60 if full else 6):
        here = scenes.scene(number, seed=HELD_OUT)
        inputs = pocket.inputs([here], scenes.caption(here).removesuffix("."))
        boost = InformedBoost(informed_tokens(pocket.model, inputs))
        plain.append(study.image_shares(pocket.model, inputs)[0].mean(-1))
        boosted.append(study.image_shares(pocket.model, inputs, boost=boost)[0].mean(-1))
    lines = {"none": torch.stack(plain).mean(0), "informed": torch.stack(boosted).mean(0)}
    half = len(lines["none"]) // 2
    falls = lines["none"][half:].mean() < lines["none"][:half].mean()
    holds = bool(falls and (lines["informed"] > lines["none"])[2:].all())
    listed = {name: line.tolist() for name, line in lines.items()}
    plot = partial(_lines, range(2 * half), listed, "layer", "image share")
    return Result(f"image share by layer: {by_seed(listed)}", holds, plot)


def too_strong(*, full: bool = False) -> Result:
    """Captions as the gain at local and summary tokens grows."""
    pocket = _Pocket()
    here = [scenes.scene(n, seed=HELD_OUT) for n in range(100 if full else 4)]
    gains = (0.0, 0.7, 0.9, 2.0, 8.0) if full else (0.0, 0.7, 8.0)
    recall, repeated = [], []
    for gain in gains:
        told = pocket.captions(here, partial(InformedBoost, alpha=gain, beta=gain))
        counts = _counts(here, told)
        recall.append(float(chair(counts).recall))
        pairs = [list(zip(text.split(), text.split()[1:], strict=False)) for text in told]
        repeated.append(1 - sum(len(set(p)) for p in pairs) / max(1, sum(map(len, pairs))))
    words = f"gains {gains}: recall {_list(recall)}, repeated pairs of words {_list(repeated)}"
    broken = recall[-1] < recall[1] or repeated[-1] > repeated[1]
    plot = partial(_lines, gains, {"recall": recall, "repeated": repeated}, "gain", "share")
    return Result(words, broken, plot)


def odds_and_shifts(*, full: bool = False) -> Result:
    """How the odds of a boosted token grow, when all scores are shifted alike, which changes no attention."""
    heads, keys = (32, 576) if full else (8, 64)
    tokens = [Informed(tuple(range(keys // 4)), ())]
    site = Site("language_model.layers.2", "self", None, 0, True, heads, heads)
    shifts = (-4.0, -2.0, 0.0, 2.0, 4.0)
    found: dict[str, list[float]] = {}
    modes: tuple[Literal["abs", "log"], ...] = ("abs", "log")
    for mode, shift in product(modes, shifts):
        scores = torch.randn(1, heads, 1, keys, generator=torch.Generator().manual_seed(0)).double() + shift
        boosted = InformedBoost(tokens, mode=mode).score(site, scores, range(1), range(keys))
        times = (boosted - scores)[..., : keys // 4].exp()
        for name, value in ((mode, times.median()), (f"{mode}, least", times.min())):
            found.setdefault(name, []).append(float(value))
    words = "; ".join(f"{name} {_list(each)}" for name, each in found.items())
    flat = all(abs(x - 1.7) < 1e-9 for mode in ("log", "log, least") for x in found[mode])
    plot = partial(_lines, shifts, {mode: found[mode] for mode in modes}, "shift", "odds, times")
    holds = flat and max(found["abs"]) > 2 * min(found["abs"])
    return Result(f"odds times, medians and least, at shifts {shifts}: {words}", holds, plot)


def spatial_axis(*, full: bool = False) -> Result:
    """How far the choice of spatial tokens is the same for one map in both precisions, for random maps."""
    heads, patches, share = (16, 576, 0.05) if full else (4, 144, 0.25)
    found: dict[str, list[float]] = {"rows, as published": [], "columns": []}
    for seed in range(10) if full else SEEDS:
        draw = torch.Generator().manual_seed(seed)
        scores = 2 * torch.randn(heads, 1 + patches, 1 + patches, generator=draw)
        maps = [each.softmax(-1).mean(0) for each in (scores, scores.double())]
        for name, axis in (("rows, as published", -1), ("columns", -2)):
            looked = [each.sum(axis).topk(int(share * patches)).indices.tolist() for each in maps]
            found[name].append(len({*looked[0]} & {*looked[1]}) / len(looked[1]))
    return Result(
        f"share of the tokens chosen in float32 and in float64, by chance {share}: {by_seed(found)}",
        max(found["rows, as published"]) < 0.75 and min(found["columns"]) > 0.95,
        lambda axes: draw_seeds(axes, found, "share chosen in both"),
    )


class _Pocket:
    """The pocket model on scenes: their captions, and inputs up to a place in an answer."""

    def __init__(self) -> None:
        pocket = Pocket()
        self.model, self.words, self._inputs = pocket.model, pocket.words, pocket.inputs

    def inputs(self, here: Sequence[Scene], answer: str = "") -> dict[str, Tensor]:
        pixels = torch.stack([scenes.normalised(scenes.render(scene).pixels) for scene in here])
        return self._inputs(pixels, "describe this picture.", answer)

    def captions(self, here: Sequence[Scene], way: Callable[[list[Informed]], Steer | None]) -> list[str]:
        made: list[str] = []
        for start in range(0, len(here), 16):
            inputs = self.inputs(here[start : start + 16])
            steer = way(informed_tokens(self.model, inputs))
            with nullcontext() if steer is None else steer(self.model):
                out = self.model.generate(**inputs, max_new_tokens=40, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            made += self.words.batch_decode(new, skip_special_tokens=True)
        return made


def _shuffled(tokens: Sequence[Informed]) -> list[Informed]:
    """As many tokens of the picture, drawn anywhere."""
    found = []
    for row, (local, summary) in enumerate(tokens):
        drawn = Random(row).sample(range(1, 257), len(local) + len(summary))
        found.append(Informed(tuple(drawn[: len(local)]), tuple(drawn[len(local) :])))
    return found


def _counts(here: Sequence[Scene], captions: Sequence[str]) -> Tensor:
    return study.chair_counts([scenes.mentioned(text) for text in captions], [scene.kinds for scene in here])


def _difference(mine: Tensor, other: Tensor, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the difference of CHAIR-I, over resampled scenes, the same for both."""
    drawn = torch.randint(len(mine), (draws, len(mine)), generator=torch.Generator().manual_seed(0))
    low, high = (chair(mine[drawn]).instances - chair(other[drawn]).instances).quantile(
        torch.tensor([0.025, 0.975]).double()
    )
    return float(low), float(high)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _scatter(counts: Mapping[str, Tensor], axes: Any) -> None:
    for name, each in counts.items():
        axes.scatter(float(chair(each).recall), float(chair(each).instances), label=name)
    axes.set(xlabel="recall", ylabel="share of named kinds that are not there")
    axes.legend()


def _lines(places: Iterable[float], lines: Mapping[str, Sequence[float]], x: str, y: str, axes: Any) -> None:
    at = list(places)
    draw_lines(axes, {n: list(zip(at, each, strict=True)) for n, each in lines.items()}, x, y, scale="linear")
