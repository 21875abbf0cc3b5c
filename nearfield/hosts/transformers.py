"""transformers models: every attention call by site name, local patterns for good, caches bounded by them.

The way in is the library's own: one attention function and one mask function, registered under `NAME` when
first needed, do nothing for a module that carries no `Seat`. What a model does is kept on its own modules.

A converted site shows a token the keys that both its pattern and the host's mask show. Padding goes to the
operator; a mask that says more (4-D masks of the user, packed sequences) is applied densely, which is exact
but not faster, and is refused once a bounded cache has dropped keys.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nearfield.core import per_dim, require
from nearfield.hosts.local import attend
from nearfield.hosts.seam import Call, Handler, Role, Site
from nearfield.hosts.transformers_eager import eager, seen_before
from nearfield.hosts.transformers_masks import Reading, dense_mask, mark, read_mask
from nearfield.hosts.transformers_sites import (
    PatchGrid,
    config_of,
    configs_of,
    find,
    head_dim_of,
    is_attention,
    is_causal_site,
    layer_type,
    line_of,
    names_of,
    native_window,
    num_kv_heads_of,
    refuse_unswitchable,
    role_of,
    sites,
    watch_grids,
)
from nearfield.ops.neighborhood import Neighborhood

if TYPE_CHECKING:
    from nearfield.hosts.transformers_cache import BoundedLayer, Part
    from nearfield.plan.pattern import SitePlan

__all__ = [
    "attention",
    "attention_modules",
    "cache_bytes",
    "cache_bytes_after",
    "install",
    "install_answers",
    "sites",
]

NAME = "nearfield"
SEAT = "_nearfield_seat"
# What attention functions are also told, and neither a handler nor a local pattern could honour.
BEYOND = {
    "softcap": "caps its scores",
    "position_bias": "adds a position bias to its scores",
    "s_aux": "has learned sinks",
    "cache": "uses a paged cache",
}

# `answer(query, key, value, mask, scale)` in `[B, N, heads, D]`, the mask as in `seam.Call`; None leaves the
# call to the host.
Answer = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]

_lock = threading.RLock()


@contextmanager
def attention(model: nn.Module, handler: Handler, *, softcap: bool = False) -> Iterator[nn.Module]:
    """`seam.attention` for a transformers model: calls with clean, unrepeated key/value heads.

    Inside the `with` the model runs on torch SDPA, bit-equal to itself under `attn_implementation="sdpa"`,
    wherever the handler answers None; sites that cap their scores run on the library's eager function, as
    they do outside. On a converted model that goes on with the local pattern.
    """
    _register()
    from nearfield.hosts.torch_nn import eagerly

    watcher = _Watcher(handler, threading.get_ident(), names_of(model), softcap)
    modules = set(model.modules())
    refuse_unswitchable(model, modules, softcap)
    with ExitStack() as stack:
        grids = watch_grids(model, modules, stack)
        stack.callback(_unwatch, modules, watcher)
        for module in modules:
            with _lock:
                seat = module.__dict__.setdefault(SEAT, _Seat())
                seat.watchers += ((watcher, grids.get(module)),)
            if is_attention(module):
                stack.callback(module.register_forward_pre_hook(watcher.begin, with_kwargs=True).remove)
        _switch(configs_of(modules), stack)
        stack.enter_context(eagerly())
        yield model


def install(model: nn.Module, plans: Mapping[str, SitePlan]) -> Callable[[], None]:
    """Makes the named sites of a transformers model local for good; the result puts everything back.

        restore = install(model, {"model.layers.3.self_attn": SitePlan(...)})

    Weights and their names stay, so `save_pretrained` writes what it wrote before. `generate` then holds, for
    each local group, the last `kernel_size - 1` keys and the sinks. Groups without a pattern do what the host
    did, its own sliding window included; sites without any are left alone.
    """
    _register()
    from nearfield.hosts.transformers_cache import Part

    modules = {name: module for module, name in names_of(model).items()}
    chosen = {name: find(modules, name) for name in plans}
    targets = set(chosen.values())
    refuse_unswitchable(model, targets)
    with ExitStack() as stack:
        grids = watch_grids(model, targets, stack)
        for name, module in chosen.items():
            plan, window = plans[name], native_window(module)
            seat = _free_seat(module, name, stack)
            parts = _parts(name, plan, module, window, Part)
            if plan.is_full:
                continue
            group = plan.groups[0]
            one_group = (
                replace(group, kv_heads=tuple(range(len(part.kv_heads))), pattern=part.pattern)
                for part in parts
            )
            subplans = tuple(replace(plan, groups=(group,)) for group in one_group)
            seat.route = _Route(name, parts, subplans, window, grids.get(module))
            stack.callback(setattr, seat, "route", None)
            stack.callback(module.register_forward_pre_hook(_before, with_kwargs=True).remove)
        _switch(configs_of({chosen[name] for name, plan in plans.items() if not plan.is_full}), stack)
        return stack.pop_all().close


def install_answers(model: nn.Module, answers: Mapping[str, Answer]) -> Callable[[], None]:
    """Has calls of the named sites answered for good, where an answer is given; the result undoes it.

    Who watches is asked first. Calls that cap scores, drop weights, are told a sliding window or say anything
    else that an answer is not told stay the host's.
    """
    _register()
    modules = {name: module for module, name in names_of(model).items()}
    chosen = {name: find(modules, name) for name in answers}
    refuse_unswitchable(model, set(chosen.values()), softcap=True)
    with ExitStack() as stack:
        for name, module in chosen.items():
            seat = _free_seat(module, name, stack)
            seat.answer = answers[name]
            stack.callback(setattr, seat, "answer", None)
            stack.callback(module.register_forward_pre_hook(partial(_refuse_switched, name)).remove)
        _switch(configs_of(set(chosen.values())), stack)
        return stack.pop_all().close


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Site name -> module, for the modules of a transformers model that call its attention function."""
    return {name: module for module, name in names_of(model).items() if is_attention(module)}


