"""What the paper on secondary attention sinks claims, tried here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfield.bench.seeds import by_seed, draw_seeds
from nearfield.catalog import Result
from nearfield.systems.secondary_sinks.layer import mlp_stages, trigger_directions
from nearfield.systems.secondary_sinks.model import END, WORDS, Planted, planted
from nearfield.systems.secondary_sinks.steer import RescaleSinks
from nearfield.systems.secondary_sinks.study import SinkProfile, origin, sink_profile

SEEDS = (0, 1, 2)
LAW_TOKENS, LAW_PLACE = 64, 16  # a short text, and where in it one trigger stands


def finds_what_is_planted(*, full: bool = False) -> Result:
    """Primary, band, positions and layer of birth in random decoders with sinks in their weights."""
    right, strangers, shown = [], [], []
    for seed in range(10) if full else SEEDS:
        made = planted(seed=seed)
        profile = sink_profile(made.model, made.input_ids)
        found = {(sink.position, sink.born) for sink in profile.of("secondary")}
        wanted = {(position, made.born) for position in made.positions}
        right.append(profile.primary == 0 and profile.band == made.band and wanted <= found)
        strangers.append(len(found - wanted) + sum(sink.position in made.twins for sink in profile.sinks))
        shown.append(profile)
    words = f"all of {len(made.positions)} sinks, primary and band right for {sum(right)} of {len(right)} "
    words += f"seeds; other tokens taken for sinks: {sum(strangers)} (among {len(made.twins)} twins a text)"
    return Result(words, all(right) and not any(strangers), shown[0].draw)


def norm_law(*, full: bool = False) -> Result:
    """A trigger of growing strength at one place, against its twin, written along another direction."""
    ranks: dict[str, list[float]] = {}
    points: dict[str, list[tuple[float, float]]] = {"sink": [], "twin": []}
    for seed in SEEDS:
        made = planted(tokens=LAW_TOKENS, seed=seed)
        count = len(made.positions)
        for name, first in (("sink", WORDS), ("twin", WORDS + count)):
            norms, lives, shares = [], [], []
            for token in range(0, count, 1 if full else 2):
                ids, profile = _alone(made, first + token)
                norms.append(float(mlp_stages(made.model, ids, made.born, [LAW_PLACE])["output"].norm()))
                lives.append(sum(sink.lifetime for sink in profile.sinks if sink.position == LAW_PLACE))
                shares.append(float(profile.received[made.born + 1 : END, LAW_PLACE].mean()))
            if name == "sink":
                ranks.setdefault("attention", []).append(_spearman(norms, shares))
                ranks.setdefault("lifetime", []).append(_spearman(norms, lives))
            points[name] += zip(norms, shares, strict=True)
    law = min(ranks["attention"] + ranks["lifetime"])
    weakest, twin = min(share for _, share in points["sink"]), max(share for _, share in points["twin"])
    words = (
        f"rank correlation with the norm of the MLP's output, by seed: {by_seed(ranks)}; share of attention "
    )
    words += f"from {weakest:.3f} up; twins, written as strongly elsewhere, at most {twin:.3f}"
    return Result(words, law > 0.9 and 3 * twin < weakest, partial(_dots, points))


def one_mlp_turns_it(*, full: bool = False) -> Result:
    """Cosines with the primary through the MLP, and which principal directions of its input set it off."""
    stages: dict[str, list[float]] = {}
    effective: dict[str, list[float]] = {}
    for seed in SEEDS if full else SEEDS[:2]:
        made = planted(seed=seed)
        ids, profile = made.input_ids, sink_profile(made.model, made.input_ids)
        for stage in ("input", "product", "output"):
            each = [about[stage] for about in origin(made.model, ids, profile)]
            stages.setdefault(stage, []).append(sum(each) / len(each))
        ordinary = [at for at in range(1, ids.shape[1]) if ids[0, at] < WORDS]
        inside = partial(mlp_stages, made.model, ids, made.born)
        sinks, others = inside(made.positions)["input"], inside(ordinary)["input"]
        target, mlp = inside([0])["output"][0], made.model.model.layers[made.born].mlp
        found = trigger_directions(mlp, sinks, others, target)
        effective.setdefault("with sinks", []).append(float(found.effective().sum()))
        without = trigger_directions(mlp, others[::2], others[1::2], target)
        effective.setdefault("without", []).append(float(without.effective().sum()))
    holds = max(stages["input"]) < 0.3 and min(stages["output"]) > 0.9
    holds = holds and min(effective["with sinks"]) > 0 == max(effective["without"])
    words = f"cosine by seed: {by_seed(stages)}; principal directions that write the primary's: "
    words += f"{by_seed(effective)}"
    return Result(words, holds, lambda axes: draw_seeds(axes, stages, "cosine with the primary"))


def rescaling_ends_them(*, full: bool = False) -> Result:
    """Attention on planted sinks with their MLP output made small, against as many other tokens'."""
    shares: dict[str, list[float]] = {}
    for seed in SEEDS if full else SEEDS[:2]:
        made = planted(seed=seed)
        ids, layers = made.input_ids, slice(made.born + 1, END)
        inside = mlp_stages(made.model, ids, made.born, [0, *made.twins])["output"]
        steers = {
            "as it is": RescaleSinks(made.born, inside[0], norm=None),
            "sinks small": RescaleSinks(made.born, inside[0], norm=1.0),
            "twins small": RescaleSinks(made.born, inside[1:].mean(0), norm=1.0, cosine=0.9),
        }
        for name, steer in steers.items():
            with steer(made.model):
                received = sink_profile(made.model, ids).received[layers]
            shares.setdefault(name, []).append(float(received[:, list(made.positions)].mean()))
            if name == "sinks small":
                ordinary = [at for at in range(1, ids.shape[1] - 1) if ids[0, at] < WORDS]
                shares.setdefault("ordinary tokens", []).append(float(received[:, ordinary].mean()))
    before, after, control, base = (
        shares[name] for name in ("as it is", "sinks small", "twins small", "ordinary tokens")
    )
    holds = all(a < 2 * o and c > 0.8 * b for a, o, c, b in zip(after, base, control, before, strict=True))
    return Result(
        f"mean share of attention on the sinks, by seed: {by_seed(shares)}",
        holds,
        lambda axes: draw_seeds(axes, shares, "share of attention"),
    )


