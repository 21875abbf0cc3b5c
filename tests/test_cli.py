"""The command line: what it prints, where, and with which exit status."""

import importlib
import json
import os
import subprocess
import sys
import types

import pytest

from nearfield import catalog, cli


@pytest.fixture
def nearfield(capsys):
    """Run the command in this process: `nearfield("list", "--json") -> (status, stdout, stderr)`."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


class Answer:
    def __init__(self, document):
        self.document = document

    def json(self):
        return self.document

    def __rich__(self):
        return "a table"


@pytest.fixture
def stub(monkeypatch):
    """Put a function in place of the one that a command calls; it records its arguments."""

    def put(address, document=None, error=None):
        seen = {}

        def call(*args, progress=None, **kwargs):
            seen.update(args=args, **kwargs)
            if progress is not None:
                progress("working", 1, 2)
            print("stray output of some library")
            if error is not None:
                raise error
            return Answer({} if document is None else document)

        module, name = address.split(":")
        try:
            monkeypatch.setattr(importlib.import_module(module), name, call, raising=False)
        except ModuleNotFoundError:
            monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: call}))
        return seen

    return put


def test_list_is_one_document_of_the_agreed_form(nearfield):
    status, out, _ = nearfield("list", "--json")
    rows = json.loads(out)
    assert status == 0 and [row["slug"] for row in rows] == [card.slug for card in catalog.cards()]
    assert all(set(row) == {"slug", "title", "kind", "domain", "claims"} for row in rows)
    status, out, _ = nearfield("list")
    assert status == 0 and "fna" in out and "gna" in out


def test_list_takes_less_than_a_third_of_a_second(python):
    def seconds():
        before = os.times()
        assert python("-m", "nearfield", "list").returncode == 0
        after = os.times()  # CPU seconds of the process that ended: other work on the machine does not count
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert any(seconds() < 0.3 for _ in range(10))


def test_listing_needs_no_torch(python):
    code = "import sys\nsys.modules['torch'] = None\nfrom nearfield import cli\ncli.main(['list', '--json'])"
    done = python("-c", code)
    assert done.returncode == 0 and json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("name", ["fna", "FNA"])
def test_show_prints_the_card(nearfield, name):
    status, out, _ = nearfield("show", name)
    assert status == 0 and "2403.04690" in out and "tiles-win" in out
    assert json.loads(nearfield("show", name, "--json")[1])["entry"]


def test_run_reports_each_claim(nearfield, tmp_path):
    status, out, _ = nearfield("run", "fna", "--claim", "fused-kernel", "--json", "--out", str(tmp_path))
    document = json.loads(out)
    assert status == 0 and (document["system"], document["mode"]) == ("fna", "smoke")
    assert all(set(c) == {"id", "expect", "found", "holds", "skipped", "seconds"} for c in document["claims"])
    assert json.loads((tmp_path / "fna.json").read_text())["claims"] == document["claims"]
    status, out, _ = nearfield("run", "fna", "--claim", "fused-kernel")
    assert status == 0 and "fused-kernel" in out


def test_a_claim_that_fails_is_no_error(nearfield, monkeypatch):
    monkeypatch.setattr(
        catalog, "resolve", lambda address: lambda *, full=False: catalog.Result("a = 2", False)
    )
    status, out, _ = nearfield("run", "fna", "--claim", "per-axis", "--full", "--json")
    assert (
        status == 0 and json.loads(out)["claims"][0]["holds"] is False and json.loads(out)["mode"] == "full"
    )


COULD_NOT = [
    (("show", "fnaa"), "no system 'fnaa'. Did you mean fna"),
    (("run", "gnna"), "no system 'gnna'. Did you mean gna"),
    (("run", "fna", "--claim", "tiles-wins"), "no claim 'tiles-wins'. Did you mean tiles-win"),
    (("list", "--domain", "visoin"), "Did you mean vision"),
    (("plan", "--tokens", "8x8", "--kernel-size", "9"), "kernel_size=9"),
    (("plan", "--tokens", "8x8", "--kernel-size", "3", "--stride", "5"), "stride"),
    (("plan", "no-such-file/config.json"), "no-such-file/config.json"),
]


@pytest.mark.parametrize(("arguments", "words"), COULD_NOT, ids=[" ".join(a) for a, _ in COULD_NOT])
def test_what_cannot_be_done_is_one_sentence_and_status_1(nearfield, arguments, words):
    for form in (arguments, (*arguments, "--json")):
        status, out, err = nearfield(*form)
        assert status == 1 and out == "" and words in err
        assert "Traceback" not in err and len(err.strip().splitlines()) == 1


WRONG_USAGE = [
    (),
    ("lst",),
    ("list", "--knd", "model"),
    ("list", "--kind", "gadget"),
    ("show",),
    ("plan",),
    ("plan", "--tokens", "56x56"),
    ("plan", "--tokens", "fifty", "--kernel-size", "7"),
    ("plan", "--tokens", "56x56", "--kernel-size", "7x7x7"),
    ("plan", "--tokens", "1x2x3x4", "--kernel-size", "1"),
    ("plan", "--tokens", "56x56", "--kernel-size", "7", "--q-tile", "8"),
    ("plan", "--tokens", "56x56", "--kernel-size", "7", "--tile", "8", "--q-tile", "8"),
    ("plan", "config.json", "--tokens", "8q"),
    ("plan", "a-model", "--kernel-size", "7"),
    ("convert", "--budget", "lots"),
    ("convert", "--budget", "1"),
    ("convert", "--tokens", "0"),
    ("convert", "--to", "somewhere"),
    ("convert", "--to", "neighborhood"),
    ("convert", "--kernel-size", "7"),
    ("bench", "neighborhood", "--device", "tpu"),
    ("bench", "--compare", "one.json"),
    ("plan", "--tokens", "56x56", "--kernel-size", "7", "--border", "mirror"),
]


@pytest.mark.parametrize("arguments", WRONG_USAGE, ids=[" ".join(a) or "nothing" for a in WRONG_USAGE])
def test_wrong_usage_is_status_2_and_prints_no_document(nearfield, arguments):
    status, out, err = nearfield(*arguments)
    assert status == 2 and "Traceback" not in err
    assert arguments == () or (out == "" and err)


def test_plan_on_a_grid_reproduces_the_paper(nearfield):
    arguments = ("--tokens", "30x48x80", "--kernel-size", "18x24x24", "--stride", "16x8x8", "--tile", "2x8x8")
    status, out, _ = nearfield("plan", *arguments, "--json")
    document = json.loads(out)
    assert status == 0 and document["block_sparse"] is True
    assert document["flop_wise"] == pytest.approx(11.1, abs=0.1)
    assert {
        "tile_wise_static",
        "tile_wise_dynamic",
        "kept",
        "tile",
        "partial_share",
        "permutation_bytes",
    } <= set(document)
    assert nearfield("plan", "--tokens", "24x44x80", "--kernel-size", "fullx12x24")[0] == 0


def test_options_reach_the_functions(nearfield, stub, tmp_path):
    run = stub("nearfield.convert.main:run")
    assert nearfield("convert")[0] == 0
    defaults = {"to": "auto", "budget": "1%", "text": None, "tokens": None, "out": None, "quick": False}
    assert run == {"args": (None,), "kernel_size": None, "purpose": "prefill", **defaults}
    arguments = (
        "convert",
        "m",
        "--tokens",
        "8k",
        "--budget",
        "2.5%",
        "--text",
        "wiki",
        "--out",
        str(tmp_path),
        "--quick",
    )
    assert nearfield(*arguments, "--to", "neighborhood", "--kernel-size", "7x7")[0] == 0
    assert (run["args"], run["tokens"], run["budget"], run["out"]) == (("m",), 8192, "2.5%", tmp_path)
    assert run["quick"] is True and run["kernel_size"] == (7, 7)

    ceiling = stub("nearfield.plan.config:ceiling")
    assert nearfield("plan", "some/config.json", "--tokens", "8k,32k")[0] == 0
    assert ceiling["args"][1] == (8192, 32768)
    only = stub("nearfield.convert.main:plan_only")
    assert nearfield("plan", "a-model", "--budget", "2%")[0] == 0
    assert (only["args"], only["budget"]) == (("a-model",), "2%")
    measure = stub("nearfield.measure:run")
    assert nearfield("measure", "a-model", "--tokens", "1k", "--windows", "64,256")[0] == 0
    assert (measure["args"], measure["tokens"], measure["windows"]) == (("a-model",), 1024, (64, 256))
    bench = stub("nearfield.bench:run")
    assert nearfield("bench", "--case", "one", "--rivals", "--threads", "2", "--dtype", "bfloat16")[0] == 0
    assert (bench["threads"], bench["dtypes"], bench["backend"]) == (2, ("bfloat16",), "auto")
    assert "directions" not in bench
    assert (bench["args"], bench["cases"], bench["rivals"], bench["device"]) == (
        ("neighborhood",),
        ["one"],
        True,
        "cpu",
    )
    assert nearfield("bench", "--rival", "tiled", "--rival", "sdpa")[0] == 0
    assert bench["rivals"] == ("tiled", "sdpa")


def test_json_is_alone_on_stdout_and_strict(nearfield, stub):
    stub("nearfield.convert.main:run", {"gain": float("nan"), "sites": ({"w": float("inf")},), "é": 1.5})
    status, out, err = nearfield("convert", "--json")
    assert status == 0
    assert json.loads(out) == {"gain": None, "sites": [{"w": None}], "é": 1.5}
    assert "stray output" in err and "working" in err


def errors():
    from nearfield.core.errors import BackendUnavailable, MissingPackage

    return [
        (ValueError("head_dim=3 is odd. Give an even one."), "head_dim=3 is odd. Give an even one."),
        (TypeError("a sentence."), "a sentence."),
        (
            OSError(28, "No space left on device", "model.safetensors"),
            "model.safetensors: No space left on device.",
        ),
        (MissingPackage("This needs gguf: pip install 'nearfield[hf]'"), "pip install 'nearfield[hf]'"),
        (BackendUnavailable("no such backend."), "no such backend."),
        (NotImplementedError("not for this model."), "not for this model."),
        (KeyError("layers"), "KeyError: 'layers' (unforeseen"),
        (RuntimeError("size mismatch"), "RuntimeError: size mismatch (unforeseen"),
    ]


@pytest.mark.parametrize(("error", "words"), errors(), ids=lambda value: type(value).__name__)
def test_every_error_is_a_sentence(nearfield, stub, error, words):
    stub("nearfield.convert.main:run", error=error)
    status, out, err = nearfield("convert", "--json")
    last = err.strip().splitlines()[-1]
    assert (
        status == 1
        and out == ""
        and last.startswith("nearfield: ")
        and words in last
        and "Traceback" not in err
    )


def test_traceback_on_request(stub):
    stub("nearfield.convert.main:run", error=ValueError("seen"))
    with pytest.raises(ValueError, match="seen"):
        cli.main(["--traceback", "convert"])


def test_an_interrupt_ends_quietly(nearfield, stub):
    stub("nearfield.convert.main:run", error=KeyboardInterrupt())
    status, out, err = nearfield("convert")
    assert status == 130 and out == "" and "Traceback" not in err


def test_a_reader_that_leaves_is_no_error(python, root):
    command = [sys.executable, "-c", "from nearfield import cli\ncli.main(['list'])"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()


@pytest.mark.parametrize(("text", "number"), [("4096", 4096), ("8k", 8192), ("1M", 1024**2)])
def test_numbers_of_tokens(text, number):
    assert cli.count(text) == number


def test_show_draws_the_stages_of_a_model_of_pictures(nearfield):
    status, out, _ = nearfield("show", "davit", "--model", "davit_small")
    assert (
        status == 0 and "davit_small on 3 × 224 × 224" in out and "stages.2" in out and "14 × 14 × 384" in out
    )
    document = json.loads(nearfield("show", "davit", "--json")[1])
    card = catalog.find("davit")
    assert document["outline"]["model"] == "davit_tiny" and document["slug"] == "davit"
    assert document["outline"]["num_params"] == card.params["davit_tiny"]
    status, out, err = nearfield("show", "davit", "--model", "davit_smal")
    assert status == 1 and out == "" and "no model 'davit_smal'. Did you mean davit_small" in err
    status, out, err = nearfield("show", "lla", "--model", "lla_recall")
    assert status == 1 and out == "" and "lla_recall takes no pictures" in err
