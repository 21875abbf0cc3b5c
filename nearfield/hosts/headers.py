"""Model files looked at before any parser: is what the header promises inside the file?

A damaged or hostile file is refused with a sentence. Nothing is executed, and nothing large is read: magic,
versions, counts, lengths, offsets and settings only. Pickles (.bin, .pt, .pth, .ckpt) can run code and are
never opened.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_JSON = 256 << 20  # bytes; the largest tokenizer.json in use is about 35 MB
MOST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MOST_ENTRIES = 1 << 16  # tensors, or settings, of one GGUF file
MOST_NAME = 1 << 12  # bytes of a tensor's or setting's name
MOST_WIDTH = 1 << 27  # no width, vocabulary or number of positions is larger
MOST_LAYERS = 1 << 12

SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
GGUF_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
MOST_VALUES = 1 << 22  # of one array of a GGUF file; longer ones are gone past unread
GGUF_BLOCKS = {  # tensor type -> (numbers of a block, bytes of a block)
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
GGUF_WIDTHS = ("embedding_length", "feed_forward_length", "vocab_size", "head_count", "head_count_kv")
JSON_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")


def check_model(path: str | Path) -> Path:
    """The path of a model file or folder whose headers are sound; `ValueError` with a sentence otherwise.

    A folder must hold config.json and safetensors weights, or one GGUF file; every file in it that a model is
    read from is looked at.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no file or folder {str(path)!r}. Give the path of a model.")
    if path.is_file():
        check_file(path)
        return path
    files = sorted(file for file in path.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix in (".safetensors", ".gguf")]
    if not weights:
        pickled = [file.name for file in files if file.suffix in PICKLES]
        why = f"; {pickled[0]} is a pickle, which can run code" if pickled else ""
        raise ValueError(
            f"The folder {str(path)!r} holds no .safetensors or .gguf weights{why}. Give one that does."
        )
    if not any(file.name == "config.json" for file in files) and weights[0].suffix != ".gguf":
        raise ValueError(f"The folder {str(path)!r} holds no config.json. Give a complete model.")
    for file in files:
        if file.suffix in (".safetensors", ".gguf", ".json"):
            check_file(file)
    return path


def check_file(path: Path) -> None:
    """Looks at one GGUF, safetensors or JSON file."""
    checks = {".gguf": check_gguf, ".safetensors": check_safetensors, ".json": check_json}
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path.name} is a pickle, which can run code when it is read. Give safetensors or GGUF."
        )
    if path.suffix not in checks:
        raise ValueError(f"{path.name} is of no known kind. Give a .gguf, .safetensors or .json file.")
    checks[path.suffix](path)


def check_safetensors(path: Path) -> int:
    """The number of tensors in a safetensors file whose header is sound."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _damaged(path, f"is {size} bytes long, too short for a header")
        length = struct.unpack("<Q", start)[0]
        if length > min(size - 8, MOST_HEADER):
            raise _damaged(path, f"promises a header of {length} bytes in a file of {size}")
        header = _parse(path, file.read(length))
    if not isinstance(header, dict):
        raise _damaged(path, "has a header that is no JSON object")
    data, spans = size - 8 - length, []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise _damaged(path, "has metadata that is more than texts")
            continue
        spans.append(_span(path, name, entry, data))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise _damaged(
                path, f"places tensor {name!r} at byte {first}, not at {end} where the one before ends"
            )
        end = last
    if end != data:
        raise _damaged(path, f"describes {end} bytes of tensors and holds {data}")
    return len(spans)


def _span(path: Path, name: str, entry: Any, data: int) -> tuple[int, int, str]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"describes tensor {name!r} by other words than dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        not _whole(shape)
        or not _whole(offsets)
        or len(offsets) != 2
        or entry["dtype"] not in SAFETENSORS_BITS
    ):
        raise _damaged(
            path, f"gives tensor {name!r} an unknown dtype, or a shape or offsets that are no whole numbers"
        )
    first, last = offsets
    if not 0 <= first <= last <= data or (last - first) * 8 != prod(shape) * SAFETENSORS_BITS[entry["dtype"]]:
        raise _damaged(
            path,
            f"places tensor {name!r} of shape {shape} at bytes {first} to {last} of {data}: it does not fit",
        )
    return first, last, name


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def check_json(path: Path) -> Any:
    """The values of a JSON file; of a model's config.json and weight index also whether they can be meant."""
    size = path.stat().st_size
    if size > MOST_JSON:
        raise _damaged(path, f"is {size} bytes long; a model's JSON has at most {MOST_JSON}")
    values = _parse(path, path.read_bytes())
    if path.name == "config.json":
        _check_config(path, values)
    if path.name.endswith(".index.json"):
        names = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(names, dict) or not all(_is_plain(name) for name in names.values()):
            raise _damaged(path, "names weight files outside its own folder, or none")
    return values


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")


def _check_config(path: Path, values: Any) -> None:
    if not isinstance(values, dict):
        raise _damaged(path, "is no JSON object")
    for key, value in values.items():
        if isinstance(value, dict):
            _check_config(path, value)
        elif (
            type(value) is int
            and abs(value) > (MOST_LAYERS if key in JSON_LAYERS else MOST_WIDTH)
            and (
                key in JSON_LAYERS
                or key.endswith(("_size", "_dim", "_heads", "_labels", "_positions", "_experts"))
            )
        ):
            raise _damaged(path, f"sets {key} to {value}, more than any model has")


