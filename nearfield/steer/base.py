"""Changes to a model's attention that last as long as a `with`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfield.hosts import seam
from nearfield.hosts.seam import Call, Site
from nearfield.steer.scores import attend_scores

STEERED = "_nearfield_steered"  # on every module of a steered model, while it is: thread -> (root, steering)


class Steer:
    """A change to the attention of a model for a while: a dataclass of settings with a method of mathematics.

        @dataclass
        class Sharpen(Steer):
            factor: float = 1.5
            sites: str = "self"

            def edit(self, site, query, key, value):
                return query * self.factor, key, value

        with Sharpen(1.3)(model):
            model(...)

    `sites` is a role ("self", "cross") or a glob over site names ("*.language_model.layers.1?.*"); a method
    that chooses otherwise, such as by `site.layer`, overrides `takes`. Of `edit`, `score`, `attend` and
    `output` only those that a subclass defines are asked for. Settings that change nothing give the model's
    own bits.

    `A() + B()` applies A first: all edits, then all scores, then all outputs. So does `with A()(model)`
    around `with B()(model)`.
    """

    sites = "self"

    def takes(self, site: Site) -> bool:
        """Whether the method works at a site."""
        return self.sites == site.role or fnmatchcase(site.name, self.sites)

    def rows(self, site: Site) -> range:
        """The rows, out of `site.rows`, whose scores `score` is shown. The others stay with the host's own
        attention, so an empty range costs nothing."""
        return site.rows

    def edit(
        self,
        site: Site,
        query: Float[Tensor, "b *n heads d"],
        key: Float[Tensor, "b *m kv_heads d"],
        value: Float[Tensor, "b *m kv_heads dv"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Other queries, keys and values, positions already worked in; a step is shown all cached keys.

        Tokens that form a grid of two or three dimensions come as `[B, *site.grid, heads, D]`; text, and
        tokens among which are class tokens, as `[B, N, heads, D]`. What a cache holds is not changed.
        """
        return query, key, value

    def score(
        self, site: Site, scores: Float[Tensor, "b heads r m"], rows: range, keys: range
    ) -> Float[Tensor, "b heads r m"]:
        """Other scores for a chunk of rows, of the places `rows` and `keys` in the sequence.

        They come scaled, capped and biased as the host does, before masks: what the host hides is hidden
        afterwards. -inf hides more.
        """
        return scores

    def attend(
        self,
        site: Site,
        query: Float[Tensor, "b n heads d"],
        key: Float[Tensor, "b m kv_heads d"],
        value: Float[Tensor, "b m kv_heads dv"],
        mask: Tensor | None,
        scale: float,
    ) -> Float[Tensor, "b n heads dv"] | None:
        """Outputs of the heads by another operator, from edited tensors; None leaves them to the host.

        Tokens are flat. `mask` is as in `seam.Call`: None where causality alone hides keys. Not asked where
        the host caps scores or drops weights, which no other operator is told. At a site whose scores a steer
        changes an answer is an error.
        """
        return None

    def output(self, site: Site, heads: Float[Tensor, "b *n heads dv"]) -> Float[Tensor, "b *n heads dv"]:
        """Other outputs of the heads, before the output projection; shaped as queries are in `edit`."""
        return heads

    def parts(self) -> tuple[Steer, ...]:
        """The methods that this one is made of, in order."""
        return (self,)

    def __add__(self, other: Steer) -> Steer:
        if not isinstance(other, Steer):
            return NotImplemented
        return _Sum(*self.parts(), *other.parts())

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model, steered in this thread until the `with` ends."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"A {type(model).__name__} is no torch module. Give the part that computes attention, such "
                "as pipe.unet or pipe.transformer."
            )
        root = getattr(model, "_orig_mod", model)  # a compiled model runs eagerly inside the `with`
        parts, listed = self.parts(), seam.listed_sites(root)
        if listed is not None:
            _refuse_missing(parts, listed, root)
        seen: dict[str, Site] = {}
        with ExitStack() as stack:
            steering = _join(root, stack)
            steering.parts += parts
            stack.callback(steering.drop, parts)
            if listed is None:  # only a forward tells the sites of such a host
                steering.noted.append(seen)
                stack.callback(steering.forget, seen)
            yield model
        if seen:
            _refuse_missing(parts, list(seen.values()), root)


