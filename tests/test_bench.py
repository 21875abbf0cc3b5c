"""The bench: what a row holds, what is timed and what is not, and that no rival goes missing silently."""

import json
import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from nearfield.bench import CASES, BenchResult, compare, results, rivals, run, timing
from nearfield.bench.builds import dense_mask
from nearfield.bench.cases import find, for_device
from nearfield.bench.rivals import RIVALS, Rival, Unfit, measure, step
from nearfield.core.errors import BackendUnavailable
from nearfield.ops.neighborhood import Neighborhood, neighborhood_attention

QUICK = tuple(rival for rival in RIVALS if not rival.compiles and "cpu" in rival.devices)


@pytest.fixture(scope="module")
def tiny() -> BenchResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearfield.bench.runner.RIVALS", QUICK)
        return run(cases=["tiny-1d"], rivals=True, backend="reference", seconds=0.05)


def test_calls_on_a_gpu_wait_in_one_queue(monkeypatch):
    """On a GPU of a false clock that takes 1 ms for a call, from a host that takes 5 ms to give it one."""
    clock = {"host": 0.0, "gpu": 0.0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock["gpu"] = max(clock["gpu"], clock["host"])

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

        def synchronize(self):
            synchronize()

    def synchronize():
        clock["host"] = max(clock["host"], clock["gpu"])

    def call():
        clock["host"] += 5e-3
        clock["gpu"] = max(clock["gpu"], clock["host"]) + 1e-3

    def sleep(cycles):
        clock["gpu"] = max(clock["gpu"], clock["host"]) + cycles / timing.CYCLES

    empty = torch.empty
    monkeypatch.setattr(timing, "perf_counter", lambda: clock["host"])
    monkeypatch.setattr(timing.torch, "empty", lambda *size, device, **kind: empty(1, **kind))
    for name, stand_in in {"Event": Event, "synchronize": synchronize, "_sleep": sleep}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert timing.once(call, "cuda") == pytest.approx(6e-3)
    found = timing.timed(call, "cuda", budget=0.06)
    assert (found.seconds, found.max, found.repeats) == (pytest.approx(1e-3), pytest.approx(1e-3), 10)
    assert found.host == pytest.approx(5e-3)


def named(name: str) -> Rival:
    return next(rival for rival in RIVALS if rival.name == name)


def inputs(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, *case.grid, case.num_heads, case.head_dim)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def outcome(rival: Rival, case, direction="forward", *, ours=None, limit=0.05, gemm_gflops=50.0):
    tensors = inputs(case)
    if ours is None:
        ours = neighborhood_attention(*tensors, case.pattern, backend="reference")
    return measure(rival, case, tensors, direction, ours=ours, gemm_gflops=gemm_gflops, limit=limit)


def result(*rows: dict, **origin) -> BenchResult:
    row = {
        "case": "tiny-1d",
        "direction": "forward",
        "dtype": "float32",
        "backend": "tiled",
        "threads": 1,
        "seconds": 2.0,
        "min": 1.9,
        "max": 2.1,
        "predicted_seconds": None,
        "useful_gflops": 10.0,
        "gemm_gflops": 100.0,
        "ratio_to_gemm": 0.1,
        "rivals": {},
    }
    return BenchResult(op="neighborhood", rows=tuple(row | changes for changes in rows), **origin)


def test_rows_cover_the_table_and_hold_what_the_contract_says(tiny):
    document = json.loads(json.dumps(tiny.json(), allow_nan=False))
    assert {"op", "device", "versions", "commit", "threads", "date", "rows"} <= document.keys()
    kinds = [(row["direction"], row["dtype"]) for row in document["rows"]]
    assert sorted(kinds) == sorted((d, t) for d in ("forward", "backward") for t in ("float32", "bfloat16"))
    for row in document["rows"]:
        assert set(results.ROW_FIELDS) <= row.keys()
        assert row["case"] == "tiny-1d"
        assert row["backend"] == "reference"
        assert row["threads"] == 1
        assert 0 < row["min"] <= row["seconds"] <= row["max"]
        useful = find("tiny-1d").useful_flops(row["direction"])
        assert row["useful_gflops"] == pytest.approx(useful / row["seconds"] / 1e9)
        assert row["ratio_to_gemm"] == pytest.approx(row["useful_gflops"] / row["gemm_gflops"])
        assert row["predicted_seconds"] is None or row["predicted_seconds"] > 0


def test_every_rival_has_a_time_or_a_reason(tiny):
    for row in tiny.rows:
        assert set(row["rivals"]) | set(row["rivals_skipped"]) == {rival.name for rival in QUICK}
        assert not set(row["rivals"]) & set(row["rivals_skipped"])
        assert all(seconds > 0 for seconds in row["rivals"].values())
        assert all(row["rivals_skipped"].values())
        assert {"sdpa", "sdpa-mask"} <= set(row["rivals"]), row["rivals_skipped"]


@pytest.mark.parametrize("case", [case for case in CASES if case.is_hidden], ids=lambda case: case.id)
def test_useful_work_is_counted_pair_by_pair(case):
    pairs = sum(len(case.bound.keys(query)) for query in range(case.bound.num_queries))
    forward = 4 * pairs * case.head_dim * case.num_heads * case.batch
    assert case.useful_flops("forward") == forward
    assert case.useful_flops("backward") == 2.5 * forward
    assert case.dense_flops("forward") == pytest.approx(forward / pairs * math.prod(case.grid) ** 2)


def test_the_table_holds_the_agreed_cases():
    gflop = {case.id: case.useful_flops("forward") / 1e9 for case in for_device("cpu")}
    agreed = {
        "causal-1d-16k-w512": 16.9,
        "causal-1d-8k-full": 77.3,
        "2d-56-k7": 0.079,
        "2d-56-k13": 0.271,
        "2d-128-k7": 1.64,
        "2d-128-k13": 5.67,
        "3d-16x32x32-k577": 4.11,
    }
    assert gflop.keys() == agreed.keys()
    assert all(gflop[id] == pytest.approx(expected, rel=0.01) for id, expected in agreed.items())
    large = {case.id for case in for_device("cuda")} - agreed.keys()
    assert {"flux-256-k80", "flux-256-k80-s16", "hunyuan-30x48x80", "hunyuan-30x48x80-s16x8x8"} <= large
    assert {"1d-32k-w2048", "vision-56-k7-h4", "dense-16k-d128"} <= large
    assert not any(case.is_hidden for case in for_device("cuda"))
    devices = [case.device for case in for_device("cuda")]
    assert devices == sorted(devices, key="cuda".__ne__)  # should time run out, the GPU's own are first


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(98, 0.018), (95, 0.055), (92, 0.082), (77, 0.227), (55, 0.445)]
)
def test_the_layers_of_cosmos_keep_what_their_names_say(sparsity, kept):
    case = find(f"cosmos-24x44x80-{sparsity}pct")
    assert case.bound.kept == pytest.approx(kept, abs=0.001)
    assert abs((1 - case.bound.kept) * 100 - sparsity) < 1


