"""`nearfield bench vision`: rows, work counted by hand, rivals that compute the same, backends as before."""

import io
import json
import os

import pytest
import torch
from rich.console import Console

from nearfield.bench import results, run, timing, vision, vision_rows
from nearfield.bench.vision import CASES, problem
from nearfield.catalog import find_entry
from nearfield.core.backend import VARIABLE

HIDDEN = {case.id: case for case in CASES if case.is_hidden}


@pytest.fixture(scope="module", params=HIDDEN)
def rows(request):
    return run("vision", cases=[request.param], dtypes=("float32",), rivals=True, seconds=0.02)


def test_rows_hold_what_the_contract_says(rows):
    document = json.loads(json.dumps(rows.json(), allow_nan=False))
    assert [row["direction"] for row in document["rows"]] == ["forward", "backward"]
    for row in document["rows"]:
        case = HIDDEN[row["case"]]
        assert set(results.ROW_FIELDS) <= row.keys()
        assert 0 < row["min"] <= row["seconds"] <= row["max"]
        assert row["pictures_per_second"] == pytest.approx(case.batch / row["seconds"])
        assert set(row["rivals"]) == {"sdpa" if case.kind == "window" else "tiled"}
        assert (row["direction"] == "forward") == ("peak_bytes" in row)
    shown = io.StringIO()
    Console(file=shown, width=120).print(rows)
    assert "pictures a second" in shown.getvalue() and "rivals: their time / ours" in shown.getvalue()


def test_work_is_counted_as_the_table_says():
    window = problem(HIDDEN["tiny-window"], "float32", "cpu", "auto")
    # each of 2 * 14 * 14 places sees 49, by two products of 32 channels in each of two heads
    assert window.useful_flops("forward") == 2 * 14 * 14 * 49 * 2 * 32 * 4
    assert window.useful_flops("backward") == 2 * window.useful_flops("forward")


def test_cases_name_what_exists():
    for case in CASES:
        if case.model:
            find_entry(case.model)
    assert len({case.id for case in CASES}) == len(CASES)


def test_a_backend_lasts_as_long_as_the_call(monkeypatch):
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.append(os.environ.get(VARIABLE))
            return x

    monkeypatch.setenv(VARIABLE, "reference")
    for name in ("tiled", "auto"):
        vision._on(name, Net()).call(torch.ones(1))
        assert os.environ[VARIABLE] == "reference"
    monkeypatch.delenv(VARIABLE)
    vision._on("tiled", Net()).call(torch.ones(1))
    assert VARIABLE not in os.environ and seen == ["tiled", "reference", "tiled"]


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(vision, "_in_tiles", lambda query, key, value: value)
    (row,) = run(
        "vision",
        cases=["tiny-window"],
        dtypes=("float32",),
        directions=("forward",),
        rivals=["sdpa"],
        seconds=0.01,
    ).rows
    assert not row["rivals"] and "not the same problem" in row["rivals_skipped"]["sdpa"]


def test_what_takes_turns_is_called_equally_often():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    found = timing.in_turn({name: lambda name=name: count(name) for name in calls}, "cpu", budget=0, least=5)
    assert calls["a"] == calls["b"] == 7 and found["a"].repeats == 5  # two of them before the clock


def test_a_backward_holds_the_gradients_of_parameters():
    made = problem(HIDDEN["tiny-model"], "float32", "cpu", "auto")
    x_grad, *grads = vision_rows._step(made.ours, made.tensors, "backward")()
    assert x_grad.shape == made.tensors[0].shape and len(grads) == len(made.ours.parameters)
    assert all(grad is not None for grad in grads)
