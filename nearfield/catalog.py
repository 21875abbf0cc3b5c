"""The cards: what each system is, offers and claims. Standard library only, so that listing is instant.

A card is `nearfield/systems/<slug>/card.toml`. Nothing is registered at import; what a card names as
"module:function" is imported when it is asked for.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent / "systems"
KINDS = ("operator", "layer", "model", "convert", "steer", "measure", "train", "study")
FIELDS = {
    "title",
    "arxiv",
    "year",
    "code",
    "kind",
    "domain",
    "summary",
    "entry",
    "params",
    "claim",
    "departs",
}
CLAIM_FIELDS = {"id", "paper", "expect", "here", "needs", "smoke_seconds"}


@dataclass(frozen=True)
class Result:
    """What a claim's experiment found: in words, and whether the claim holds (`None`: not decided here).

    `plot(axes)` draws it with matplotlib; `skipped` says why nothing was run, or which part was not.
    """

    found: str
    holds: bool | None
    plot: Callable[[Any], None] | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Claim:
    """One statement of a paper and the experiment that shows it here."""

    id: str
    paper: str
    expect: str
    here: str
    needs: tuple[str, ...]
    smoke_seconds: float

    def function(self) -> Callable[..., Result]:
        """The experiment, `(*, full=False) -> Result`."""
        return resolve(self.here)


@dataclass(frozen=True)
class Card:
    """One system: a paper, what of it can be used here, and what is claimed."""

    slug: str
    title: str
    arxiv: str
    year: int
    code: tuple[str, str]
    kind: tuple[str, ...]
    domain: tuple[str, ...]
    summary: str
    entry: dict[str, str]
    params: dict[str, int]
    claims: tuple[Claim, ...]
    departs: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """What `nearfield list --json` says of this system."""
        return {
            "slug": self.slug,
            "title": self.title,
            "kind": list(self.kind),
            "domain": list(self.domain),
            "claims": [claim.id for claim in self.claims],
        }

    def json(self) -> dict[str, Any]:
        """The whole card, for `nearfield show --json`."""
        return {**asdict(self), "code": {"repo": self.code[0], "licence": self.code[1]}}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        about = Table.grid(padding=(0, 2))
        about.add_row("paper", f"arXiv {self.arxiv}, {self.year}")
        about.add_row("code", f"{self.code[0]} ({self.code[1]})")
        about.add_row("kind", ", ".join(self.kind))
        about.add_row("domain", ", ".join(self.domain))
        for name, address in self.entry.items():
            counted = f", {self.params[name]:,} parameters" if name in self.params else ""
            about.add_row("offers", f"{name} ({address}{counted})")
        for what in self.departs:
            about.add_row("departs", what)
        claims = Table("claim", "the paper says", "expected here", "needs", box=None, pad_edge=False)
        for claim in self.claims:
            claims.add_row(claim.id, claim.paper, claim.expect, ", ".join(claim.needs))
        return Group(f"{self.slug}: {self.title}", self.summary, "", about, "", claims)


@dataclass(frozen=True)
class Listing:
    """Some systems, in order."""

    cards: tuple[Card, ...]

    def json(self) -> list[dict[str, Any]]:
        """One row a system."""
        return [card.row() for card in self.cards]

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("system", "kind", "domain", "what it brings", box=None, pad_edge=False)
        for card in self.cards:
            table.add_row(card.slug, ", ".join(card.kind), ", ".join(card.domain), card.summary)
        return table


class CardError(ValueError):
    """A card that cannot be used, named by its file, with what is wrong."""


def cards(home: Path = HOME) -> tuple[Card, ...]:
    """All systems, by slug. Raises `CardError` if a card is wrong or two offer an entry of the same name."""
    return _cards(home)


def listing(*, kind: str | None = None, domain: str | None = None, home: Path = HOME) -> Listing:
    """The systems of a kind and a domain, by default all. Raises `LookupError` for an unknown domain."""
    known = cards(home)
    domains = {entry for card in known for entry in card.domain}
    if domain is not None and domain not in domains:
        raise LookupError(unknown("domain", domain, domains, f"There are {', '.join(sorted(domains))}."))
    return Listing(
        tuple(c for c in known if (kind is None or kind in c.kind) and (domain is None or domain in c.domain))
    )


def find(name: str, home: Path = HOME) -> Card:
    """The system of this name, hyphens or underscores. Raises `LookupError` with the nearest right names."""
    known = {card.slug: card for card in cards(home)}
    card = known.get(_slug(name))
    if card is None:
        raise LookupError(unknown("system", name, known, "`nearfield list` shows all."))
    return card


def find_entry(name: str, home: Path = HOME) -> tuple[Card, Any]:
    """The card that offers an entry, and the object. Raises `LookupError` with the nearest right names."""
    owners = {entry: card for card in cards(home) for entry in card.entry}
    card = owners.get(name.replace("-", "_"))
    if card is None:
        raise LookupError(
            unknown("entry", name, owners, "`nearfield show SYSTEM` lists what a system offers.")
        )
    return card, resolve(card.entry[name.replace("-", "_")])


def unknown(what: str, name: str, known: Iterable[str], hint: str) -> str:
    """One sentence: there is no such thing, these are near, and how to see all."""
    near = get_close_matches(_slug(name), list(known), n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"There is no {what} {name!r}.{meant} {hint}"


def resolve(address: str) -> Any:
    """The object at "module:name". Imports the module."""
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)


def read(path: Path) -> Card:
    """The card in a file, checked. Raises `CardError` with one sentence."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"{_label(path)} is no TOML: {error}.") from None
    try:
        return _card(path.parent.name, raw)
    except (KeyError, TypeError, ValueError) as error:
        text = f"{error.args[0]!r} is missing." if isinstance(error, KeyError) else str(error)
        raise CardError(f"{_label(path)}: {text}") from None


