"""Looking at a decoder: what a response is read from, which words heads relate, what layers know."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nearfield.hosts.transformers_sites import head_dim_of, sites

LEVELS, THRESHOLD, POWER = 10, 7, 4.0  # L, b and p of the paper
TOP, NEAREST, SPREAD = 100, 3000, 1.96  # words of a dimension; words a threshold is made of, and its width
EPS = 1e-7


def attribution(
    model: nn.Module,
    prompt: Int64[Tensor, " n"],
    response: Int64[Tensor, " m"],
    *,
    of: Literal["probability", "log-probability"] = "probability",
    chunk: int = 8,
) -> Float[Tensor, "n m"]:
    """How much each response token owes to each prompt token: S[i, j] = (∂p_j / ∂e_i) · e_i.

    What p_j loses as the embedding of token i shrinks, per share; that it vanishes is further than this
    reaches. A token that is nearly certain hardly moves: `of="log-probability"` still tells of it. One
    backward serves `chunk` response tokens, each in its own copy of the sequence.
    """
    if of not in ("probability", "log-probability"):
        raise ValueError(f"of={of!r} is unknown. Choose probability or log-probability.")
    if not len(prompt) or not len(response):
        raise ValueError(f"{len(prompt)} tokens of prompt and {len(response)} of response. Give one of each.")
    tokens = torch.cat([prompt, response])
    embedded = model.get_input_embeddings()(tokens).detach()  # type: ignore[operator]
    columns = []
    for start in range(0, len(response), chunk):
        some = response[start : start + chunk]
        last = len(prompt) + start + len(some) - 1  # the row before a token tells of it
        given = embedded[:last].expand(len(some), -1, -1).clone().requires_grad_()
        with torch.enable_grad():
            logits = model(inputs_embeds=given, use_cache=False, logits_to_keep=len(some)).logits
            rows = logits[:, -len(some) :].diagonal(dim1=0, dim2=1).T.float()
            log = rows.log_softmax(-1).gather(-1, some[:, None].to(rows.device))[:, 0]
            (gradient,) = torch.autograd.grad((log.exp() if of == "probability" else log).sum(), given)
        columns.append((gradient * given.detach()).sum(-1)[:, : len(prompt)])
    return torch.cat(columns).T


def sparsify(
    scores: Float[Tensor, "n m"], *, levels: int = LEVELS, threshold: int = THRESHOLD
) -> Float[Tensor, "n m"]:
    """Whole numbers 0 to `levels`, the largest of each response token's; those up to `threshold` become 0.

    ceil(levels · S / (max S + 1e-7)) of the positive part: with 10 and 7, 0.71 of the largest stays (8) and
    0.70 does not (7).
    """
    positive = scores.clamp(min=0)
    ranks = (levels * positive / (positive.amax(0, keepdim=True) + EPS)).ceil()
    return ranks * (ranks > threshold)


def density(scores: Float[Tensor, "n m"], *, power: float = POWER) -> Float[Tensor, " n"]:
    """How steadily each prompt token matters: ‖S_i‖₁ / ‖S_i‖ₚ. One response: 1; M alike: M^(1 - 1/p)."""
    return scores.norm(1, dim=-1) / (scores.norm(power, dim=-1) + EPS)


def find_span(tokens: Sequence[int], part: Sequence[int]) -> range:
    """Where `part` first stands in `tokens`."""
    for start in range(len(tokens) - len(part) + 1) if part else ():
        if list(tokens[start : start + len(part)]) == list(part):
            return range(start, start + len(part))
    raise ValueError(
        f"The {len(part)} tokens are nowhere in a row among the {len(tokens)}. Give their range."
    )


def instruction_score(densities: Float[Tensor, " n"], span: range) -> float:
    """Σ of the densities of an instruction, as shares of the prompt's largest, over log₂(2 + its length)."""
    shares = densities / densities.amax().clamp(min=EPS)
    return float(shares[span.start : span.stop].sum()) / math.log2(2 + len(span))


class Words(NamedTuple):
    """Words, and what a model reads (`given`) and writes (`output`) for them: means over their tokens."""

    words: tuple[str, ...]
    given: Float[Tensor, "words d"]
    output: Float[Tensor, "words d"]


@torch.no_grad()
def words_of(model: nn.Module, words: Sequence[str], tokens: Sequence[Sequence[int]]) -> Words:
    """The vectors of words, each given by its tokens (with the blank before it, as inside a text)."""
    empty = [word for word, each in zip(words, tokens, strict=True) if not len(each)]
    if empty:
        raise ValueError(f"{', '.join(map(repr, empty))} have no tokens. Leave them out.")
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)  # type: ignore[operator]
    means = [torch.stack([table[list(each)].float().mean(0) for each in tokens]) for table in tables]
    return Words(tuple(words), *means)


class Head(NamedTuple):
    """The pairs of words that one head relates, and in how many of its dimensions; a pair has no order."""

    site: str
    layer: int
    head: int
    pairs: Counter[tuple[str, str]]

    def count(self, word: str) -> int:
        """The pairs that a word is part of."""
        return sum(word in pair for pair in self.pairs)


