"""Measured boxes and executors: candidates, the store, and the tuner on a false clock and interpreted."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nearfield.bench import tune as bench_tune
from nearfield.bench.cases import Case
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood import Neighborhood, triton, triton_plan, tuned
from nearfield.ops.neighborhood.triton_plan import Config, Tiling
from tests.test_neighborhood_triton import installed, interpreted

GPU = "NVIDIA H200"
BOUND = Neighborhood(7).on((56, 56))
BOXES = Tiling((1, 4, 16), (1, 8, 8), 8, 2, True, False)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuned.measured.cache_clear()
    yield tmp_path / "cache" / "nearfield"
    tuned.measured.cache_clear()


def kept(bound: Any = BOUND, boxes: Tiling = BOXES) -> tuned.Measured:
    executors = {
        tuned.case_key(bound, "forward", 2, 64): {"triton": 2e-3, "natten": 1e-3},
        tuned.case_key(bound, "backward", 2, 64): {"triton": 3e-3, "natten": 4e-3},
    }
    return tuned.Measured({tuned.case_key(bound, "forward", 2, 64): boxes}, executors)


@pytest.mark.parametrize("kind", ["forward", "queries", "keys"])
@pytest.mark.parametrize(("item", "dim"), [(2, 64), (4, 128), (2, 256)])
@pytest.mark.parametrize(
    "bound", [BOUND, Neighborhood(3).on((5,)), Neighborhood((4, 6, 6), (2, 1, 2)).on((8, 14, 12))]
)
def test_candidates_are_few_and_begin_with_the_static_choice(
    bound: Any, kind: str, item: int, dim: int
) -> None:
    found = triton_plan.candidates(bound, kind, item, dim)
    way = triton_plan.way_of(bound, dim)
    assert found[0] == triton_plan.tiling((bound,), kind, item, dim, 90, way)
    assert 2 <= len(found) == len(set(found)) <= 8
    assert len({(c.warps, c.stages) for c in found}) > 1
    for c in found:
        assert (c.partial, c.whole) == triton_plan.loops((bound,), c, kind == "keys")
    assert triton_plan.candidates(bound, kind, item, dim, most=3) == found[:3]


def test_what_was_measured_is_found_again_and_nothing_else(home: Path) -> None:
    assert tuned.tiles((BOUND,), "forward", 2, 64, GPU) is None
    assert tuned.preferred(BOUND, "forward", 2, 64, GPU) is None
    path = tuned.store(GPU, kept())
    assert path.parent == home
    assert list(home.iterdir()) == [path]
    small = Neighborhood(7).on((9, 9))
    assert tuned.tiles((BOUND,), "forward", 2, 64, GPU) == BOXES
    assert tuned.tiles((small, BOUND), "forward", 2, 64, GPU) == BOXES  # the largest grid decides
    assert tuned.preferred(BOUND, "forward", 2, 64, GPU) == "natten"
    assert tuned.preferred(BOUND, "backward", 2, 64, GPU) == "triton"
    others = [(small, "forward", 2, 64), (BOUND, "keys", 2, 64), (BOUND, "forward", 4, 64),
              (BOUND, "forward", 2, 32), (Neighborhood(7, is_causal=True).on((56, 56)), "forward", 2, 64),
              (Neighborhood(7, border="truncate").on((56, 56)), "forward", 2, 64)]  # fmt: skip
    for bound, *rest in others:
        assert tuned.tiles((bound,), *rest, GPU) is None
        assert tuned.preferred(bound, *rest, GPU) is None
    assert tuned.tiles((BOUND,), "forward", 2, 64, "NVIDIA A100") is None


def test_loops_are_those_of_the_grids_at_hand() -> None:
    aligned = Neighborhood(16, 8).on((64, 64))
    tuned.store(GPU, kept(aligned, replace(BOXES, q_tile=(1, 8, 8), partial=True)))
    found = tuned.tiles((aligned,), "forward", 2, 64, GPU)
    assert found is not None
    assert (found.partial, found.whole) == (False, True)


def test_a_second_measurement_joins_the_first() -> None:
    tuned.store(GPU, kept())
    other = Neighborhood(9).on((56, 56))
    tuned.store(GPU, kept(other, replace(BOXES, warps=4)))
    assert tuned.tiles((BOUND,), "forward", 2, 64, GPU) == BOXES
    found = tuned.tiles((other,), "forward", 2, 64, GPU)
    assert found is not None
    assert found.warps == 4


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    path = tuned.store(GPU, kept())
    document = json.loads(path.read_text())
    change(document)
    return json.dumps(document)


def first(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(document["tiles"].values()))
    return found


BROKEN: dict[str, Callable[[], str]] = {
    "no JSON": lambda: "{",
    "not a document": lambda: "[1]",
    "no tiles": lambda: edited(lambda d: d.pop("tiles")),
    "of another device": lambda: edited(lambda d: d.update(device="NVIDIA A100")),
    "of another Triton": lambda: edited(lambda d: d.update(triton="2.0")),
    "of other kernels": lambda: edited(lambda d: d.update(kernels="0")),
    "sides that are no powers": lambda: edited(lambda d: first(d).update(q_tile=[1, 6, 8])),
    "a box of a million tokens": lambda: edited(lambda d: first(d).update(kv_tile=[1, 1024, 1024])),
    "an unknown way": lambda: edited(lambda d: first(d).update(way="by_box")),
    "of the form before ways": lambda: edited(
        lambda d: first(d).update(by_box=first(d).pop("way") != "rows")
    ),
    "three warps": lambda: edited(lambda d: first(d).update(warps=3)),
    "no time": lambda: edited(lambda d: d["executors"].update(x={"triton": "soon"})),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_foreign_file_is_ignored_with_one_warning(name: str) -> None:
    text = BROKEN[name]()
    path = tuned.path(GPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    tuned.measured.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            assert tuned.tiles((BOUND,), "forward", 2, 64, GPU) is None
            assert tuned.preferred(BOUND, "forward", 2, 64, GPU) is None
    assert [warning.category for warning in told] == [RuntimeWarning]
    assert f"{path} is ignored" in str(told[0].message)
    assert path.read_text() == text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.store(GPU, kept())
    assert tuned.tiles((BOUND,), "forward", 2, 64, GPU) == BOXES


def test_the_file_is_read_once_and_an_interrupted_write_leaves_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tuned.store(GPU, kept())
    tuned.tiles((BOUND,), "forward", 2, 64, GPU)
    before = path.read_text()
    path.unlink()
    assert tuned.tiles((BOUND,), "forward", 2, 64, GPU) == BOXES
    path.write_text(before)

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        tuned.store(GPU, tuned.Measured())
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = tuned.path(GPU).name
    assert name.startswith("tuned-nvidia-h200-triton-")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.path(GPU) == tmp_path / "nearfield" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.path(GPU) == Path(os.path.expanduser("~/.cache/nearfield")) / name


def test_boxes_on_trial_go_before_those_stored_and_only_for_a_while() -> None:
    tuned.store(GPU, kept())
    trial = replace(BOXES, warps=4)
    with tuned.trying({"forward": trial}):
        assert tuned.tiles((BOUND,), "forward", 2, 64, GPU) == trial
        with tuned.trying({"keys": trial}):
            assert tuned.tiles((BOUND,), "keys", 2, 64, GPU) is not None
        assert tuned.tiles((BOUND,), "keys", 2, 64, GPU) is None
    assert tuned.tiles((BOUND,), "forward", 2, 64, GPU) == BOXES


@pytest.mark.compile
def test_a_traced_call_is_not_looked_up() -> None:
    tuned.store(GPU, kept())

    def ask(x: torch.Tensor) -> torch.Tensor:
        name = tuned.preferred(Neighborhood(7).bind(tuple(x.shape)), "forward", 2, 64, GPU)
        return x + (1 if name is None else 2)

    compiled = torch.compile(ask, fullgraph=True, backend="eager", dynamic=True)
    for side in (56, 57):
        assert torch.equal(compiled(torch.zeros(side, 56)), torch.ones(side, 56))


# The tuner


class Clock:
    """Seconds by the boxes on trial, or by call; and the time that passes with each measurement."""

    def __init__(self, cost: Callable[[dict[str, Tiling]], float], each: float = 0.0) -> None:
        self.cost, self.each, self.now, self.calls = cost, each, 0.0, 0

    def __call__(self, call: Callable[[], object]) -> float:
        self.now += self.each
        self.calls += 1
        return self.cost(dict(tuned._trial))


@pytest.fixture
def kernels_stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The Triton backend replaced by the reference, which may be told to fail for some boxes."""
    from nearfield.ops.neighborhood import attention, reference

    told: dict[str, Any] = {"fails": lambda tiles: False, "wrong": lambda tiles: False}

    def attend(*tensors: Any, **options: Any) -> Any:
        tiles = tuned._trial.get("forward")
        if tiles is not None and told["fails"](tiles):
            raise RuntimeError("out of resource: shared memory")
        out, lse = reference.attend(*tensors, **options)
        return (out * 1.1 if tiles is not None and told["wrong"](tiles) else out), lse

    monkeypatch.setattr(triton, "missing", lambda device: None)
    monkeypatch.setattr(triton, "supports", lambda *tensors, **options: None)
    monkeypatch.setattr(attention.triton, "attend", attend)
    return told


