"""From checked tensors to a backend: which form, who computes it."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from torch import Tensor

from nearfield.core.backend import Verdict, choose
from nearfield.ops import kernels
from nearfield.ops.checks import no_transform
from nearfield.ops.linear import native, reference, tiled, triton

FORMS = ("auto", "parallel", "chunk", "recurrent")


def check_form(form: str) -> None:
    """Refuse a form that there is not."""
    if form not in FORMS:
        near = get_close_matches(str(form), FORMS, n=1) or FORMS
        raise ValueError(f"form={form!r} is unknown. Did you mean {' or '.join(map(repr, near))}?")


def attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float,
    is_causal: bool = True,
    form: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output `[B, T, H, V]` and the last state `[B, H, K, V]`; key and value may have fewer heads."""
    tokens, heads = query.shape[1], query.shape[2]
    if form == "auto":
        form = "recurrent" if is_causal and tokens == 1 else "chunk"

    def ask_native() -> Verdict:
        cannot = no_transform() or _unlike(is_causal, form, "the CPU kernels", ("chunk", "recurrent"))
        return Verdict(cannot or kernels.unfit(query, value, scale) or kernels.missing())

    def ask_triton() -> Verdict:
        cannot = no_transform() or _unlike(is_causal, form, "the GPU kernels", ("chunk",))
        cannot = cannot or triton.unfit(query, beta) or triton.missing(query.device.type)
        return Verdict(cannot, "Triton's interpreter is slow." if triton.interpreted() else None)

    def ask_tiled() -> Verdict:
        if not is_causal:
            return Verdict("without a causal order there are no steps." if form == "recurrent" else None)
        return Verdict(no_transform())

    asked: dict[str, Callable[[], Verdict]] = {
        "native": ask_native,
        "triton": ask_triton,
        "tiled": ask_tiled,
        "reference": Verdict,
    }
    name = choose(op, backend, asked)
    if not is_causal:
        module = tiled if name == "tiled" else reference
        return module.attend_everywhere(query, key, value, initial_state, scale=scale, form=form)
    if name == "native" and tokens:
        key, value = _shared(key, heads), _shared(value, heads)
        if beta is None:
            return native.gated(query, key, value, g, initial_state, scale)
        return native.delta(query, key, value, beta, g, initial_state, scale)
    if name == "triton" and tokens:
        return triton.attend(query, key, value, g, beta, initial_state, scale=scale)
    module = tiled if name == "tiled" else reference
    return module.attend(query, key, value, g, beta, initial_state, scale=scale, form=form)


def _unlike(is_causal: bool, form: str, who: str, forms: tuple[str, ...]) -> str | None:
    if not is_causal:
        return f"{who} are for causal order; without it two matrix products are all there is."
    return None if form in forms else f"{who} have no form {form!r}, only {' and '.join(map(repr, forms))}."


def _shared(x: Tensor, heads: int) -> Tensor:
    """`x` [B, T, H or fewer, D] with `heads` heads, copied only where several heads share several."""
    if x.shape[2] == 1:
        return x.expand(-1, -1, heads, -1)
    if x.shape[2] == heads:
        return x
    return x.unsqueeze(3).expand(-1, -1, -1, heads // x.shape[2], -1).flatten(2, 3)
