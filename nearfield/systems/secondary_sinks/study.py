"""Which tokens of a text a decoder makes into attention sinks, in which layers, and which MLP writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfield.hosts import seam
from nearfield.hosts.seam import Call
from nearfield.steer.scores import hidden_of, scores_of
from nearfield.systems.secondary_sinks.layer import decoder_blocks, mlp_stages

Label = Literal["primary", "secondary", "noise"]
Rule = Literal["share", "layers"]
MASSIVE = 3  # dimensions of the primary's state that may carry a cosine alone
WORKSPACE = 64 << 20  # bytes that a chunk of attention rows may take


class Sink(NamedTuple):
    """A token whose state lies along the primary's; `layers` counts blocks from 0."""

    position: int
    layers: tuple[int, ...]
    label: Label

    @property
    def born(self) -> int:
        """The block behind which it is a sink first."""
        return self.layers[0]

    @property
    def lifetime(self) -> int:
        """In how many layers it is one."""
        return len(self.layers)


@dataclass(frozen=True)
class SinkProfile:
    """What one text shows. Rows of the tensors are layers: states are those behind a block, `received` is the
    attention that the block itself gives to a token, a mean over its heads and all later tokens."""

    primary: int
    band: range
    sinks: tuple[Sink, ...]
    norms: Float[Tensor, "layers n"]
    cosines: Float[Tensor, "layers n"]
    trimmed: Float[Tensor, "layers n"]  # cosines without the three largest dimensions of the primary
    received: Float[Tensor, "layers n"]

    def of(self, label: Label) -> tuple[Sink, ...]:
        """The sinks with a label; the primary itself is not among them."""
        return tuple(sink for sink in self.sinks if sink.label == label)

    def draw(self, axes: Any) -> None:
        """The cosines of all tokens in all layers, secondary sinks marked."""
        image = axes.imshow(self.cosines.abs().numpy(), aspect="auto", cmap="magma", vmin=0, vmax=1)
        for sink in self.of("secondary"):
            axes.plot(sink.position, sink.born, marker="v", color="cyan", markersize=4)
        axes.axhspan(self.band.start - 0.5, self.band.stop - 0.5, fill=False, color="white", linestyle=":")
        axes.set(xlabel="token", ylabel="block")
        axes.figure.colorbar(image, ax=axes, label="|cosine| with the primary sink")


@torch.no_grad()
def sink_profile(
    model: nn.Module,
    input_ids: Int[Tensor, "1 n"],
    *,
    candidates: int = 2,
    cosine: float = 0.9,
    lifetimes: Rule = "share",
    parity: bool = False,
) -> SinkProfile:
    """The sinks that a decoder makes of one text.

    The primary is that of the first `candidates` tokens with the largest mean norm; its band begins behind
    the largest rise of that norm and ends with the largest fall. Later tokens with |cos| > `cosine` to it are
    sinks in that layer. `lifetimes` labels them: `label`. Memory is linear in the tokens.

    `parity=True` takes the states of the published code, which lack the embeddings (a rise in the first block
    is missed) and end behind the final norm (whose fall may end the band), and its rule of "layers".
    """
    if input_ids.shape[0] != 1 or input_ids.shape[1] <= candidates:
        raise ValueError(
            f"input_ids are {list(input_ids.shape)} with {candidates} candidates for the primary sink. Give "
            "one text [1, tokens] that is longer."
        )
    blocks = decoder_blocks(model)
    watch, received = _States(candidates), [torch.empty(0)] * len(blocks)
    names = {f"{name}.{site}": at for at, (name, site, _) in enumerate(blocks)}

    def note(call: Call) -> None:
        if call.site.name in names:
            received[names[call.site.name]] = attention_received(call)

    with ExitStack() as stack:
        stack.enter_context(seam.attention(model, note, softcap=True))
        if not parity:
            watched = [block for _, _, block in blocks]
            before = watched[0].register_forward_pre_hook(
                lambda _, args, kwargs: watch(_first(args, kwargs)), with_kwargs=True
            )
            stack.callback(before.remove)
            for block in watched:
                stack.callback(block.register_forward_hook(lambda _, args, out: watch(out)).remove)
        out = model(input_ids=input_ids, use_cache=False, output_hidden_states=parity)
    for state in out.hidden_states[1:] if parity else ():
        watch(state)
    norms = torch.stack(watch.norms)
    primary = int(norms[len(norms) - len(blocks) :, :candidates].mean(0).argmax())
    band = primary_band(norms[:, primary], has_start=not parity)
    cosines = torch.stack([each[primary] for each in watch.cosines])[-len(blocks) :]
    found: dict[int, list[int]] = {}
    for layer in band:
        for position in (cosines[layer, primary + 1 :].abs() > cosine).nonzero()[:, 0].tolist():
            found.setdefault(position + primary + 1, []).append(layer)
    rule: Rule = "layers" if parity else lifetimes
    sinks = [
        Sink(at, tuple(layers), label(len(layers), len(band) if rule == "share" else len(blocks), rule))
        for at, layers in sorted(found.items())
    ]
    trimmed = torch.stack([each[primary] for each in watch.trimmed])[-len(blocks) :]
    return SinkProfile(
        primary, band, tuple(sinks), norms[-len(blocks) :], cosines, trimmed, torch.stack(received)
    )


