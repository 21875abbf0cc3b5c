"""How alike the layers of a decoder choose: whose top key blocks another layer could take over.

One forward of a text; the queries of its last tokens stand for decoding steps, each of which sees the keys up
to its own. Per layer and key/value head:

- density: the smallest number of blocks that hold a share `mass` of a step's attention, over all blocks
- overlap of layers i and j: the share of the blocks that j would choose which i chooses too

both as means over the steps. Blocks are chosen as `ops.topk` does, by exact attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfield.hosts import seam
from nearfield.hosts.seam import Call
from nearfield.ops.topk import block_scores, choose_blocks, topk_block_attention

Merge = Literal["min", "mean"]
COLOURS = {"full": "#3b4a6b", "selects": "#e09f3e", "reuses": "#c9d1dc"}


@dataclass(frozen=True)
class ReuseProfile:
    """What one text shows of a decoder's layers. `fixed` are those that no plan can make sparse, because they
    have a window of their own or cap their scores: their density is NaN, their overlaps are 0.
    """

    names: tuple[str, ...]
    density: Float[Tensor, "layers kv_heads"]
    overlap: Float[Tensor, "layers layers kv_heads"]
    fixed: tuple[int, ...]
    num_keys: int
    steps: int
    num_tokens: int
    block_size: int
    num_sinks: int
    num_recent: int
    mass: float

    @property
    def chance(self) -> float:
        """About the overlap of two layers that choose at random beside the blocks that both must take."""
        blocks, size = ceil(self.num_keys / self.block_size), self.block_size
        forced = ceil(self.num_sinks / size) + (1 + (self.num_recent - 1) / size if self.num_recent else 0)
        chosen = max(self.num_tokens // size, forced)
        free = chosen - forced
        return (forced + free * free / max(1, blocks - forced)) / chosen

    def matrix(self, heads: Merge = "min") -> list[list[float]]:
        """The overlaps with heads merged, as `plan.reuse.best_reuse` takes them.

        "min": what is reused serves every head at least so well; "mean" is published for layers whose heads
        share their keys.
        """
        if heads not in ("min", "mean"):
            raise ValueError(f"heads={heads!r} is unknown. Choose min or mean.")
        merged = self.overlap.amin(-1) if heads == "min" else self.overlap.mean(-1)
        return merged.tolist()

    def draw(self, axes: Any) -> None:
        """The overlap of every later layer with every earlier one, the mean over heads."""
        draw_overlap(axes, self.matrix("mean"))


@torch.no_grad()
def reuse_profile(
    model: nn.Module,
    input_ids: Int[Tensor, "1 n"],
    *,
    steps: int = 64,
    num_tokens: int,
    block_size: int = 64,
    num_sinks: int = 64,
    num_recent: int = 512,
    mass: float = 0.9,
    parity: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReuseProfile:
    """The density and overlap of a decoder's layers on one unpadded text, whose last `steps` tokens are the
    steps. Memory is linear in the tokens. `num_tokens` are the keys that a sparse layer would read.

    `parity=True` follows the published profiler: densities lie one block lower and are clipped at 1.5
    interquartile ranges beyond the quartiles of a head's steps; the last `num_recent // block_size` blocks
    are forced in, of which the very last may hold few keys.
    """
    num_keys = _check(input_ids, steps, num_tokens, block_size, num_sinks, num_recent, mass)
    sites, fixed = decoder_sites(model), fixed_layers(model)
    chosen: dict[int, Tensor] = {}  # layer -> [S, Hkv, blocks]: one bit a block
    density: dict[int, Tensor] = {}
    blocks = torch.arange(num_keys - steps, num_keys) // block_size + 1  # that a step sees

    def watch(call: Call) -> None:
        layer = sites.get(call.site.name)
        if layer is None or layer in fixed:
            return
        query = _tail(call, steps)
        if not (query.isfinite().all() and call.key.isfinite().all()):
            raise ValueError(
                f"{call.site.name}: queries or keys are not finite. Check the weights and the input."
            )
        scores = block_scores(query, call.key, block_size=block_size, score="mass", scale=call.scale)
        seen = blocks.to(scores.device)
        density[layer] = _density(scores[0], seen, mass, parity).cpu()
        if parity:
            mask = _published_choice(scores[0], seen, num_tokens, block_size, num_sinks, num_recent)
        else:
            index = choose_blocks(
                scores,
                num_tokens // block_size,
                block_size=block_size,
                num_keys=num_keys,
                num_sinks=num_sinks,
                num_recent=num_recent,
            )
            mask = _as_mask(index[0], scores.shape[-1])
        chosen[layer] = mask.cpu()
        if progress is not None:
            progress(len(chosen), len(sites) - len(fixed))

    with seam.attention(model, watch, softcap=True):
        model(input_ids=input_ids, use_cache=False, **_last_logits(model))
    missing = [name for name, layer in sites.items() if layer not in chosen and layer not in fixed]
    if missing:
        raise ValueError(f"The model did not call its attention at {missing[0]}, so it has no profile.")
    heads = max((len(each) for each in density.values()), default=1)
    unknown = torch.full((heads,), torch.nan, dtype=torch.float64)
    return ReuseProfile(
        tuple(sites),
        torch.stack([density.get(layer, unknown) for layer in sites.values()]),
        _overlap(chosen, len(sites), heads),
        fixed,
        num_keys,
        steps,
        num_tokens,
        block_size,
        num_sinks,
        num_recent,
        mass,
    )


def sensitive_by_density(profile: ReuseProfile, share: float) -> tuple[int, ...]:
    """The layers that need most blocks: a share of all, rounded up, that had best keep full attention.

    Layers that no plan can make sparse come on top.
    """
    return _most(profile.density.mean(-1).tolist(), share, profile.fixed)


class Distortion(NamedTuple):
    """What one sparse layer alone does to a decoder, by layer; NaN where a layer cannot be sparse.

    `output`: squared error of the heads' outputs over their squares. `divergence`: of the next token's
    distribution from the dense model's (Kullback-Leibler, in nats), the mean over the steps.
    """

    output: Float[Tensor, " layers"]
    divergence: Float[Tensor, " layers"]

    def sensitive(self, share: float) -> tuple[int, ...]:
        """The layers of the largest sum of both, each over its mean: a share of all, rounded up."""
        parts = [x / x.nanmean().clamp_min(1e-30) for x in self]
        fixed = self.output.isnan().nonzero()[:, 0].tolist()
        return _most((parts[0] + parts[1]).tolist(), share, fixed)


@torch.no_grad()
def distortion(
    model: nn.Module,
    input_ids: Int[Tensor, "1 n"],
    *,
    steps: int = 64,
    num_tokens: int,
    block_size: int = 64,
    num_sinks: int = 64,
    num_recent: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Distortion:
    """How sensitive each layer is, as the paper measures it: one at a time reads `num_tokens` keys.

    The text before its last `steps` tokens is read once; these then follow once for each layer.
    """
    num_keys = _check(input_ids, steps, num_tokens, block_size, num_sinks, num_recent, 0.9)
    sites = decoder_sites(model)
    cache = filled_cache(model, input_ids[:, : num_keys - steps], num_keys)
    output, divergence = torch.full((2, len(sites)), torch.nan, dtype=torch.float64)

    def logits(handler: seam.Handler) -> Tensor:
        with seam.attention(model, handler, softcap=True):
            found = model(input_ids=input_ids[:, num_keys - steps :], past_key_values=cache, use_cache=True)
        cache.crop(-steps)
        return found.logits[0].float().log_softmax(-1)

    dense = logits(lambda call: None)
    able = {name: layer for name, layer in sites.items() if layer not in fixed_layers(model)}
    for done, (name, layer) in enumerate(able.items(), start=1):

        def sparse(call: Call, name: str = name, layer: int = layer) -> Tensor | None:
            if call.site.name != name:
                return None
            scores = block_scores(call.query, call.key, block_size=block_size, score="mass", scale=call.scale)
            index = choose_blocks(
                scores,
                num_tokens // block_size,
                block_size=block_size,
                num_keys=num_keys,
                num_sinks=num_sinks,
                num_recent=num_recent,
            )
            q, k, v = call.query, call.key, call.value
            whole = call.host(q, k, v)
            part: Any = topk_block_attention(q, k, v, index, block_size=block_size, scale=call.scale)
            output[layer] = float((part - whole).double().square().sum() / whole.double().square().sum())
            return part

        divergence[layer] = F.kl_div(logits(sparse), dense, log_target=True, reduction="batchmean")
        if progress is not None:
            progress(done, len(able))
    return Distortion(output, divergence)


def decoder_sites(model: nn.Module) -> dict[str, int]:
    """The causal self-attention sites of a transformers decoder, each with its layer's number."""
    listed = seam.listed_sites(model) or []
    names = [site.name for site in listed if site.is_causal and site.role == "self"]
    layers = [site.layer for site in listed if site.name in names]
    if not names or layers != list(range(len(names))):
        raise NotImplementedError(
            f"This {type(model).__name__} has no row of decoder layers that is known. Give a decoder of "
            "transformers, such as LlamaForCausalLM."
        )
    return {name: layer for layer, name in enumerate(names)}


