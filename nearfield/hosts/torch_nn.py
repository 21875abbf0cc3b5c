"""Plain torch hosts: SDPA calls by module name, `nn.MultiheadAttention` and encoder layers, ViT grids.

Two things can sit at a site and answer for it: a `Session` (a handler, while a `with` lasts) and a `Planned`
(a local pattern, for good). Both are asked through the same openings: a function mode around SDPA, and a
`forward` laid over the instances of torch's own attention modules, whose fused paths no mode sees.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from nearfield.hosts.calls import OPENINGS, Asked, Seen, context_of, multihead, note_grid, with_twin
from nearfield.hosts.local import attend
from nearfield.hosts.seam import Call, Handler

if TYPE_CHECKING:
    from nearfield.plan.pattern import SitePlan

BACKWARD = (Tensor.backward, torch.autograd.grad)
PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")  # what scores are computed with by hand

_here = threading.local()  # `.busy`: a handler or a local pattern is computing in this thread


class Session(TorchFunctionMode, Asked):
    """A handler at every site of a model, in the thread that entered it."""

    def __init__(self, model: nn.Module, handler: Handler, leave_out: Sequence[nn.Module]):
        self.handler = handler
        self.names = {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}
        self.names = {module: "" if name == "_orig_mod" else name for module, name in self.names.items()}
        self.leave_out = {id(module) for module in leave_out}
        self.local = threading.local()
        self.in_backward = 0

    def listening(self) -> bool:
        state = self._state()
        return not state.muted and (state.hidden > 0 or self._recomputing() or self._is_entered())

    def answer(self, module: nn.Module, seen: Seen) -> Tensor | None:
        site = seen.site(self.names.get(module, ""), list(self._state().grids.values()))
        scale = seen.query.shape[-1] ** -0.5 if seen.scale is None else seen.scale
        call = Call(site, module, seen.query, seen.key, seen.value, seen.complete_mask(), scale)
        call.dropout, call.is_exact = seen.dropout, not seen.is_twin
        if seen.host is not None:
            call.host = seen.host if seen.is_twin else _awake(seen.host)
        with _without(self), _busy(), _stance("default"):
            out = self.handler(call)
        wanted = (*seen.query.shape[:3], seen.value.shape[-1])
        if out is not None and tuple(out.shape) != wanted:
            raise ValueError(
                f"The handler gave {tuple(out.shape)} at site {site.name!r}. "
                f"Give [B, N, heads, Dv] = {wanted}, or None."
            )
        return out

    @contextmanager
    def aside(self) -> Iterator[None]:
        state = self._state()
        state.muted += 1
        try:
            with _without(self):
                yield
        finally:
            state.muted -= 1

    @contextmanager
    def hidden(self) -> Iterator[None]:
        state = self._state()
        state.hidden += 1
        try:
            with _without(self):
                yield
        finally:
            state.hidden -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        state = self._state()
        if func in BACKWARD:
            return self._backward(func, args, kwargs)
        if getattr(_here, "busy", 0) or not state.running or id(state.running[-1]) in self.leave_out:
            return func(*args, **kwargs)
        module = state.running[-1]
        if func in OPENINGS:
            out = OPENINGS[func](self, module, context_of(module, state.given[-1]), func, *args, **kwargs)
            return func(*args, **kwargs) if out is None else out
        result = func(*args, **kwargs)
        self._notice_eager(module, getattr(func, "__name__", ""), args, kwargs, result)
        return result

    def _notice_eager(self, module: nn.Module, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Refuses a softmax over the product of two activations: attention that cannot be seen."""
        if not isinstance(result, Tensor) or result.ndim < 3:
            return
        scores, form = self._state().scores, (result.shape[-1], result.numel())
        if name in PRODUCTS and not any(isinstance(factor, nn.Parameter) for factor in args):
            scores[module] = form
        elif name == "softmax" and scores.get(module) == form:
            axis = kwargs["dim"] if "dim" in kwargs else args[1]
            if axis in (-1, result.ndim - 1):
                raise NotImplementedError(
                    f"Site {self.names.get(module, '')!r} ({type(module).__name__}) takes the softmax of "
                    "query times key itself, so its attention cannot be seen. Switch it to its fused path "
                    "(F.scaled_dot_product_attention), or enter only the parts of the model that use it."
                )

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a backward; torch has taken the mode off for its whole length."""
        self.in_backward += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.in_backward -= 1

    def _recomputing(self) -> bool:
        """Whether this thread runs a backward of this session, so that a forward in it is a checkpoint's."""
        return self.in_backward > 0 and torch._C._current_graph_task_id() != -1

    def _is_entered(self) -> bool:
        return self in _get_current_function_mode_stack()

    def _state(self) -> Any:
        """What this thread is in the middle of."""
        local = self.local
        if not hasattr(local, "running"):
            local.running, local.given, local.entered, local.grids, local.scores = [], [], [], {}, {}
            local.hidden = local.muted = 0
        return local

    def enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook: the module runs now."""
        state = self._state()
        state.running.append(module)
        state.given.append((args, kwargs))
        if self._recomputing() and not self._is_entered() and not state.muted:
            _push_mode(self)
            state.entered.append(module)

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called on exceptions too: the module no longer runs."""
        state = self._state()
        if state.entered and state.entered[-1] is module:
            state.entered.pop()
            _pop_mode()
        while state.running:
            state.given.pop()
            if state.running.pop() is module:
                break
        state.scores.pop(module, None)
        note_grid(state.grids, module, output)


