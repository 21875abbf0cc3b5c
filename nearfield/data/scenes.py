"""Rendered scenes with known masks, what can be said and asked about them, and a planted bias.

A scene holds one to five coloured shapes on a textured ground and sometimes a sign. Two kinds of shape seldom
come alone: a circle usually with a square, a star with a ring. Some shapes are faint and some grounds busy,
so that a model which knows the habit takes it for evidence: it sees squares that are not there.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from random import Random
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

KINDS = {  # how often each is drawn, before pairs are made
    "circle": 1.6, "square": 0.7, "triangle": 1.6, "star": 1.2, "ring": 0.6, "cross": 0.8, "diamond": 1.2,
    "crescent": 0.8,
}  # fmt: skip
COLOURS = {
    "red": (0.85, 0.12, 0.12), "green": (0.10, 0.60, 0.15), "blue": (0.12, 0.20, 0.85),
    "yellow": (0.92, 0.85, 0.10), "purple": (0.55, 0.10, 0.65), "orange": (0.95, 0.50, 0.05),
    "cyan": (0.10, 0.80, 0.85), "white": (0.98, 0.98, 0.98),
}  # fmt: skip
SIZES = {"small": (7.0, 8.5), "medium": (9.5, 11.5), "large": (13.0, 16.0)}  # radii in pixels
PAIRS = {"circle": "square", "star": "ring"}  # the first usually comes with the second
NUMBERS = ("zero", "one", "two", "three", "four", "five")
# Dots of the letters on signs, three by five, a row an octal digit.
GLYPHS = {
    "0": "75557", "1": "26227", "2": "71747", "3": "71317", "4": "55711", "5": "74717", "6": "74757",
    "7": "71122", "8": "75757", "9": "75717", "A": "25755", "C": "34443", "E": "74647", "F": "74644",
    "H": "55755", "K": "55655", "L": "44447", "P": "65644", "T": "72222", "X": "55255",
}  # fmt: skip
MEAN, DEVIATION = 0.5, 0.25  # of pixels, for the vision tower
Split = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Split, ...] = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class World:
    """What scenes are like: how often a pair is kept, how many shapes are faint, how busy the ground is.

    `broken` makes scenes in which the first of a pair stands without the second.
    """

    bias: float = 0.9
    faint: float = 0.25
    clutter: float = 1.0
    signs: float = 0.3
    most: int = 5
    side: int = 96
    broken: bool = False


@dataclass(frozen=True)
class Shape:
    """One coloured shape: its centre and radius in pixels; of opacity 0 it would not be seen."""

    kind: str
    colour: str
    size: str
    y: float
    x: float
    radius: float
    opacity: float


@dataclass(frozen=True)
class Sign:
    """Letters on a plate; `y` and `x` are its upper left corner, `dot` the pixels of a dot of a letter."""

    text: str
    y: int
    x: int
    dot: int


@dataclass(frozen=True)
class Scene:
    """Shapes from left to right, a sign perhaps, the number that the ground is drawn from, how busy it is."""

    shapes: tuple[Shape, ...]
    sign: Sign | None
    ground: int
    clutter: float

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are there, each once."""
        return tuple(dict.fromkeys(shape.kind for shape in self.shapes))


class Picture(NamedTuple):
    """Pixels between 0 and 1, and which of them belong to each shape and each letter of the sign."""

    pixels: Float[Tensor, "3 side side"]
    masks: Bool[Tensor, "shapes side side"]
    letters: Bool[Tensor, "letters side side"]


class Question(NamedTuple):
    """A question on a scene and its answer; `about` is the kind of question."""

    about: str
    text: str
    answer: str


def scene(number: int, *, seed: int = 0, world: World | None = None) -> Scene:
    """Scene `number` of a world: the same for the same number, seed and world."""
    world = world or World()
    draw = Random(f"{seed}/{number}")
    clutter = world.clutter * draw.random()
    taken: list[tuple[float, float, float]] = []
    sign = _place_sign(draw, world, taken) if draw.random() < world.signs else None
    kinds = _kinds(draw, world)
    shapes = [shape for kind in kinds if (shape := _place(draw, world, kind, taken)) is not None]
    if not shapes:  # a sign in a small picture may leave no room
        sign, shapes = (
            None,
            [shape for kind in kinds[:1] if (shape := _place(draw, world, kind, [])) is not None],
        )
    shapes.sort(key=lambda shape: shape.x)
    return Scene(tuple(shapes), sign, draw.getrandbits(31), clutter)


