"""What HiPrune claims, tried here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from nearfield.bench.seeds import draw_seeds, paired_interval
from nearfield.bench.work import cpu_seconds
from nearfield.catalog import Result
from nearfield.data import scenes
from nearfield.data.scenes import Picture, Question, Scene
from nearfield.hosts.pocket import SIDE
from nearfield.hosts.vision_language import vision_tower
from nearfield.systems.hiprune.model import Asked
from nearfield.systems.hiprune.steer import Selection, select
from nearfield.systems.hiprune.study import draw_kept, hit_rate, prefill_flops, tower_scores

HELD_OUT = 20_000  # the seed of scenes that the pocket model never learnt from
GROUPS: dict[str, dict[str, Any]] = {
    "all three": {},
    "no buffers": {"buffers": False},
    "anchors": {"alpha": 1.0, "buffers": False},
    "registers": {"alpha": 0.0},
}


def time_follows_flops(*, full: bool = False) -> Result:
    """Prefill of a random Llama with 32 tokens of text and fewer and fewer of the image."""
    from transformers import LlamaConfig, LlamaModel

    layers, dim, counts = (12, 1024, (576, 384, 192, 64)) if full else (4, 320, (576, 192))
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=dim,
        intermediate_size=dim * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
        num_key_value_heads=dim // 64,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    embeds = {count: torch.randn(1, 32 + count, dim) for count in counts}
    flops = {count: prefill_flops(config, 32 + count) for count in counts}
    seconds = dict.fromkeys(counts, float("inf"))
    with torch.no_grad():
        for _ in range(5 if full else 3):  # in turns, so that other work on the machine meets all alike
            for count in counts:
                call = partial(model, inputs_embeds=embeds[count], use_cache=False)
                seconds[count] = min(seconds[count], cpu_seconds(call, budget=0.0, least=1))
    said, found = flops[192] / flops[576], seconds[192] / seconds[576]
    falls = all(seconds[a] > seconds[b] for a, b in zip(counts, counts[1:], strict=False))
    words = f"{layers} layers of {dim}: {', '.join(f'{n} tokens {s:.2f} s' for n, s in seconds.items())}; "
    words += f"192 / 576: time {found:.3f}, FLOPs {said:.3f}"
    return Result(words, falls and abs(found / said - 1) <= 0.15, partial(_lines, flops, seconds))


def neighbours_are_near(*, full: bool = False) -> Result:
    """Buffers that touch no anchor, on 24 x 24 tokens with random scores and 192 of them kept."""
    draws, strays = (1000 if full else 200), {"grid": 0, "clamp-flat": 0}
    shown: Selection | None = None
    for seed in range(draws):
        draw = torch.Generator().manual_seed(seed)
        objects, deep = torch.rand(2, 576, generator=draw, dtype=torch.float64)
        for rule in strays:
            found = select(objects, deep, (24, 24), 192, neighbors=rule)  # type: ignore[arg-type]
            strays[rule] += _stray(found, 24)
            if rule == "clamp-flat" and shown is None and _stray(found, 24):
                shown = found
    words = f"buffers that touch no anchor, over {draws} images: {strays['grid']} on the grid, "
    words += f"{strays['clamp-flat']} by flat numbers, as published"
    plot = None
    if shown is not None:
        groups = {"anchors": shown.anchors, "buffers": shown.buffers}
        plot = partial(draw_kept, pixels=torch.full((3, 96, 96), 0.8), grid=(24, 24), groups=groups)
    return Result(words, strays["grid"] == 0 < strays["clamp-flat"], plot)


def little_is_lost(*, full: bool = False) -> Result:
    """Right answers of the pocket model to POPE's questions with a third and a ninth of its image tokens."""
    pocket, number = Asked(), SIDE * SIDE
    found: dict[str, list[float]] = {}
    shown = None
    for seed, (here, asked) in enumerate(_questions(full)):
        scores, features, pixels = pocket.look(here)
        random = torch.rand(number, generator=torch.Generator().manual_seed(seed))
        kept = {"all": torch.arange(number)}
        for part in (3, 9):
            keep = number // part
            kept[f"HiPrune 1/{part}"] = select(*scores, (SIDE, SIDE), keep).kept
            kept[f"random 1/{part}"] = random.topk(keep).indices.sort().values
            kept[f"uniform 1/{part}"] = (torch.arange(keep) * number / keep).long()
            kept[f"first 1/{part}"] = torch.arange(keep)
        shown = shown or (pixels, select(*scores, (SIDE, SIDE), number // 9))
        pocket.ask(here, asked, kept, features, found)
    gains = {n: paired_interval(found[f"HiPrune 1/{n}"], found[f"random 1/{n}"]) for n in (3, 9)}
    words = _said(found) + "; HiPrune less random, 95 %: "
    words += ", ".join(f"1/{n} {low:+.3f} to {high:+.3f}" for n, (low, high) in gains.items())
    return Result(words, gains[9][0] > 0, partial(_picture, shown))


def groups_help(*, full: bool = False) -> Result:
    """Right answers with a ninth of the tokens, chosen as anchors, registers, both, and both with buffers."""
    pocket, found = Asked(), dict[str, list[float]]()
    for here, asked in _questions(full):
        scores, features, _ = pocket.look(here)
        keep = SIDE * SIDE // 9
        kept = {name: select(*scores, (SIDE, SIDE), keep, **how).kept for name, how in GROUPS.items()}
        pocket.ask(here, asked, kept, features, found)
    first, *others = found
    gains = {name: paired_interval(found[first], found[name]) for name in others}
    words = _said(found) + "; all three less, 95 %: "
    words += ", ".join(f"{name} {low:+.3f} to {high:+.3f}" for name, (low, high) in gains.items())
    return Result(
        words,
        min(low for low, _ in gains.values()) > 0,
        lambda axes: draw_seeds(axes, {name: [sum(x) / len(x)] for name, x in found.items()}, "accuracy"),
    )


def middle_layers_see_objects(*, full: bool = False) -> Result:
    """Of the tenth of tokens that each layer attends to most, the share on shapes, against that of all."""
    pocket, rates, base = Asked(), [], []
    for number in range(150 if full else 6):
        here = scenes.scene(number, seed=HELD_OUT)
        picture = scenes.render(here)
        objects, inputs = _covered(picture), pocket.inputs(here, "is there a circle?")
        layers = range(len(vision_tower(pocket.model, inputs).sites))
        scores, _ = tower_scores(pocket.model, inputs, layers)
        rates.append([hit_rate(scores[layer][0], objects) for layer in layers])
        base.append(float(objects.float().mean()))
    means, even = torch.tensor(rates).mean(0), sum(base) / len(base)
    best = int(
        torch.tensor(rates[::2]).mean(0).argmax()
    )  # chosen on half of the scenes, judged on the others
    low, _ = paired_interval([row[best] for row in rates[1::2]], base[1::2])
    words = f"share on shapes by layer: {', '.join(f'{rate:.2f}' for rate in means.tolist())}; of all tokens "
    words += f"{even:.2f}; largest in layer {best + 1} on half of the scenes"

    def plot(axes: Any) -> None:
        axes.plot(range(1, len(means) + 1), means.tolist(), marker="o")
        axes.axhline(even, linestyle=":", color="grey")
        axes.set(xlabel="layer of the tower", ylabel="share of the top tenth on shapes", ylim=(0, 1))

    return Result(words, low > 0 and 0 < best < len(means) - 1, plot)


def _questions(full: bool) -> list[tuple[Scene, tuple[Question, Question]]]:
    return scenes.pope("random", 300 if full else 4, seed=HELD_OUT)


def _covered(picture: Picture) -> Bool[Tensor, " tokens"]:
    """Tokens of which a quarter at least is covered by a shape."""
    inside = picture.masks.any(0).float()[None, None]
    return F.adaptive_avg_pool2d(inside, SIDE).flatten() >= 0.25


def _stray(found: Selection, width: int) -> int:
    """Buffers without an anchor beside, above or below them."""
    y, x = found.anchors // width, found.anchors % width
    gaps = (found.buffers[:, None] // width - y).abs() + (found.buffers[:, None] % width - x).abs()
    return int((gaps.amin(1) != 1).sum())


def _said(found: Mapping[str, list[float]]) -> str:
    return "accuracy " + ", ".join(f"{name} {sum(each) / len(each):.3f}" for name, each in found.items())


def _picture(shown: Any, axes: Any) -> None:
    pixels, found = shown
    groups = {"anchors": found.anchors, "buffers": found.buffers, "registers": found.registers}
    draw_kept(axes, pixels, (SIDE, SIDE), groups)


def _lines(flops: dict[int, int], seconds: dict[int, float], axes: Any) -> None:
    for name, each in (("FLOPs", flops), ("CPU seconds", seconds)):
        axes.plot(list(each), [value / each[576] for value in each.values()], marker="o", label=name)
    axes.set(xlabel="image tokens", ylabel="share of that with 576", ylim=(0, None))
    axes.legend()
