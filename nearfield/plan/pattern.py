"""What a plan says: for every attention site and key/value-head group, which pattern it gets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any

from nearfield.ops.neighborhood.geometry import BORDERS, Neighborhood

FULL = "full"
PATTERN_KEYS = tuple(field.name for field in fields(Neighborhood))


@dataclass(frozen=True)
class GroupPlan:
    """The pattern of some key/value heads of one site; `pattern=None` leaves them full attention."""

    kv_heads: tuple[int, ...]
    pattern: Neighborhood | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", tuple(self.kv_heads))
        if not self.kv_heads:
            raise ValueError("kv_heads=() names no head. Give a group at least one key/value head.")
        for head in self.kv_heads:
            if isinstance(head, bool) or not isinstance(head, int) or head < 0:
                raise ValueError(f"kv_heads={self.kv_heads} must hold whole numbers from 0.")
        if len(set(self.kv_heads)) != len(self.kv_heads):
            raise ValueError(f"kv_heads={self.kv_heads} names a head twice. Name each once.")
        if self.pattern is not None and not isinstance(self.pattern, Neighborhood):
            raise TypeError(f"pattern={self.pattern!r} must be a Neighborhood, or None for full attention.")

    def kept(self, grid: tuple[int, ...] | int, *, is_causal: bool = False) -> float:
        """Visible pairs / all pairs on `grid`; `is_causal` says what full attention is at this site."""
        if self.pattern is not None:
            return self.pattern.on(grid).kept
        tokens = grid if isinstance(grid, int) else prod(grid)
        return (tokens + 1) / (2 * tokens) if is_causal else 1.0

    def to_json(self) -> dict[str, Any]:
        """The group as plain JSON values."""
        return {"kv_heads": list(self.kv_heads), "pattern": pattern_to_json(self.pattern)}

    @classmethod
    def from_json(cls, data: Any) -> GroupPlan:
        """The group that `to_json` wrote; anything else is a `ValueError`."""
        given = _exactly("A group", data, ("kv_heads", "pattern"))
        if not isinstance(given["kv_heads"], list):
            raise ValueError(f"kv_heads={given['kv_heads']!r} must be a list of whole numbers.")
        return cls(tuple(given["kv_heads"]), pattern_from_json(given["pattern"]))


@dataclass(frozen=True)
class SitePlan:
    """What one attention site becomes: its key/value heads in groups, each with a pattern.

    The groups must hold every head from 0 up to the highest exactly once.
    """

    name: str
    groups: tuple[GroupPlan, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r} must be the site's dotted name.")
        if not all(isinstance(group, GroupPlan) for group in self.groups):
            raise TypeError(f"groups of site {self.name!r} must be GroupPlan objects.")
        heads = sorted(head for group in self.groups for head in group.kv_heads)
        if not heads or heads != list(range(len(heads))):
            raise ValueError(
                f"The groups of site {self.name!r} hold the key/value heads {heads}. "
                "Every head from 0 up must be in exactly one group."
            )

    @classmethod
    def uniform(cls, name: str, num_kv_heads: int, pattern: Neighborhood | None) -> SitePlan:
        """One pattern for all key/value heads of a site."""
        return cls(name, (GroupPlan(tuple(range(num_kv_heads)), pattern),))

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of the site."""
        return sum(len(group.kv_heads) for group in self.groups)

    @property
    def is_full(self) -> bool:
        """Whether nothing changes at this site."""
        return all(group.pattern is None for group in self.groups)

    def pattern_of(self, kv_head: int) -> Neighborhood | None:
        """The pattern of one key/value head."""
        for group in self.groups:
            if kv_head in group.kv_heads:
                return group.pattern
        raise ValueError(
            f"Site {self.name!r} has key/value heads 0 to {self.num_kv_heads - 1}, not {kv_head}."
        )

    def kept(self, grid: tuple[int, ...] | int, *, is_causal: bool = False) -> float:
        """Visible pairs / all pairs on `grid`, the mean over key/value heads."""
        shares = (len(group.kv_heads) * group.kept(grid, is_causal=is_causal) for group in self.groups)
        return sum(shares) / self.num_kv_heads

    def to_json(self) -> dict[str, Any]:
        """The site as plain JSON values."""
        return {"name": self.name, "groups": [group.to_json() for group in self.groups]}

    @classmethod
    def from_json(cls, data: Any) -> SitePlan:
        """The site that `to_json` wrote; anything else is a `ValueError`."""
        given = _exactly("A site", data, ("name", "groups"))
        if not isinstance(given["groups"], list):
            raise ValueError(f"groups of site {given['name']!r} must be a list.")
        return cls(given["name"], tuple(GroupPlan.from_json(group) for group in given["groups"]))