@contextmanager
def attention(model: nn.Module, handler: Handler, leave_out: Sequence[nn.Module] = ()) -> Iterator[nn.Module]:
    """`seam.attention` for a plain torch model; sites inside the `leave_out` modules are not entered.

    Modules whose fused path is switched off (`fused_attn=False`) use it inside the `with`, so they are equal
    to their own run up to rounding; all others are bit-equal.
    """
    _refuse_scripted(model)
    session = Session(model, handler, leave_out)
    with ExitStack() as stack:
        outside = {module for guest in leave_out for module in guest.modules()} - set(leave_out)
        layers = [module for module in model.modules() if _is_standard_layer(module)]
        # Hooks on an encoder layer or in it switch its fused path off, so it is told by a forward instead.
        quiet = {module for layer in layers for module in layer.modules()}
        for module in model.modules():
            if module in outside:
                continue
            forward = _opening(module, session)
            if forward is not None and module not in leave_out:
                stack.callback(forward.put().lift)
            if module not in quiet:
                stack.callback(
                    module.register_forward_pre_hook(session.enter_module, with_kwargs=True).remove
                )
                stack.callback(module.register_forward_hook(session.leave_module, always_call=True).remove)
            if getattr(module, "fused_attn", None) is False:
                stack.callback(_set(module, "fused_attn", True))
        stack.enter_context(eagerly())
        stack.enter_context(session)
        yield model


def install(model: nn.Module, plans: dict[str, SitePlan]) -> Callable[[], None]:
    """Makes the named sites of a plain torch model local for good; the result puts everything back.

    Sites are those that `seam.sites` names: `nn.MultiheadAttention` (alone or in encoder and decoder layers)
    and modules that call `F.scaled_dot_product_attention` themselves, such as a ViT's attention. The grid of
    image tokens is read, call by call, from the patch convolution before them. Weights and their names stay.
    """
    _refuse_scripted(model)
    modules = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}
    unknown = [name for name in plans if name not in modules]
    if unknown:
        near = get_close_matches(unknown[0], modules, n=3) or list(modules)[-3:]
        raise ValueError(f"The model has no module {unknown[0]!r}. Near it: {', '.join(near)}.")
    chosen = {modules[name]: (name, plan) for name, plan in plans.items() if not plan.is_full}
    for module, (name, _) in chosen.items():
        if isinstance(
            module, nn.TransformerEncoder | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
        ):
            raise ValueError(
                f"Module {name!r} holds attention sites and is none. "
                f"Name the site, such as '{name}.self_attn'."
            )
    grids = Grids()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                stack.callback(module.register_forward_hook(grids.note).remove)
            planned = chosen.get(module.self_attn if _is_standard_layer(module) else module)
            if planned is None:
                continue
            if getattr(module, "fused_attn", None) is False:
                stack.callback(_set(module, "fused_attn", True))
            if isinstance(getattr(vars(module).get("forward"), "who", None), Planned):
                raise RuntimeError(
                    f"Site {planned[0]!r} is local already. Call the restore of that plan first."
                )
            who = Planned(*planned, grids)
            forward = _opening(module, who) or SdpaForward(module, who)
            stack.callback(forward.put().lift)
        return stack.pop_all().close