class _Sum(Steer):
    """Several steers, applied in order."""

    def __init__(self, *parts: Steer):
        self.all = parts

    def parts(self) -> tuple[Steer, ...]:
        return self.all

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.all))


class _Steering:
    """The handler of one model in one thread: all steers at work on it."""

    def __init__(self) -> None:
        self.parts: tuple[Steer, ...] = ()
        self.noted: list[dict[str, Site]] = []  # for each `with` that wants them, the sites it has met

    def drop(self, parts: tuple[Steer, ...]) -> None:
        for part in parts:  # the last of its kind: a `with` may be left in any order, and hold one twice
            at = max(at for at, mine in enumerate(self.parts) if mine is part)
            self.parts = self.parts[:at] + self.parts[at + 1 :]

    def forget(self, seen: dict[str, Site]) -> None:
        self.noted = [other for other in self.noted if other is not seen]

    def __call__(self, call: Call) -> Tensor | None:
        site = call.site
        for seen in self.noted:
            seen.setdefault(site.name, site)
        mine = [part for part in self.parts if part.takes(site)]
        query, key, value = call.query, call.key, call.value
        for part in _defining(mine, "edit"):
            query, key, value = _edited(part, call, query, key, value)
        given, edited = (call.query, call.key, call.value), (query, key, value)
        changed = any(a is not b for a, b in zip(given, edited, strict=True))
        if changed and not call.is_exact and _equal(given, edited):
            (query, key, value), changed = given, False
        wanted = [(part, _inside(part.rows(site), site)) for part in _defining(mine, "score")]
        scoring = [(part, rows) for part, rows in wanted if rows]
        out = attend_scores(call, query, key, value, scoring) if scoring else None
        for part in reversed(_defining(mine, "attend")):
            other = _attended(part, call, query, key, value)
            if other is None:
                continue
            if out is not None:
                raise ValueError(
                    f"{type(part).__name__}.attend answers at site {site.name!r}, where the scores are "
                    "changed too, which its operator does not see. Let one of them leave the site out."
                )
            out = other
            break
        changed, outputs = changed or out is not None, _defining(mine, "output")
        if not changed and not outputs:
            return None
        out = call.host(query, key, value) if out is None else out
        before = out
        for part in outputs:
            shown = _on_grid(out, site)
            heads = part.output(site, shown)
            if heads.shape != shown.shape:
                raise ValueError(_misshapen(part, "output", site, heads, shown))
            out = heads.flatten(1, -3)
        # A host whose fused path holds the site is bit-equal to nothing but itself.
        idle = not changed and not call.is_exact and _equal((before,), (out,))
        return None if idle else out


def _join(root: nn.Module, stack: ExitStack) -> _Steering:
    """The steering of a model in this thread; the seam is entered by the first who steers it."""
    thread = threading.get_ident()
    marked = [vars(module)[STEERED].get(thread) for module in root.modules() if STEERED in vars(module)]
    here = vars(root).get(STEERED, {}).get(thread)
    if any(mark is not None and mark[0] is not root for mark in marked):
        raise RuntimeError(
            "A part of this model, or a model that it is part of, is steered already. Steer both through the "
            "same module and name their sites, or add them: A() + B()."
        )
    if here is not None:
        steering: _Steering = here[1]
        here[2].append(stack)
        stack.callback(_leave, here, stack)
        return steering
    steering = _Steering()
    entered = ExitStack()
    mark = (root, steering, [stack], entered)
    with ExitStack() as undo:
        undo.enter_context(seam.attention(root, steering, softcap=True))
        modules = list(root.modules())
        undo.callback(_unmark, modules, thread)
        for module in modules:
            vars(module).setdefault(STEERED, {})[thread] = mark
        entered.push(undo.pop_all())
    stack.callback(_leave, mark, stack)
    return steering