@cache
def _cards(home: Path) -> tuple[Card, ...]:
    found = tuple(read(path) for path in sorted(home.glob("*/card.toml")))
    owner: dict[str, str] = {}
    for card in found:
        for entry in card.entry:
            if entry in owner:
                raise CardError(f"Entry {entry!r} is offered by {owner[entry]} and {card.slug}. Rename one.")
            owner[entry] = card.slug
    return found


def _card(slug: str, raw: dict[str, Any]) -> Card:
    _only("the card", raw, FIELDS)
    kind, domain = _texts("kind", raw["kind"]), _texts("domain", raw["domain"])
    if not kind or set(kind) - set(KINDS):
        raise ValueError(f"kind={list(kind)} must be one or more of {', '.join(KINDS)}.")
    if not domain:
        raise ValueError("domain=[] must name at least one domain.")
    entry = {_text("entry", name): _address(f"entry.{name}", at) for name, at in raw.get("entry", {}).items()}
    params = raw.get("params", {})
    if set(params) - set(entry):
        raise ValueError(f"[params] counts {sorted(set(params) - set(entry))}, which [entry] does not offer.")
    if any(isinstance(count, bool) or not isinstance(count, int) for count in params.values()):
        raise ValueError("[params] must hold whole numbers.")
    if not isinstance(raw["year"], int):
        raise ValueError(f"year={raw['year']!r} must be a number.")
    claims = tuple(_claim(claim) for claim in raw.get("claim", []))
    ids = [claim.id for claim in claims]
    if len(set(ids)) != len(ids):
        raise ValueError(f"claim ids {ids} must differ.")
    for departure in raw.get("departs", []):
        _only("[[departs]]", departure, {"what"})
    return Card(
        slug=slug,
        title=_text("title", raw["title"]),
        arxiv=_text("arxiv", raw["arxiv"]),
        year=raw["year"],
        code=(_text("code.repo", raw["code"]["repo"]), _text("code.licence", raw["code"]["licence"])),
        kind=kind,
        domain=domain,
        summary=_text("summary", raw["summary"]),
        entry=entry,
        params=dict(params),
        claims=claims,
        departs=tuple(_text("departs.what", departure["what"]) for departure in raw.get("departs", [])),
    )


def _claim(raw: dict[str, Any]) -> Claim:
    _only("[[claim]]", raw, CLAIM_FIELDS)
    seconds = raw["smoke_seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 8:
        raise ValueError(f"smoke_seconds={seconds!r} must lie above 0 and at most 8.")
    return Claim(
        id=_text("claim.id", raw["id"]),
        paper=_text("claim.paper", raw["paper"]),
        expect=_text("claim.expect", raw["expect"]),
        here=_address("claim.here", raw["here"]),
        needs=_texts("claim.needs", raw.get("needs", [])),
        smoke_seconds=float(seconds),
    )


def _only(where: str, raw: dict[str, Any], allowed: set[str]) -> None:
    if not isinstance(raw, dict) or set(raw) - allowed:
        raise ValueError(
            f"{where} holds {sorted(set(raw) - allowed)}; allowed are {', '.join(sorted(allowed))}."
        )


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}={value!r} must be text.")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name}={value!r} must be a list of texts.")
    return tuple(_text(name, entry) for entry in value)


def _address(name: str, value: Any) -> str:
    module, colon, function = _text(name, value).partition(":")
    if not colon or not module.startswith("nearfield.") or not function.isidentifier():
        raise ValueError(f"{name}={value!r} must be 'nearfield.module:name'.")
    return value


def _slug(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _label(path: Path) -> str:
    return "/".join(path.parts[-3:])