def test_the_backward_call_holds_no_forward_and_reaches_all_inputs():
    calls = {"forward": 0, "backward": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            calls["forward"] += 1
            return q + k + v

        @staticmethod
        def backward(ctx, grad):
            calls["backward"] += 1
            return grad, grad, grad

    call = step(Counted.apply, inputs(find("tiny-1d")), "backward")
    for _ in range(3):
        grads = call()
    assert calls == {"forward": 1, "backward": 3}
    assert len(grads) == 3
    assert all(grad is not None for grad in grads)


def test_the_forward_call_builds_no_graph():
    leaves = [tensor.requires_grad_() for tensor in inputs(find("tiny-1d"))]
    out = step(lambda q, k, v: q * k + v, leaves, "forward")()
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("untimed", "kept", "expected"),
    [
        # compiling calls and the one that confirms the level are not timed; the median ignores the outlier
        ([2.0, 1.5, 1.0, 1.0], [1.0, 7.0, 0.5], (1.0, 0.5, 7.0, 3)),
        # a call above the budget of 3 seconds warms up once, and gets the least number of repeats
        ([20.0], [10.0, 10.0, 12.0], (10.0, 10.0, 12.0, 3)),
        # never settling: five untimed calls at most
        ([1.0, 2.0, 1.0, 2.0, 1.0], [1.0, 2.0, 1.0], (1.0, 1.0, 2.0, 3)),
    ],
)
def test_timing_is_the_median_after_warm_up(monkeypatch, untimed, kept, expected):
    ticks = iter(untimed + kept)
    monkeypatch.setattr(timing, "once", lambda call, device: next(ticks))
    assert timing.timed(lambda: None, "cpu", budget=3.0)[:4] == expected
    assert next(ticks, None) is None


def test_repeats_are_bounded(monkeypatch):
    monkeypatch.setattr(timing, "once", lambda call, device: 1e-6)
    assert timing.timed(lambda: None, "cpu", budget=100.0).repeats == 50


