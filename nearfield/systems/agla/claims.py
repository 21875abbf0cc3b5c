"""What AGLA claims, tried here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nearfield.bench.seeds import Found, by_seed, draw_seeds, paired_interval
from nearfield.catalog import Result
from nearfield.data import scenes
from nearfield.data.scenes import KINDS, Question, Scene
from nearfield.hosts.pocket import Pocket
from nearfield.hosts.seam import Site
from nearfield.hosts.vision_language import image_tokens
from nearfield.steer import Steer
from nearfield.systems.agla import study
from nearfield.systems.agla.steer import assemble, generate_assembled, local_inputs
from nearfield.systems.agla.study import Matched, matched_by_itself

HELD_OUT = 20_000  # the seed of scenes that the pocket model never learnt from


def beats_both_controls(*, full: bool = False) -> Result:
    """The probability of the right answer to POPE's questions, which is what sampling scores in the mean."""
    pocket = _Pocket()
    splits: list[list[dict[str, float]]] = []
    for split in scenes.SPLITS if full else scenes.SPLITS[-1:]:
        asked = scenes.pope(split, 150 if full else 4, seed=HELD_OUT)
        splits.append([pocket.answers(here, question) for here, pair in asked for question in pair])
    keys = list(splits[0][0])
    means = {key: [sum(row[key] for row in rows) / len(rows) for rows in splits] for key in keys}
    pooled = {name: [row[name] for rows in splits for row in rows] for name in keys if "," not in name}
    label = "probability of the right answer"
    plot = partial(draw_seeds, found={name: means[name] for name in pooled}, label=f"{label}, a dot a split")
    return _compared(pooled, label, f"; by split: {by_seed(means)}", plot)


def covers_the_object(*, full: bool = False) -> Result:
    """Share of the pixels that are kept inside the shape that is asked for, less that outside."""
    pocket = _Pocket()
    found: dict[str, list[float]] = {"asked": [], "another shape asked": [], "random heat": []}
    for here, (question, _) in scenes.pope("random", 200 if full else 6, seed=HELD_OUT):
        shapes = [n for n, shape in enumerate(here.shapes) if f" {shape.kind}?" in question.text]
        picture, masks, _ = scenes.render(here)
        inside = masks[shapes].any(0)
        mine, other = pocket.matched(here, question.text), pocket.matched(here, _other(here, question.text))
        ratio = float(study.keep_ratio(mine.similarity))
        heats = mine.heat[0], other.heat[0], _random(here.ground)
        for each, heat in zip(found.values(), heats, strict=True):
            kept = study.keep_mask(study.pixel_map(heat, (96, 96)), ratio).float()
            each.append(float(kept[inside].mean() - kept[~inside].mean()))
    found["nothing masked"] = [0.0] * len(found["asked"])
    plot = partial(study.draw_heat, picture=picture, heat=mine.heat[0], ratio=ratio)
    return _compared(found, "kept inside less outside", plot=plot)