class Planned(Asked):
    """The local pattern of one site, for good."""

    def __init__(self, name: str, plan: SitePlan, grids: Grids):
        self.name, self.plan, self.grids = name, plan, grids

    def answer(self, module: nn.Module, seen: Seen) -> Tensor:
        if seen.dropout:
            raise NotImplementedError(
                f"Site {self.name!r} is local and drops attention weights with probability {seen.dropout}, "
                "which local attention cannot. Set its dropout to 0, or call .eval()."
            )
        site = seen.site(self.name, list(self.grids.seen.values()))
        with _busy():
            return attend(
                seen.query, seen.key, seen.value, site, self.plan, key_mask=seen.padding(), scale=seen.scale
            )


class Grids:
    """The grids that a model's convolutions put out last, by module."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, tuple[int, ...]] = {}

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a convolution."""
        note_grid(self.seen, module, output)


class Forward:
    """A `forward` laid over a module's own, on the instance; class, weights and names stay as they are."""

    def __init__(self, module: nn.Module, who: Asked):
        self.module, self.who = module, who
        self.was_set = "forward" in vars(module)
        self.__wrapped__ = module.forward  # what inspect.signature follows

    def put(self) -> Forward:
        """Takes the place of the module's forward."""
        vars(self.module)["forward"] = self
        return self

    def lift(self) -> None:
        """Gives the place back."""
        if vars(self.module).get("forward") is not self:
            raise RuntimeError(
                f"The forward of this {type(self.module).__name__} was changed again since. "
                "Undo the later change first."
            )
        if self.was_set:
            vars(self.module)["forward"] = self.__wrapped__
        else:
            del vars(self.module)["forward"]

    def follow(self, seen: Seen) -> Tensor | None:
        """What those answer over whose forward this one was laid."""
        below: Any = self.__wrapped__
        if not isinstance(below, type(self)):
            return None
        module: Any = self.module
        attn = module.self_attn if _is_standard_layer(module) else module
        out = below.who.answer(attn, with_twin(seen, below.follow)) if below.who.listening() else None
        return below.follow(seen) if out is None else out


class MultiheadForward(Forward):
    """`nn.MultiheadAttention` that asks first. Attention weights of an answered site are not known: None."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        given = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if not self.who.listening():
            return self.__wrapped__(query, key, value, *given)
        masks = key_padding_mask, attn_mask, is_causal, need_weights
        out = multihead(self.who, self.module, self.module, query, key, value, *masks, self.follow)
        if out is not None:
            return out, None
        with self.who.aside():
            return self.__wrapped__(query, key, value, *given)


class EncoderLayerForward(Forward):
    """`nn.TransformerEncoderLayer` that asks for its attention first, whichever path it would have taken."""

    def __call__(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        layer: Any = self.module
        if not self.who.listening():
            return self.__wrapped__(src, src_mask, src_key_padding_mask, is_causal)
        x, padding = src, src_key_padding_mask
        if src.is_nested:  # the encoder's own form of a padded batch
            lengths = src._nested_tensor_size()[:, 0].to(src.device)
            x = src.to_padded_tensor(0.0)
            padding = torch.arange(x.shape[1], device=src.device) >= lengths[:, None]
        normed = layer.norm1(x) if layer.norm_first else x
        attn = layer.self_attn
        given = (normed, normed, normed, padding, src_mask, is_causal, False)
        out = multihead(self.who, attn, attn, *given, self.follow)
        if out is None:
            with self.who.aside():
                return self.__wrapped__(src, src_mask, src_key_padding_mask, is_causal)
        x = x + layer.dropout1(out)
        if layer.norm_first:
            x = x + layer._ff_block(layer.norm2(x))
        else:
            x = layer.norm1(x)
            x = layer.norm2(x + layer._ff_block(x))
        return torch._nested_tensor_from_mask(x, ~padding) if padding is not None and src.is_nested else x


class EncoderForward(Forward):
    """`nn.TransformerEncoder` that packs a padded batch as it does when nobody looks; its layers ask."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.who.hidden() if self.who.listening() else nullcontext():
            return self.__wrapped__(*args, **kwargs)


