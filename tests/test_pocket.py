"""The pocket models: their package, what they are trained by, and what the shipped weights can do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'nearfield[hf]'")

POCKET = Path(__file__).parents[1] / "pocket"
if not POCKET.is_dir():
    pytest.skip("the pocket distribution is not beside this one", allow_module_level=True)
sys.path.insert(0, str(POCKET))

import evaluate  # noqa: E402
import lm  # noqa: E402
import nearfield_pocket  # noqa: E402
import tasks  # noqa: E402
import vlm  # noqa: E402
from ngram import NGram  # noqa: E402

from nearfield.data import scenes  # noqa: E402
from nearfield.data.scenes import World  # noqa: E402

sys.path.remove(str(POCKET))


def shipped(name: str) -> Path:
    try:
        return nearfield_pocket.path(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


# the package


def test_names_are_checked_and_the_nearest_is_told():
    with pytest.raises(ValueError, match="Did you mean 'lm-base'"):
        nearfield_pocket.path("lm-bas")


def test_importing_the_package_imports_no_torch():
    code = "import nearfield_pocket, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=POCKET, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", "False"]


# the vision-language model while it learns


@pytest.fixture(scope="module")
def learner():
    torch.manual_seed(0)
    made = vlm.Learner(vlm.build())
    for parameter in made.parameters():
        if parameter.ndim > 1:  # large enough that logits depend on everything
            torch.nn.init.normal_(parameter, std=0.06)
    return made.eval()


@torch.no_grad()
def test_packed_questions_are_answered_as_if_each_were_alone(learner):
    here = scenes.scene(3)
    asked = scenes.questions(here, Random(1))[::4]
    batch = vlm.collate([vlm.sample(here, asked, Random(0))])
    logits = learner.model.lm_head(learner.speak(learner.see(batch["pixels"], batch["places"])[0], batch))
    for number, question in enumerate(asked, 1):
        ids = torch.tensor([evaluate.prompt(question.text)])
        alone = learner.model(input_ids=ids, pixel_values=batch["pixels"]).logits[0, -1]
        at = ((batch["segments"][0] == number) & (batch["targets"][0] != vlm.IGNORED)).nonzero()[0]
        torch.testing.assert_close(logits[0, at[0]], alone, atol=1e-5, rtol=1e-4)


def test_small_pictures_are_windows_of_the_grid():
    data = vlm.Lessons(0, 4, 8, ((0.0, World(side=48, most=2)), (0.5, World())))
    small, large = data[0], data[31]
    rows, columns = small["places"] // vlm.GRID, small["places"] % vlm.GRID
    assert small["pixels"].shape == (3, 48, 48)
    assert rows.max() - rows.min() == columns.max() - columns.min() == 7
    assert torch.equal(large["places"], torch.arange(256))
    assert all(torch.equal(small[name], data[0][name]) for name in small)


def test_labels_of_patches_are_what_the_scene_holds():
    for number in range(10):
        here = scenes.scene(number)
        what = vlm.sample(here, [], Random(0))["what"]
        found = {vlm.WHAT[place] for place in what.tolist()} - {"nothing"}
        letters = set(here.sign.text) if here.sign else set()
        assert found <= set(here.kinds) | letters


def test_labels_of_cells_and_offsets_lie_on_the_shape():
    shape = scenes.Shape("square", "red", "large", 48.0, 36.0, 15.0, 1.0)
    made = vlm.sample(scenes.Scene((shape,), None, 0, 0.0), [], Random(0))
    centre, corner = 8 * 16 + 6, 5 * 16 + 3  # it begins at (35.25, 23.25)
    assert made["covered"][centre].tolist() == [1.0] * 9
    torch.testing.assert_close(made["offsets"][centre], torch.tensor([3 / 15, 3 / 15]))
    assert 0 < made["covered"][corner][-1] == made["covered"][corner].sum() < 1
    assert made["covered"].sum() == pytest.approx(25.5**2 / 4, rel=0.1)


def test_both_losses_reach_every_weight_that_is_used(learner):
    data = vlm.Lessons(0, 1, 2, ((0.0, World(side=48, most=2)),))
    batch = vlm.collate([data[0], data[1]])
    learner.zero_grad()
    vlm.talk(learner, batch).mean.backward()
    without = [name for name, parameter in learner.named_parameters() if parameter.grad is None]
    learner.zero_grad()
    assert without == []


def test_reading_leaves_the_tower_and_the_projector_as_they_are(learner):
    learner.learns_to_see(False)
    still = {name for name, p in learner.named_parameters() if not p.requires_grad}
    learner.learns_to_see(True)
    assert still == {name for name, _ in learner.named_parameters() if "language_model" not in name}
    assert all(p.requires_grad for p in learner.parameters())


# the language models while they learn


def test_layers_begin_as_wide_as_their_width_asks():
    for layers, width in (
        (lm.build().model.layers, lm.WIDTH),
        (vlm.build().model.language_model.layers, vlm.WIDTH),
    ):
        for name, matrix in layers.named_parameters():
            if matrix.ndim > 1:
                assert abs(float(matrix.detach().std()) * width**0.5 - 1) < 0.05, name


def test_drills_begin_short():
    draw = Random(0)
    shares = (0.0, 0.5, 1.0)
    longest = [max(sum(mark for _, mark in tasks.drill(draw, done)) for _ in range(200)) for done in shares]
    assert longest == [3, 3, 8]


def test_texts_of_drills_say_the_same_again_and_again():
    corpus = lm.Corpus(None, torch.randperm(2000), torch.zeros(0))
    windows = {
        drills: lm.Windows(corpus, 0, 10, 2, ((0.0, 64),), (0.0, 0.0), drills) for drills in (True, False)
    }
    for number in range(20):
        ids = windows[True][number]["ids"][1:]
        assert len(ids) == 64 and any(torch.equal(ids[n:], ids[:-n]) for n in range(6, 33))
        assert len(windows[False][number]["ids"][1:].unique()) == 64


def test_answers_of_tasks_are_found_in_what_stands_before_them():
    draw = Random(0)
    for _ in range(50):
        before = ""
        for text, is_answer in tasks.recall(draw, 5):
            if is_answer:
                key = before.rsplit(" the ", 1)[1].removesuffix(" is")
                assert f" the {key} is{text[:-1]}" in before.split("\nQuestions:")[0]
            before += text
    for name in tasks.INSTRUCTIONS:
        (question, marked), (answer, is_answer) = tasks.instruction(draw, name)
        words = question.split("Words: ")[1].split("\n")[0].split()
        assert (marked, is_answer) == (False, True)
        assert answer.strip().lower().strip("()").split(" ")[0].strip("(),") in (*words, str(len(words)))


def test_kin_are_related_as_the_story_says():
    draw = Random(0)
    for _ in range(50):
        pieces = tasks.kinship(draw, 4)
        told = pieces[0][0].removeprefix("Story: ").rstrip(".").split(". ")
        parent = {line.split()[-1]: line.split()[0] for line in told}
        for (question, _), (answer, _) in zip(pieces[1::2], pieces[2::2], strict=True):
            if "how is" in question:
                older, younger = question.split()[3], question.split()[-1].rstrip("?")
                expected = 2 if answer.strip().startswith("grand") else 1
                for _ in range(expected):
                    younger = parent[younger]
                assert younger == older


def test_five_grams_are_probabilities_and_prefer_what_they_have_seen():
    draw = np.random.default_rng(0)
    text = draw.integers(0, 6, 400)
    grams = NGram(text, order=3)
    for context in (text[10:12], np.array([5, 2047]), text[3:4]):
        rows = np.array([[*context, token] for token in range(2048)])
        total = sum(np.exp(grams.log_probability(row)[-1]) for row in rows)
        assert total == pytest.approx(1, abs=1e-9)
    assert grams.log_probability(text).mean() > grams.log_probability(draw.integers(0, 6, 400)).mean()


# what is shipped


def test_cards_say_how_it_was_made_and_all_gates_hold():
    for name in nearfield_pocket.NAMES:
        shipped(name)
        card = nearfield_pocket.card(name)
        assert card["licence"] == "Apache-2.0"
        assert all("seed" in stage["recipe"] for stage in card["stages"].values())
        assert all(card["gates"].values()), card["gates"]
        json.dumps(card)


@pytest.mark.slow
def test_the_language_model_recalls_as_its_card_says():
    folder = shipped("lm-base")
    model = evaluate.reread(folder)
    from transformers import AutoTokenizer

    empty = torch.zeros(0, dtype=torch.int16)
    corpus = lm.Corpus(AutoTokenizer.from_pretrained(folder), empty, empty)
    draw = Random(lm.HELD_OUT + 1)
    right = lm.answers_right(model, corpus, [tasks.recall(draw, 8) for _ in range(20)])
    known = nearfield_pocket.card("lm-base")["metrics"]["recall-8"]
    assert sum(right) / len(right) == pytest.approx(known, abs=0.1)


@pytest.mark.slow
def test_the_twin_follows_instructions():
    folder = shipped("lm-chat")
    model = evaluate.reread(folder)
    from transformers import AutoTokenizer

    empty = torch.zeros(0, dtype=torch.int16)
    corpus = lm.Corpus(AutoTokenizer.from_pretrained(folder), empty, empty)
    draw = Random(lm.HELD_OUT + 1)
    right = lm.answers_right(model, corpus, [tasks.instruction(draw) for _ in range(60)])
    known = nearfield_pocket.card("lm-chat")["metrics"]["instructions"]
    assert sum(right) / len(right) == pytest.approx(known, abs=0.15)


@pytest.mark.slow
def test_the_vision_language_model_answers_as_its_card_says():
    folder = shipped("vlm")
    learner = vlm.Learner(evaluate.reread(folder))
    known = nearfield_pocket.card("vlm")["metrics"]
    for split in ("random", "adversarial"):
        # 60 scenes that the card's figures were not measured on: 120 answers, three deviations of a share
        found = evaluate.pope_figures(learner, scenes.pope(split, 60, seed=vlm.HELD_OUT + 1))
        assert found["accuracy"] == pytest.approx(known[f"pope-{split}"]["accuracy"], abs=0.12)


def test_the_processor_prepares_what_the_model_was_trained_on():
    made = evaluate.processor()
    from PIL import Image

    pixels = (scenes.render(scenes.scene(0)).pixels * 255).byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "is there a circle?"}]
    found = made.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert found["input_ids"][0].tolist() == evaluate.prompt("is there a circle?")
    torch.testing.assert_close(found["pixel_values"][0], scenes.normalised(pixels / 255))
