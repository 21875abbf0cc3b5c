"""Makes what is derived: the table of systems (here and in the README), their pages, the picture of windows.

python docs/generate.py            write them
python docs/generate.py --check    say what is stale, exit status 1 if anything is
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nearfield.catalog import Card, cards
from nearfield.ops.neighborhood.geometry import Neighborhood

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "systems"
BEGIN, END = "<!-- systems: made by docs/generate.py -->", "<!-- end of systems -->"
CELL, GAP, TOP = 14, 46, 56
INK = {
    "page": "#ffffff",
    "text": "#24292f",
    "token": "#e6e9ee",
    "seen": "#7fb2e5",
    "query": "#d1495b",
    "sink": "#edae49",
}


def pages() -> dict[Path, str]:
    """Every derived file with its text."""
    found = cards()
    made = {ROOT / "docs" / "systems.md": "# Systems\n\nMade from the cards.\n\n" + table(found, "systems/")}
    made |= {ROOT / "docs" / "systems" / f"{card.slug}.md": page(card) for card in found}
    made[ROOT / "docs" / "neighborhood.svg"] = picture()
    readme = ROOT / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks the lines {BEGIN!r} and {END!r}.")
    made[readme] = f"{before}{BEGIN}\n{table(found, 'docs/systems/')}{END}{after}"
    return made


def table(found: tuple[Card, ...], folder: str) -> str:
    """The systems as a Markdown table."""
    lines = ["| system | kind | domain | what it brings |", "|---|---|---|---|"]
    for card in found:
        cells = (
            f"[{card.slug}]({folder}{card.slug}.md)",
            ", ".join(card.kind),
            ", ".join(card.domain),
            card.summary,
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def page(card: Card) -> str:
    """One system: what it is, what it offers, what it claims and what was found."""
    found, made = outcomes(card)
    lines = [
        f"# {card.title}",
        "",
        card.summary,
        "",
        f"- Paper: [arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv}), {card.year}",
        f"- Official code: [{card.code[0]}](https://github.com/{card.code[0]}), {card.code[1]}",
        f"- Kind: {', '.join(card.kind)}. Domain: {', '.join(card.domain)}.",
        "",
    ]
    if card.entry:
        lines += ["## What it offers", "", "| `nearfield.create(...)` | is | parameters |", "|---|---|---|"]
        for name, address in card.entry.items():
            count = f"{card.params[name]:,}" if name in card.params else ""
            lines.append(f"| `{name}` | `{address}` | {count} |")
        lines.append("")
    if card.claims:
        lines += [f"## What it claims: `nearfield run {card.slug}`", ""]
        lines += ["| claim | the paper says | expected here | found |", "|---|---|---|---|"]
        for claim in card.claims:
            cells = (f"`{claim.id}`", claim.paper, claim.expect, found.get(claim.id, "not yet shown"))
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        lines += ["", *([f"Found on {made}.", ""] if made else [])]
        for claim in card.claims:
            if (RESULTS / f"{card.slug}-{claim.id}.svg").is_file():
                lines += [f"![{claim.id}](../../bench/systems/{card.slug}-{claim.id}.svg)", ""]
    if card.departs:
        lines += [
            "## Where it departs from the paper or its code",
            "",
            *(f"- {what}" for what in card.departs),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def outcomes(card: Card) -> tuple[dict[str, str], str]:
    """What the committed results say of each claim, in words, and where they were made."""
    path = RESULTS / f"{card.slug}.json"
    if not path.is_file():
        return {}, ""
    document = json.loads(path.read_text(encoding="utf-8"))
    made = document["made"]
    words = {}
    for claim in document["claims"]:
        verdict = {True: "Holds", False: "Does not hold", None: "Not decided"}[claim["holds"]]
        skipped = f" Skipped: {claim['skipped']}." if claim["skipped"] else ""
        found = f": {claim['found']}." if claim["found"] else "."
        words[claim["id"]] = f"{verdict}{found}{skipped}"
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return words, f"{made['machine']}; {versions}; {made['date'][:10]}; {document['mode']} form"


def picture() -> str:
    """A token and what it sees, drawn from the geometry itself."""
    text = Neighborhood(8, is_causal=True, num_sinks=2).on(20)
    panels = [
        ("a token and what it sees", "kernel_size=7", _plane(Neighborhood(7), (9, 10))),
        ("at a border: as many keys", "kernel_size=7", _plane(Neighborhood(7), (1, 18))),
        ("further, with gaps", "kernel_size=5, dilation=3", _plane(Neighborhood(5, dilation=3), (9, 10))),
        ("text: rows see columns", "kernel_size=8, is_causal=True, num_sinks=2", _rows(text.num_keys, text)),
    ]
    side = 20 * CELL
    width, height = len(panels) * (side + GAP) + GAP, side + TOP + GAP // 2
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<pattern id="tokens" width="{CELL}" height="{CELL}" patternUnits="userSpaceOnUse">'
        f'<rect width="{CELL - 1}" height="{CELL - 1}" fill="{INK["token"]}"/></pattern>',
        f'<rect width="{width}" height="{height}" fill="{INK["page"]}"/>',
    ]
    for number, (title, settings, cells) in enumerate(panels):
        left = GAP + number * (side + GAP)
        out.append(f'<text x="{left}" y="22" font-size="18" fill="{INK["text"]}">{title}</text>')
        out.append(f'<text x="{left}" y="43" font-size="13" fill="{INK["text"]}">{settings}</text>')
        out.append(f'<g transform="translate({left} {TOP})">')
        out.append(f'<rect width="{side}" height="{side}" fill="url(#tokens)"/>')
        for ink in ("seen", "sink", "query"):
            places = sorted(place for place, other in cells.items() if other == ink)
            squares = "".join(f"M{x * CELL} {y * CELL}h{CELL - 1}v{CELL - 1}h-{CELL - 1}z" for y, x in places)
            out.append(f'<path fill="{INK[ink]}" d="{squares}"/>')
        out.append("</g>")
    return "\n".join([*out, "</svg>"]) + "\n"


def _plane(pattern: Neighborhood, query: tuple[int, int]) -> dict[tuple[int, int], str]:
    """One query on a grid of 20 x 20 tokens."""
    bound = pattern.on((20, 20))
    number = query[0] * 20 + query[1]
    seen = {bound.coordinates(key) for key in bound.keys(number)}
    return dict.fromkeys(seen, "seen") | {query: "query"}


def _rows(size: int, bound) -> dict[tuple[int, int], str]:
    """All queries of a sequence: a row each, its own token in the query's colour."""
    cells = {}
    for query in range(size):
        window = bound.windows(query)[0]
        cells |= {(query, key): "seen" if key in window else "sink" for key in bound.keys(query)}
        cells[query, query] = "query"
    return cells


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write what is derived, or with --check name what is stale. Returns the exit status."""
    stale = [
        path
        for path, text in pages().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    kept = {path for path in pages() if path.parent.name == "systems"}
    orphans = [path for path in (ROOT / "docs" / "systems").glob("*.md") if path not in kept]
    if "--check" in sys.argv[1:]:
        for path in stale + orphans:
            print(f"{path.relative_to(ROOT)} is stale: python docs/generate.py")
        return 1 if stale or orphans else 0
    made = pages()
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made[path], encoding="utf-8")
    for path in orphans:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
