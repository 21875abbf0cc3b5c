"""A transformer as counts read from its config.json: FLOPs by part, without weights or model library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from nearfield.ops.neighborhood.geometry import Neighborhood

Kind = Literal["decoder", "encoder", "vision"]

# Decoders whose MLP has three matrices, act(gate) * up, then down; and those whose MLP has two.
GATED = frozenset(
    (
        "arctic", "baichuan", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3",
        "gemma3_text", "glm", "glm4", "gpt_oss", "granite", "helium", "internlm2", "llama", "minicpm",
        "ministral", "ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi3",
        "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
    )
)  # fmt: skip
PLAIN = frozenset(
    (
        "biogpt", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj",
        "mpt", "nemotron", "opt", "phi", "starcoder2",
    )
)  # fmt: skip
ENCODERS = frozenset(
    (
        "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta",
    )
)  # fmt: skip
VISION = frozenset(
    (
        "beit", "clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "ijepa",
        "siglip_vision_model", "vit", "vit_mae",
    )
)  # fmt: skip

NAMES = {  # ours -> theirs, the usual one first
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "mlp": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "experts": ("num_local_experts", "num_experts"),
    "experts_used": ("num_experts_per_tok", "experts_per_token"),
}
MOST_LAYERS, MOST = 10_000, 10**9  # beyond, a config is damaged or hostile


@dataclass(frozen=True)
class Layer:
    """One layer: weights a token meets in its projections and its MLP, and what attention adds.

    `width` is heads * (query dim + value dim): 2 * width FLOPs a pair. `window` is the model's own, if any.
    """

    projections: int
    mlp: int
    width: int
    window: Neighborhood | None = None


@dataclass(frozen=True)
class Model:
    """A transformer as counts. `head` is the weights of the output head, met by the last position only."""

    name: str
    kind: Kind
    layers: tuple[Layer, ...]
    head: int
    positions: int | None
    notes: tuple[str, ...] = ()

    def pairs(self, layer: Layer, tokens: int, window: Neighborhood | None = None) -> int:
        """Visible pairs of a layer, under its own window and under `window`, whichever shows fewer."""
        full = tokens * (tokens + 1) // 2 if self.kind == "decoder" else tokens * tokens
        grid = _square(tokens) if self.kind == "vision" else (tokens,)
        shown = [full] + [w.on(grid).num_pairs for w in (layer.window, window) if w is not None]
        return min(shown)

    def attention(self, tokens: int, window: Neighborhood | None = None) -> int:
        """FLOPs of scores and weighted values in all layers."""
        counts: dict[Layer, int] = {}
        for layer in self.layers:
            counts[layer] = counts.get(layer, 0) + 1
        return sum(
            2 * many * layer.width * self.pairs(layer, tokens, window) for layer, many in counts.items()
        )

    def flops(self, tokens: int) -> dict[str, int]:
        """FLOPs of one pass over `tokens` (of a decoder: prefill, one position through the head), by part."""
        parts = {
            "projections": 2 * tokens * sum(layer.projections for layer in self.layers),
            "mlp": 2 * tokens * sum(layer.mlp for layer in self.layers),
            "head": 2 * self.head,
            "attention": self.attention(tokens),
        }
        return parts | {"total": sum(parts.values())}


def read_model(config: Any, name: str) -> Model:
    """The counts behind a transformers config (the values of its config.json)."""
    if not isinstance(config, dict):
        raise ValueError(f"{name} is no model config: it holds no JSON object.")
    notes: list[str] = []
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
        notes.append("Only the language part of this model is counted.")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{name} is no model config: it has no model_type. Give a transformers config.json.")
    kind, gated = _family(config, model_type, name, notes)
    read = _Reader(config, name)
    hidden, count, heads = read.need("hidden"), read.need("layers", most=MOST_LAYERS), read.need("heads")
    head_dim = read.get("head_dim") or _divide(hidden, heads, name)
    kv_heads = _kv_heads(config, read, heads)
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlps = [_mlp(config, read, hidden, gated, index) for index in range(count)]
    windows = _windows(config, read, model_type, kind, count)
    layers = [Layer(projections, mlp, 2 * heads * head_dim, w) for mlp, w in zip(mlps, windows, strict=True)]
    head = hidden * read.need("vocabulary") if kind == "decoder" else 0
    return Model(model_type, kind, tuple(layers), head, read.get("positions"), tuple(notes))


class _Reader:
    """Whole numbers of a config by our names; a wrong one is a `ValueError`."""

    def __init__(self, config: dict[str, Any], file: str) -> None:
        self.config, self.file = config, file

    def get(self, name: str, most: int = MOST) -> int | None:
        """The number, or None where the config leaves it out or null."""
        for key in NAMES.get(name, (name,)):
            value = self.config.get(key)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                    raise ValueError(
                        f"{self.file} says {key}={value!r}; a whole number up to {most:,} is needed."
                    )
                return value
        return None

    def need(self, name: str, most: int = MOST) -> int:
        """The number, which must be there and above 0."""
        value = self.get(name, most)
        if not value:
            raise ValueError(
                f"{self.file} gives no {' or '.join(NAMES.get(name, (name,)))}: nothing can be counted."
            )
        return value


def _family(config: dict[str, Any], model_type: str, name: str, notes: list[str]) -> tuple[Kind, bool]:
    """What kind of model it is, and whether its MLP is gated; refuses what would be counted wrongly."""
    for key, what in (
        ("is_encoder_decoder", "an encoder and a decoder"),
        ("kv_lora_rank", "compressed keys and values"),
        ("moe_layers", "experts in some layers of another size"),
    ):
        if config.get(key):
            raise NotImplementedError(f"{name} has {what} ({key}), which is not counted yet.")
    if model_type in VISION:
        return "vision", bool(config.get("use_swiglu_ffn"))
    if model_type in ENCODERS:
        return "encoder", model_type == "modernbert"
    if model_type in GATED or model_type in PLAIN:
        return "decoder", model_type in GATED
    if "rms_norm_eps" in config:
        notes.append(f"Unknown model_type {model_type!r}: counted like a Llama, with a gated MLP.")
        return "decoder", True
    known = ", ".join(("llama", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox", "gpt2", "bert", "vit"))
    raise ValueError(
        f"{name} has the unknown model_type {model_type!r}. Known are {known} and their relatives."
    )


def _divide(hidden: int, heads: int, name: str) -> int:
    if hidden % heads:
        raise ValueError(
            f"{name}: hidden size {hidden} is no multiple of {heads} heads, and no head_dim is given."
        )
    return hidden // heads


def _kv_heads(config: dict[str, Any], read: _Reader, heads: int) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    found = read.get("kv_heads") or heads
    if heads % found:
        raise ValueError(f"{read.file}: {heads} heads are no multiple of {found} key/value heads.")
    return found


def _mlp(config: dict[str, Any], read: _Reader, hidden: int, gated: bool, index: int) -> int:
    """Weights of one layer's MLP that a token meets: with experts, the router and the chosen ones."""
    matrices = 3 if gated else 2
    width = read.get("mlp")
    if width is None:
        ratio = config.get("mlp_ratio", 4)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1000:
            raise ValueError(f"{read.file} says mlp_ratio={ratio!r}; a number above 0 is needed.")
        width = int(hidden * ratio)
        if gated:  # DINOv2: two thirds of the width, rounded up to a multiple of 8
            width = (int(width * 2 / 3) + 7) // 8 * 8
    experts = read.get("experts") or 0
    dense = config.get("mlp_only_layers") or ()
    every = read.get("decoder_sparse_step") or 1
    if not experts or (isinstance(dense, list) and index in dense) or (index + 1) % every:
        return matrices * hidden * width
    chosen = read.need("experts_used") * (read.get("moe_intermediate_size") or width)
    shared = read.get("shared_expert_intermediate_size") or 0
    return hidden * experts + matrices * hidden * (chosen + shared) + (hidden if shared else 0)