def test_the_gemm_rate_counts_two_operations_a_product(monkeypatch):
    monkeypatch.setattr(timing, "once", lambda call, device: 0.5)
    gemm = timing.Gemm(torch.float32, "cpu")
    gemm.measure(2)
    assert gemm.gflops == pytest.approx(2 * 1024**3 / 0.5 / 1e9)


PATTERNS = [
    ((40,), Neighborhood(7, is_causal=True)),
    ((40,), Neighborhood(6, stride=3, dilation=2)),
    ((7, 9), Neighborhood((3, 4), stride=(2, 1), is_causal=(False, True))),
    ((5, 6), Neighborhood(4, border="truncate")),
    ((3, 4, 5), Neighborhood((2, 3, 2))),
]


@pytest.mark.parametrize(("grid", "pattern"), PATTERNS)
def test_the_dense_mask_is_the_geometry(grid, pattern):
    case = replace(find("tiny-1d"), grid=grid, pattern=pattern)
    mask = dense_mask(case, torch.device("cpu"))
    found = [row.nonzero().flatten().tolist() for row in mask]
    assert found == [case.bound.keys(query) for query in range(case.bound.num_queries)]


@pytest.mark.parametrize("name", ["sdpa-mask", "gather"])
@pytest.mark.parametrize(("grid", "pattern"), PATTERNS)
def test_same_problem_rivals_agree_with_the_reference(name, grid, pattern):
    case = replace(find("tiny-1d"), grid=grid, pattern=pattern)
    assert outcome(named(name), case).seconds > 0  # `measure` refuses a rival whose output differs


def test_a_rival_that_computes_something_else_is_refused():
    case = find("tiny-1d")
    off_by_one = neighborhood_attention(*inputs(case), Neighborhood(9, is_causal=True), backend="reference")
    with pytest.raises(Unfit, match="differs from ours"):
        outcome(named("sdpa-mask"), case, ours=off_by_one)


def test_reasons_for_leaving_a_rival_out(monkeypatch):
    case = find("tiny-1d")
    for name in ("flex", "natten"):
        with pytest.raises(Unfit, match="no backward pass on the CPU"):
            outcome(named(name), case, "backward")
    with pytest.raises(Unfit, match="too slow: about .* s for one head"):
        outcome(named("gather"), case, gemm_gflops=1e-5)
    monkeypatch.setitem(sys.modules, "natten", None)
    with pytest.raises(Unfit, match="not installed"):
        outcome(named("natten"), case)
    broken = replace(named("sdpa"), build=lambda case, like: lambda q, k, v: q @ k)
    with pytest.raises(Unfit, match="RuntimeError"):
        outcome(broken, case)
    monkeypatch.setattr(rivals, "free_bytes", lambda device: 1e3)
    with pytest.raises(Unfit, match="too large: .* free memory"):
        outcome(named("sdpa-mask"), case)


def test_a_slow_rival_is_timed_on_fewer_heads_and_says_so(monkeypatch):
    monkeypatch.setattr(rivals, "timed", lambda call, device, **options: timing.Timing(2.0, 2.0, 2.0, 1))
    case = replace(find("tiny-1d"), num_heads=4)
    seconds = case.dense_flops("forward") / (0.3 * 1e9 * 1e-1)
    whole = outcome(named("sdpa"), case, gemm_gflops=1e-1, limit=1.01 * seconds)
    assert (whole.seconds, whole.note) == (2.0, None)
    part = outcome(named("sdpa"), case, gemm_gflops=1e-1, limit=0.51 * seconds)
    assert part.seconds == 4.0
    assert part.note == "timed on 2 of 4 heads, scaled"


def test_the_fastest_of_several_ways_stands_for_a_rival_and_is_named(monkeypatch):
    seconds = {"slow": 3.0, "fast": 1.0}
    now = []

    def build(case, like):
        def by(name):
            return lambda q, k, v: now.append(name) or neighborhood_attention(q, k, v, case.pattern)

        return {**{name: by(name) for name in seconds}, "broken": lambda q, k, v: q @ k}

    def timed(call, device, **options):
        call()
        return timing.Timing(seconds[now[-1]], 0.0, 9.0, 1)

    monkeypatch.setattr(rivals, "timed", timed)
    row = outcome(Rival("several", build, rate=1.0), find("tiny-1d"))
    assert (row.seconds, row.variant) == (1.0, "fast")
    broken = Rival("several", lambda case, like: {"broken": lambda q, k, v: q @ k}, rate=1.0)
    with pytest.raises(Unfit, match="RuntimeError"):
        outcome(broken, find("tiny-1d"))


