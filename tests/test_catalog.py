"""Cards are read, checked and found; what is derived from them is fresh."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest

from nearfield import catalog

CARD = """
title = "A title"
arxiv = "2403.04690"
year = 2024
code = { repo = "someone/something", licence = "MIT" }
kind = ["model"]
domain = ["vision"]
summary = "What it brings."
[entry]
ENTRY = "nearfield.core.dims:per_dim"
[params]
ENTRY = 12
[[claim]]
id = "first"
paper = "It is so."
expect = "a = 1"
here = "nearfield.core.dims:per_dim"
needs = ["cuda"]
smoke_seconds = 2
[[departs]]
what = "A detail."
"""


def put(home, slug, text):
    folder = home / slug
    folder.mkdir()
    (folder / "card.toml").write_text(text, encoding="utf-8")
    return folder / "card.toml"


@pytest.fixture
def home(tmp_path):
    put(tmp_path, "first_system", CARD.replace("ENTRY", "one"))
    put(tmp_path, "second", CARD.replace("ENTRY", "two").replace('["vision"]', '["text", "vision"]'))
    return tmp_path


def test_a_card_says_what_its_file_says(home):
    card = catalog.find("first_system", home)
    assert (card.title, card.year, card.code) == ("A title", 2024, ("someone/something", "MIT"))
    assert card.params == {"one": 12} and card.departs == ("A detail.",)
    assert card.claims[0] == catalog.Claim(
        "first", "It is so.", "a = 1", "nearfield.core.dims:per_dim", ("cuda",), 2.0
    )


@pytest.mark.parametrize("name", ["first_system", "first-system", "First-System"])
def test_hyphens_and_underscores_name_the_same_system(home, name):
    assert catalog.find(name, home).slug == "first_system"


def test_a_wrong_name_answers_with_the_nearest_right_one(home):
    with pytest.raises(LookupError, match=r"no system 'secnod'.*second"):
        catalog.find("secnod", home)
    with pytest.raises(LookupError, match=r"no entry 'on'.*one"):
        catalog.find_entry("on", home)
    with pytest.raises(LookupError, match=r"no domain 'txt'.*text"):
        catalog.listing(domain="txt", home=home)


def test_listing_keeps_what_was_asked_for(home):
    assert [row["slug"] for row in catalog.listing(home=home).json()] == ["first_system", "second"]
    assert [row["slug"] for row in catalog.listing(domain="text", home=home).json()] == ["second"]
    assert catalog.listing(kind="steer", home=home).json() == []


def test_two_cards_cannot_offer_the_same_entry(home):
    put(home, "third", CARD.replace("ENTRY", "one"))
    with pytest.raises(catalog.CardError, match="'one' is offered by first_system and third"):
        catalog.cards(home)


WRONG = [
    ('title = "A title"', "", "'title' is missing"),
    ('title = "A title"', "title = 3", "title=3 must be text"),
    ('kind = ["model"]', 'kind = ["gadget"]', "one or more of operator"),
    ('domain = ["vision"]', "domain = []", "at least one domain"),
    ('domain = ["vision"]', 'domain = "vision"', "must be a list"),
    ("year = 2024", 'year = "2024"', "must be a number"),
    ("ENTRY = 12", "other = 12", r"\['other'\], which \[entry\] does not offer"),
    ("ENTRY = 12", "ENTRY = 1.5", "whole numbers"),
    ('ENTRY = "nearfield.core.dims:per_dim"', 'ENTRY = "os:system"', "must be 'nearfield.module:name'"),
    ("smoke_seconds = 2", "smoke_seconds = 60", "at most 8"),
    ("smoke_seconds = 2", "smoke_second = 2", "holds.*smoke_second"),
    (
        'code = { repo = "someone/something", licence = "MIT" }',
        'code = { repo = "a/b" }',
        "'licence' is missing",
    ),
    ("year = 2024", "year = ", "is no TOML"),
    ('what = "A detail."', 'why = "A detail."', "departs"),
]


@pytest.mark.parametrize(("good", "bad", "sentence"), WRONG, ids=[bad or good for good, bad, _ in WRONG])
def test_a_wrong_card_is_refused_with_a_sentence(tmp_path, good, bad, sentence):
    assert good in CARD
    path = put(tmp_path, "broken", CARD.replace(good, bad).replace("ENTRY", "one"))
    with pytest.raises(catalog.CardError, match=sentence) as error:
        catalog.read(path)
    assert str(error.value).startswith(f"{tmp_path.name}/broken/card.toml")


def test_a_claim_may_not_stand_twice(tmp_path):
    claim = CARD[CARD.index("[[claim]]") : CARD.index("[[departs]]")]
    with pytest.raises(catalog.CardError, match="must differ"):
        catalog.read(put(tmp_path, "twice", CARD.replace("ENTRY", "one") + claim))


def test_what_is_derived_from_the_cards_is_fresh(root):
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_card_makes_pages_stale(root):
    spec = importlib.util.spec_from_file_location("generate", root / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    card = catalog.find("fna")
    changed = replace(card, summary="Something | else.")
    assert generate.page(card) != generate.page(changed)
    assert "Something \\| else." in generate.table((changed,), "")
