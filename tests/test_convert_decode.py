"""`nearfield convert --for decode` on a small random decoder: choose, judge, time, save, load."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import nearfield  # noqa: E402
from nearfield import cli  # noqa: E402
from nearfield.convert import convert, decoding, save  # noqa: E402
from nearfield.convert.decoder import Judgement, ask, read  # noqa: E402
from nearfield.convert.decoding_report import decode_page  # noqa: E402
from nearfield.convert.main import run  # noqa: E402
from nearfield.convert.steps import ask_in_steps, follow, prefill  # noqa: E402
from nearfield.data import recall  # noqa: E402
from nearfield.hosts.transformers_blocks import BlockLayer, block_cache, install_reuse  # noqa: E402
from nearfield.ops.neighborhood import Neighborhood  # noqa: E402
from nearfield.plan.reuse import ReusePolicy  # noqa: E402

TOKENS = 512
SPOKEN = (
    "Remember: the pass key of the red green black white door opens is What is the pass key of the red door? "
    "One of the special magic numbers for is: What is the special magic number for ? The special magic number"
)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "initializer_range": 0.1,  # far from even attention, and text that does not need it
}


KINDS = ["full_attention", "sliding_attention"] * 2


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
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words, *[f"{SPOKEN} {' '.join(recall.NAMES)}"] * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Decoders, an encoder and a text, each at its path."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(prose(), encoding="utf-8")
    tokenizer = learnt(prose())
    size = {"vocab_size": len(tokenizer), **SMALL}
    encoder = {name: value for name, value in size.items() if "key_value" not in name}
    built = {
        "llama <b>&": LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=1024)),
        "short": LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=256)),
        "sliding": MistralForCausalLM(MistralConfig(**size, sliding_window=64)),
        "mixed": Qwen3ForCausalLM(
            Qwen3Config(**size, head_dim=8, use_sliding_window=True, sliding_window=32, layer_types=KINDS)
        ),
        "bert": BertModel(BertConfig(**encoder, max_position_embeddings=128)),
    }
    for name, model in built.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def llama(folder):
    return str(folder / "llama <b>&")


@pytest.fixture(scope="module")
def words(folder):
    return str(folder / "text.txt")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _short():
    """Fewer timings and prompts: each is like the next."""
    torch.set_num_threads(1)  # models this small only wait for a second one
    patch = pytest.MonkeyPatch()
    patch.setattr(decoding, "ROUNDS", 4)
    patch.setattr(decoding, "LENGTHS", ((2, 2), (1, 2)))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def automatic(llama, words, tmp_path_factory):
    told = []
    out = tmp_path_factory.mktemp("auto") / "out"
    settings = {"text": words, "tokens": TOKENS, "out": out, "budget": "5%", "purpose": "decode"}
    found = run(llama, **settings, progress=lambda *a: told.append(a))
    return found, out, told


def opened(path):
    return LlamaForCausalLM.from_pretrained(path).eval()


def draw(rows, tokens, seed=1):
    return torch.randint(1, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


# The job


def test_a_policy_is_found_within_the_budget(automatic):
    found, _, progress = automatic
    told = json.loads(json.dumps(found.json(), allow_nan=False))
    assert (told["model"], told["for"], told["tokens"], found.tail) == ("llama <b>&", "decode", TOKENS, 128)
    policy = ReusePolicy.from_json(told["policy"])
    assert policy == found.policy
    assert len(policy.sources) == 4
    assert policy.selecting  # attention is far from needed in a random model
    quality = told["quality"]
    assert quality["change"] == pytest.approx(quality["after"] / quality["before"] - 1)
    low, high = quality["interval"]
    assert low - 1e-9 <= quality["change"] <= high + 1e-9  # a tail of 128 tokens is one span of the bootstrap
    assert quality["passkey"]["prompts"] == 16
    assert told["holds"] is (quality["interval"][1] <= 0.05 and quality["passkey"]["kept"])
    for name, done, total in progress:
        assert isinstance(name, str) and 0 <= done <= total
    finished = {name for name, done, total in progress if done == total}
    assert finished >= {"compare layers", "try policies", "time steps", "write the folder"}


def test_the_prediction_stands_beside_the_measured_ratio(automatic):
    found = automatic[0]
    told = found.json()["decode"]
    model = nearfield.load(automatic[1])
    weights = sum(p.nbytes for p in model.parameters())
    weights -= model.get_input_embeddings().weight.nbytes  # the head is another table here
    assert told["bytes_per_step"]["weights"] == weights
    cache = 4 * TOKENS * 2 * 2 * 8 * 4  # layers, keys, heads, keys and values, channels, bytes
    assert told["bytes_per_step"]["before"] == weights + cache
    after = sum(found.policy.bytes_read(TOKENS, kv_heads=2, key_dim=8, value_dim=8, itemsize=4))
    assert told["bytes_per_step"]["after"] == weights + after
    ratio = told["bytes_per_step"]["before"] / told["bytes_per_step"]["after"]
    assert told["predicted_speedup"] == pytest.approx(ratio)
    dense = min(told["seconds"][way]["median"] for way in ("torch", "native"))
    assert told["speedup"] == pytest.approx(dense / told["seconds"]["after"]["median"])
    for each in told["seconds"].values():
        assert 0 < each["min"] <= each["median"] <= each["max"]
        assert each["count"] == 4
    assert told["cache_bytes"] >= cache


def test_the_controls_are_other_policies(automatic):
    found = automatic[0]
    points = {point.kind: point for point in found.points}
    assert set(points) == {"full", "policy", "uniform", "unprotected", "every", "window"}
    assert points["full"].added == 0
    assert points["full"].bytes > points["policy"].bytes >= points["unprotected"].bytes
    policies = [tried.policy for tried in found.trials]
    assert found.policy in policies
    uniform = next(
        p
        for p in policies
        if p.sources == decoding._evenly(found.policy.sources, len(found.policy.selecting))
    )
    assert len(uniform.selecting) == len(found.policy.selecting)
    assert uniform.full == found.policy.full
    assert points["policy"].added <= decoding.AIM * math.log1p(0.05)


def test_the_folder_loads_and_generates_by_itself(automatic, llama):
    found, out, _ = automatic
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "nearfield.json", "report.json", "report.html"}
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(found.json()))
    model, twin = nearfield.load(out), opened(llama)
    assert model.nearfield_policy == found.policy
    install_reuse(twin, found.policy)
    ids = draw(1, 300)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        one, two = (each.generate(ids, **settings) for each in (model, twin))
    assert torch.equal(one.sequences, two.sequences)
    assert all(type(layer) is BlockLayer for layer in one.past_key_values.layers)


def test_people_get_a_table_and_a_page(automatic, monkeypatch):
    import sys

    from rich.console import Console

    found, out, _ = automatic
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    shown = console.export_text()
    for said in ("perplexity, last 128", "tokens a second", "if reading were all", "select (S)", "Saved in"):
        assert said in shown
    page = (out / "report.html").read_text()
    assert "llama &lt;b&gt;&amp; decoding by blocks" in page
    for bad in ("<b>", "<script", "http", "[green]"):
        assert bad not in page
    for point in found.points:
        assert point.name in page
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "Pictures are left out" in decode_page(found)


def test_a_policy_from_a_file_is_judged_as_it_is(automatic, llama, words, tmp_path):
    """And one that loses too much is told so."""
    found, out, _ = automatic
    again = run(llama, to=str(out / "nearfield.json"), text=words, tokens=TOKENS, purpose="decode")
    assert again.policy == found.policy
    assert again.points == [] and again.trials == []
    assert again.json()["quality"]["after"] == pytest.approx(found.json()["quality"]["after"], rel=1e-5)
    told = json.loads(again.text_json())
    assert told["overlap"] is None
    (tmp_path / "policy.json").write_text(json.dumps(found.policy.to_json()))
    hard = run(
        llama, to=str(tmp_path / "policy.json"), text=words, tokens=TOKENS, budget=1e-9, purpose="decode"
    )
    assert len(hard.judgements) == 1
    assert not hard.holds or hard.json()["quality"]["interval"][1] <= 1e-9


def test_what_nothing_holds_for_stays_full(llama, words, monkeypatch):
    """Judgements that all fail end with full attention, which holds."""
    monkeypatch.setattr(decoding, "READ", (16,))
    monkeypatch.setattr(decoding, "SHARES", (0.25, 0.5))
    monkeypatch.setattr(decoding, "ANSWER_LIMIT", math.inf)
    monkeypatch.setattr(decoding, "AIM", 1e9)  # every trial holds, whatever it loses
    monkeypatch.setattr(Judgement, "holds", lambda self, _: not any(self.perplexity.slices))
    found = run(llama, text=words, tokens=TOKENS, purpose="decode")
    assert found.holds
    assert found.policy.full == (0, 1, 2, 3)
    assert 1 < len(found.judgements) <= decoding.JUDGEMENTS
    assert "No policy was worth taking" in decode_page(found)
    assert [point.kind for point in found.points] == ["full"]


def test_layers_with_windows_of_their_own_stay_as_they_are(folder, words, monkeypatch):
    monkeypatch.setattr(decoding, "READ", (4,))
    monkeypatch.setattr(decoding, "SHARES", (0.25,))
    monkeypatch.setattr(decoding, "ANSWER_LIMIT", math.inf)
    monkeypatch.setattr(decoding, "AIM", 1e9)
    found = run(str(folder / "mixed"), text=words, tokens=TOKENS, budget="50%", purpose="decode")
    assert {1, 3} < set(found.policy.full) < {0, 1, 2, 3}
    windows = 2 * 32 * 2 * 2 * 8 * 4  # two layers of 32 keys
    assert found.steps.dense_bytes - found.steps.weight_bytes == windows + 2 * TOKENS * 2 * 2 * 8 * 4


# What it measures


def test_following_in_steps_is_reading_at_once(llama):
    model, ids = opened(llama), draw(1, 200)
    cache = block_cache(model, 200)
    with torch.no_grad():
        model(ids[:, :99], past_key_values=cache)
        for _ in range(2):  # the cache is left as it was
            found = follow(model, cache, ids, 100)
            assert cache.get_seq_length() == 99
            torch.testing.assert_close(found.losses, read(model, ids).losses, rtol=1e-4, atol=1e-4)
        assert found.right == read(model, ids).right


def test_windows_of_the_host_are_put_back(folder):
    """Layers with a sliding window forget tokens, which a crop must have again."""
    torch.manual_seed(0)
    more = {"head_dim": 8, "use_sliding_window": True, "sliding_window": 32, "layer_types": KINDS}
    model, ids = Qwen3ForCausalLM(Qwen3Config(vocab_size=300, **SMALL, **more)).eval(), draw(1, 200)
    cache = prefill(model, ids[:, :99], 200)
    for _ in range(2):
        found = follow(model, cache, ids, 100)
        torch.testing.assert_close(found.losses, read(model, ids).losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [None, ReusePolicy((None, 1, 1, 3), 48, 8, 8, 16, "bound")])
def test_an_answer_counts_as_decoding_writes_it(llama, policy):
    model, context = opened(llama), draw(1, 150)[0].tolist()
    questions = [draw(1, length, seed=length)[0].tolist() for length in (7, 20)]
    if policy is not None:
        install_reuse(model, policy)

    def written(question):
        """Greedy tokens behind the question, token by token."""
        cache, given, said = DynamicCache(config=model.config), torch.tensor([context]), []
        with torch.no_grad():
            model(given, past_key_values=cache)
            for token in question:
                logits = model(torch.tensor([[token]]), past_key_values=cache).logits
            for _ in range(4):
                said.append(int(logits[0, -1].argmax()))
                logits = model(torch.tensor([said[-1:]]), past_key_values=cache).logits
        return said

    answers = [written(question) for question in questions]
    prompt = recall.Prompt(context, questions, answers, [], [])
    cache = prefill(model, torch.tensor([context]), 200)
    assert ask_in_steps(model, cache, prompt).right == [True, True]
    spoilt = [answers[0], [*answers[1][:3], answers[1][3] ^ 1]]
    assert ask_in_steps(model, cache, replace_answers(prompt, spoilt)).right == [True, False]
    assert cache.get_seq_length() == 150
    if policy is None:
        assert ask(model, prompt).right == [True, True]


def replace_answers(prompt, answers):
    return replace(prompt, answers=answers)


def test_the_judgement_is_of_the_steps_that_the_model_takes(automatic, llama, words):
    """Perplexity by hand: single steps of the loaded model on one held-out slice."""
    found, out, _ = automatic
    from transformers import AutoTokenizer

    from nearfield.data import text

    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = text.split(text.documents(words), tokenizer, tokens=TOKENS, num_calibration=1).held_out[:1]
    for path, judged in ((out, found.judgements[-1].after), (llama, found.judgements[-1].before)):
        model = nearfield.load(path) if path is out else opened(path)
        cache, losses = DynamicCache(config=model.config), []
        with torch.no_grad():
            model(ids[:, : TOKENS - 129], past_key_values=cache)
            for at in range(TOKENS - 129, TOKENS - 1):
                logits = model(ids[:, at : at + 1], past_key_values=cache).logits[0]
                losses.append(F.cross_entropy(logits, ids[0, at + 1 : at + 2]))
        torch.testing.assert_close(torch.stack(losses), judged.readings[0].losses, rtol=1e-3, atol=1e-3)


def test_candidates_grow_more_careful_and_within_is_an_order():
    policy = ReusePolicy((None, 1, 1, 3), 48, 8, 8, 16, "bound")
    one = decoding.Candidate(policy, 10)
    more = decoding.Candidate(replace(policy, num_tokens=64, score="mass"), 12)
    other = decoding.Candidate(replace(policy, sources=(None, 1, 1, None), num_tokens=64), 11)
    assert one.is_within(one) and one.is_within(more)
    assert not more.is_within(one)
    assert not other.is_within(more)
    assert decoding._evenly((None, 1, 1, None, 4, 4), 2) == (None, 1, 1, None, 4, 4)
    assert decoding._evenly((0, None, 2, 3, 4), 2) == (0, None, 0, 3, 3)
    sizes = [decoding._sizes(tokens, tokens // 16)["block_size"] for tokens in (512, 2048, 8192, 32768)]
    assert sizes == [4, 8, 32, 64]


# In and out


def test_a_policy_converts_and_is_put_back(llama):
    model, policy, ids = opened(llama), ReusePolicy((None, 1, 1, 3), 48, 8, 8, 16, "bound"), draw(1, 100)
    with torch.no_grad():
        before = model(ids).logits
        report = convert(model, policy)
        assert report.json() == {"policy": policy.to_json()}
        assert torch.equal(model(ids).logits, before)  # a prompt is read as ever
        for other in (policy, Neighborhood(8, is_causal=True)):
            with pytest.raises(ValueError, match="converted already"):
                convert(model, other)
        report.restore()
        report.restore()
        assert not hasattr(model, "nearfield_policy")
        convert(model, Neighborhood(8, is_causal=True)).restore()
    with pytest.raises(NotImplementedError, match="keeps no cache that is known here"):
        convert(torch.nn.Linear(2, 2), policy)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 3}, "it must hold format, nearfield, model and plan"),
        ({"format": 1}, "it must hold format, nearfield, model and plan"),
        ({"format": True}, "it must hold"),
        ({"policy": {"sources": [0]}}, "has no key"),
        ({"policy": None}, "must be an object"),
        ({"more": 1}, "and policy, and nothing else"),
    ],
)
def test_a_damaged_policy_is_refused(llama, tmp_path, change, match):
    model = opened(llama)
    convert(model, ReusePolicy((None, 1, 1, 3), 48, 8, 8, 16, "bound"))
    save(model, tmp_path / "out")
    path = tmp_path / "out" / "nearfield.json"
    described = json.loads(path.read_text())
    assert described["format"] == 2
    path.write_text(json.dumps({**described, **change}))
    with pytest.raises(ValueError, match=match):
        nearfield.load(tmp_path / "out")


def test_plans_of_the_first_format_load_as_before(llama, tmp_path):
    model = opened(llama)
    convert(model, Neighborhood(8, is_causal=True))
    save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "nearfield.json").read_text())["format"] == 1
    assert nearfield.load(tmp_path / "out").nearfield_plan == model.nearfield_plan


def test_the_command_prints_one_json_document(capsys, automatic, llama, words):
    policy = str(automatic[1] / "nearfield.json")
    arguments = ["--for", "decode", "--to", policy, "--text", words, "--tokens", "512", "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", llama, *arguments])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["for"], told["policy"]) == ("decode", automatic[0].policy.to_json())


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (["{root}/bert"], 1, "bert is an encoder: .* no steps to make cheaper"),
        (["{root}/short"], 1, "The model has 256 positions, which is too few"),
        (
            ["{root}/sliding", "--tokens", "512", "--text", "{words}"],
            1,
            "Every layer of sliding has a sliding window",
        ),
        (
            ["{llama}", "--to", "neighborhood", "--kernel-size", "64"],
            2,
            "is for prefill: a step reads blocks",
        ),
        (["{llama}", "--to", "none.json"], 1, "There is no policy none.json"),
        (["{llama}", "--for", "sleep"], 2, "Choose prefill or decode"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_sentence(capsys, folder, llama, words, arguments, status, match):
    given = [a.format(root=folder, llama=llama, words=words) for a in arguments]
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "--for", "decode", *given, "--json"])
    out, err = capsys.readouterr()
    assert ended.value.code == status
    assert out == ""
    said = " ".join(err.replace("│", " ").split())
    assert re.search(match, said), said
    assert "Traceback" not in said