def test_heads_come_first_on_a_gpu_inside_the_clock_for_those_who_want_them():
    q = torch.randn(2, 5, 3, 4)
    seen = []
    out = rivals._transposing(lambda *x: seen.extend(t.shape for t in x) or x[0])(q, q, q)
    assert seen == [(2, 3, 5, 4)] * 3
    assert out.shape == (2, 3, 5, 4)


def test_sparge_gets_whole_boxes_in_their_order(monkeypatch):
    def stand_in(q, k, v, mask_id):
        seen = mask_id.repeat_interleave(128, 2).repeat_interleave(64, 3).bool()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    module = ModuleType("spas_sage_attn")
    module.block_sparse_sage2_attn_cuda = stand_in
    monkeypatch.setitem(sys.modules, "spas_sage_attn", module)
    aligned = replace(find("tiny-2d"), grid=(48, 64), pattern=Neighborhood(48, 16), num_heads=1)
    ours = neighborhood_attention(*inputs(aligned), aligned.pattern, backend="tiled")
    same = replace(named("sparge"), is_same=True)
    assert outcome(same, aligned, ours=ours, gemm_gflops=500.0).seconds > 0
    with pytest.raises(Unfit, match="no backward"):
        outcome(named("sparge"), aligned, "backward", ours=ours)
    monkeypatch.setitem(sys.modules, "spas_sage_attn", None)
    with pytest.raises(Unfit, match="not installed"):
        outcome(named("sparge"), aligned, ours=ours, gemm_gflops=500.0)


def test_no_row_and_no_rival_begins_when_time_is_over(monkeypatch):
    ticks = iter([0.0, 0.0, 59.0, 61.0, 61.0, 61.0, 61.0])
    monkeypatch.setattr("nearfield.bench.runner.monotonic", lambda: next(ticks))
    monkeypatch.setattr("nearfield.bench.runner.RIVALS", (named("sdpa"), named("sdpa-mask")))
    found = run(
        cases=["tiny-1d"],
        dtypes=["float32"],
        rivals=True,
        backend="reference",
        seconds=0.01,
        minutes=1.0,
    )
    assert [row["direction"] for row in found.rows] == ["forward"]
    assert list(found.rows[0]["rivals"]) == ["sdpa"]
    assert found.rows[0]["rivals_skipped"] == {"sdpa-mask": "no time was left"}
    assert found.left_out == ("tiny-1d backward float32",)
    assert json.loads(json.dumps(found.json()))["left_out"] == ["tiny-1d backward float32"]


def test_the_gpu_table_runs_by_itself_in_half_precision_one_dtype_after_the_other(monkeypatch):
    rows = []

    def note(case, dtype, direction, **rest):
        rows.append((dtype, case.id, direction, rest["rivals"], rest["seconds"]))
        return {}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("nearfield.bench.runner._row", note)
    monkeypatch.setattr("nearfield.bench.runner.provenance", lambda device, threads: {"device": device})
    run(device="cuda", rivals=True)
    own = [case.id for case in for_device("cuda")]
    assert [row[:2] for row in rows[::2]] == [(d, id) for d in ("bfloat16", "float16") for id in own]
    assert {row[2] for row in rows} == {"forward", "backward"}
    for _, _, _, wanted, seconds in rows:
        assert wanted == ["triton", "flash", "sdpa", "flex", "natten", "sparge"]
        assert seconds < 1