class SdpaForward(Forward):
    """A module whose own SDPA calls ask first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with SdpaMode(self.who, self.module, context_of(self.module, (args, kwargs))):
            return self.__wrapped__(*args, **kwargs)


class SdpaMode(TorchFunctionMode):
    """Answers the SDPA calls made while one converted module runs."""

    def __init__(self, who: Asked, module: nn.Module, context: Any):
        self.who, self.module, self.context = who, module, context

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in OPENINGS:
            return func(*args, **kwargs)
        watching = [
            mode
            for mode in _get_current_function_mode_stack()
            if isinstance(mode, Session) and mode.listening()
        ]
        chain = (*reversed(watching), self.who)

        def ask(first: int, *args: Any, **kwargs: Any) -> Any:
            for at in range(first, len(chain)):
                following = partial(ask, at + 1)
                out = OPENINGS[func](chain[at], self.module, self.context, following, *args, **kwargs)
                if out is not None:
                    return out
            return func(*args, **kwargs)

        return ask(0, *args, **kwargs)


def _opening(module: nn.Module, who: Asked) -> Forward | None:
    """The forward to lay over one of torch's own attention modules; None for any other module."""
    if _is_standard_layer(module):
        return EncoderLayerForward(module, who)
    if isinstance(module, nn.MultiheadAttention) and _is_own(module, nn.MultiheadAttention, "forward"):
        return MultiheadForward(module, who)
    if isinstance(module, nn.TransformerEncoder) and _is_own(module, nn.TransformerEncoder, "forward"):
        return EncoderForward(module, who) if all(map(_is_standard_layer, module.layers)) else None
    return None


def _is_standard_layer(module: nn.Module) -> bool:
    """Whether a module is torch's encoder layer with torch's attention in it, however far derived."""
    kind = nn.TransformerEncoderLayer
    return (
        isinstance(module, kind)
        and all(_is_own(module, kind, name) for name in ("forward", "_sa_block", "_ff_block"))
        and isinstance(module.self_attn, nn.MultiheadAttention)
        and _is_own(module.self_attn, nn.MultiheadAttention, "forward")
    )


def _is_own(module: nn.Module, kind: type, name: str) -> bool:
    return getattr(type(module), name) is getattr(kind, name)


def _refuse_scripted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"Module {name!r} is scripted; its attention cannot be seen. "
                "Use the model it was scripted from."
            )


def _set(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of an instance; the result puts it back as it was, also where its class held it."""
    if name not in vars(owner):
        setattr(owner, name, value)
        return lambda: delattr(owner, name)
    before = vars(owner)[name]
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


@contextmanager
def _without(mode: TorchFunctionMode) -> Iterator[None]:
    """This thread's function modes without one of them, wherever in the stack it is."""
    if mode not in _get_current_function_mode_stack():
        yield
        return
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
    try:
        yield
    finally:
        for _ in above:
            _pop_mode()
        for other in (mode, *reversed(above)):
            _push_mode(other)


@contextmanager
def _busy() -> Iterator[None]:
    """Attention computed inside belongs to no site."""
    _here.busy = getattr(_here, "busy", 0) + 1
    try:
        yield
    finally:
        _here.busy -= 1


def _awake(host: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The host's own computation as a handler may call it: other sites' askers hear it."""

    def run(*given: Tensor) -> Tensor:
        _here.busy -= 1
        try:
            return host(*given)
        finally:
            _here.busy += 1

    return run


_watching = threading.Lock()
_stances: list[Any] = []  # of each that watches; only the first one's is real


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code runs eagerly inside; of several, the last to leave puts that back, in whatever order."""
    with _watching:
        if not _stances:
            _stances.append(_stance("force_eager"))
            _stances[0].__enter__()
        else:
            _stances.append(None)
    try:
        yield
    finally:
        with _watching:
            if len(_stances) == 1:
                _stances[0].__exit__(None, None, None)
            _stances.pop()


def _stance(name: str) -> AbstractContextManager[Any]:
    """How compiled code runs inside; where nothing was compiled yet, the compiler is not even imported."""
    return torch.compiler.set_stance(name) if "torch._dynamo" in sys.modules else nullcontext()
