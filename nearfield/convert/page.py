"""report.html: one self-contained page, pictures inside, no scripts."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from math import expm1, log2
from typing import Any

from nearfield.convert.report import Conversion, EncoderConversion, is_local, verdict_words, word_of
from nearfield.core.errors import require

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1c2126 }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% } th, td { padding: .35rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr + tr td, th { border-bottom: 1px solid #d8dde2 }
img { max-width: 100% } .good { color: #0b6b3a } .bad { color: #a32020 } .note { color: #56616b }
.scroll { max-height: 28rem; overflow: auto }
"""
MARKS = {  # kind of point -> marker, colour (Okabe and Ito: told apart without colour vision)
    "full": ("s", "#000000"),
    "plan": ("*", "#D55E00"),
    "uniform": ("o", "#0072B2"),
    "narrow": ("o", "#56B4E9"),
    "random": ("x", "#999999"),
    "needle": ("^", "#009E73"),
    "sensitivity": ("D", "#CC79A7"),
}


def page(found: Conversion) -> str:
    """The report as one HTML document. Without matplotlib its pictures are left out, and it says so."""
    parts = [
        f"<h1>{escape(found.model)} made local</h1>",
        f'<p class="note">{found.tokens:,} tokens of {escape(found.text)} text; {escape(_where(found))}</p>',
        _verdict(found),
        table(("", "before", "after", "change (95 % interval)"), found.figures),
    ]
    if found.planner is not None:
        try:
            parts += _pictures(found)
        except ImportError as error:
            parts.append(f'<p class="note">Pictures are left out. {escape(str(error))}</p>')
        controls = [
            (p.name, f"{p.seconds:.2f}", f"{expm1(p.added):+.2%}", f"{p.added_to_answers:+.2f}")
            for p in found.points
        ]
        parts += [
            "<h2>Other plans, one run each on the calibration passage</h2>",
            table(("plan", "prefill, s", "perplexity", "added to pass keys, nats per token"), controls),
        ]
    words = "1024+4 is a causal window of 1,024 tokens and the first 4; full is full attention."
    return document(f"{found.model} made local", [*parts, *_patterns(found, words)])


def encoder_page(found: EncoderConversion) -> str:
    """The report of an encoder as one HTML document."""
    before, after = found.seconds
    change = found.change
    rows = [
        ("Features turned, mean 1 - cosine", f"{change.mean:.4%} ({change.low:.4%} … {change.high:.4%})"),
        ("Worst input", f"{change.worst:.4%}"),
        ("Tokens whose nearest neighbour stayed", f"{change.same_neighbour:.1%}"),
        ("Forward, median seconds", f"{before:.3f} → {after:.3f} ({before / after:.2f} ×)"),
    ]
    parts = [
        f"<h1>{escape(found.model)} made local</h1>",
        f'<p class="note">{found.tokens:,} tokens of {escape(found.inputs)}; {escape(_where(found))}</p>',
        _verdict(found),
        table(("", "found (95 % interval)"), rows),
    ]
    words = "9 is a window of 9 tokens a side; full is full attention."
    return document(f"{found.model} made local", [*parts, *_patterns(found, words)])


def _verdict(found: Conversion | EncoderConversion) -> str:
    judged = found.judgements if isinstance(found.judgements, int) else len(found.judgements)
    words = verdict_words(found.holds, found.budget, judged, is_local(found.plan))
    plain = re.sub(r"\[/?(green|red)\]", "", words)
    return f'<p class="{"good" if found.holds else "bad"}">{escape(plain)}</p>'


def _patterns(found: Conversion | EncoderConversion, words: str) -> list[str]:
    rows = [
        (site.name, *(word_of(site.pattern_of(head)) for head in range(site.num_kv_heads)))
        for site in found.plan.values()
    ]
    heads = max((len(row) for row in rows), default=1) - 1
    return [
        "<h2>Pattern by site and key/value head</h2>",
        f'<p class="note">{words}</p>',
        '<div class="scroll">',
        table(("site", *(f"head {i}" for i in range(heads))), rows),
        "</div>",
    ]


def document(title: str, parts: list[str]) -> str:
    """A whole page."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _where(found: Conversion | EncoderConversion) -> str:
    machine = found.machine
    return (
        f"{machine['machine']}, {machine['threads']} threads, torch {machine['versions']['torch']}, float32"
    )


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of texts."""

    def line(tag: str, cells: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", head) + "".join(line("td", row) for row in rows) + "</table>"


def _pictures(found: Conversion) -> list[str]:
    shown = [
        ("Quality against time", frontier(found), "Each mark is one run on the calibration passage."),
        (
            "What each head looked at, and what it got",
            heat(found),
            "Left: mean attention distance before. Right: the pattern chosen per key/value head.",
        ),
    ]
    parts = []
    for title, figure, words in shown:
        parts += [f"<h2>{title}</h2>", picture(title, figure), f'<p class="note">{words}</p>']
    return parts


def picture(title: str, figure: Any) -> str:
    """A matplotlib figure inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{title}" src="data:image/png;base64,{data}">'


def frontier(found: Conversion) -> Any:
    """A matplotlib figure: prefill seconds against added perplexity of the plan and of the controls."""
    require("matplotlib", extra="plot")
    figure_module = require("matplotlib.figure", extra="plot")
    figure = figure_module.Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for point in found.points:
        marker, colour = MARKS[point.kind]
        axes.scatter(
            point.seconds,
            100 * expm1(point.added),
            marker=marker,
            color=colour,
            s=170 if point.kind == "plan" else 60,
            zorder=3,
            label=f"{point.name} ({point.added_to_answers:+.2f} nats on pass keys)",
        )
    axes.axhline(100 * found.budget, color="#555555", linewidth=1, linestyle="--", label="budget")
    axes.margins(x=0.08, y=0.08)
    axes.set_xlabel("prefill, seconds")
    axes.set_ylabel("added perplexity, %")
    axes.grid(color="#e4e7ea", zorder=0)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def heat(found: Conversion) -> Any:
    """A matplotlib figure: mean attention distance by layer and head, and the window of each group."""
    matplotlib = require("matplotlib", extra="plot")
    figure_module = require("matplotlib.figure", extra="plot")
    assert found.planner is not None
    damages = found.planner.damages
    distances = [damage.distance.tolist() for damage in damages]
    widths = []
    for damage in damages:
        site = found.plan[damage.site.name]
        row = []
        for head in range(site.num_kv_heads):
            pattern = site.pattern_of(head)
            size = found.tokens if pattern is None else pattern.kernel_size
            row.append(log2(size if isinstance(size, int) else max(size)))
        widths.append(row)
    figure = figure_module.Figure(figsize=(9, 1.4 + 0.19 * len(damages)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    image = left.imshow(distances, aspect="auto", cmap="viridis", interpolation="nearest")
    left.set(title="mean attention distance before", xlabel="query head", ylabel="layer")
    figure.colorbar(image, ax=left, label="tokens")
    top = round(log2(found.tokens))
    image = right.imshow(
        widths, aspect="auto", cmap=matplotlib.colormaps["cividis"], vmin=6, vmax=top, interpolation="nearest"
    )
    right.set(title="window after", xlabel="key/value head")
    right.set_xticks(range(len(widths[0])))
    bar = figure.colorbar(image, ax=right, ticks=range(6, top + 1))
    bar.ax.set_yticklabels([f"{2**i:,}" for i in range(6, top)] + ["full"])
    return figure
