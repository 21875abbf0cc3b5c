"""Swapping attention for good: exact both ways, saved whole or not at all, loaded strictly or not at all."""

import errno
import json
import os
import pickle
import resource
import struct
from copy import deepcopy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

import nearfield  # noqa: E402
from nearfield.convert import (  # noqa: E402
    convert,
    load,
    save,
    store,
)
from nearfield.convert.swap import attention_sites, default_pattern, positions  # noqa: E402
from nearfield.hosts import seam  # noqa: E402
from nearfield.hosts.transformers import NAME  # noqa: E402
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention  # noqa: E402
from nearfield.plan.pattern import GroupPlan, SitePlan, plan_to_json  # noqa: E402

CAUSAL = Neighborhood(6, is_causal=True, num_sinks=2)


def llama(**more):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **more})).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel(config).eval()


def dinov2():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=40, patch_size=4
    )
    return Dinov2Model(config).eval()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(rows=1, tokens=40, seed=1):
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


HOSTS = {
    "llama": (llama, {"input_ids": ids(2)}, CAUSAL, None),
    "bert": (bert, {"input_ids": ids(2)}, Neighborhood(7, border="truncate"), None),
    "dinov2": (dinov2, {"pixel_values": draw(2, 3, 40, 40)}, Neighborhood(3), None),
    "encoder": (encoder, {"src": draw(2, 40, 32)}, Neighborhood(7), {"src": draw(2, 40, 32)}),
    "encoder, example by place": (encoder, {"src": draw(2, 40, 32)}, Neighborhood(7), (draw(2, 40, 32),)),
}


def seen_by(model):
    """Everything about a host that a conversion could leave behind."""
    return (
        [sorted(vars(module)) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        getattr(getattr(model, "config", None), "_attn_implementation", None),
        model.training,
    )


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_becomes_local_and_is_put_back_exactly(host):
    build, inputs, pattern, example = HOSTS[host]
    model = build()
    convert(model, pattern, example=example).restore()  # what is registered once is there now
    before, weights = seen_by(model), deepcopy(model.state_dict())
    with torch.no_grad():
        full = first(model(**inputs))
        report = convert(model, pattern, example=example)
        local = first(model(**inputs))
        assert model.state_dict().keys() == weights.keys()
        report.restore()
        again = first(model(**inputs))
    assert (local - full).abs().max() > 1e-3 * full.abs().max()
    assert torch.equal(again, full)
    assert seen_by(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    report.restore()  # once more does nothing
    with torch.no_grad():
        assert torch.equal(first(model(**inputs)), full)


@pytest.mark.parametrize("host", ["llama", "bert", "dinov2", "encoder"])
def test_a_converted_site_computes_the_operator(host):
    """Each site's result is what the operator gives for the query, key and value that arrive there."""
    build, inputs, pattern, example = HOSTS[host]
    model = build()
    wanted = {}

    def handler(call):
        prefix, grid = call.site.num_prefix, call.site.grid or (call.query.shape[1],)
        if prefix:  # checked by the hosts' own tests: here what patches see of patches and of the prefix
            q, k, v = (x[:, prefix:].unflatten(1, grid) for x in (call.query, call.key, call.value))
            out = neighborhood_attention(
                q,
                k,
                v,
                pattern,
                additional_keys=call.key[:, :prefix],
                additional_values=call.value[:, :prefix],
                backend="reference",
            ).flatten(1, -3)
            scores = torch.einsum("bnhd,bmhd->bhnm", call.query[:, :prefix], call.key) * call.scale
            out = torch.cat([torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), call.value), out], 1)
        else:
            q, k, v = (x.unflatten(1, grid) for x in (call.query, call.key, call.value))
            out = neighborhood_attention(q, k, v, pattern, scale=call.scale, backend="reference").flatten(
                1, -3
            )
        wanted[call.site.name] = out
        return out

    with torch.no_grad():
        with seam.attention(model, handler):
            expected = first(model(**inputs))
        report = convert(model, pattern, example=example)
        found = first(model(**inputs))
    assert [site.name for site in report.sites] == list(wanted)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_where_chooses_sites_by_name():
    model = llama()
    report = convert(model, CAUSAL, where="model.layers.[02].*")
    assert [site.name for site in report.sites] == [f"model.layers.{i}.self_attn" for i in (0, 2)]
    assert report.skipped == {"model.layers.1.self_attn": "does not match 'model.layers.[02].*'"}
    only = convert(llama(), [SitePlan.uniform(f"model.layers.{i}.self_attn", 2, CAUSAL) for i in (0, 2)])
    report.restore()
    assert only.json()["sites"] == report.json()["sites"]
    assert only.skipped == {"model.layers.1.self_attn": "is not in the plan"}