def fixed_layers(model: nn.Module) -> tuple[int, ...]:
    """The layers that cannot read blocks instead of all keys: they have a window already, or cap scores."""
    from nearfield.hosts.transformers_blocks import sparse_layers

    return tuple(sorted(set(decoder_sites(model).values()) - set(sparse_layers(model))))


def filled_cache(model: nn.Module, input_ids: Int[Tensor, "1 n"], capacity: int) -> Any:
    """A cache with room for `capacity` tokens that has read these; what follows can be cropped again."""
    from nearfield.hosts.transformers_blocks import BlockLayer, block_cache

    cache = block_cache(model, capacity)
    if not all(isinstance(layer, BlockLayer) for layer in cache.layers):
        raise NotImplementedError(
            f"Some layers of this {type(model).__name__} have a window of their own: they forget tokens and "
            "cannot take back steps, as is needed here."
        )
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, **_last_logits(model))
    return cache


def draw_overlap(axes: Any, overlap: Sequence[Sequence[float]]) -> None:
    """A matrix of overlaps above its diagonal: columns are layers, rows whose blocks they would take."""
    layers = len(overlap)
    shown = [[overlap[i][j] if i < j else float("nan") for j in range(layers)] for i in range(layers)]
    image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="layer", ylabel="takes the blocks of layer")
    axes.figure.colorbar(image, ax=axes, label="share of its blocks")