def _parse(path: Path, text: bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _damaged(path, "gives a key twice")
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError:
        raise _damaged(path, "is not text in UTF-8 where JSON is due") from None
    except json.JSONDecodeError as error:
        raise _damaged(path, f"is not JSON ({error})") from None
    except RecursionError:
        raise _damaged(path, "is JSON nested too deeply") from None


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: sides (the quickest first), type, and its bytes in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int
    length: int


@dataclass(frozen=True)
class GgufHeader:
    """The settings and the places of the tensors of a GGUF file."""

    settings: dict[str, Any]
    tensors: dict[str, GgufTensor]


def check_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file, if it is sound."""
    size = path.stat().st_size
    if size < 24:
        raise _damaged(path, f"is {size} bytes long, too short for a header")
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        return _Gguf(path, data, size).check()


class _Gguf:
    """A walk over a GGUF header that never leaves the file."""

    def __init__(self, path: Path, data: mmap, size: int):
        self.path, self.data, self.size, self.at = path, data, size, 0

    def check(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise _damaged(self.path, "does not begin with GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            raise _damaged(
                self.path, f"has GGUF version {version}; 2 and 3 in little-endian order can be read"
            )
        tensors, count = self.number("<Q"), self.number("<Q")
        if tensors > MOST_ENTRIES or count > MOST_ENTRIES:
            raise _damaged(self.path, f"promises {tensors} tensors and {count} settings")
        settings: dict[str, Any] = {}
        for _ in range(count):
            name = self.name()
            if name in settings:
                raise _damaged(self.path, f"gives the setting {name!r} twice")
            settings[name] = self.value(self.number("<I"))
        places: dict[str, GgufTensor] = {}
        for _ in range(tensors):
            name, place = self.tensor()
            if name in places:
                raise _damaged(self.path, f"gives the tensor {name!r} twice")
            places[name] = place
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _damaged(self.path, f"aligns its tensors to {alignment} bytes")
        start = -(-self.at // alignment) * alignment
        places = {name: replace(place, start=start + place.start) for name, place in places.items()}
        end = start
        for name, place in sorted(places.items(), key=lambda item: item[1].start):
            if place.start % alignment or place.start < end or place.start + place.length > self.size:
                raise _damaged(
                    self.path,
                    f"places tensor {name!r} of {place.length} bytes at byte {place.start} of {self.size}: "
                    "outside the file or upon another",
                )
            end = place.start + place.length
        self.check_settings(settings, places)
        return GgufHeader(settings, places)

    def check_settings(self, settings: dict[str, Any], places: dict[str, GgufTensor]) -> None:
        widest = max((max(place.shape) for place in places.values()), default=0)
        for name, value in settings.items():
            if type(value) is not int:
                continue
            end = name.rpartition(".")[2]
            if end == "block_count" and not 0 < value <= len(places):
                raise _damaged(self.path, f"sets {name} to {value} and holds {len(places)} tensors")
            if end in GGUF_WIDTHS and not 0 < value <= widest:
                raise _damaged(self.path, f"sets {name} to {value}; its widest tensor has {widest}")

    def take(self, length: int) -> bytes:
        start = self.at
        self.skip(length)
        return self.data[start : self.at]

    def skip(self, length: int) -> None:
        if length > self.size - self.at:
            raise _damaged(self.path, f"ends at byte {self.size}, inside its header")
        self.at += length

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def name(self) -> str:
        length = self.number("<Q")
        if not 0 < length <= MOST_NAME:
            raise _damaged(self.path, f"holds a name of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(self.path, "holds a name that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A number, a text, or an array of either (None in place of a very long one)."""
        if kind in GGUF_FIXED:
            return self.number("<" + GGUF_FIXED[kind])
        if kind == GGUF_STRING:
            return self.text()
        if kind != GGUF_ARRAY:
            raise _damaged(self.path, f"holds a value of the unknown kind {kind}")
        inner, length = self.number("<I"), self.number("<Q")
        if inner in GGUF_FIXED:
            width = struct.calcsize("<" + GGUF_FIXED[inner])
            if length > MOST_VALUES:
                return self.skip(length * width)
            return list(struct.unpack(f"<{length}{GGUF_FIXED[inner]}", self.take(length * width)))
        if inner == GGUF_STRING and length <= min(MOST_VALUES, (self.size - self.at) // 8):
            return [self.text() for _ in range(length)]
        raise _damaged(self.path, f"holds an array of {length} values of kind {inner}")

    def tensor(self) -> tuple[str, GgufTensor]:
        """The next tensor by name; its start still counted from the first tensor."""
        name, rank = self.name(), self.number("<I")
        if not 1 <= rank <= 4:
            raise _damaged(self.path, f"gives tensor {name!r} {rank} dimensions")
        shape = tuple(self.number("<Q") for _ in range(rank))
        kind, start = self.number("<I"), self.number("<Q")
        if kind not in GGUF_BLOCKS:
            raise _damaged(self.path, f"gives tensor {name!r} the unknown type {kind}")
        numbers, length = GGUF_BLOCKS[kind]
        if shape[0] % numbers or min(shape) < 1:
            raise _damaged(
                self.path, f"gives tensor {name!r} the shape {shape}, which type {kind} cannot have"
            )
        return name, GgufTensor(shape, kind, start, prod(shape) // numbers * length)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path.name} {what}: the file is damaged or not what its name says. Get it again.")