def primary_in_a_trained_model(*, full: bool = False) -> Result:
    """SmolLM2-135M on documents of Python's reference: what the study finds, whatever it is."""
    if not full:
        return Result("", None, skipped="reading SmolLM2 takes longer than a short form may: --full")
    from nearfield.data import text
    from nearfield.hosts import packaged

    host = packaged.load("smollm2-135m")
    profiles = []
    for document in [each for each in text.documents("python") if len(each) > 3000][:6]:
        ids = host.processor(document, return_tensors="pt").input_ids[:, :512]
        profiles.append(sink_profile(host.model, ids))
    shares, uniform, noise = [], [], 0
    for profile in profiles:
        band = profile.received[profile.band.start + 1 : profile.band.stop, profile.primary]
        shares.append(float(band.mean()))
        later = profile.primary + 1 + torch.arange(profile.received.shape[1] - profile.primary - 1)
        uniform.append(float((1 / (later + 1)).mean()))
        noise += len(profile.of("noise")) + len(profile.of("primary"))
    times = [share / even for share, even in zip(shares, uniform, strict=True)]
    found = [sink for profile in profiles for sink in profile.of("secondary")]
    words = f"primary at {sorted({p.primary for p in profiles})}, blocks "
    words += f"{sorted({(p.band.start, p.band.stop - 1) for p in profiles})}, attention "
    words += f"{', '.join(f'{share:.2f}' for share in shares)} ({min(times):.0f} times uniform at least); "
    words += (
        f"secondary sinks: {len(found)}, born {sorted({sink.born for sink in found})}; other labels: {noise}"
    )
    return Result(words, min(times) >= 10, profiles[0].draw)


def _alone(made: Planted, token: int) -> tuple[Tensor, SinkProfile]:
    """A text without triggers but for this one, and what it shows."""
    ids = made.input_ids % WORDS
    ids[0, 1:] = ids[0, 1:].clamp(min=1)
    ids[0, LAW_PLACE] = token
    return ids, sink_profile(made.model, ids)


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share the mean of their ranks; 0 where all are equal."""
    ranks = []
    for values in (torch.tensor(a), torch.tensor(b)):
        below = (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
        ranks.append(below - below.mean())
    return float(F.cosine_similarity(ranks[0], ranks[1], dim=0))


def _dots(points: dict[str, list[tuple[float, float]]], axes: Any) -> None:
    for name, each in points.items():
        axes.plot(*zip(*each, strict=True), "o", alpha=0.6, label=name)
    axes.set(xlabel="norm of the MLP's output at birth", ylabel="share of attention")
    axes.legend()