def primary_band(norms: Float[Tensor, " states"], *, has_start: bool = True) -> range:
    """The blocks behind which a token's norm stands high: from its largest rise to the largest fall after it.

    `norms` are those behind each block, after the one before the first block where `has_start`. Where no fall
    follows the band ends with the model; the published rule then takes the smallest rise for one.
    """
    steps = norms.diff()
    start = int(steps.argmax()) + 1
    rest = steps[start:]
    if len(rest) and (not has_start or rest.min() < 0):
        end = start + int(rest.argmin()) + 1
    else:
        end = len(norms)
    return range(start - has_start, end - has_start)


def label(lifetime: int, layers: int, rule: Rule = "share") -> Label:
    """What a sink of this lifetime is.

    "layers" is published: secondary between 4 and L - 15 of the L layers of a model, both left out. It means
    nothing below 20 layers. "share": secondary between 0.1 and 0.75 of the layers of the primary's band.
    """
    least, most = (4.0, layers - 15.0) if rule == "layers" else (0.1 * layers, 0.75 * layers)
    if lifetime >= most:
        return "primary"
    return "secondary" if lifetime > least else "noise"


def levels(profiles: Iterable[SinkProfile]) -> Counter[tuple[int, int]]:
    """How many secondary sinks of some texts share a layer of birth and a lifetime: a model's sink levels."""
    return Counter((sink.born, sink.lifetime) for each in profiles for sink in each.of("secondary"))


def attention_received(call: Call) -> Float[Tensor, " m"]:
    """What each key of a causal call receives: the mean over heads and later queries; NaN for the last."""
    num_queries, num_keys, heads = call.query.shape[1], call.key.shape[1], call.query.shape[2]
    step = max(1, WORKSPACE // (4 * 3 * heads * num_keys))
    total = torch.zeros(num_keys, dtype=torch.promote_types(call.query.dtype, torch.float32))
    total = total.to(call.query.device)
    for start in range(0, num_queries, step):
        here = slice(start, min(start + step, num_queries))
        scores = scores_of(call, call.query[:, here], call.key, here)
        hidden = hidden_of(call, here, num_keys, scores.device)
        scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1)[0].mean(0)  # [R, M]
        places = torch.arange(here.start, here.stop, device=weights.device) + num_keys - num_queries
        weights[torch.arange(len(places)), places] = 0  # its own is no later query
        total += weights.nan_to_num(0.0).sum(0)
    later = num_keys - 1 - torch.arange(num_keys, device=total.device)
    return total / later.clamp(max=num_queries)


def origin(model: nn.Module, input_ids: Int[Tensor, "1 n"], profile: SinkProfile) -> list[dict[str, float]]:
    """For each secondary sink, where its first layer's MLP turns it to the primary.

    Cosines with the primary in the same MLP, by stage; "norm" is that of the MLP's output.
    """
    found = {}
    by_birth: dict[int, list[int]] = {}
    for sink in profile.of("secondary"):
        by_birth.setdefault(sink.born, []).append(sink.position)
    for born, positions in by_birth.items():
        stages = mlp_stages(model, input_ids, born, [profile.primary, *positions])
        cosines = {stage: F.cosine_similarity(x[1:], x[:1], dim=-1) for stage, x in stages.items()}
        norms = stages["output"][1:].norm(dim=-1)
        for at, position in enumerate(positions):
            found[position] = {stage: float(x[at]) for stage, x in cosines.items()} | {
                "norm": float(norms[at])
            }
    return [found[sink.position] for sink in profile.of("secondary")]


class _States:
    """Norms, and cosines with each candidate, of the states that it is shown; the states are not kept."""

    def __init__(self, candidates: int) -> None:
        self.candidates = candidates
        self.norms: list[Tensor] = []
        self.cosines: list[Tensor] = []
        self.trimmed: list[Tensor] = []

    def __call__(self, output: Any) -> None:
        state = (output if isinstance(output, Tensor) else output[0])[0].detach()
        state = state.to(torch.promote_types(state.dtype, torch.float32))  # [N, dim]
        first = state[: self.candidates]
        self.norms.append(state.norm(dim=-1))
        self.cosines.append(F.normalize(first, dim=-1) @ F.normalize(state, dim=-1).T)
        cut = []
        for at, one in enumerate(first):
            rest = state.index_fill(1, one.abs().topk(MASSIVE).indices, 0.0)
            cut.append(F.cosine_similarity(rest, rest[at], dim=-1))
        self.trimmed.append(torch.stack(cut))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
