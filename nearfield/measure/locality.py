"""Every attention site of a host, measured while one forward runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearfield.hosts import seam
from nearfield.measure.statistics import Rows, Window, attention_statistics, default_windows

NUM_SINKS = 4  # what a converted decoder keeps beside its window


@dataclass(frozen=True)
class HeadLocality:
    """One head: distances in tokens or patches, masses as shares of 1, entropy in nats; None is undefined."""

    distance: float | None
    inside: dict[str, float | None]
    entropy: float | None
    sink_mass: float | None
    nmi: float | None


@dataclass(frozen=True)
class SiteLocality:
    """One attention site and its heads, in the host's order."""

    site: seam.Site
    heads: tuple[HeadLocality, ...]

    @property
    def name(self) -> str:
        """The host's own name of the site."""
        return self.site.name

    @property
    def unit(self) -> str:
        """What distances are counted in."""
        return "tokens" if self.site.grid is None or len(self.site.grid) == 1 else "patches"

    def values(self, name: str, window: str | None = None) -> list[float]:
        """A statistic of every head, NaN where undefined; `name="inside"` takes a window."""
        found = [h.inside.get(window or "") if name == "inside" else getattr(h, name) for h in self.heads]
        return [math.nan if value is None else value for value in found]


@dataclass(frozen=True)
class Locality:
    """How local a model is: printable, plottable, and as JSON."""

    model: str
    sites: tuple[SiteLocality, ...]
    num_sinks: int = NUM_SINKS

    def json(self) -> dict[str, Any]:
        """`{model, sites: [{name, heads: [{distance, inside: {w: mass}, entropy, sink_mass, nmi}]}]}`."""
        sites = [{"name": s.name, "heads": [asdict(head) for head in s.heads]} for s in self.sites]
        return {"model": self.model, "sites": sites}

    @property
    def windows(self) -> tuple[str, ...]:
        """Every window that some site was asked about, in order."""
        return tuple(dict.fromkeys(w for site in self.sites for w in site.heads[0].inside))

    @property
    def sink_words(self) -> str:
        """What sink mass means here."""
        prefixed = {site.site.num_prefix for site in self.sites}
        if prefixed == {0}:
            return f"first {self.num_sinks} tokens" if self.num_sinks > 1 else "first token"
        return "class and register tokens" if 0 not in prefixed else "prefix or first tokens"

    def short_names(self) -> tuple[str, list[str]]:
        """The sites' common name with {} for what differs, and that part of each; else "" and full names."""
        names = [site.name for site in self.sites]
        parts = [name.split(".") for name in names]
        if len({len(part) for part in parts}) == 1 and len(names) > 1:
            differ = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
            if len(differ) == 1:
                common = [p if i != differ[0] else "{}" for i, p in enumerate(parts[0])]
                return ".".join(common), [part[differ[0]] for part in parts]
        return "", names

    def save(self, folder: str | Path) -> None:
        """Writes `locality.json` and `locality.png` into a folder, made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "locality.json").write_text(json.dumps(self.json(), indent=1), "utf-8")
        self.save_picture(folder / "locality.png")

    def save_picture(self, path: str | Path, *, window: str | None = None) -> Path:
        """Writes a heat picture, site by head, of distance, sink mass and mass inside a window."""
        from nearfield.measure.picture import figure

        figure(self, window=window).savefig(path, dpi=150)
        return Path(path)

    def __rich__(self) -> Any:
        from nearfield.measure.table import table

        return table(self)


def measure(
    model: nn.Module,
    *inputs: Any,
    windows: Sequence[Window] | None = None,
    rows: Rows = "all",
    num_sinks: int = NUM_SINKS,
    generator: torch.Generator | None = None,
    progress: Callable[[str], None] | None = None,
    name: str | None = None,
    **kwargs: Any,
) -> Locality:
    """How local each head of each attention site is, from one forward `model(*inputs, **kwargs)`.

    `measure(model, input_ids, windows=(64, 1024))` watches the host's queries and keys and keeps no map of
    all pairs. `windows=None` chooses by grid. `rows` picks the queries to look at: "all", "last_half", or how
    many to draw with `generator`. `progress` hears the name of every site that is done. The model computes in
    eval mode without gradients and is left as it was. Raises `ValueError` where no attention was seen, and,
    naming the site, where queries or keys are not finite.
    """
    found: dict[str, _Means] = {}

    def watch(call: seam.Call) -> None:
        site = call.site
        for what, values in (("queries", call.query), ("keys", call.key)):
            _check_finite(site.name, what, values)
        own = windows if windows is not None else default_windows(site.grid) if site.grid else ()
        statistics = attention_statistics(
            call.query,
            call.key,
            grid=None if site.role == "cross" else site.grid,
            num_prefix=site.num_prefix,
            is_causal=site.is_causal,
            mask=call.mask,
            scale=call.scale,
            windows=own,
            num_sinks=num_sinks,
            rows=rows,
            generator=generator,
        )
        means = found.setdefault(site.name, _Means(site))
        each = statistics.num_rows
        once = (each > 0).to(each.dtype)  # nmi is a property of a whole sequence
        inside = {f"inside {w}": (mass, each) for w, mass in statistics.inside.items()}
        means.add(
            distance=(statistics.distance, each),
            entropy=(statistics.entropy, each),
            sink_mass=(statistics.sink_mass, each),
            nmi=(statistics.nmi, once),
            **inside,
        )
        if progress is not None:
            progress(site.name)

    with _quiet(model), torch.no_grad(), seam.attention(model, watch):
        model(*inputs, **kwargs)
    if not found:
        raise ValueError(
            f"No attention was seen in {type(model).__name__}: nothing to measure. "
            "Give a transformers model, or one that calls scaled_dot_product_attention."
        )
    return Locality(
        name or getattr(model, "name_or_path", "") or type(model).__name__,
        tuple(SiteLocality(means.site, means.heads()) for means in found.values()),
        num_sinks,
    )


class _Means:
    """Weighted means per head over the sequences and calls of one site."""

    def __init__(self, site: seam.Site) -> None:
        self.site = site
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def add(self, **found: tuple[Tensor | None, Tensor]) -> None:
        """Adds values and weights `[B, H]`; undefined values do not count."""
        for name, (values, weights) in found.items():
            if values is not None:
                sums, weight = (values.nan_to_num(0.0) * weights).sum(0).cpu(), weights.sum(0).cpu()
                self.sums[name] = self.sums.get(name, 0) + sums
                self.weights[name] = self.weights.get(name, 0) + weight

    def heads(self) -> tuple[HeadLocality, ...]:
        """The means, head by head."""
        means = {name: (sums / self.weights[name]).tolist() for name, sums in self.sums.items()}
        heads = []
        for h in range(len(means["entropy"])):
            mine = {name: None if math.isnan(values[h]) else values[h] for name, values in means.items()}
            inside = {
                name.removeprefix("inside "): v for name, v in mine.items() if name.startswith("inside ")
            }
            heads.append(
                HeadLocality(
                    mine.get("distance"), inside, mine["entropy"], mine["sink_mass"], mine.get("nmi")
                )
            )
        return tuple(heads)


def _check_finite(site: str, what: str, values: Tensor) -> None:
    """Refuses infinite and undefined numbers in one sentence."""
    bad = int(values.numel() - torch.isfinite(values).sum())
    if bad:
        raise ValueError(
            f"{site}: {bad} of {values.numel()} numbers in its {what} are infinite or NaN. "
            "Check the weights and the input, or load the model in float32."
        )


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each module then trains again as it did."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