def cache_bytes(cache: Any) -> int:
    """Bytes that a transformers cache takes up now, spare room in its buffers included."""
    require("transformers", extra="hf")
    from nearfield.hosts import transformers_cache

    return transformers_cache.cache_bytes(cache)


def cache_bytes_after(model: nn.Module, num_tokens: int, *, batch: int = 1) -> int:
    """Bytes of keys and values that rows of `num_tokens` leave in a decoder's cache, converted or not."""
    total = 0
    itemsize = next(model.parameters()).dtype.itemsize
    for module in attention_modules(model).values():
        config = config_of(module)
        if not is_causal_site(module) or config is None:
            continue
        num_heads, head_dim = num_kv_heads_of(module), head_dim_of(module)
        seat = module.__dict__.get(SEAT)
        window = native_window(module)
        if seat is not None and seat.route is not None:
            held = sum(len(part.kv_heads) * part.held(num_tokens) for part in seat.route.parts)
        else:
            held = num_heads * (num_tokens if window is None else min(num_tokens, window - 1))
        total += 2 * held * head_dim * itemsize
    return batch * total


@dataclass(frozen=True)
class _Watcher:
    """A handler, in the thread that entered it, and the names of the modules as its model spells them."""

    handler: Handler
    thread: int
    names: dict[nn.Module, str] = field(repr=False)
    softcap: bool = False
    at: dict[nn.Module, int] = field(default_factory=dict, repr=False)  # place of the next query

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: the module's next query follows those that its cache has seen."""
        if self.listening():
            self.at[module] = seen_before(module, args, kwargs)

    def places(self, module: nn.Module, role: Role, num_queries: int, num_keys: int) -> tuple[range, range]:
        """The places of the queries and keys of a call; a module may call several times, part by part."""
        first = self.at.get(module, max(0, num_keys - num_queries))
        self.at[module] = first + num_queries
        start = 0 if role == "cross" else max(0, first + num_queries - num_keys)
        return range(first, first + num_queries), range(start, start + num_keys)

    def listening(self) -> bool:
        """Whether this thread's calls are the handler's. A backward may recompute in a thread of its own."""
        return threading.get_ident() == self.thread or torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class _Route:
    """What a converted site does."""

    name: str
    parts: tuple[Part, ...]
    plans: tuple[SitePlan, ...]  # one for each part, its heads counted from 0
    window: int | None  # the host's own sliding window
    grid: PatchGrid | None


@dataclass
class _Seat:
    """Who sits at a module: handlers for a while; for good a route, or what answers some of its calls."""

    watchers: tuple[tuple[_Watcher, PatchGrid | None], ...] = ()
    route: _Route | None = None
    answer: Answer | None = None

    @property
    def is_taken(self) -> bool:
        """Whether the site is converted."""
        return self.route is not None or self.answer is not None


