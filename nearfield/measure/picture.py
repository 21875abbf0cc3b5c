"""The locality of a model as a heat picture: a row a site, a column a head."""

from __future__ import annotations

from statistics import pstdev
from typing import Any

from nearfield.core.errors import require
from nearfield.measure.locality import Locality

UNKNOWN = "#d0d0d0"  # heads for which a quantity has no meaning
MASS_COLOURS, DISTANCE_COLOURS = "cividis", "viridis"  # both read the same without colour vision
LONG_RANGE = 20  # ratio of largest to smallest distance from which colours go by its logarithm


def figure(locality: Locality, *, window: str | None = None) -> Any:
    """A matplotlib `Figure`: distance, sink mass, and mass inside `window`.

    `window=None` takes the one in which heads differ most.
    """
    matplotlib = require("matplotlib", extra="plot")
    require("matplotlib.figure", extra="plot")
    require("matplotlib.colors", extra="plot")
    if window is not None and window not in locality.windows:
        raise ValueError(f"window={window!r} was not measured. Choose one of {', '.join(locality.windows)}.")
    if window is None and locality.windows:
        window = max(locality.windows, key=lambda w: _spread(_grid(locality, "inside", w)))
    unit = "/".join(sorted({site.unit for site in locality.sites}))
    panels = [
        ("How far each head looks", f"mean attention distance ({unit})", _grid(locality, "distance")),
        (f"Mass on {locality.sink_words}", "share of attention", _grid(locality, "sink_mass")),
    ]
    if window is not None:
        ranks = {len(site.site.grid) for site in locality.sites if site.site.grid}
        sides = window.split("x") * (ranks.pop() if len(ranks) == 1 and "x" not in window else 1)
        title = f"Mass inside a window of {' × '.join(sides)} {unit}"
        panels.append((title, "share of attention", _grid(locality, "inside", window)))
    rows, columns = len(panels[0][2]), len(panels[0][2][0])
    height = 1.9 + max(2.0, 0.2 * rows)
    out = matplotlib.figure.Figure(figsize=(3.9 * len(panels), height), layout="constrained")
    axes = out.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    common, names = locality.short_names()
    for at, (ax, (title, unit_label, values)) in enumerate(zip(axes, panels, strict=True)):
        colours = matplotlib.colormaps[MASS_COLOURS if at else DISTANCE_COLOURS].with_extremes(bad=UNKNOWN)
        norm = matplotlib.colors.Normalize(0, 1) if at else _distance_norm(matplotlib, values)
        image = ax.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        for boundary in _group_boundaries(locality):
            ax.axvline(boundary - 0.5, color="white", linewidth=0.8)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("head" if not _group_boundaries(locality) else "head (lines part the key/value groups)")
        ax.set_xticks(range(0, columns, -(-columns // 12)))
        bar = out.colorbar(image, ax=ax, location="bottom", shrink=0.9, aspect=30, pad=0.02)
        bar.set_label(unit_label, fontsize=9)
        bar.ax.xaxis.set_major_formatter("{x:g}")
        bar.ax.tick_params(labelsize=8)
        ax.tick_params(labelsize=8)
    step = -(-rows // 32)
    axes[0].set_yticks(range(0, rows, step), names[::step])
    axes[0].set_ylabel(common.replace("{}", "*") if common else "attention site", fontsize=9)
    out.suptitle(f"Locality of {locality.model}", fontsize=12)
    return out


def _grid(locality: Locality, name: str, window: str | None = None) -> list[list[float]]:
    """Sites by heads, NaN where a site has fewer heads or the quantity has no meaning."""
    values = [site.values(name, window) for site in locality.sites]
    columns = max(map(len, values))
    return [row + [float("nan")] * (columns - len(row)) for row in values]


def _group_boundaries(locality: Locality) -> list[int]:
    """First heads of the second and later key/value groups, where all sites group alike and share keys."""
    groups = {(site.site.num_heads, site.site.num_kv_heads) for site in locality.sites}
    heads, kv_heads = groups.pop()
    if groups or kv_heads == heads:
        return []
    return list(range(heads // kv_heads, heads, heads // kv_heads))


def _known(values: list[list[float]]) -> list[float]:
    return [value for row in values for value in row if value == value]


def _spread(values: list[list[float]]) -> float:
    known = _known(values)
    return pstdev(known) if known else 0.0


def _distance_norm(matplotlib: Any, values: list[list[float]]) -> Any:
    """Linear from 0, or logarithmic where distances span orders of magnitude."""
    known = _known(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    if low > 0 and high > LONG_RANGE * low:
        return matplotlib.colors.LogNorm(low, high)
    return matplotlib.colors.Normalize(0, high or 1.0)