def test_the_fastest_right_candidate_is_stored_and_the_others_named(kernels_stand_in: dict[str, Any]) -> None:
    bound = bench_tune.find("tiny-2d").bound
    candidates = triton_plan.candidates(bound, "forward", 4, 16)
    wanted = candidates[3]
    kernels_stand_in["fails"] = lambda tiles: tiles == candidates[1]
    kernels_stand_in["wrong"] = lambda tiles: tiles == candidates[2]
    fast = (candidates[1], candidates[2])  # would win if they were not dropped
    clock = Clock(lambda trial: 1.0 if trial["forward"] in fast else 2.0 + (trial["forward"] != wanted))
    result = bench_tune.tune(
        device="cpu", cases=["tiny-2d"], dtypes=["float32"], directions=["forward"], timer=clock
    )
    rows = [row for row in result.rows if "queries" in row["candidate"]]
    assert len(rows) == len(candidates)
    assert [row["taken"] for row in rows] == [tiles == wanted for tiles in candidates]
    assert rows[1]["dropped"] == "RuntimeError: out of resource: shared memory"
    assert "relative error is 0.1" in rows[2]["dropped"]
    assert rows[1]["seconds"] is rows[2]["seconds"] is None
    name = tuned.device_name(torch.device("cpu"))
    assert tuned.tiles((bound,), "forward", 4, 16, name) == wanted
    assert tuned.preferred(bound, "forward", 4, 16, name) == "triton"
    assert tuned.preferred(bound, "backward", 4, 16, name) is None
    assert result.path == str(tuned.path(name))
    assert json.loads(json.dumps(result.json()))["rows"] == list(result.rows)
    from rich.console import Console

    with open(os.devnull, "w") as nowhere:
        Console(file=nowhere, width=200).print(result)


