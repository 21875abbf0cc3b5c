"""What TNT claims, tried here."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nearfield.bench.resolution import against_resolution, model_macs
from nearfield.catalog import Result
from nearfield.data import images
from nearfield.measure.receptive import gradient_map, share_inside
from nearfield.systems.tnt.model import POSITIONS, TNT, Inner, tnt
from nearfield.train.vision import learn

SEEDS = (0, 1, 2)
SIZES = {"TNT-Ti": ((12, 192), (2, 3)), "TNT-S": ((24, 384), (4, 6)), "TNT-B": ((40, 640), (4, 10))}


def words_help(*, full: bool = False) -> Result:
    """TNT and a net without inner transformer, widened to as many parameters, on patches of textures."""
    data = images.textures(32, count=600 if full else 120)
    width = _width_of_equal_parameters()
    found: dict[str, list[float]] = {}
    counts = []
    for name, build in {
        "with words": partial(_net, 48, patch_size=8, stride=2, image_size=32, num_classes=3),
        "without": partial(_net, width, word_heads=0, patch_size=8, stride=2, image_size=32, num_classes=3),
    }.items():
        for seed in SEEDS if full else SEEDS[:1]:
            torch.manual_seed(seed)
            net = build()
            found.setdefault(name, []).append(
                learn(net, data, steps=500 if full else 10, lr=4e-3, batch_size=16, seed=seed)
            )
        counts.append(_size(net))
    means = [sum(each) / len(each) for each in found.values()]
    return Result(
        f"accuracy by seed: {_by_seed(found)}; {counts[0]:,} and {counts[1]:,} parameters",
        means[0] > means[1],
        partial(_draw_dots, found, "accuracy"),
    )


def words_are_cheap(*, full: bool = False) -> Result:
    """What a block costs with its inner transformer, relative to without it, at each published size."""
    ratios: dict[str, list[float]] = {}
    for name in SIZES if full else ("TNT-S",):
        dims, (word_heads, heads) = SIZES[name]
        # MACs and parameters: what one block more adds, so that stem and classifier do not count
        with_words, without = (
            [tnt(dims, (inner, heads), depth).eval() for depth in (1, 2)] for inner in (word_heads, 0)
        )
        ratio = []
        for cost in (model_macs, _size):
            more = [cost(deep) - cost(shallow) for shallow, deep in (with_words, without)]
            ratio.append(more[0] / more[1])
        models = {"with": with_words[1], "without": without[1]}
        seconds = against_resolution(models, (224,), budget=1.0 if full else 0.0).seconds
        ratios[name] = [*ratio, seconds["with"][0] / seconds["without"][0]]  # type: ignore[operator]
    words = "; ".join(
        f"{name} MACs {ratio[0]:.3f}, parameters {ratio[1]:.3f}, "
        f"CPU seconds of two, with stem, {ratio[2]:.2f}"
        for name, ratio in ratios.items()
    )
    macs, size = ratios["TNT-S"][:2]
    holds = abs(macs - 1.14) <= 0.01 and abs(size - 1.08) <= 0.01
    return Result(f"a block with words / without: {words}", holds, partial(_draw_ratios, ratios))


def positions(*, full: bool = False) -> Result:
    """Positions of words, of sentences, both and neither, on handwritten digits."""
    data = images.digits(16)
    kinds = {"both": POSITIONS, "sentence": ("sentence",), "word": ("word",), "neither": ()}
    found: dict[str, list[float]] = {}
    for name, kept in kinds.items():
        for seed in SEEDS if full else SEEDS[:1]:
            torch.manual_seed(seed)
            net = _net(32, patch_size=4, stride=1, image_size=16, num_classes=10, positions=kept)
            found.setdefault(name, []).append(
                learn(net, data, steps=800 if full else 5, lr=4e-3, batch_size=16, seed=seed)
            )
    means = {name: sum(each) / len(each) for name, each in found.items()}
    return Result(
        f"accuracy by seed: {_by_seed(found)}",
        means["both"] > max(means["sentence"], means["word"], means["neither"]),
        partial(_draw_dots, found, "accuracy"),
    )


def words_see_their_patch(*, full: bool = False) -> Result:
    """Which pixels move the words of a patch, behind some inner transformers; also in the older layout."""
    outside: dict[str, list[float]] = {}
    for name, legacy in {"published": False, "older layout": True}.items():
        for seed in SEEDS:
            torch.manual_seed(seed)
            net = tnt((8, 32), (2, 4), 12 if full else 3, image_size=48, legacy=legacy).eval()
            for parameter in net.parameters():
                nn.init.normal_(parameter, std=0.2)
            seen = gradient_map(partial(_words, net), torch.randn(1, 3, 48, 48), (1, 1))
            outside.setdefault(name, []).append(float(1 - share_inside(seen, (16, 16, 32, 32))))
    holds = max(map(abs, outside["published"])) < 1e-9 and min(outside["older layout"]) > 0
    return Result(
        f"share of the gradient from outside the patch, by seed: {_by_seed(outside)}",
        holds,
        partial(_draw_dots, outside, "share of the gradient from outside the patch"),
    )


def _net(dim: int, *, word_heads: int = 2, **options: Any) -> TNT:
    return tnt((8, dim), (word_heads, 4), 3, in_channels=1, drop_path=0.0, **options)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _width_of_equal_parameters(dim: int = 48) -> int:
    """The width without words that comes nearest to the parameters of `dim` with words."""
    options = {"patch_size": 8, "stride": 2, "image_size": 32, "num_classes": 3}
    with torch.device("meta"):
        wanted = _size(_net(dim, **options))
        widths = range(dim, 2 * dim, 4)
        return min(widths, key=lambda width: abs(_size(_net(width, word_heads=0, **options)) - wanted))


def _words(net: TNT, pictures: Tensor) -> Tensor:
    """The words behind the inner transformers of all blocks, as one vector a patch."""
    words, _ = net.stem(pictures)
    for inner in net.modules():
        if isinstance(inner, Inner):
            words, _ = inner(words)
    return words.flatten(-2)


def _by_seed(found: dict[str, list[float]]) -> str:
    return "; ".join(f"{name} {', '.join(f'{share:.3f}' for share in each)}" for name, each in found.items())


def _draw_dots(found: dict[str, list[float]], label: str, axes: Any) -> None:
    for place, each in enumerate(found.values()):
        axes.plot([place] * len(each), each, "o", alpha=0.7)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(ylabel=label)


def _draw_ratios(ratios: dict[str, list[float]], axes: Any) -> None:
    for number, label in enumerate(("MACs", "parameters", "CPU seconds")):
        points = [(place, each[number]) for place, each in enumerate(ratios.values())]
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(ratios)), list(ratios))
    axes.set(ylabel="a block with words / without")
    axes.legend()
