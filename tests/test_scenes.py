"""Rendered scenes: what is said of them is what is drawn, and pairs keep together as often as they should."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
import torch

from nearfield.data import scenes
from nearfield.data.scenes import Scene, Shape, Sign, World

HERE = [scenes.scene(number, seed=7) for number in range(40)]


def test_a_scene_is_a_function_of_its_number_seed_and_world():
    assert scenes.scene(3, seed=1) == scenes.scene(3, seed=1)
    assert len({scenes.scene(3, seed=seed) for seed in range(5)}) == 5
    assert scenes.scene(3, world=World(faint=1.0)) != scenes.scene(3)
    a, b = scenes.render(HERE[0]), scenes.render(HERE[0])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_global_random_numbers_are_left_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    scenes.render(scenes.scene(0))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("side", [48, 72, 96])
def test_shapes_lie_inside_apart_and_from_left_to_right(side):
    for number in range(30):
        here = scenes.scene(number, world=World(side=side, most=3))
        picture = scenes.render(here, side)
        assert picture.pixels.shape == (3, side, side)
        assert 0 <= picture.pixels.min() <= picture.pixels.max() <= 1
        masks = torch.cat([picture.masks, picture.letters])
        assert 1 <= len(here.shapes) <= 3
        assert picture.masks.flatten(1).any(1).all()
        for a, b in combinations(picture.masks, 2):
            assert (a & b).sum() <= 1  # corners stand out of the circle that is kept free
        if here.sign is not None:
            assert len(picture.letters) == len(here.sign.text)
            assert masks[-1].any()
        assert [shape.x for shape in here.shapes] == sorted(shape.x for shape in here.shapes)


def test_a_mask_is_where_the_shape_is_and_the_colour_is_under_it():
    for kind in scenes.KINDS:
        shape = Shape(kind, "red", "large", 40.0, 50.0, 15.0, 1.0)
        picture = scenes.render(Scene((shape,), None, 5, 0.0))
        mask = picture.masks[0]
        y, x = mask.nonzero().float().mT + 0.5
        assert ((y - 40).square() + (x - 50).square()).max() < 1.75 * 15**2  # the corners of a square
        assert 150 < mask.sum() < 760  # a disc of radius 15 has 707 pixels
        found = picture.pixels[:, mask].mean(1)
        assert (found - torch.tensor(scenes.COLOURS["red"])).abs().max() < 0.1


def test_an_opacity_of_zero_leaves_the_ground():
    shape = Shape("star", "blue", "medium", 40.0, 50.0, 10.0, 0.0)
    # the same ground but for the colour drawn for the shape, which comes before the noise
    seen = scenes.render(Scene((shape,), None, 5, 0.0)).pixels
    empty = scenes.render(Scene((), None, 5, 0.0)).pixels
    assert (seen - empty).abs().mean() < 0.02


def test_kinds_can_be_told_apart_by_their_masks():
    masks = {}
    for kind in scenes.KINDS:
        shape = Shape(kind, "red", "large", 48.0, 48.0, 15.0, 1.0)
        masks[kind] = scenes.render(Scene((shape,), None, 0, 0.0)).masks[0]
    for a, b in combinations(masks, 2):
        both, either = (masks[a] & masks[b]).sum(), (masks[a] | masks[b]).sum()
        assert both / either < 0.9, (a, b)


def test_every_letter_is_drawn_in_its_own_way():
    drawn = []
    for letter in scenes.GLYPHS:
        picture = scenes.render(Scene((), Sign(letter, 20, 20, 3), 0, 0.0))
        plate = picture.pixels.mean(0)[20:41, 20:35]
        dark = (plate < 0.5).float()
        drawn.append(dark if dark[0, 0] == 0 else 1 - dark)  # some signs are light on dark
        assert picture.letters.shape == (1, 96, 96)
    for a, b in combinations(range(len(drawn)), 2):
        assert not torch.equal(drawn[a], drawn[b])


def test_captions_name_all_shapes_in_order():
    for here in HERE:
        text = scenes.caption(here)
        assert text.endswith(".")
        words = text.replace(",", "").replace(".", "").split()
        assert [word for word in words if word in scenes.KINDS] == [shape.kind for shape in here.shapes]
        assert scenes.mentioned(text) == here.kinds


def test_answers_follow_from_the_scene():
    about = set()
    for number, here in enumerate(HERE):
        colours = {(shape.colour, shape.kind) for shape in here.shapes}
        for question in scenes.questions(here, Random(number)):
            about.add(question.about)
            words = question.text.rstrip("?").split()
            if question.about == "presence":
                assert question.answer == ("yes" if words[-1] in here.kinds else "no")
            elif question.about == "coloured":
                assert question.answer == ("yes" if (words[-2], words[-1]) in colours else "no")
            elif question.about == "total":
                assert question.answer == scenes.NUMBERS[len(here.shapes)]
            elif question.about == "count":
                kind = next(kind for kind in scenes.KINDS if words[2] in (f"{kind}s", f"{kind}es"))
                count = sum(shape.kind == kind for shape in here.shapes)
                assert question.answer == scenes.NUMBERS[count]
            elif question.about == "colour":
                assert (question.answer, words[-1]) in colours
            elif question.about == "kind":
                assert (words[-1], question.answer.split()[-1]) in colours
            elif question.about == "size":
                assert question.answer in {shape.size for shape in here.shapes if shape.kind == words[-1]}
            elif question.about == "sign":
                text = "nothing" if here.sign is None else " ".join(here.sign.text)
                assert question.answer == text
            elif question.about == "relation":
                by_kind = {shape.kind: shape for shape in here.shapes}
                first, second = by_kind[words[2]], by_kind[words[-1]]
                holds = {
                    "left": first.x < second.x,
                    "right": first.x > second.x,
                    "above": first.y < second.y,
                    "below": first.y > second.y,
                }[words[3]]
                assert question.answer == ("yes" if holds else "no")
    assert about == {
        "presence", "coloured", "count", "total", "colour", "size", "kind", "relation", "sign",
    }  # fmt: skip


def test_the_vocabulary_holds_every_word_that_is_said():
    known = set(scenes.vocabulary())
    for number, here in enumerate(HERE):
        said = [scenes.caption(here), "describe this picture."]
        for question in scenes.questions(here, Random(number)):
            said += [question.text, question.answer]
        words = " ".join(said).replace(",", " , ").replace(".", " . ").replace("?", " ? ").split()
        assert known.issuperset(words)


@pytest.mark.parametrize("bias", [0.0, 0.5, 1.0])
def test_pairs_keep_together_as_often_as_the_world_says(bias):
    """Within four standard deviations, and a little less often where a crowd leaves no room."""
    world = World(bias=bias)
    for first, second in scenes.PAIRS.items():
        found = [scenes.scene(number, world=world).kinds for number in range(600)]
        together = [second in kinds for kinds in found if first in kinds]
        share = sum(together) / len(together)
        deviation = (bias * (1 - bias) / len(together)) ** 0.5
        assert bias - 0.08 - 4 * deviation <= share <= bias + 4 * deviation


def test_the_splits_of_pope_ask_about_the_same_scenes():
    rows = {split: scenes.pope(split, 20, seed=3) for split in scenes.SPLITS}
    assert len({tuple(here for here, _ in row) for row in rows.values()}) == 1
    assert len({tuple(pair[0] for _, pair in row) for row in rows.values()}) == 1
    for split, row in rows.items():
        for here, (there, missing) in row:
            assert (there.answer, missing.answer) == ("yes", "no")
            kind = missing.text.rstrip("?").split()[-1]
            assert kind not in here.kinds
            if split == "adversarial":
                assert any(scenes.PAIRS.get(other) == kind for other in here.kinds)
            if split == "popular":
                assert all(scenes.KINDS[kind] >= scenes.KINDS[k] for k in scenes.KINDS if k not in here.kinds)


def test_broken_worlds_have_a_lonely_first_of_a_pair():
    for number in range(40):
        kinds = scenes.scene(number, world=replace(World(), broken=True)).kinds
        for first, second in scenes.PAIRS.items():
            assert first not in kinds or second not in kinds


def test_normalised_pixels_of_middle_grey_are_zero():
    grey = torch.full((2, 3, 4, 4), scenes.MEAN)
    assert not scenes.normalised(grey).any()