def test_nothing_begins_after_the_time_is_over(
    kernels_stand_in: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(lambda trial: 1.0, each=50.0)
    monkeypatch.setattr(bench_tune, "monotonic", lambda: clock.now)
    result = bench_tune.tune(
        device="cpu", cases=["tiny-1d", "tiny-2d"], dtypes=["float32"], seconds=120, timer=clock
    )
    assert clock.calls == 3
    assert [row["what"] for row in result.rows] == ["forward"] * 3
    assert result.left[0] == "tiny-1d float32 forward"
    assert result.left[-1] == "tiny-2d float32"
    bound = bench_tune.find("tiny-1d").bound
    assert tuned.tiles((bound,), "forward", 4, 16, tuned.device_name(torch.device("cpu"))) is not None


def test_refusals() -> None:
    with pytest.raises(BackendUnavailable, match="Nothing to tune on device='cpu'"):
        bench_tune.tune(device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="no CUDA device"):
            bench_tune.tune(device="cuda")


def test_the_command_tunes_and_times_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nearfield import cli

    given: dict[str, Any] = {}

    def tune(**options: Any) -> bench_tune.TuneResult:
        given.update(options)
        return bench_tune.TuneResult((), "a/file", ("flux-256-k80 bfloat16",))

    monkeypatch.setattr(bench_tune, "tune", tune)

    def run(*words: str) -> Any:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", *words])
        return ended.value.code or 0, *capsys.readouterr()

    status, out, _ = run("--tune", "--device", "cuda", "--tune-seconds", "60", "--dtype", "float16", "--json")
    assert (status, json.loads(out)["path"]) == (0, "a/file")
    assert given.pop("progress") is not None
    assert given == {"device": "cuda", "cases": None, "seconds": 60.0, "dtypes": ("float16",)}
    status, out, _ = run("neighborhood", "--tune", "--device", "cuda")
    assert "No time was left for flux-256-k80 bfloat16" in " ".join(out.split())
    assert run("linear", "--tune")[0] != 0
    assert "nothing to tune" in run("linear", "--tune")[2]


def tuning(folder: str) -> dict[str, Any]:
    """What a tuning finds where Triton interprets, and which boxes a later call takes."""
    os.environ["XDG_CACHE_HOME"] = folder
    smaller = Config(4, 8, 4, 1)
    triton_plan._near = lambda config, item, way: [config, smaller]  # the interpreter is slow
    case = Case("two boxes", (9,), Neighborhood(5), 1, 16)
    bench_tune.CASES, bench_tune.EXECUTORS = (case,), ("triton",)
    result = bench_tune.tune(
        device="cpu", dtypes=["float32"], seconds=1e9, timer=lambda call: tuned._trial["forward"].q_tile[2]
    )
    asked: list[str] = []
    right = triton_plan.tiling
    triton_plan.tiling = lambda *given: (asked.append(given[1]), right(*given))[1]
    q, k, v = bench_tune._inputs(case, "float32", "cpu")
    from nearfield.ops.neighborhood import neighborhood_attention
    from nearfield.testing import relative_error

    pair = [
        neighborhood_attention(q, k, v, case.pattern, backend=backend) for backend in ("triton", "reference")
    ]
    other = neighborhood_attention(q[:, :8], k[:, :8], v[:, :8], case.pattern, backend="triton")
    return {"rows": result.rows, "asked": asked, "error": relative_error(*pair), "other": list(other.shape)}


@installed
def test_the_tuner_runs_real_kernels_where_triton_interprets(python: Any, tmp_path: Path) -> None:
    found = interpreted(python, "tuning", str(tmp_path), home="tests.test_tuned")
    boxes = [row for row in found["rows"] if "queries," in row["candidate"]]
    assert [row["dropped"] for row in boxes] == [None] * len(boxes)
    assert {row["what"] for row in boxes if row["taken"]} == {"forward", "queries", "keys"}
    taken = [(row["what"], row["candidate"]) for row in found["rows"] if row["taken"]]
    assert ("backward", "triton") in taken
    assert found["asked"] == ["forward"]  # of the grid that was not measured
    assert found["error"] < 2e-6
