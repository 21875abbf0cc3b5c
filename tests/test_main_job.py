"""`nearfield convert` from end to end on models that are built here: a language model, two encoders."""

import json
import math
import random
import sys

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import nearfield  # noqa: E402
from nearfield import cli  # noqa: E402
from nearfield.convert import convert  # noqa: E402
from nearfield.convert.decoder import ask  # noqa: E402
from nearfield.convert.main import plan_only, run  # noqa: E402
from nearfield.data import pictures, recall, text  # noqa: E402
from nearfield.ops.neighborhood import Neighborhood  # noqa: E402
from nearfield.plan.pattern import plan_from_json, plan_to_json  # noqa: E402

TOKENS = 512
WINDOW = Neighborhood(64, is_causal=True, num_sinks=4)
SPOKEN = (
    "Remember: the pass key of the red green black door is What is the pass key of the red door? It is "
    "One of the special magic numbers for is: What is the special magic number for ? The special magic number"
)


def prose(words=9000):
    """Paragraphs of made-up words, none twice."""
    draw = random.Random(0)
    known = ["".join(draw.choices("abcdeiou", k=draw.randint(2, 7))) for _ in range(200)]
    lines = [" ".join(draw.choices(known, k=30)) + "." for _ in range(words // 30)]
    return "\n\n".join(lines)


def learnt(words):
    """A byte-level BPE that has seen the words, and those of the prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words, *[f"{SPOKEN} {' '.join(recall.NAMES)}"] * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model, two encoders and a text, each at its path."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(prose(), encoding="utf-8")
    (root / "short.txt").write_text(prose(600), encoding="utf-8")
    tokenizer = learnt(prose())
    width = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.2}
    built = {
        "llama <b>&": LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                intermediate_size=48,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                **width,
            )
        ),
        "bert": BertModel(
            BertConfig(vocab_size=len(tokenizer), intermediate_size=48, max_position_embeddings=128, **width)
        ),
        "dinov2": Dinov2Model(Dinov2Config(image_size=80, patch_size=8, **width)),
    }
    for name, model in built.items():
        model.save_pretrained(root / name)
        if name != "dinov2":
            tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def llama(folder):
    return str(folder / "llama <b>&")


@pytest.fixture(scope="module")
def words(folder):
    return str(folder / "text.txt")


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def check_contract(told, model, metric):
    """The machine contract: names and types, and that the figures agree with one another."""
    json.dumps(told, allow_nan=False)
    assert told["model"] == model
    assert type(told["tokens"]) is int
    quality, seconds = told["quality"], told["seconds"]
    assert {"metric", "before", "after", "change", "passkey"} <= quality.keys()
    assert metric in quality["metric"]
    assert all(is_number(quality[key]) for key in ("before", "after", "change"))
    assert {"before", "after", "speedup"} <= seconds.keys()
    assert all(is_number(seconds[key]) and seconds[key] > 0 for key in ("before", "after", "speedup"))
    assert seconds["speedup"] == pytest.approx(seconds["before"] / seconds["after"])
    for site in told["sites"]:
        assert site.keys() == {"name", "groups"}
        for group in site["groups"]:
            assert group.keys() == {"kv_heads", "pattern", "kept"}
            assert all(type(head) is int for head in group["kv_heads"])
            assert group["pattern"] == "full" or isinstance(group["pattern"], dict)
            assert 0 < group["kept"] <= 1
    low, high = quality["interval"]
    assert low <= quality["change"] <= high


def plan_of(told):
    """The plan in a JSON answer, as the strict reader sees it."""
    sites = [
        {**site, "groups": [{k: g[k] for k in ("kv_heads", "pattern")} for g in site["groups"]]}
        for site in told["sites"]
    ]
    return plan_from_json(sites)


@pytest.fixture(scope="module")
def automatic(llama, words, tmp_path_factory):
    told = []
    out = tmp_path_factory.mktemp("auto") / "out"
    found = run(llama, text=words, tokens=TOKENS, out=out, budget="5%", progress=lambda *a: told.append(a))
    return found, out, told


def test_a_language_model_is_made_local_within_the_budget(automatic, llama):
    found, _, progress = automatic
    told = found.json()
    check_contract(told, "llama <b>&", "perplexity")
    assert told["tokens"] == TOKENS
    quality = told["quality"]
    assert quality["change"] == pytest.approx(quality["after"] / quality["before"] - 1)
    assert len(quality["slices"]) >= 4
    assert quality["worst"] == pytest.approx(max(quality["slices"]))
    assert quality["interval"][0] <= quality["interval"][1]
    passkey = quality["passkey"]
    assert {"before", "after"} <= passkey.keys()
    assert all(is_number(passkey[key]) and 0 <= passkey[key] <= 1 for key in ("before", "after"))
    assert passkey["prompts"] >= 40
    assert told["holds"] is (quality["interval"][1] <= 0.05 and passkey["kept"])
    assert [site["name"] for site in told["sites"]] == [f"model.layers.{i}.self_attn" for i in range(2)]
    for name, done, total in progress:
        assert isinstance(name, str)
        assert 0 <= done <= total
    assert {name for name, done, total in progress if done == total} >= {"load the model", "write the folder"}


def test_the_folder_holds_the_model_its_tokenizer_and_the_reports(automatic, llama):
    found, out, _ = automatic
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "nearfield.json",
        "report.json",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not [path.name for path in out.parent.iterdir() if path != out]
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(found.json()))
    model = nearfield.load(out)
    assert model.nearfield_plan == found.plan == plan_of(found.json())
    ids = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, found_logits(llama, found.plan, ids))
    said = "What is the pass key?"
    assert (
        AutoTokenizer.from_pretrained(out)(said).input_ids
        == AutoTokenizer.from_pretrained(llama)(said).input_ids
    )


def found_logits(path, plan, ids):
    model = LlamaForCausalLM.from_pretrained(path).eval()
    convert(model, plan)
    return model(ids).logits


def test_the_page_stands_alone_and_says_names_as_they_are(automatic):
    found, out, _ = automatic
    page = (out / "report.html").read_text()
    assert "llama &lt;b&gt;&amp; made local" in page
    assert "<b>" not in page
    assert "<script" not in page
    assert "http" not in page
    assert page.count('<img alt="') == page.count('src="data:image/png;base64,')
    if find_matplotlib():
        assert page.count("<img ") == 2
    for site in found.plan:
        assert site in page
    for point in found.points:
        assert point.name in page


def find_matplotlib():
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def test_the_page_without_pictures_says_why(automatic, monkeypatch):
    from nearfield.convert.page import page

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = page(automatic[0])
    assert "Pictures are left out" in made
    assert "pip install" in made
    assert "<img" not in made


def test_the_controls_are_other_ways_to_spend_the_same(automatic):
    found = automatic[0]
    kinds = [point.kind for point in found.points]
    assert kinds[0] == "full"
    assert {"full", "plan", "uniform", "random", "needle", "sensitivity"} <= set(kinds)
    assert found.points[0].added == 0
    assert all(point.seconds > 0 for point in found.points)


def test_people_get_a_table(automatic):
    from rich.console import Console

    console = Console(width=110, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(automatic[0])
    shown = console.export_text()
    for words in (
        "perplexity, last half of 4",
        "95 % interval, worst slice",
        "four-key",
        "× faster",
        "Saved in",
    ):
        assert words in shown


def by_hand(path, words, pattern=None):
    """Perplexity over the last half of each held-out slice, from whole logits."""
    model = LlamaForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    held_out = text.split(text.documents(words), tokenizer, tokens=TOKENS, num_calibration=1).held_out
    if pattern is not None:
        convert(model, pattern)
    half = TOKENS // 2
    with torch.no_grad():
        logits = model(held_out).logits[:, half - 1 : -1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), held_out[:, half:].flatten()))


def test_the_quality_is_that_of_the_models_on_the_held_out_text(llama, words):
    """One pattern for all: nothing is planned, and the verdict stands though the budget does not hold."""
    found = run(llama, to="neighborhood", kernel_size=64, text=words, tokens=TOKENS, budget="0.001%")
    quality = found.json()["quality"]
    assert quality["before"] == pytest.approx(by_hand(llama, words), rel=1e-5)
    assert quality["after"] == pytest.approx(by_hand(llama, words, WINDOW), rel=1e-5)
    assert quality["after"] != pytest.approx(quality["before"], rel=1e-5)
    assert found.points == []
    assert {site.pattern_of(0) for site in found.plan.values()} == {WINDOW}
    cache = found.json()["cache_bytes"]
    assert 0 < cache["after"] < cache["before"]
    assert all(rate > 0 for rate in found.json()["decode_tokens_per_second"].values())
    kept = found.json()["sites"][0]["groups"][0]["kept"]
    assert kept == pytest.approx(WINDOW.on(TOKENS).kept)


def test_a_plan_from_a_file_is_taken_as_it_is(automatic, llama, words, tmp_path):
    found, out, _ = automatic
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_to_json(found.plan)))
    for source in (path, out / "nearfield.json"):
        again = run(llama, to=str(source), text=words, tokens=TOKENS)
        assert again.plan == found.plan
        assert again.planner is None
    assert again.json()["quality"]["after"] == pytest.approx(found.json()["quality"]["after"], rel=1e-5)


def test_a_plan_is_predicted_without_converting_anything(llama, words):
    found = plan_only(llama, text=words, tokens=TOKENS, budget=0.05)
    told = json.loads(json.dumps(found.json(), allow_nan=False))
    assert told["model"] == "llama <b>&"
    assert plan_from_json(told["plan"]) == found.plan == plan_of(told)
    seconds = told["predicted"]["attention_seconds"]
    assert 0 < seconds["after"] <= seconds["before"]
    assert 0 <= told["predicted"]["added_loss"] <= math.log1p(0.05)


# Retrieval.


def test_an_answer_counts_only_as_greedy_decoding_writes_it(llama):
    """The answers of a prompt are made by decoding token by token, then one of them is spoilt."""
    draw = random.Random(1)
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    context = [draw.randrange(256) for _ in range(150)]
    questions = [[draw.randrange(256) for _ in range(length)] for length in (7, 4, 9)]
    full = None
    for pattern in (None, WINDOW):
        if pattern is not None:
            convert(model, pattern)
        answers = []
        for question in questions:
            ids = context + question
            for _ in range(4):
                with torch.no_grad():
                    ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            answers.append(ids[-4:])
        assert ask(model, recall.Prompt(context, questions, answers, [], [])).right == [True] * 3
        for at in range(4):
            spoilt = [list(answer) for answer in answers]
            spoilt[1][at] = (spoilt[1][at] + 1) % 256
            assert ask(model, recall.Prompt(context, questions, spoilt, [], [])).right == [True, False, True]
        assert answers != full  # the window is felt
        full = answers


def test_asking_says_what_the_cache_held(llama):
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    prompt = recall.Prompt(list(range(200)), [[1, 2]], [[3]], [], [])
    before = ask(model, prompt, decode=True)
    convert(model, WINDOW)
    after = ask(model, prompt, decode=True)
    assert 0 < after.cache_bytes < before.cache_bytes
    assert before.tokens_per_second > 0 < after.tokens_per_second


# Encoders.


@pytest.mark.parametrize(("to", "kernel_size"), [("auto", None), ("neighborhood", 17)])
def test_an_encoder_of_text(folder, words, tmp_path, to, kernel_size):
    out = tmp_path / "out"
    found = run(str(folder / "bert"), to=to, kernel_size=kernel_size, text=words, out=out, budget="5%")
    told = found.json()
    check_contract(told, "bert", "cosine")
    assert told["tokens"] == 128
    assert told["quality"]["passkey"] is None
    assert told["quality"]["change"] == pytest.approx(1 - told["quality"]["after"])
    assert told["holds"] is (told["quality"]["interval"][1] <= 0.05)
    assert {"config.json", "model.safetensors", "nearfield.json", "tokenizer.json", "report.html"} <= {
        path.name for path in out.iterdir()
    }
    model = nearfield.load(out)
    assert model.nearfield_plan == found.plan
    if to == "neighborhood":
        assert told["quality"]["change"] == pytest.approx(
            turned(folder / "bert", words, found.plan), rel=1e-3
        )


def turned(path, words, plan):
    """1 - cosine of features before and after, from two whole runs on the held-out slices."""
    model, tokenizer = BertModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    slices = text.split(text.documents(words), tokenizer, tokens=128, num_calibration=1).held_out
    with torch.no_grad():
        before = model(slices).last_hidden_state
        convert(model, plan)
        after = model(slices).last_hidden_state
    return float(1 - F.cosine_similarity(before, after, dim=-1).mean())


def test_an_encoder_of_pictures(folder, tmp_path):
    try:
        pictures.tensors(80, 5)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))
    out = tmp_path / "out"
    found = run(str(folder / "dinov2"), budget="20%", out=out, quick=True)
    check_contract(found.json(), "dinov2", "cosine")
    assert found.tokens == 101
    assert found.grid == (10, 10)
    assert {"config.json", "model.safetensors", "nearfield.json", "report.json"} <= {
        p.name for p in out.iterdir()
    }
    assert nearfield.load(out).nearfield_plan == found.plan
    with pytest.raises(ValueError, match="this one looks at pictures"):
        run(str(folder / "dinov2"), tokens=512)


# At the command line.


def test_the_command_prints_one_json_document(python, llama, words, tmp_path):
    arguments = ["--to", "neighborhood", "--kernel-size", "64", "--text", words, "--tokens", "512", "--json"]
    done = python("-m", "nearfield", "convert", llama, *arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    check_contract(told, "llama <b>&", "perplexity")
    assert told == json.loads((tmp_path / "out" / "report.json").read_text())


def ended(capsys, *arguments):
    """Exit status, stdout and stderr of the command, run in this process."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["convert", *arguments])
    return (exit_.value.code, *capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (["{root}/nothing"], 1, "There is no .*nothing.* Give a folder"),
        (["smollm"], 1, "smollm"),
        (["{llama}", "--budget", "abc"], 2, "'abc' is no share"),
        (
            ["{llama}", "--tokens", "2048", "--text", "{words}"],
            1,
            "--tokens 2,048 is outside .* 512 to 1,024",
        ),
        (["{llama}", "--tokens", "64", "--text", "{words}"], 1, "--tokens 64 is outside"),
        (["{llama}", "--out", "{root}"], 1, "is there and not empty. Choose a new folder for --out"),
        (
            ["{llama}", "--tokens", "512", "--text", "{root}/short.txt"],
            1,
            "The text has .* Give a longer text",
        ),
        (["{llama}", "--tokens", "512", "--text", "{root}/none.txt"], 1, "There is no text file"),
        (["{llama}", "--to", "plan"], 2, "Choose auto, neighborhood, or a .json plan"),
        (
            ["{llama}", "--to", "none.json", "--text", "{words}", "--tokens", "512"],
            1,
            "There is no plan none.json",
        ),
        (["{llama}", "--to", "neighborhood"], 2, "belong together"),
        (["{root}/bert", "--tokens", "512", "--text", "{words}"], 1, "has 128 positions and cannot read"),
    ],
)
def test_bad_input_is_told_in_one_sentence(capsys, folder, llama, words, arguments, status, match):
    given = [a.format(root=folder, llama=llama, words=words) for a in arguments]
    code, out, err = ended(capsys, *given, "--json")
    assert code == status
    assert out == ""
    said = " ".join(err.replace("│", " ").split())
    import re

    assert re.search(match, said), said
    assert "Traceback" not in said


@pytest.mark.parametrize("budget", ["abc", "0%", "-1%", "100%", 1.5, "nan", "1%%", ""])
def test_a_budget_that_is_no_share_is_refused_before_any_work(budget):
    with pytest.raises(ValueError, match="is no share of quality. Give one such as 1% or 0.01"):
        run("there is no such model", budget=budget)


@pytest.mark.parametrize("plan", ["[]", "{}", "not json", '[{"name": "x"}]', '{"plan": NaN}'])
def test_a_plan_that_is_none_is_refused(llama, words, tmp_path, plan):
    (tmp_path / "plan.json").write_text(plan)
    with pytest.raises(ValueError):
        run(llama, to=str(tmp_path / "plan.json"), text=words, tokens=TOKENS)