def test_a_plan_for_each_group_is_followed():
    groups = (GroupPlan((1,), CAUSAL), GroupPlan((0,), None))
    plan = {"model.layers.1.self_attn": SitePlan("model.layers.1.self_attn", groups)}
    seen = []
    for chosen in (plan, list(plan.values())):
        model = llama()
        report = convert(model, chosen)
        seen.append(model(input_ids=ids()).logits)
        assert report.sites == tuple(plan.values())
    assert torch.equal(*seen)
    uniform = llama()
    convert(uniform, CAUSAL, where="model.layers.1.*")
    assert not torch.allclose(uniform(input_ids=ids()).logits, seen[0])
    assert not torch.allclose(llama()(input_ids=ids()).logits, seen[0])


@pytest.mark.parametrize(
    ("what", "options", "match"),
    [
        (
            CAUSAL,
            {"where": "*.attention"},
            r"No self-attention site matches '\*\.attention'. The sites are: mod",
        ),
        ([SitePlan.uniform("model.layers.7.self_attn", 2, CAUSAL)], {}, r"layers\.7.*another model"),
        ([SitePlan.uniform("model.layers.1.self_attn", 3, CAUSAL)], {}, "layers.1.self_attn"),
        ([SitePlan.uniform("model.layers.1.self_attn", 2, Neighborhood((3, 3)))], {}, "layers.1.self_attn"),
        ({}, {}, "names no site"),
        ([SitePlan.uniform("model.layers.1.self_attn", 2, CAUSAL)], {"where": "lm_*"}, "names no site"),
    ],
)
def test_what_does_not_suit_is_refused_and_changes_nothing(what, options, match):
    model = llama()
    convert(model, CAUSAL).restore()
    before, logits = seen_by(model), model(input_ids=ids()).logits
    with pytest.raises(ValueError, match=match):
        convert(model, what, **options)
    assert seen_by(model) == before
    assert torch.equal(model(input_ids=ids()).logits, logits)


def test_a_plain_host_asks_for_an_example():
    with pytest.raises(ValueError, match="of a TransformerEncoder show when it runs. Give example="):
        convert(encoder(), Neighborhood(7))


def test_a_model_is_converted_once_at_a_time():
    model = llama()
    report = convert(model, CAUSAL)
    local = model(input_ids=ids()).logits
    with pytest.raises(ValueError, match="converted already. Call restore"):
        convert(model, Neighborhood(3, is_causal=True))
    assert torch.equal(model(input_ids=ids()).logits, local)
    report.restore()
    convert(model, Neighborhood(3, is_causal=True))
    report.restore()  # the first conversion's: none of its business any more
    assert not torch.equal(model(input_ids=ids()).logits, llama()(input_ids=ids()).logits)


def test_the_report_speaks_json_and_tables():
    report = convert(llama(), CAUSAL, where="model.layers.0.*")
    told = json.loads(json.dumps(report.json()))
    (site,) = told["sites"]
    assert SitePlan.from_json(site) == report.sites[0]
    assert told["skipped"].keys() == {"model.layers.1.self_attn", "model.layers.2.self_attn"}
    from rich.console import Console

    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report)
    shown = console.export_text()
    assert "model.layers.0.self_attn" in shown
    assert "6+2  6+2" in shown
    assert "left alone" in shown