@dataclass
class _Lease:
    """A config switched to our function by so many users, and what it said before."""

    config: Any
    before: str | None
    users: int = 0


_leases: dict[int, _Lease] = {}


def _register() -> None:
    """Makes `NAME` known to transformers; harmless to models that do not use it."""
    require("transformers", extra="hf")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def marked_mask(*args: Any, **kwargs: Any) -> Tensor | None:
        return mark(sdpa_mask(*args, **kwargs))

    with _lock:
        if NAME not in AttentionInterface():
            # Without a mask function of the same name padding would be ignored silently.
            AttentionMaskInterface.register(NAME, marked_mask)
            AttentionInterface.register(NAME, _attention_function)


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers: `[B, heads, N, D]` in, `([B, N, heads, Dv], None)` out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def host(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        if kwargs.get("softcap") is not None:
            return eager(module, query, key, value, mask, is_causal, options)
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=is_causal, **options)[0]

    seat: _Seat | None = module.__dict__.get(SEAT)
    watchers = () if seat is None else tuple(pair for pair in seat.watchers if pair[0].listening())
    route = None if seat is None else seat.route
    answer = None if seat is None or dropout or is_causal is False or _says_more(kwargs) else seat.answer

    def answered(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The output `[B, N, H, Dv]` of a site without a route."""
        if answer is not None:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            out = answer(q, k, v, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
            if out is not None:
                return out
        return host(query, key, value, attention_mask)

    if route is None and not watchers:
        return answered(query, key, value), None

    name = route.name if route is not None else watchers[-1][0].names[module]
    heeded = {"softcap"} if route is None and all(watcher.softcap for watcher, _ in watchers) else ()
    for option, what in BEYOND.items():
        if kwargs.get(option) is not None and option not in heeded:
            raise NotImplementedError(
                f"Site {name!r} {what} ({option}), which only the host itself can do. Leave it out."
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    num_queries, num_keys = query.shape[2], key.shape[2]
    layer = None
    if route is not None:
        from nearfield.hosts.transformers_cache import claim

        layer = claim(key)
    if attention_mask is None and causal and 1 < num_queries < num_keys:
        # A static cache in its first step: the keys behind the queries are still empty.
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    role = role_of(module, name)

    def site(name: str, grid: PatchGrid | None, rows: range = range(0), keys: range = range(0)) -> Site:
        if role == "cross":
            sides, prefix = None, 0
        else:
            sides, prefix = line_of(module, key.shape[2]) if grid is None else grid.fit(key.shape[2])
        return Site(name, role, sides, prefix, bool(causal), query.shape[1], key.shape[1], rows, keys)

    if layer is not None and watchers and layer.seen > num_queries:
        raise NotImplementedError(
            f"Site {name!r} decodes from a cache that holds only windows and sinks, so its calls cannot "
            "be shown whole. Run with use_cache=False inside the `with`, or watch the model before it is "
            "converted."
        )
    asked = [
        (watcher, site(watcher.names[module], grid, *watcher.places(module, role, num_queries, num_keys)))
        for watcher, grid in reversed(watchers)
    ]
    wanted = (query.shape[0], num_queries, query.shape[1], value.shape[-1])

    def ask(first: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the handlers from `first` on, and the host after them, make of `[B, heads, N, D]`."""
        for at in range(first, len(asked)):
            watcher, place = asked[at]
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            call = Call(place, module, q, k, v, attention_mask, scale)
            call.softcap, call.dropout = kwargs.get("softcap"), dropout
            call.host = partial(_heads_first, partial(ask, at + 1))
            out = watcher.handler(call)
            if out is not None:
                if tuple(out.shape) != wanted:
                    raise ValueError(
                        f"The handler gave {tuple(out.shape)} at site {name!r}. Give [B, N, heads, Dv] = "
                        f"{wanted}, or None."
                    )
                return out
        return last(query, key, value)

    def last(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if route is None:
            return answered(query, key, value)
        if dropout and any(part.pattern is not None for part in route.parts):
            raise NotImplementedError(
                f"Site {name!r} is local and drops attention weights with probability {dropout}, which local "
                "attention cannot. Set the attention dropout of its config to 0, or call .eval()."
            )
        if kwargs.get("sliding_window") not in (None, route.window):
            raise NotImplementedError(
                f"Site {name!r} has a sliding window of {kwargs['sliding_window']} that its config did not "
                "show. Leave it full."
            )
        place = site(name, route.grid)
        return _local(route, place, layer, query, key, value, attention_mask, scale, dropout, host)

    out = ask(0, query, key, value)
    if route is not None and layer is not None and layer.pending is not None:  # a handler has answered
        _store(layer, _reading(route, bool(causal), attention_mask))
    return out, None


def _says_more(kwargs: dict[str, Any]) -> bool:
    """Whether an attention function is told what an answer would not be."""
    return any(kwargs.get(name) is not None for name in (*BEYOND, "sliding_window"))


def _heads_first(follow: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """A function of `[B, heads, N, D]`, given `[B, N, heads, D]`."""
    return follow(*(x.transpose(1, 2) for x in given))


def _local(
    route: _Route,
    site: Site,
    layer: BoundedLayer | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    host: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """The output `[B, N, H, Dv]` of a converted site."""
    from nearfield.hosts.transformers_cache import one_row, select, unite

    num_kv_heads = sum(len(part.kv_heads) for part in route.parts)
    if key.shape[1] != num_kv_heads:
        raise ValueError(
            f"The plan of site {route.name!r} is for {num_kv_heads} key/value heads; the site has "
            f"{key.shape[1]}. Plan every head of the site once."
        )
    share = query.shape[1] // num_kv_heads
    if mask is not None and mask.shape[-2] != query.shape[2]:
        mask = mask.expand(*mask.shape[:2], query.shape[2], -1)  # one row for all queries
    reading = _reading(route, site.is_causal, mask)
    if layer is not None and layer.seen > query.shape[2]:
        layer.take()

        def full(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            if query.shape[2] == 1 and not dropout and (mask is None or mask.shape[1] == 1):
                return one_row(query, key, value, mask, scale)  # reads each key once, not once per query head
            return host(query, key, value, mask)

        return layer.attend(query, key, value, mask, reading, scale, full)
    padding = None
    if reading is not None and reading.last_hidden >= 0:
        padding = reading.keys.expand(key.shape[0], -1)
    outs = []
    pieces = (select(x, route.parts, n) for x, n in ((query, share), (key, 1), (value, 1)))
    for part, plan, q, k, v in zip(route.parts, route.plans, *pieces, strict=True):
        if part.pattern is None:
            outs.append(host(q, k, v, mask))
        elif mask is not None and reading is not None and not reading.plain:
            if site.num_prefix or len(site.grid or ()) != 1:
                raise NotImplementedError(
                    f"Site {site.name!r} is given a mask that says more than padding, which a pattern on a "
                    "grid cannot follow. Leave the site full."
                )
            outs.append(host(q, k, v, dense_mask(mask, reading.keys, part.pattern)))
        else:
            if padding is not None and part.pattern.border == "shift" and not site.is_causal:
                raise ValueError(
                    f"Site {site.name!r} is given padded rows and its pattern has border='shift', whose "
                    "windows would depend on the padding. Convert with border='truncate'."
                )
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            outs.append(attend(q, k, v, site, plan, key_mask=padding, scale=scale))
    if layer is not None:
        _store(layer, reading)
    return unite(outs, route.parts, share)


def _reading(route: _Route, is_causal: bool, mask: Tensor | None) -> Reading | None:
    return None if mask is None else read_mask(mask, is_causal=is_causal, window=route.window)


def _store(layer: BoundedLayer, reading: Reading | None) -> None:
    """Fills an empty bounded layer with the tokens of this call."""
    key, value = layer.take()
    keys = None if reading is None or reading.last_hidden < 0 else reading.keys.expand(key.shape[0], -1)
    layer.store(key, value, keys)


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a converted attention module: readies its layer of the cache."""
    from transformers.cache_utils import Cache

    from nearfield.hosts.transformers_cache import bind

    seat: _Seat | None = module.__dict__.get(SEAT)
    if seat is None or seat.route is None:
        return
    route = seat.route
    _refuse_switched(route.name, module)
    cache = next((given for given in (*kwargs.values(), *args) if isinstance(given, Cache)), None)
    bind(cache, getattr(module, "layer_idx", 0) or 0, route.parts, route.name)


def _refuse_switched(name: str, module: nn.Module, *_: Any) -> None:
    """Raises where the model has been switched to another attention function since it was converted."""
    now = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
    if now != NAME:
        raise RuntimeError(
            f"Site {name!r} is converted, but its model was switched to attn_implementation={now!r} "
            f"since. Call restore() to undo the conversion, or model.set_attn_implementation({NAME!r}) to "
            "use it."
        )


def _parts(
    name: str, plan: SitePlan, module: nn.Module, window: int | None, make: type[Part]
) -> tuple[Part, ...]:
    """The heads of a site by pattern, once every pattern is one that the site can follow."""
    num_kv_heads = num_kv_heads_of(module)
    if plan.num_kv_heads != num_kv_heads:
        raise ValueError(
            f"The plan of site {name!r} is for {plan.num_kv_heads} key/value heads; the site has "
            f"{num_kv_heads}. Plan every head of the site once."
        )
    kind = layer_type(module)
    if kind not in (None, "full_attention", "sliding_attention"):
        raise NotImplementedError(f"Site {name!r} is a layer of type {kind!r}. Leave it out of the plan.")
    if role_of(module, name) == "cross" and not plan.is_full:
        raise ValueError(
            f"Site {name!r} is cross attention: a local pattern needs self-attention. Leave it out of the "
            "plan."
        )
    chosen: dict[Neighborhood | None, list[int]] = {}
    for group in plan.groups:
        pattern = group.pattern
        if pattern is not None:
            _check_pattern(name, pattern, is_causal_site(module), window)
        elif window is not None:
            pattern = Neighborhood(window, is_causal=True)
        chosen.setdefault(pattern, []).extend(group.kv_heads)
    return tuple(make(tuple(sorted(heads)), pattern) for pattern, heads in chosen.items())


def _check_pattern(name: str, pattern: Neighborhood, is_causal: bool, window: int | None) -> None:
    given = pattern.is_causal if isinstance(pattern.is_causal, tuple) else (pattern.is_causal,)
    if set(given) != {is_causal} or (is_causal and len(given) > 1):
        wanted = "causal in its one dimension" if is_causal else "not causal"
        raise ValueError(f"Site {name!r} is {wanted}; its pattern {pattern} must be so too.")
    if not is_causal:
        return
    if per_dim("stride", pattern.stride, 1)[0] > 1 or pattern.border == "pad":
        raise ValueError(
            f"Site {name!r} is causal and its pattern {pattern} has a stride above 1 or border='pad'. What a "
            "token sees would depend on how many follow it, or on zero keys that no cache holds. Use "
            "stride=1 and another border."
        )
    size = per_dim("kernel_size", pattern.kernel_size, 1)[0]
    if window is not None and (
        size * per_dim("dilation", pattern.dilation, 1)[0] > window or pattern.num_sinks
    ):
        raise ValueError(
            f"Site {name!r} has a sliding window of {window} of its own, and its pattern {pattern} shows "
            f"keys that the host hides. Use a kernel_size of at most {window} and no sinks, or leave it full "
            "(the host's window then stays)."
        )


def _free_seat(module: nn.Module, name: str, stack: ExitStack) -> _Seat:
    """The seat at a module that is not converted; when the last of its users leaves, it goes."""
    with _lock:
        seat: _Seat = module.__dict__.setdefault(SEAT, _Seat())
    stack.callback(_unseat, module)
    if seat.is_taken:
        raise RuntimeError(f"Site {name!r} is converted already. Call the restore of that conversion first.")
    return seat


def _unseat(module: nn.Module) -> None:
    with _lock:
        seat: _Seat | None = module.__dict__.get(SEAT)
        if seat is not None and not seat.is_taken and not seat.watchers:
            del module.__dict__[SEAT]


def _unwatch(modules: set[nn.Module], watcher: _Watcher) -> None:
    with _lock:
        for module in modules:
            seat: _Seat | None = module.__dict__.get(SEAT)
            if seat is not None:
                seat.watchers = tuple(pair for pair in seat.watchers if pair[0] is not watcher)
                _unseat(module)


def _switch(configs: list[Any], stack: ExitStack) -> None:
    """Has configs name our attention function until the stack closes; the last user restores them."""
    with _lock:
        for config in configs:
            lease = _leases.setdefault(id(config), _Lease(config, config._attn_implementation))
            lease.users += 1
            config._attn_implementation_internal = NAME  # the public setter would also set every sub-config
            stack.callback(_release, config)


def _release(config: Any) -> None:
    with _lock:
        lease = _leases[id(config)]
        lease.users -= 1
        if not lease.users:
            del _leases[id(config)]
            if config._attn_implementation == NAME:  # else somebody chose anew, and keeps the choice
                config._attn_implementation_internal = lease.before