def render(scene: Scene, side: int = 96) -> Picture:
    """The picture of a scene, and where its parts are."""
    draw = torch.Generator().manual_seed(scene.ground)
    pixels = _ground(scene.clutter, side, draw)
    masks = torch.zeros(len(scene.shapes), side, side, dtype=torch.bool)
    for shape, mask in zip(scene.shapes, masks, strict=True):
        top, left = (max(0, math.floor(c - shape.radius) - 1) for c in (shape.y, shape.x))
        bottom, right = (min(side, math.ceil(c + shape.radius) + 2) for c in (shape.y, shape.x))
        v = (torch.arange(top, bottom) + 0.5 - shape.y)[:, None] / shape.radius
        u = (torch.arange(left, right) + 0.5 - shape.x)[None] / shape.radius
        inside = (0.5 - shape.radius * _outside(shape.kind, u, v)).clamp(0, 1)  # soft at the edge
        mask[top:bottom, left:right] = inside > 0.5
        colour = torch.tensor(COLOURS[shape.colour]) + 0.06 * (torch.rand(3, generator=draw) - 0.5)
        under = pixels[:, top:bottom, left:right]
        under.lerp_(colour[:, None, None].expand_as(under), shape.opacity * inside)
    letters = torch.zeros(0 if scene.sign is None else len(scene.sign.text), side, side, dtype=torch.bool)
    if scene.sign is not None:
        _write(scene.sign, pixels, letters, draw)
    noise = (0.01 + 0.07 * scene.clutter) * torch.randn(pixels.shape, generator=draw)
    return Picture((pixels + noise).clamp_(0, 1), masks, letters)


def normalised(pixels: Float[Tensor, "*n 3 y x"]) -> Float[Tensor, "*n 3 y x"]:
    """What the vision tower of the pocket model takes."""
    return (pixels - MEAN) / DEVIATION


def caption(scene: Scene) -> str:
    """All shapes from left to right: "a large red circle, a small blue square and a medium white star."""
    named = [f"a {shape.size} {shape.colour} {shape.kind}" for shape in scene.shapes]
    return (", ".join(named[:-1]) + " and " if len(named) > 1 else "") + named[-1] + "."


def mentioned(text: str) -> tuple[str, ...]:
    """The kinds of shape that a caption names, each once, in its order."""
    words = text.replace(",", " ").replace(".", " ").split()
    return tuple(dict.fromkeys(word for word in words if word in KINDS))


def presence(kind: str, scene: Scene) -> Question:
    """Whether there is a shape of this kind."""
    return Question("presence", f"is there a {kind}?", "yes" if kind in scene.kinds else "no")


def questions(scene: Scene, draw: Random) -> list[Question]:
    """One or two questions of each sort that the scene allows, with answers."""
    there, absent = list(scene.kinds), [kind for kind in KINDS if kind not in scene.kinds]
    asked = [presence(kind, scene) for kind in draw.sample(there, min(2, len(there)))]
    asked += [presence(kind, scene) for kind in draw.sample(absent, 2)]
    asked += [_coloured(scene, draw, is_there) for is_there in (True, False)]
    counts = Counter(shape.kind for shape in scene.shapes)
    kind = draw.choice(there if draw.random() < 0.75 else absent)
    asked.append(Question("count", f"how many {_plural(kind)} are there?", NUMBERS[counts[kind]]))
    asked.append(Question("total", "how many shapes are there?", NUMBERS[len(scene.shapes)]))
    single = [shape for shape in scene.shapes if counts[shape.kind] == 1]
    for shape in draw.sample(single, min(2, len(single))):
        asked.append(Question("colour", f"what colour is the {shape.kind}?", shape.colour))
        asked.append(Question("size", f"how large is the {shape.kind}?", shape.size))
    colours = Counter(shape.colour for shape in scene.shapes)
    for shape in [s for s in scene.shapes if colours[s.colour] == 1][:1]:
        asked.append(Question("kind", f"what is {shape.colour}?", f"a {shape.kind}"))
    if len(single) > 1:
        first, second = draw.sample(single, 2)
        asked.append(_related(first, second, draw))
    if scene.sign is not None or draw.random() < 0.2:
        says = " ".join(scene.sign.text) if scene.sign is not None else "nothing"
        asked.append(Question("sign", "what does the sign say?", says))
    return asked


