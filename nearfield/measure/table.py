"""The locality of a model as a table for people."""

from __future__ import annotations

from math import isnan, nan
from typing import Any

from nearfield.measure.locality import Locality

NAMED = 3  # how many heads to name at either end


def table(locality: Locality) -> Any:
    """One line a site, means over its heads and the range of distances; then the extreme heads by name."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    common, names = locality.short_names()
    any_nmi = any(head.nmi is not None for site in locality.sites for head in site.heads)
    units = sorted({site.unit for site in locality.sites})
    notes = [f"sites {common}"] if common else []
    notes += [
        f"distance in {' or '.join(units)}",
        "entropy in nats",
        f"sinks: mass on the {locality.sink_words}",
    ]
    out = Table(
        title=f"Locality of {locality.model}",
        caption=", ".join(notes),
        title_justify="left",
        caption_justify="left",
    )
    out.add_column("site", overflow="fold")
    windows = [f"in {window}" for window in locality.windows]
    for heading in (
        "distance",
        "range of heads",
        *windows,
        "entropy",
        "sinks",
        *(("nmi",) if any_nmi else ()),
    ):
        out.add_column(heading, justify="right", no_wrap=heading != "range of heads")
    for site, name in zip(locality.sites, names, strict=True):
        distances = site.values("distance")
        out.add_row(
            name,
            _number(_mean(distances)),
            f"{_number(min(distances))}–{_number(max(distances))}",
            *(_share(_mean(site.values("inside", window))) for window in locality.windows),
            _number(_mean(site.values("entropy"))),
            _share(_mean(site.values("sink_mass"))),
            *((_number(_mean(site.values("nmi")), 3),) if any_nmi else ()),
        )
    order = sorted(
        (distance, f"{name} head {h}", site.unit)
        for site, name in zip(locality.sites, names, strict=True)
        for h, distance in enumerate(site.values("distance"))
        if not isnan(distance)
    )
    lines = [
        Text(
            f"Most {word}: "
            + ", ".join(f"{name} ({_number(distance)} {unit})" for distance, name, unit in few)
        )
        for word, few in (("local", order[:NAMED]), ("global", order[::-1][:NAMED]))
        if few
    ]
    return Group(out, *lines)


def _mean(values: list[float]) -> float:
    known = [value for value in values if not isnan(value)]
    return sum(known) / len(known) if known else nan


def _number(value: float, digits: int | None = None) -> str:
    """Three significant digits, or so many decimals."""
    if isnan(value):
        return "–"
    return f"{value:.{digits}f}" if digits is not None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float) -> str:
    return "–" if isnan(value) else f"{value:.1%}"
