"""The main job for encoders: quality is how far features turn, and whether nearest neighbours stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfield.convert.quality import FeatureChange, feature_change
from nearfield.convert.report import EncoderConversion
from nearfield.convert.search import planner_of
from nearfield.convert.swap import convert, default_pattern
from nearfield.data import pictures, text
from nearfield.hosts import seam
from nearfield.hosts.packaged import Packaged
from nearfield.hosts.seam import Site
from nearfield.measure.sensitivity import SiteDamage, sensitivity
from nearfield.ops.neighborhood import Neighborhood
from nearfield.ops.neighborhood.geometry import Border
from nearfield.plan.pattern import SitePlan

HELD_OUT, QUICK_HELD_OUT = 4, 2  # one shipped photograph gives five cuts
PROBES = 2  # random directions in which features are watched
ROUNDS = 3  # interleaved timings
JUDGEMENTS = 5
AIM = 0.6  # share of the budget that the first plan is to use, by prediction

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Given:
    """Calibration and held-out inputs of one kind, each the keyword arguments of one forward."""

    calibration: Inputs
    held_out: Sequence[Inputs]
    name: str


def run(
    opened: Packaged,
    *,
    to: str,
    budget: float,
    source: str | None,
    tokens: int | None,
    quick: bool,
    kernel_size: int | tuple[int, ...] | None,
    tell: Callable[[str, float, float], None],
    read_plan: Callable[[Path], dict[str, SitePlan]],
) -> EncoderConversion:
    """An encoder made local with a mean 1 - cosine of its features within `budget`."""
    model = opened.model
    given = _inputs(opened, source, tokens, QUICK_HELD_OUT if quick else HELD_OUT)
    sites = seam.sites(model, **given.calibration)
    before = [_features(model, inputs) for inputs in given.held_out]
    planner, judgements, share = None, 0, AIM * budget
    if to == "auto":
        planner = planner_of(_damages(model, given.calibration, tell), before[0].shape[0], tell)
    while True:
        if planner is not None:
            plan, _ = planner.choose(share)
        elif to == "neighborhood":
            assert kernel_size is not None
            plan = {
                s.name: SitePlan.uniform(s.name, s.num_kv_heads, default_pattern(s, kernel_size))
                for s in sites
            }
        else:
            plan = read_plan(Path(to))
        change, seconds = _judge(model, plan, given.held_out, before, tell)
        judgements += 1
        if planner is None or change.high <= budget or judgements == JUDGEMENTS:
            break
        share *= 0.7 * budget / change.high
    report = convert(model, plan, example=given.calibration)
    return EncoderConversion(
        model=opened.name,
        kind=opened.kind,
        inputs=given.name,
        tokens=before[0].shape[0],
        grid=sites[0].grid,
        budget=budget,
        change=change,
        seconds_before=seconds[0],
        seconds_after=seconds[1],
        judgements=judgements,
        plan=plan,
        report=report,
    )


def candidates(site: Site) -> list[Neighborhood]:
    """Windows for a site of an encoder: squares on a grid, centred runs on text, up to most of the side."""
    grid = site.grid or ()
    sizes = [5, 7, 9, 13, 19, 25, 31, 45] if len(grid) > 1 else [17, 33, 65, 129, 257, 513]
    border: Border = "truncate" if len(grid) == 1 else "shift"
    return [Neighborhood(size, border=border) for size in sizes if grid and size < min(grid)]


def _inputs(opened: Packaged, source: str | None, tokens: int | None, held_out: int) -> Given:
    config: Any = opened.model.config
    if opened.kind == "image-encoder":
        if source is not None or tokens is not None:
            raise ValueError("--text and --tokens are for models of text; this one looks at pictures.")
        size = config.image_size
        shown = pictures.tensors(size, held_out + 1)
        inputs = [{"pixel_values": picture[None]} for picture in shown]
        return Given(inputs[0], inputs[1:], "pictures")
    most = config.max_position_embeddings
    length = tokens or most
    if length > most:
        raise ValueError(
            f"The model has {most:,} positions and cannot read --tokens {length:,}. Give at most {most}."
        )
    source = source or "python"
    found = text.split(
        text.documents(source), opened.processor, tokens=length, num_calibration=1, num_held_out=held_out
    )
    return Given(
        {"input_ids": found.calibration},
        [{"input_ids": ids[None]} for ids in found.held_out],
        f"{source} text",
    )


def _features(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0]


def _damages(model: nn.Module, inputs: Inputs, tell: Callable[[str, float, float], None]) -> list[SiteDamage]:
    """1 - cosine per token that each candidate adds: E over random directions v of ½ (v·J Δ)² is ½ |J Δ|²."""
    length = len(_features(model, inputs))
    total: list[SiteDamage] = []
    for probe in range(PROBES):
        generator = torch.Generator().manual_seed(probe)

        def done(sites_done: int, sites: int, before: int = probe) -> None:
            tell("measure attention", before * sites + sites_done, PROBES * sites)

        found = sensitivity(
            model,
            partial(_projected, inputs=inputs, generator=generator),
            candidates,
            rows=range(length),
            generator=generator,
            progress=done,
        )
        for site in found:
            site.damage.div_(length * PROBES)
        if total:
            for site, more in zip(total, found, strict=True):
                site.damage.add_(more.damage)
        else:
            total = found
    return total


def _projected(model: nn.Module, *, inputs: Inputs, generator: torch.Generator) -> Tensor:
    features = F.normalize(model(**inputs).last_hidden_state.float(), dim=-1)
    direction = torch.randn(features.shape, generator=generator)
    return (features * direction).sum()


def _judge(
    model: nn.Module,
    plan: Mapping[str, SitePlan],
    held_out: Sequence[Inputs],
    before: list[Tensor],
    tell: Callable[[str, float, float], None],
) -> tuple[FeatureChange, tuple[list[float], list[float]]]:
    """Features of held-out inputs, and interleaved seconds of the model as it was and as it is."""
    after: list[Tensor] = []
    seconds: tuple[list[float], list[float]] = ([], [])
    rounds = max(ROUNDS, len(held_out))
    for at in range(rounds):
        inputs = held_out[at % len(held_out)]
        _timed(model, inputs, seconds[0])
        report = convert(model, plan, example=inputs)
        try:
            features = _timed(model, inputs, seconds[1])
        finally:
            report.restore()
        if at < len(held_out):
            after.append(features)
        tell("judge on held-out inputs", at + 1, rounds)
    return feature_change(before, after), seconds


def _timed(model: nn.Module, inputs: Inputs, seconds: list[float]) -> Tensor:
    _features(model, inputs)  # what is built once per shape (masks) is built here
    began = perf_counter()
    features = _features(model, inputs)
    seconds.append(perf_counter() - began)
    return features