def test_threads_are_given_back(monkeypatch):
    before = torch.get_num_threads()
    seen = []
    note = lambda *row, **rest: seen.append(torch.get_num_threads())  # noqa: E731
    monkeypatch.setattr("nearfield.bench.runner._row", note)
    run(cases=["tiny-1d"], dtypes=["float32"], directions=["forward"], threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before

    def fail(*row, **rest):
        raise RuntimeError

    monkeypatch.setattr("nearfield.bench.runner._row", fail)
    with pytest.raises(RuntimeError):
        run(cases=["tiny-1d"], threads=before + 1)
    assert torch.get_num_threads() == before


def test_progress_tells_each_row_and_the_end(monkeypatch):
    monkeypatch.setattr("nearfield.bench.runner._row", lambda *row, **rest: {})
    heard = []
    run(cases=["tiny-1d"], dtypes=["float32"], progress=lambda *told: heard.append(told))
    assert heard == [("bench neighborhood", done, 2) for done in range(3)]


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ({"op": "neighbourhood"}, "neighborhood"),
        ({"cases": ["2d-56-k77"]}, "2d-56-k7"),
        ({"dtypes": ["fp32"]}, "float32"),
        ({"directions": ["both"]}, "forward"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"threads": 0}, "at least 1"),
        ({"cases": ["flux-256-k80"]}, "cuda"),
    ],
)
def test_wrong_arguments_are_answered_with_the_right_ones(wrong, advice):
    with pytest.raises(ValueError, match=advice):
        run(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(BackendUnavailable, match="device='cpu'"):
        run(device="cuda")


def test_compare_pairs_rows_and_names_the_rest():
    a = result({}, {"dtype": "bfloat16"}, {"case": "only-a"}, machine="one")
    faster = {"seconds": 1.0, "min": 0.9, "max": 1.1, "ratio_to_gemm": 0.3}
    b = result(faster, {"dtype": "bfloat16", "max": 2.2}, machine="two")
    found = compare(a, b)
    first, second = found.rows
    assert first["ratio"] == 0.5
    assert first["gemm_relative"] == pytest.approx(3.0)
    assert first["is_clear"]
    assert second["ratio"] == 1.0
    assert not second["is_clear"]
    assert found.only_a == ("only-a forward float32 (tiled, 1 thread)",)
    assert found.only_b == ()
    assert found.differs == {"machine": ("one", "two")}
    json.dumps(found.json(), allow_nan=False)


def test_compare_crosses_backends_only_where_it_is_unambiguous():
    found = compare(result({}), result({"backend": "native"}))
    assert [(row["backend_a"], row["backend_b"]) for row in found.rows] == [("tiled", "native")]
    found = compare(result({}), result({}, {"backend": "native"}))
    assert [(row["backend_a"], row["backend_b"]) for row in found.rows] == [("tiled", "tiled")]
    assert found.only_b == ("tiny-1d forward float32 (native, 1 thread)",)
    assert compare(result({}), result({"threads": 2})).rows == ()


def test_a_saved_result_is_the_same_again(tiny, tmp_path):
    tiny.save(tmp_path / "a.json")
    assert BenchResult.load(tmp_path / "a.json") == tiny
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    same = compare(tmp_path / "a.json", tiny)
    assert {row["ratio"] for row in same.rows} == {1.0}
    assert (same.only_a, same.only_b, same.differs) == ((), (), {})


def test_a_run_that_breaks_off_leaves_the_rows_before(tmp_path, monkeypatch):
    from nearfield.bench import runner

    right = runner._row

    def broken(case, dtype, direction, **rest):
        if direction == "backward":
            raise KeyboardInterrupt
        return right(case, dtype, direction, **rest)

    monkeypatch.setattr(runner, "_row", broken)
    with pytest.raises(KeyboardInterrupt):
        run(cases=["tiny-1d"], dtypes=["float32"], seconds=0.01, out=tmp_path / "a.json")
    assert [row["direction"] for row in BenchResult.load(tmp_path / "a.json").rows] == ["forward"]
    with pytest.raises(FileNotFoundError):
        run(cases=["tiny-1d"], out=tmp_path / "nowhere" / "a.json")


@pytest.mark.parametrize("text", ["", "\xff", "[]", "{}", '{"rows": [1]}', '{"rows": [{"case": "x"}]}'])
def test_other_files_are_no_results(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="nearfield bench --json"):
        BenchResult.load(tmp_path / "x.json")


def test_tables_show_times_rivals_and_reasons(tiny):
    from rich.console import Console

    console = Console(width=250)
    with console.capture() as captured:
        console.print(tiny)
        console.print(compare(result({}), result({"backend": "native", "seconds": 1.0})))
    text = captured.get()
    for wanted in ("tiny-1d", "of GEMM", "sdpa-mask", "natten left out of", "tiled → native", "0.50"):
        assert wanted in text, wanted


def test_the_table_tells_a_kind_of_reason_once():
    from rich.console import Console

    skipped = [{"rivals_skipped": {"gather": f"too large: about {size} GB"}} for size in (6, 7)]
    document = result(*skipped, {"rivals_skipped": {"gather": "too slow: about 30 s"}})
    console = Console(width=110)
    with console.capture() as captured:
        console.print(document)
    lines = [line.strip() for line in captured.get().splitlines() if "left out" in line]
    assert lines == [
        "gather left out of 2 of 3 rows: too large: about 6 GB",
        "gather left out of 1 of 3 rows: too slow: about 30 s",
    ]