def draw_sources(axes: Any, sources: Sequence[int | None]) -> None:
    """A policy as a strip: a field for each layer, coloured by what it does, with its source."""
    kinds = ["full" if i is None else "selects" if i == j else "reuses" for j, i in enumerate(sources)]
    for kind, colour in COLOURS.items():
        layers = [layer for layer, each in enumerate(kinds) if each == kind]
        label = f"{kind} ({len(layers)})"
        axes.bar(layers, [1] * len(layers), width=1, color=colour, edgecolor="white", label=label)
    size = min(9, 260 / len(sources))
    for layer, (source, kind) in enumerate(zip(sources, kinds, strict=True)):
        if kind == "reuses":
            axes.text(layer, 0.5, str(source), ha="center", va="center", fontsize=size)
    axes.set(xlim=(-0.5, len(sources) - 0.5), ylim=(0, 1), yticks=[], xlabel="layer")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def _density(
    scores: Float[Tensor, "s kv_heads blocks"], seen: Int[Tensor, " s"], mass: float, parity: bool
) -> Float[Tensor, " kv_heads"]:
    shares = scores.double().sort(dim=-1, descending=True).values
    shares = shares.cumsum(-1) / shares.sum(-1, keepdim=True)
    # the first sum that reaches the share closes the count; the published count stops before it
    needed = (shares <= mass).sum(-1) if parity else (shares < mass).sum(-1) + 1  # [S, Hkv]
    ratio = needed.double() / seen[:, None]
    if parity:
        low, high = ratio.quantile(torch.tensor([0.25, 0.75], dtype=ratio.dtype), dim=0)
        spread = 1.5 * (high - low)
        ratio = ratio.clamp(low - spread, high + spread)
    return ratio.mean(0)