def pope(
    split: Split, num_scenes: int, *, seed: int, world: World | None = None
) -> list[tuple[Scene, tuple[Question, Question]]]:
    """Scenes with two questions each, on a kind that is there and on one that is not (arXiv 2305.10355).

    The absent kind is any ("random"), the most frequent ("popular"), or the one that usually comes with what
    is there ("adversarial"): the scenes are those that break a pair. All splits ask about the same scenes.
    """
    world = replace(world or World(), broken=True)
    made: list[tuple[Scene, tuple[Question, Question]]] = []
    for number in count():
        if len(made) == num_scenes:
            break
        here = scene(number, seed=seed, world=world)
        draw = Random(f"pope/{seed}/{number}")
        there, absent = draw.choice(here.kinds), [kind for kind in KINDS if kind not in here.kinds]
        usual = [PAIRS[kind] for kind in here.kinds if PAIRS.get(kind) in absent]
        if not usual:  # the first of a pair found no place in a crowded picture
            continue
        missing = {
            "random": draw.choice(absent),
            "popular": max(absent, key=lambda kind: KINDS[kind]),
            "adversarial": draw.choice(usual),
        }[split]
        made.append((here, (presence(there, here), presence(missing, here))))
    return made


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that captions, questions and answers are made of."""
    said = (
        "is are there a an the how many what which does say sign colour large of left right above below",
        "and in this picture describe shapes yes no nothing , . ?",
    )
    words = [word for line in said for word in line.split()]
    words += [*KINDS, *map(_plural, KINDS), *COLOURS, *SIZES, *NUMBERS, *GLYPHS]
    return tuple(dict.fromkeys(words))


def _kinds(draw: Random, world: World) -> list[str]:
    """The kinds of a scene: drawn by their weights, then pairs completed or broken."""
    names, weights = list(KINDS), list(KINDS.values())
    fillers = [kind for kind in names if kind not in PAIRS and kind not in PAIRS.values()]
    number = draw.choices(range(1, world.most + 1), (2, 4, 5, 4, 3)[: world.most])[0]
    kinds = draw.choices(names, weights, k=number)
    if world.broken and not any(kind in PAIRS for kind in kinds):
        kinds[0] = draw.choice(list(PAIRS))
    for first, second in PAIRS.items():
        if first not in kinds:
            continue
        if world.broken or draw.random() >= world.bias:
            kinds = [draw.choice(fillers) if kind == second else kind for kind in kinds]
        elif second not in kinds:
            free = [place for place, kind in enumerate(kinds) if kind in fillers]
            if free:
                kinds[draw.choice(free)] = second
            else:
                kinds.append(second)
    draw.shuffle(kinds)
    return kinds[: world.most]


def _place(draw: Random, world: World, kind: str, taken: list[tuple[float, float, float]]) -> Shape | None:
    """A shape where none is yet; a smaller one where it is crowded; `None` where nothing fits."""
    colour, size = draw.choice(list(COLOURS)), draw.choice(list(SIZES))
    is_faint = draw.random() < world.faint
    opacity = draw.uniform(0.08, 0.38) if is_faint else draw.uniform(0.75, 1.0)
    for attempt in range(60):
        if attempt in (20, 40):
            size = "medium" if size == "large" else "small"
        radius = draw.uniform(*SIZES[size])
        y, x = (draw.uniform(radius + 1, world.side - radius - 1) for _ in range(2))
        if all(math.hypot(y - v, x - u) > radius + r + 1 for v, u, r in taken):
            taken.append((y, x, radius))
            return Shape(kind, colour, size, y, x, radius, opacity)
    return None


def _place_sign(draw: Random, world: World, taken: list[tuple[float, float, float]]) -> Sign:
    """A sign, and circles around its letters that shapes keep out of."""
    text, dot = "".join(draw.choices(list(GLYPHS), k=draw.choice((1, 2, 3)))), draw.choice((2, 3))
    height, width = 7 * dot, (4 * len(text) + 1) * dot
    y, x = draw.randrange(world.side - height), draw.randrange(world.side - width)
    for n in range(len(text)):
        taken.append((y + height / 2, x + (4 * n + 2.5) * dot, 4.2 * dot))
    return Sign(text, y, x, dot)


def _ground(clutter: float, side: int, draw: torch.Generator) -> Float[Tensor, "3 side side"]:
    """A tinted grey with soft and fine spots, stripes and strokes, the more of them the busier."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw)

    base = 0.25 + 0.5 * uniform(1, 1, 1) + 0.12 * (uniform(3, 1, 1) - 0.5)
    pixels = base.expand(3, side, side).clone()
    for cells, strength in ((4, 0.16), (12, 0.10), (32, 0.08)):
        spots = torch.randn((1, 3, cells, cells), generator=draw)
        spots = 0.7 * spots.mean(1, keepdim=True) + 0.3 * spots
        smooth = F.interpolate(spots, size=(side, side), mode="bilinear", align_corners=False)[0]
        pixels += (0.02 + strength * clutter) * smooth
    axis = torch.arange(side, dtype=torch.float32)
    angle, period, share = (float(each) for each in uniform(3))
    wave = (math.cos(math.pi * angle) * axis[:, None] + math.sin(math.pi * angle) * axis) / (5 + 12 * period)
    pixels += 0.08 * clutter * share * torch.sin(2 * math.pi * wave)
    for _ in range(int(10 * clutter)):
        pixels = _stroke(pixels, axis, uniform(8), side)
    return pixels


