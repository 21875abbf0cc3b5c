"""Tasks in words whose answers stand far back, and instructions with responses: pieces of text, marked.

A task is a list of `(text, is_answer)`. What is no answer is drawn at random and can hardly be predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Pieces = list[tuple[str, bool]]

_WORDS = """
apple arrow basket bell bird boat bone book bread bridge brush butter candle castle chair circle
clock cloud coat copper corn crown desk door dress drum eagle feather field fire fish flag flower
forest garden glass gold grass hammer hat honey horse house iron island jacket key kitchen knife
ladder lake lamp leaf lemon letter light lion map mirror moon mountain mouse needle oil orange paper
pencil pepper piano pillow plate pocket queen rain ring river road rock roof rope rose salt sand
school ship silver snow spoon star stone sugar sun table tiger tower train tree wagon wall water
wheel wind window winter wood wool
"""
_NAMES = """
Adam Alice Anna Ben Carl Clara Daniel David Emma Eva Frank Grace Henry Helen Ivan Jack Jane John
Julia Karl Kate Laura Leo Lucy Maria Mark Mary Max Nina Oscar Paul Peter Rose Ruth Sam Sara Simon
Sofia Thomas Tim Vera Victor
"""
_FEMALE = """
Alice Anna Clara Emma Eva Grace Helen Jane Julia Kate Laura Lucy Maria Mary Nina Rose Ruth Sara
Sofia Vera
"""
WORDS, NAMES, FEMALE = tuple(_WORDS.split()), tuple(_NAMES.split()), frozenset(_FEMALE.split())


def recall(draw: Random, pairs: int, asked: int | None = None) -> Pieces:
    """Keys with values, then questions on the keys in another order."""
    keys = draw.sample(WORDS, pairs)
    values = [str(draw.randrange(10, 100)) for _ in keys]
    pieces: Pieces = [("Facts:", False)]
    pieces += [(f" the {key} is {value};", False) for key, value in zip(keys, values, strict=True)]
    pieces[-1] = (pieces[-1][0][:-1] + ".", False)
    pieces.append(("\nQuestions:", False))
    for place in draw.sample(range(pairs), asked or pairs):
        pieces += [(f" the {keys[place]} is", False), (f" {values[place]};", True)]
    return pieces


def hidden(draw: Random, text: str, keys: int) -> Pieces:
    """A text with doors and their keys hidden in it, and a question on each at its end."""
    doors = draw.sample(WORDS, keys)
    numbers = ["".join(draw.choices("0123456789", k=4)) for _ in doors]
    lines = text.split("\n")
    for door, number in zip(doors, numbers, strict=True):
        lines.insert(draw.randrange(len(lines) + 1), f"The key of the {door} door is {number}.")
    pieces: Pieces = [("\n".join(lines), False)]
    for place in draw.sample(range(keys), keys):
        pieces += [(f"\nThe key of the {doors[place]} door is", False), (f" {numbers[place]}.", True)]
    return pieces


def kinship(draw: Random, people: int) -> Pieces:
    """A line of parents and children told out of order, and how some of them are related."""
    line = draw.sample(NAMES, people)
    told = [
        f"{parent} is the {'mother' if parent in FEMALE else 'father'} of {child}."
        for parent, child in zip(line, line[1:], strict=False)
    ]
    draw.shuffle(told)
    pieces: Pieces = [("Story: " + " ".join(told), False)]
    for _ in range(2):
        distance = draw.choice((1, 2)) if people > 2 else 1
        place = draw.randrange(people - distance)
        older, younger = line[place], line[place + distance]
        word = "grand" * (distance - 1) + ("mother" if older in FEMALE else "father")
        pieces += [(f"\nQuestion: who is the {word} of {younger}?", False), (f" {older}.", True)]
        pieces += [(f"\nQuestion: how is {older} related to {younger}?", False), (f" {word}.", True)]
    return pieces


def counting(draw: Random, length: int) -> Pieces:
    """Words of two or three kinds in a row, and how many there are of each."""
    kinds = draw.sample(WORDS, draw.choice((2, 3)))
    row = draw.choices(kinds, k=length)
    pieces: Pieces = [("Row: " + " ".join(row) + ".", False)]
    for kind in kinds:
        pieces += [(f"\nHow many times {kind}?", False), (f" {row.count(kind)}.", True)]
    return pieces


def copying(draw: Random, length: int) -> Pieces:
    """Words in a row, and the same once more."""
    row = " ".join(draw.choices(WORDS, k=length))
    return [(f"Copy: {row}.\nCopy:", False), (f" {row}.", True)]


def task(draw: Random, done: float, text: Callable[[Random], str]) -> Pieces:
    """Any of them, the longer the further the training has come (`done` between 0 and 1)."""
    longest = 3 + round(13 * min(1.0, 2 * done))
    kind = draw.random()
    if kind < 0.55:
        return recall(draw, draw.randint(2, longest))
    if kind < 0.65:
        return hidden(draw, text(draw), draw.randint(1, 3))
    if kind < 0.80:
        return kinship(draw, draw.randint(2, 5))
    if kind < 0.88:
        return counting(draw, draw.randint(3, 9))
    return copying(draw, draw.randint(3, longest))


def drill(draw: Random, done: float) -> Pieces:
    """Copying or recall: two or three at first, up to eight at the end."""
    longest = 3 + round(5 * max(0.0, 2 * done - 1))
    return (copying if draw.random() < 0.4 else recall)(draw, draw.randint(2, longest))


def instruction(draw: Random, name: str | None = None) -> Pieces:
    """An instruction on a few words, one of `INSTRUCTIONS` or any, and the response that follows it."""
    row = draw.sample(WORDS, draw.randint(2, 6))
    wanted, response = _RESPONSES[name or draw.choice(INSTRUCTIONS)](draw, row)
    return [(f"Instruction: {wanted}\nWords: {' '.join(row)}\nResponse:", False), (f" {response}\n", True)]


_RESPONSES: dict[str, Callable[[Random, list[str]], tuple[str, str]]] = {
    "repeat": lambda draw, row: (draw.choice(("Repeat the words.", "Say the words again.")), " ".join(row)),
    "reverse": lambda draw, row: (
        draw.choice(("Reverse the words.", "Say the words backwards.")),
        " ".join(reversed(row)),
    ),
    "capitals": lambda draw, row: ("Write the words in capitals.", " ".join(row).upper()),
    "first": lambda draw, row: ("Give the first word.", row[0]),
    "last": lambda draw, row: ("Give the last word.", row[-1]),
    "count": lambda draw, row: ("Count the words.", str(len(row))),
    "list": lambda draw, row: ("Put a comma between the words.", ", ".join(row)),
    "brackets": lambda draw, row: ("Put each word in brackets.", " ".join(f"({word})" for word in row)),
}
INSTRUCTIONS = tuple(_RESPONSES)