@torch.no_grad()
def head_pairs(
    model: nn.Module,
    words: Words,
    *,
    similar: Float[Tensor, "words words"] | None = None,
    top: int = TOP,
    least: int = 2,
) -> list[Head]:
    """Word pairs that each query head relates, read off its weights; positions are left out.

    In every dimension the `top` words of largest |query| meet those of largest |key|. A pair counts where
    both have the same sign and the words are akin: `similar` (the paper's is the cosine of GloVe vectors;
    without it, of the model's own input embeddings) lies above mean + 1.96 deviations for both. Of a head's
    pairs those stay that `least` dimensions know.
    """
    kin = (
        F.normalize(words.given, dim=-1) @ F.normalize(words.given, dim=-1).T if similar is None else similar
    )
    known = kin[:, :NEAREST]
    bound = known.mean(1) + SPREAD * known.std(1)
    allowed = (kin > bound[:, None]) & (kin > bound[None]) & ~torch.eye(len(kin), dtype=torch.bool)
    found, modules = [], dict(model.named_modules())
    for site in sites(model):
        if f"{site.name}.q_proj" not in modules:
            continue
        attention = modules[site.name]
        read = _normed(modules, site.name, words.given)
        dim = head_dim_of(attention)
        group = site.num_heads // site.num_kv_heads
        query = (read @ modules[f"{site.name}.q_proj"].weight.float().T).unflatten(-1, (-1, dim))
        key = (read @ modules[f"{site.name}.k_proj"].weight.float().T).unflatten(-1, (-1, dim))
        for head in range(site.num_heads):
            q, k = query[:, head], key[:, head // group]
            counted: Counter[tuple[str, str]] = Counter()
            for each in range(dim):
                counted.update(_pairs(q[:, each], k[:, each], allowed, words.words, top))
            kept = Counter({pair: number for pair, number in counted.items() if number >= least})
            found.append(Head(site.name, site.layer or 0, head, kept))
    return found


def _pairs(
    query: Tensor, key: Tensor, allowed: Tensor, words: Sequence[str], top: int
) -> set[tuple[str, str]]:
    """The pairs of one dimension, in lower case; each once, whichever of the two is the key."""
    a, b = (x.abs().topk(min(top, len(x))).indices for x in (query, key))
    agree = (query[a, None] * key[None, b] > 0) & allowed[a][:, b]
    asking, asked = a.tolist(), b.tolist()
    pairs = (sorted((words[asked[j]].lower(), words[asking[i]].lower())) for i, j in agree.nonzero().tolist())
    return {(first, second) for first, second in pairs}


def _normed(modules: dict[str, nn.Module], site: str, x: Tensor) -> Tensor:
    """Word vectors times the gain of the norm before a site; a LayerNorm's mean is taken out too."""
    norm = modules.get(f"{site.rpartition('.')[0]}.input_layernorm")
    gain = getattr(norm, "weight", None)
    if gain is None:
        raise NotImplementedError(f"Site {site!r} has no input_layernorm beside it, to be folded.")
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x * (1 + gain if "gemma" in type(norm).__name__.lower() else gain)


class Concepts(NamedTuple):
    """Principal directions of what a feed-forward layer writes, their shares, the words nearest to each."""

    layer: int
    directions: Float[Tensor, "ranks d"]
    shares: Float[Tensor, " ranks"]
    words: tuple[tuple[str, ...], ...]


@torch.no_grad()
def concepts(model: nn.Module, words: Words, *, ranks: int = 300, top: int = 50) -> list[Concepts]:
    """What each feed-forward layer can add to a token: principal directions of its output weights, in words.

    Rows of `down_proj` transposed are the values that are written; centred, W = U Σ Vᵀ. A direction is told
    by the words of largest |V_r · o|, `o` the normalised output vector: its sign means nothing. `shares` are
    σ² over the sum of all.
    """
    written, found = F.normalize(words.output, dim=-1), []
    named = [(n, m) for n, m in model.named_modules() if n.endswith(".mlp.down_proj")]
    if not named:
        raise NotImplementedError(f"{type(model).__name__} has no layers called mlp.down_proj to be read.")
    for name, module in named:
        layer = next(int(part) for part in name.split(".") if part.isdecimal())
        values = module.weight.float().T  # [ff, d]
        _, sigma, directions = torch.linalg.svd(values - values.mean(0), full_matrices=False)
        near = (directions[:ranks] @ written.T).abs().topk(min(top, len(written)), dim=-1).indices
        told = tuple(tuple(words.words[i] for i in row) for row in near.tolist())
        shares = sigma.square() / sigma.square().sum()
        found.append(Concepts(layer, directions[:ranks], shares[:ranks], told))
    return found


def overlap(first: Concepts, second: Concepts, ranks: int) -> float:
    """Mean squared cosine of the principal angles of two layers' first directions; ranks / d at random."""
    cosines = torch.linalg.svdvals(first.directions[:ranks] @ second.directions[:ranks].T)
    return float(cosines.square().mean())


class Welch(NamedTuple):
    """Welch's test of unequal variances, one-sided."""

    t: float
    freedom: float
    p: float


def welch(first: Sequence[float], second: Sequence[float]) -> Welch:
    """Whether the mean of the first sample lies above that of the second."""
    a, b = (torch.tensor(list(x), dtype=torch.float64) for x in (first, second))
    if min(len(a), len(b)) < 2:
        raise ValueError(f"Samples of {len(a)} and {len(b)}: each needs two values or more.")
    parts = a.var() / len(a), b.var() / len(b)
    spread = float(sum(parts))
    if spread == 0:
        raise ValueError("Neither sample varies, so that there is nothing to test.")
    t = float(a.mean() - b.mean()) / math.sqrt(spread)
    freedom = spread**2 / float(parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    return Welch(t, freedom, _tail(t, freedom))


def _tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's distribution: its density over angles, t = √freedom · tan θ, summed up."""
    angles = torch.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 20_001, dtype=torch.float64)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return constant * float(torch.trapezoid(angles.cos().clamp(min=0) ** (freedom - 1), angles))