def _leave(mark: tuple[Any, ...], stack: ExitStack) -> None:
    """The last who steers a model leaves the seam."""
    mark[2].remove(stack)
    if not mark[2]:
        mark[3].close()


def _unmark(modules: list[nn.Module], thread: int) -> None:
    for module in modules:
        marks = vars(module)[STEERED]
        del marks[thread]
        if not marks:
            del vars(module)[STEERED]


def _refuse_missing(parts: tuple[Steer, ...], sites: list[Site], root: nn.Module) -> None:
    """Raises where a host has no site for a steer."""
    for part in parts:
        if not any(part.takes(site) for site in sites):
            names = [site.name for site in sites]
            shown = ", ".join(names if len(names) < 7 else [*names[:3], "...", *names[-3:]]) or "none"
            raise ValueError(
                f"{type(part).__name__} finds no attention site for sites={part.sites!r} in this "
                f"{type(root).__name__}. Its sites are: {shown}."
            )


def _defining(parts: list[Steer], hook: str) -> list[Steer]:
    """The steers that define one of the methods."""
    return [part for part in parts if getattr(type(part), hook) is not getattr(Steer, hook)]


def _edited(
    part: Steer, call: Call, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    site = call.site
    shown = tuple(_on_grid(x, site) for x in (query, key, value))
    q, k, v = part.edit(site, *shown)
    if q.shape != shown[0].shape:
        raise ValueError(_misshapen(part, "edit", site, q, shown[0]))
    flat = [
        old if new is view else new.flatten(1, -3)
        for new, view, old in zip((q, k, v), shown, (query, key, value), strict=True)
    ]
    for new, old in zip(flat[1:], (key, value), strict=True):
        same = new.shape[:1] + new.shape[2:] == old.shape[:1] + old.shape[2:]
        if not same or new.shape[1] != flat[1].shape[1]:
            raise ValueError(_misshapen(part, "edit", site, new, old))
    if flat[1].shape[1] != key.shape[1] and (call.mask is not None or site.is_causal):
        raise ValueError(
            f"{type(part).__name__}.edit gave {flat[1].shape[1]} keys for {key.shape[1]} at site "
            f"{site.name!r}, whose mask does not say who may see them. Keep their number there."
        )
    return flat[0], flat[1], flat[2]


def _attended(part: Steer, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """The outputs that a steer's own operator gives, if any."""
    if call.softcap is not None or call.dropout:
        return None
    out = part.attend(call.site, query, key, value, call.mask, call.scale)
    if out is None:
        return None
    wanted = (*query.shape[:3], value.shape[-1])
    if out.shape != wanted:
        raise ValueError(
            f"{type(part).__name__}.attend gave {list(out.shape)} at site {call.site.name!r}. Give "
            f"{list(wanted)}, or None."
        )
    return out


def _misshapen(part: Steer, hook: str, site: Site, new: Tensor, old: Tensor) -> str:
    return (
        f"{type(part).__name__}.{hook} gave {list(new.shape)} at site {site.name!r}. Give {list(old.shape)}, "
        "as it was given."
    )


def _on_grid(x: Tensor, site: Site) -> Tensor:
    """`[B, N, H, D]` on the grid, where the tokens are exactly a grid of more than one dimension."""
    grid = site.grid
    if grid is None or len(grid) == 1 or site.num_prefix or prod(grid) != x.shape[1]:
        return x
    return x.unflatten(1, grid)


def _inside(rows: range, site: Site) -> range:
    """Contiguous rows cut to those of the call."""
    if rows.step != 1:
        raise ValueError(f"rows={rows} at site {site.name!r} leave some out. Give a range of step 1.")
    start, stop = max(rows.start, site.rows.start), min(rows.stop, site.rows.stop)
    return range(start, max(start, stop))


def _equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether nothing was changed, and nobody is to learn from it."""
    if torch.is_grad_enabled() and any(x.requires_grad and x is not y for y, x in zip(a, b, strict=True)):
        return False
    return all(x is y or (x.shape == y.shape and torch.equal(x, y)) for x, y in zip(a, b, strict=True))