def test_default_patterns_suit_their_sites():
    sites = {site.name: site for site in attention_sites(llama())}
    assert default_pattern(sites["model.layers.0.self_attn"], 64) == Neighborhood(
        64, is_causal=True, num_sinks=4
    )
    (site, *_) = attention_sites(dinov2(), {"pixel_values": draw(1, 3, 40, 40)})
    assert (site.grid, site.num_prefix) == ((10, 10), 1)
    assert default_pattern(site, 5) == Neighborhood(5)
    (site, *_) = attention_sites(bert(), {"input_ids": ids()})
    assert default_pattern(site, 9) == Neighborhood(9, border="truncate")
    assert positions(llama()) == 128
    assert positions(encoder()) is None


# Kept in a folder.


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_saved_and_loaded_is_the_same(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    groups = (GroupPlan((1,), CAUSAL), GroupPlan((0,), None))
    plan = [
        SitePlan("model.layers.1.self_attn", groups),
        SitePlan.uniform("model.layers.2.self_attn", 2, None),
    ]
    convert(model, plan)
    logits = model(input_ids=ids()).logits
    folder = save(model, tmp_path / "new" / "out", extra={"report.json": "{}\n"})
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "nearfield.json",
        "report.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    again = nearfield.load(folder)
    assert not again.training
    assert torch.equal(again(input_ids=ids()).logits, logits)
    assert plan_to_json(again.nearfield_plan) == plan_to_json(plan)
    assert torch.equal(model(input_ids=ids()).logits, logits)  # saving changed nothing
    # without nearfield the folder is the host's own model, in full
    plain = LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(
        plain(input_ids=ids()).logits, llama(tie_word_embeddings=tied)(input_ids=ids()).logits
    )
    assert NAME not in (folder / "config.json").read_text()


@pytest.mark.parametrize("host", ["bert", "dinov2"])
def test_an_encoder_saved_and_loaded_is_the_same(tmp_path, host):
    build, inputs, pattern, _ = HOSTS[host]
    model = build()
    convert(model, pattern, example=inputs)
    with torch.no_grad():
        features = first(model(**inputs))
        assert torch.equal(first(nearfield.load(nearfield.save(model, tmp_path / "out"))(**inputs)), features)


def test_a_loaded_model_generates_with_a_bounded_cache(tmp_path):
    from transformers import DynamicCache

    from nearfield.hosts.transformers import cache_bytes

    model = llama()
    convert(model, CAUSAL)
    save(model, tmp_path / "out")
    found = load(tmp_path / "out")
    held = {}
    for tokens in (40, 100):
        cache = DynamicCache(config=found.config)
        options = {"attention_mask": torch.ones(1, tokens), "max_new_tokens": 12, "do_sample": False}
        written = found.generate(ids(tokens=tokens), past_key_values=cache, pad_token_id=0, **options)
        held[tokens] = cache_bytes(cache)
        # the same tokens, each read from a whole pass over all before it
        with torch.no_grad():
            likely = model(input_ids=written).logits[0].argmax(-1)
        assert torch.equal(likely[tokens - 1 : -1], written[0, tokens:])
    assert held[40] == held[100]


def test_only_a_converted_model_that_describes_itself_is_saved(tmp_path):
    with pytest.raises(ValueError, match="not converted, so there is no plan to save"):
        save(llama(), tmp_path / "out")
    model = encoder()
    convert(model, Neighborhood(7), example=(draw(2, 40, 32),))
    with pytest.raises(NotImplementedError, match="Saving a converted TransformerEncoder"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def converted():
    model = llama()
    convert(model, CAUSAL)
    return model


def test_a_folder_that_holds_anything_is_refused_and_left_alone(tmp_path, converted):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("mine", "file"):
        with pytest.raises(FileExistsError, match="is there and not empty"):
            save(converted, tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "letter.txt", "mine"]


def test_an_empty_folder_is_filled_also_the_one_we_stand_in(tmp_path, converted, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    save(converted, ".")
    assert (tmp_path / "out" / "nearfield.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def limited(model, folder):
    """Save with files limited to 20,000 bytes: what a full disk is to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        save(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_space(model, folder):
    def full(target, **options):
        with open(os.path.join(target, "config.json"), "w") as file:
            file.write("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "save_pretrained", full)
        save(model, folder)


@pytest.mark.parametrize("broken", [limited, no_space])
def test_a_full_disk_is_told_in_a_sentence_and_leaves_nothing(tmp_path, converted, broken):
    with pytest.raises(OSError, match="out could not be written .*Nothing was kept there; free some space"):
        broken(converted, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    save(converted, tmp_path / "out")
    load(tmp_path / "out")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_save_that_is_interrupted_leaves_nothing(tmp_path, converted, monkeypatch, stop):
    monkeypatch.setattr(store, "plan_to_json", lambda plan: (_ for _ in ()).throw(stop("here")))
    with pytest.raises(stop, match="here"):
        save(converted, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["save_pretrained", "plan"])
def test_a_save_that_is_killed_leaves_nothing_to_load(tmp_path, converted, moment):
    child = os.fork()
    if child == 0:
        try:
            if moment == "plan":
                store.plan_to_json = lambda plan: os.kill(os.getpid(), 9)
            else:
                whole = type(converted).save_pretrained
                type(converted).save_pretrained = lambda self, to: (whole(self, to), os.kill(os.getpid(), 9))
            save(converted, tmp_path / "out")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    (left,) = tmp_path.iterdir()  # beside the folder, hidden
    assert left.name.startswith(".out.")
    assert (left / "model.safetensors").is_file()
    for folder in (tmp_path / "out", left):
        with pytest.raises((FileNotFoundError, ValueError)):
            nearfield.load(folder)
    save(converted, tmp_path / "out")
    load(tmp_path / "out")


# Loading is strict.


@pytest.fixture
def folder(tmp_path, converted):
    return save(converted, tmp_path / "out")


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def weights(path, change):
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


MODEL, PLAN, CONFIG = "model.safetensors", "nearfield.json", "config.json"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "missing keys: model.layers.1.mlp.up_proj"),
        (lambda s: s.update(more=torch.zeros(3)), "unexpected keys: more"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(31)}), "model.norm.weight|LlamaForCausalLM"),
    ],
)
def test_weights_that_do_not_fit_exactly_are_refused(folder, change, match):
    weights(folder / MODEL, change)
    with pytest.raises(ValueError, match=match):
        load(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def swap_header(path):
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])


def overlap(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [0, 1 << 50]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("damage", [cut, swap_header, overlap, lambda path: path.write_bytes(b"")])
def test_damaged_weights_are_refused(folder, damage):
    damage(folder / MODEL)
    with pytest.raises(ValueError, match="model.safetensors"):
        load(folder)


class Bomb:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin"])
def test_pickles_are_never_read(folder, tmp_path, name, converted):
    trace = tmp_path / "trace"
    (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    assert torch.equal(load(folder)(input_ids=ids()).logits, converted(input_ids=ids()).logits)
    (folder / MODEL).unlink()
    with pytest.raises(ValueError, match="holds no .safetensors or .gguf weights.*pickle"):
        load(folder)
    assert not trace.exists()


def test_code_that_a_folder_brings_is_never_run(folder, tmp_path):
    trace = tmp_path / "trace"
    (folder / "modeling_evil.py").write_text(f"import os; os.mkdir({str(trace)!r})\n")
    edit(
        folder / CONFIG,
        lambda c: c.update(
            auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.C"}
        ),
    )
    load(folder)
    assert not trace.exists()


def set_plan(**settings):
    def change(data):
        data["plan"][0]["groups"][0]["pattern"].update(settings)

    return change


def rename(name):
    return lambda data: data.update(model=name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(format=2), "it must hold format, nearfield, model and policy"),
        (lambda d: d.update(format=3), "its format is 3; this version reads 1 and 2"),
        (lambda d: d.update(format=True), "its format is True"),
        (lambda d: d.update(more=1), "must hold format, nearfield, model and plan, and nothing else"),
        (lambda d: d.pop("nearfield"), "must hold format, nearfield, model and plan"),
        (lambda d: d.update(plan={}), "A plan must be a list of sites, not an object"),
        (lambda d: d.update(plan=[]), "names no site"),
        (lambda d: d["plan"].append(d["plan"][0]), "twice"),
        (lambda d: d["plan"][0].update(__class__="os.system"), "unknown key '__class__'"),
        (lambda d: d["plan"][0].update(name="model.layers.9.self_attn"), "another model"),
        (lambda d: d["plan"][0].update(name="__class__"), "another model"),
        (lambda d: d["plan"][0]["groups"][0].update(kv_heads=[0]), "key/value"),
        (lambda d: d["plan"][0]["groups"][0].update(kv_heads=[0, 1, 2]), "key/value"),
        (set_plan(kernel_size="6"), "kernel_size='6'"),
        (set_plan(kernel_size=0), "kernel_size"),
        (set_plan(is_causal=1), "is_causal=1"),
        (set_plan(num_sinks=True), "num_sinks=True"),
        (set_plan(border="__class__"), "border='__class__'"),
        (set_plan(sinks=3), "unknown key 'sinks'"),
        (rename("BertModel"), "They must agree"),
        (rename("__class__"), "__class__"),
        (rename(["LlamaForCausalLM"]), "LlamaForCausalLM"),
        (rename(None), "None"),
    ],
)
def test_a_hostile_plan_is_refused(folder, change, match):
    edit(folder / PLAN, change)
    with pytest.raises(ValueError, match=match):
        load(folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "This is not JSON"),
        ("[1, 2]", "must hold format"),
        ('{"format": NaN}', "holds NaN"),
        ('{"format": 1, "format": 1}', "gives the key 'format' twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": 1e999, "nearfield": "0", "model": "x", "plan": []}', "its format is inf"),
        ("\x00", "This is not JSON"),
    ],
)
def test_a_plan_that_is_no_json_is_refused(folder, text, match):
    (folder / PLAN).write_text(text)
    with pytest.raises(ValueError, match=match):
        load(folder)


def test_a_plan_in_another_alphabet_or_without_end_is_refused(folder, monkeypatch):
    (folder / PLAN).write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not text in UTF-8|This is not JSON"):
        load(folder)
    monkeypatch.setattr(store, "LONGEST", 2)
    with pytest.raises(ValueError, match="is 3 bytes long; a plan is at most 2"):
        load(folder)


@pytest.mark.parametrize("name", ["PreTrainedModel", "__class__", "LlamaConfig", "pipeline", "os"])
def test_a_folder_cannot_name_what_is_no_model(folder, name):
    """config.json and nearfield.json agree, so only the name itself can be refused."""
    edit(folder / PLAN, rename(name))
    edit(folder / CONFIG, lambda c: c.update(architectures=[name]))
    with pytest.raises(ValueError, match=name):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(hidden_size="thirty-two"),
        lambda c: c.update(num_hidden_layers=-1),
        lambda c: c.update(hidden_size=1 << 40),
        lambda c: c.update(num_hidden_layers=4),
        lambda c: c.pop("architectures"),
        lambda c: c.update(rope_parameters=[]),
    ],
)
def test_a_config_that_does_not_suit_is_refused(folder, change):
    edit(folder / CONFIG, change)
    with pytest.raises(ValueError):
        load(folder)


def test_a_folder_without_a_plan_or_config_is_refused(folder):
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match="config.json"):
        load(folder)
    (folder / PLAN).unlink()
    with pytest.raises(
        FileNotFoundError, match="holds no nearfield.json. Give a folder that `nearfield convert"
    ):
        load(folder)
    with pytest.raises(FileNotFoundError):
        load(folder / "nowhere")