def heat_is_evidence(*, full: bool = False) -> Result:
    """How far the log-probability of a token falls when a tenth of the picture is hidden from the text."""
    found: dict[str, list[float]] = {"heat": [], "attention": [], "random": []}
    for seed in range(40 if full else 8):
        model, inputs = tiny(seed)
        where, before = image_tokens(model, inputs)[0][0], _told(model, inputs)
        heats = [matched_by_itself(model, inputs, gradient=each).heat[0] for each in (True, False)]
        for each, heat in zip(found.values(), (*heats, _random(seed)[:8, :8]), strict=True):
            hottest = where.start + heat.flatten().topk(len(where) // 10).indices
            with _Hide(hottest, where.stop)(model):
                each.append(float((before - _told(model, inputs))[before.argmax()]))
    return _compared(found, "fall of the log-probability")


def one_cache(*, full: bool = False) -> Result:
    """Greedy tokens with one cache for both branches, as published, and with two; local pictures are grey."""
    rows = []
    for seed in range(20 if full else 6):
        model, inputs = tiny(seed)
        local = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
        published = generate_assembled(model, inputs, local, parity=True, max_new_tokens=6, do_sample=False)
        ours = generate_assembled(model, inputs, local, max_new_tokens=6, do_sample=False)
        begun = published[:, :-5]
        given = {**inputs, "input_ids": begun, "attention_mask": torch.ones_like(begun)}
        plain = model.generate(**given, max_new_tokens=5, do_sample=False)
        pairs = (published, plain), (begun, ours[:, :-5]), (published, ours)
        rows.append([torch.equal(*pair) for pair in pairs])
    same, first, equal = (sum(each) for each in zip(*rows, strict=True))
    words = (
        f"of {len(rows)} models: one cache goes on as the whole picture alone in {same}; with two the first"
    )
    words += f" token is the same in {first}, and what follows another in {len(rows) - equal}"
    holds = same == first == len(rows) > equal

    def draw(axes: Any) -> None:
        axes.bar(("one cache goes on\nas the whole picture", "two caches go on\nas one"), (same, equal))
        axes.set(ylabel=f"models of {len(rows)}")

    return Result(words, holds, draw)


def tiny(seed: int) -> tuple[Any, dict[str, Tensor]]:
    """A LLaVA of random weights, large enough that its picture counts, and a prompt with a picture."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    shape: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 96, "initializer_range": 0.25}
    vision = CLIPVisionConfig(
        hidden_size=48, num_hidden_layers=2, image_size=32, patch_size=4, initializer_factor=4.0, **shape
    )
    text = LlamaConfig(hidden_size=64, num_hidden_layers=4, num_key_value_heads=2, vocab_size=256, **shape)
    torch.manual_seed(seed)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=255)
    model: Any = LlavaForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, suppress_tokens=[255])
    ids = torch.randint(1, 200, (1, 74)).index_fill(1, torch.arange(4, 68), 255)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.eval(), {**inputs, "pixel_values": torch.randn(1, 3, 32, 32)}


@dataclass
class _Hide(Steer):
    """Some tokens are hidden from those behind the picture, in the middle layer."""

    places: Tensor
    begin: int
    sites: str = "*language_model.layers.2.*"

    def rows(self, site: Site) -> range:
        return range(self.begin, site.rows.stop)

    def score(self, site: Site, scores: Tensor, rows: range, keys: range) -> Tensor:
        return scores.index_fill(-1, self.places, -torch.inf)


class _Pocket:
    """The pocket model and its answers to questions on scenes."""

    def __init__(self) -> None:
        pocket = Pocket()
        self.model, self._inputs = pocket.model, pocket.inputs
        self.yes, self.no = pocket.words.convert_tokens_to_ids(["yes", "no"])

    def inputs(self, here: Scene, question: str) -> dict[str, Tensor]:
        return self._inputs(scenes.normalised(scenes.render(here).pixels)[None], question)

    def matched(self, here: Scene, question: str) -> Matched:
        return matched_by_itself(self.model, self.inputs(here, question), target=self.yes)

    def answers(self, here: Scene, asked: Question) -> dict[str, float]:
        """The probability of the right answer by AGLA and its rivals."""
        inputs, combine = self.inputs(here, asked.text), assemble()
        matched = self.matched(here, asked.text)
        other = self.matched(here, _other(here, asked.text)).heat
        heats = {"AGLA": matched.heat, "random mask": (_random(here.ground),), "another shape's mask": other}
        options: Any = {"mean": [scenes.MEAN] * 3, "std": [scenes.DEVIATION] * 3}
        shown = [local_inputs(inputs, matched._replace(heat=heat), **options) for heat in heats.values()]
        pixels = torch.cat([each["pixel_values"] for each in (inputs, *shown)])
        with torch.no_grad():
            many = {name: inputs[name].expand(len(pixels), -1) for name in ("input_ids", "attention_mask")}
            whole, *local = self.model(**many, pixel_values=pixels).logits[:, -1:].unbind(0)
        made = {name: combine([whole, each]) for name, each in zip(heats, local, strict=True)}
        made |= {"plain": whole, "sharpened": combine([whole, whole])}
        right = self.yes if asked.answer == "yes" else self.no
        greedy = {f"{name}, greedy": float(made[name].argmax() == right) for name in ("AGLA", "plain")}
        return {name: float(each.softmax(-1)[0, right]) for name, each in made.items()} | greedy


def _other(here: Scene, question: str) -> str:
    """The question for another kind, one that is there if there is one."""
    kind = next(kind for kind in (*here.kinds, *KINDS) if f" {kind}?" not in question)
    return scenes.presence(kind, here).text


def _random(seed: int) -> Tensor:
    return torch.rand(16, 16, generator=torch.Generator().manual_seed(seed))


def _told(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[0, -1].log_softmax(-1)


def _gains(found: Found) -> dict[str, tuple[float, float]]:
    """95 % intervals of the mean difference of the first and each other, paired."""
    first, *_ = found.values()
    return {name: paired_interval(first, each) for name, each in list(found.items())[1:]}


def _compared(found: Found, label: str, more: str = "", plot: Any = None) -> Result:
    """Holds where the first is above each other."""
    gains = _gains(found)
    means = ", ".join(f"{name} {sum(each) / len(each):+.3f}" for name, each in found.items())
    less = ", ".join(f"{name} {low:+.3f} to {high:+.3f}" for name, (low, high) in gains.items())
    words = f"{label}: {means}; {next(iter(found))} less the others, 95 %: {less}{more}"
    plot = plot or (lambda axes: draw_seeds(axes, found, label))
    return Result(words, all(low > 0 for low, _ in gains.values()), plot)