def _windows(
    config: dict[str, Any], read: _Reader, model_type: str, kind: Kind, count: int
) -> Sequence[Neighborhood | None]:
    """Every layer's own window."""
    if kind == "vision":
        return [None] * count
    size = read.get("sliding_window") or read.get("window_size")
    if model_type == "modernbert":
        size = 2 * ((read.get("local_attention") or 128) // 2) + 1  # so many on either side
    chunk = read.get("attention_chunk_size")
    is_causal = kind == "decoder"
    local = Neighborhood(size, is_causal=is_causal, border="truncate") if size else None
    patterns = {
        "full_attention": None,
        "global": None,
        "sliding_attention": local,
        "local": local,
        "chunked_attention": Neighborhood(chunk, stride=chunk, is_causal=is_causal) if chunk else None,
    }
    types = (
        config.get("layer_types")
        or config.get("attention_layers")
        or _layer_types(config, read, model_type, count)
    )
    if not isinstance(types, list) or len(types) != count:
        raise ValueError(f"{read.file}: layer_types must list the kinds of all {count} layers.")
    for entry in types:
        if not isinstance(entry, str) or entry not in patterns:
            raise NotImplementedError(f"{read.file} has layers of kind {entry!r}, which are not counted yet.")
    if config.get("use_sliding_window") is False:
        return [None] * count
    return [patterns[entry] for entry in types]


def _layer_types(config: dict[str, Any], read: _Reader, model_type: str, count: int) -> list[str]:
    """Kinds of layers where the config does not list them: each family has a rule of its own."""
    sliding, full = "sliding_attention", "full_attention"
    if model_type == "modernbert":
        every = read.get("global_attn_every_n_layers") or 3
        return [full if i % every == 0 else sliding for i in range(count)]
    every = {"gemma2": 2, "gpt_oss": 2, "cohere2": 4, "gemma3_text": 6, "gemma3": 6, "olmo3": 4}.get(
        model_type, 0
    )
    every = read.get("sliding_window_pattern") or read.get("_sliding_window_pattern") or every
    if every:
        return [full if (i + 1) % every == 0 else sliding for i in range(count)]
    if model_type == "gpt_neo":
        return ["global" if i % 2 == 0 else "local" for i in range(count)]
    if model_type.startswith("qwen"):
        first = read.get("max_window_layers") or 0
        uses = config.get("use_sliding_window") is True
        return [sliding if uses and i >= first else full for i in range(count)]
    return [sliding if read.get("sliding_window") else full] * count


def _square(tokens: int) -> tuple[int, int]:
    """The most nearly square grid that holds so many tokens."""
    side = isqrt(tokens)
    return side, -(-tokens // side)