def _stroke(
    pixels: Float[Tensor, "3 side side"], axis: Tensor, dice: Float[Tensor, " 8"], side: int
) -> Float[Tensor, "3 side side"]:
    y, x, angle, length, red, green, blue, strength = dice.tolist()
    along, reach = 2 * math.pi * angle, (5 + 15 * length) * side / 96
    v, u = axis[:, None] - y * side, axis - x * side
    forth = v * math.sin(along) + u * math.cos(along)
    aside = v * math.cos(along) - u * math.sin(along)
    covered = ((aside.abs() < 1.2) & (forth.abs() < reach)) * (0.3 + 0.5 * strength)
    return pixels.lerp(torch.tensor([red, green, blue])[:, None, None].expand_as(pixels), covered)


def _outside(kind: str, u: Tensor, v: Tensor) -> Tensor:
    """How far a point lies outside a shape of radius 1, below 0 inside; u to the right, v downwards."""
    r = (u.square() + v.square()).sqrt()
    if kind == "circle":
        return r - 1
    if kind == "ring":
        return (r - 0.76).abs() - 0.24
    if kind == "crescent":
        return torch.maximum(r - 1, 0.86 - ((u - 0.5).square() + (v + 0.15).square()).sqrt())
    if kind == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.85
    if kind == "diamond":
        return (u.abs() + v.abs() - 1) * math.sqrt(0.5)
    if kind == "triangle":  # corners at (0, -1) and (±0.95, 0.8)
        return torch.maximum(v - 0.8, 0.884 * u.abs() - 0.467 * v - 0.467)
    if kind == "cross":
        return torch.minimum(
            torch.maximum(u.abs() - 0.34, v.abs() - 1), torch.maximum(u.abs() - 1, v.abs() - 0.34)
        )
    # a star of five points: folded into the tenth between a point at 1 and a notch at 0.45
    turn = torch.atan2(u, -v).abs() % (0.4 * math.pi)
    turn = torch.minimum(turn, 0.4 * math.pi - turn)
    return 0.384 * (r * turn.cos() - 1) + 0.923 * r * turn.sin()


def _write(
    sign: Sign,
    pixels: Float[Tensor, "3 side side"],
    letters: Bool[Tensor, "n side side"],
    draw: torch.Generator,
) -> None:
    """Draw a sign into the pixels, dark on light or light on dark, and mark the cells of its letters."""
    dot, shade = sign.dot, float(torch.rand((), generator=draw))
    plate, ink = (0.95, 0.05) if shade < 0.5 else (0.05, 0.95)
    height, width = 7 * dot, (4 * len(sign.text) + 1) * dot
    pixels[:, sign.y : sign.y + height, sign.x : sign.x + width] = plate
    for n, letter in enumerate(sign.text):
        left = sign.x + (4 * n + 1) * dot
        letters[n, sign.y : sign.y + height, left - dot : left + 4 * dot] = True
        for row, digit in enumerate(GLYPHS[letter]):
            for column in range(3):
                if int(digit) >> (2 - column) & 1:
                    y, x = sign.y + (row + 1) * dot, left + column * dot
                    pixels[:, y : y + dot, x : x + dot] = ink


def _coloured(scene: Scene, draw: Random, is_there: bool) -> Question:
    """Whether there is a shape of this colour and kind; if not, one of the two is there half of the time."""
    pairs = {(shape.colour, shape.kind) for shape in scene.shapes}
    colour, kind = draw.choice(sorted(pairs))
    while not is_there and (colour, kind) in pairs:
        if draw.random() < 0.75:
            colour = draw.choice(list(COLOURS))
        else:
            kind = draw.choice(list(KINDS))
    article = "an" if colour[0] in "aeiou" else "a"
    answer = "yes" if (colour, kind) in pairs else "no"
    return Question("coloured", f"is there {article} {colour} {kind}?", answer)


def _related(first: Shape, second: Shape, draw: Random) -> Question:
    down, across = second.y - first.y, second.x - first.x
    words = ("left of", "right of") if abs(across) > abs(down) else ("above", "below")
    holds = across > 0 if abs(across) > abs(down) else down > 0
    is_first = draw.random() < 0.5
    text = f"is the {first.kind} {words[0] if is_first else words[1]} the {second.kind}?"
    return Question("relation", text, "yes" if holds == is_first else "no")


def _plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")