def _as_mask(index: Int[Tensor, "s kv_heads k"], blocks: int) -> Bool[Tensor, "s kv_heads blocks"]:
    """The chosen blocks as bits; -1 is none."""
    mask = torch.zeros((*index.shape[:2], blocks + 1), dtype=torch.bool, device=index.device)
    return mask.scatter_(-1, index.masked_fill(index < 0, blocks), True)[..., :blocks]


def _published_choice(
    scores: Float[Tensor, "s kv_heads blocks"],
    seen: Int[Tensor, " s"],
    num_tokens: int,
    block_size: int,
    num_sinks: int,
    num_recent: int,
) -> Bool[Tensor, "s kv_heads blocks"]:
    """The top blocks with whole blocks of sinks and recent keys counted from either end."""
    block = torch.arange(scores.shape[-1], device=scores.device)
    last = seen[:, None]
    forced = (block < num_sinks // block_size) | (block >= last - num_recent // block_size)
    order = scores.masked_fill(forced[:, None], torch.inf)
    order = order.masked_fill((block >= last)[:, None], -1)  # not there yet
    top = order.topk(min(num_tokens // block_size, scores.shape[-1]), dim=-1)
    return _as_mask(top.indices.masked_fill(top.values < 0, -1), scores.shape[-1])


def _overlap(chosen: dict[int, Tensor], layers: int, heads: int) -> Float[Tensor, "layers layers kv_heads"]:
    """Means over steps of shared blocks over the blocks of the later layer; 1 on the diagonal, 0 below."""
    found = torch.zeros(layers, layers, heads, dtype=torch.float64)
    masks = {layer: mask.float() for layer, mask in chosen.items()}
    for i, mine in masks.items():
        for j, other in masks.items():
            if i < j:
                shared = (mine * other).sum(-1) / other.sum(-1)  # [S, Hkv]
                found[i, j] = shared.double().mean(0)
    found[range(layers), range(layers)] = 1
    return found


def _most(scores: Sequence[float], share: float, fixed: Sequence[int]) -> tuple[int, ...]:
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must lie from 0 to 1.")
    number = ceil(len(scores) * share - 1e-9)  # 0.09 of 100 layers are 9
    order = sorted((at for at in range(len(scores)) if at not in fixed), key=lambda at: -scores[at])
    return tuple(sorted({*order[:number], *fixed}))


def _tail(call: Call, steps: int) -> Tensor:
    if call.query.shape[1] < steps:
        raise ValueError(
            f"{call.site.name} was shown {call.query.shape[1]} queries, fewer than {steps} steps."
        )
    return call.query[:, -steps:]


def _last_logits(model: nn.Module) -> dict[str, Any]:
    """Asks for the last token's logits alone, where a host can: those of all take more room than all else."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _check(
    input_ids: Tensor,
    steps: int,
    num_tokens: int,
    block_size: int,
    num_sinks: int,
    num_recent: int,
    mass: float,
) -> int:
    """The length of the text, once all that was given can be."""
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids are {list(input_ids.shape)}. Give one text, [1, tokens].")
    length = input_ids.shape[1]
    if not 0 < steps < length:
        raise ValueError(
            f"steps={steps} of a text of {length} tokens. Give at least 1, and fewer than it has."
        )
    if block_size < 1 or num_tokens < block_size or num_sinks < 0 or num_recent < 0:
        raise ValueError(
            f"num_tokens={num_tokens}, block_size={block_size}, num_sinks={num_sinks}, "
            f"num_recent={num_recent}: give at least one block of at least one key, no negative number."
        )
    if num_tokens + block_size > length - steps:
        raise ValueError(
            f"Before the {steps} steps of a text of {length} tokens there is nothing to choose where "
            f"num_tokens={num_tokens} keys are read. Give {num_tokens + block_size + steps} tokens or more."
        )
    if not 0 < mass < 1:
        raise ValueError(f"mass={mass} must lie between 0 and 1.")
    return length