def plan_to_json(plan: Mapping[str, SitePlan] | Iterable[SitePlan]) -> list[dict[str, Any]]:
    """A whole plan as plain JSON values, sites in the given order."""
    return [site.to_json() for site in (plan.values() if isinstance(plan, Mapping) else plan)]


def plan_from_json(data: Any) -> dict[str, SitePlan]:
    """Site name -> plan, as `plan_to_json` wrote it; a site named twice is a `ValueError`."""
    if not isinstance(data, list):
        raise ValueError(f"A plan must be a list of sites, not {_kind(data)}.")
    sites: dict[str, SitePlan] = {}
    for site in map(SitePlan.from_json, data):
        if site.name in sites:
            raise ValueError(f"The plan names site {site.name!r} twice. Name each site once.")
        sites[site.name] = site
    return sites


def pattern_to_json(pattern: Neighborhood | None) -> dict[str, Any] | str:
    """`"full"` for None, else the pattern's six settings."""
    if pattern is None:
        return FULL
    settings = {key: getattr(pattern, key) for key in PATTERN_KEYS}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def pattern_from_json(data: Any) -> Neighborhood | None:
    """The pattern that `pattern_to_json` wrote; anything else is a `ValueError`."""
    if data == FULL:
        return None
    given = _exactly("A pattern", data, PATTERN_KEYS)
    for key in ("kernel_size", "stride", "dilation", "is_causal"):
        kind = bool if key == "is_causal" else int
        entries = given[key] if isinstance(given[key], list) else [given[key]]
        if not entries or any(type(entry) is not kind for entry in entries):
            allowed = "true or false" if kind is bool else "a whole number"
            raise ValueError(f"{key}={given[key]!r} of a pattern must be {allowed}, or a list of such.")
    if type(given["num_sinks"]) is not int:
        raise ValueError(f"num_sinks={given['num_sinks']!r} of a pattern must be a whole number.")
    if given["border"] not in BORDERS:
        raise ValueError(
            f"border={given['border']!r} of a pattern is unknown. Choose one of {', '.join(BORDERS)}."
        )
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Neighborhood(**settings)


def read_json(text: str | bytes) -> Any:
    """The values of a JSON text; damaged text, a key given twice, NaN or infinity is a `ValueError`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"The JSON gives the key {key!r} twice. Give it once.")
            found[key] = value
        return found

    def refuse(word: str) -> Any:
        raise ValueError(f"The JSON holds {word}, which is no JSON number.")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"This is not JSON: {error}.") from None
    except UnicodeDecodeError:
        raise ValueError("This is not JSON: it is not text in UTF-8.") from None
    except RecursionError:
        raise ValueError("The JSON is nested too deeply to be read.") from None


def _exactly(what: str, data: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """`data` if it is an object with exactly these keys."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} must be an object with the keys {', '.join(keys)}, not {_kind(data)}.")
    unknown, missing = sorted(map(str, set(data) - set(keys))), [key for key in keys if key not in data]
    if unknown or missing:
        problem = f"the unknown key {unknown[0]!r}" if unknown else f"no key {missing[0]!r}"
        raise ValueError(f"{what} has {problem}. The keys are exactly {', '.join(keys)}.")
    return data


def _kind(data: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(data), "a number")
