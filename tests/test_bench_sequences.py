"""`nearfield bench linear|lla|scan`: rows, work counted by hand, rivals timed or explained."""

import json

import pytest
import torch

from nearfield.bench import OPS, BenchResult, results, run, sequences
from nearfield.bench.rivals import Unfit
from nearfield.bench.sequence_rows import require_agreement
from nearfield.bench.sequences import CASES, problem

HIDDEN = [case for case in CASES if case.is_hidden]


@pytest.fixture(scope="module", params=HIDDEN, ids=lambda case: case.id)
def rows(request) -> BenchResult:
    case = request.param
    return run(case.op, cases=[case.id], dtypes=("float32",), rivals=True, seconds=0.02)


def test_rows_hold_what_the_contract_says(rows):
    document = json.loads(json.dumps(rows.json(), allow_nan=False))
    assert document["op"] in OPS and len(document["rows"]) == 2
    for row in document["rows"]:
        assert set(results.ROW_FIELDS) <= row.keys()
        assert row["backend"] in ("native", "tiled") and 0 < row["min"] <= row["seconds"] <= row["max"]
        case = next(case for case in CASES if case.id == row["case"])
        useful = case.useful_flops(row["direction"])
        assert row["useful_gflops"] == pytest.approx(useful / row["seconds"] / 1e9)


def test_every_rival_of_a_case_has_a_time_or_a_reason(rows):
    for row in rows.rows:
        case = next(case for case in CASES if case.id == row["case"])
        names = set(problem(case, "float32", "cpu", row["backend"]).rivals) - {row["backend"]}
        assert set(row["rivals"]) | set(row["rivals_skipped"]) == names
        assert names - {"fla", "mamba-ssm"} <= set(row["rivals"]), row["rivals_skipped"]
        assert all(seconds > 0 for seconds in row["rivals"].values())


def test_work_is_counted_as_the_table_says():
    by_id = {case.id: case for case in CASES}
    # a position and head: 2 * 64 * (16 + 16) within chunks, 4 * 16 * 16 for the state
    assert by_id["tiny-channel"].useful_flops("forward") == 40 * 2 * (4096 + 1024)
    assert by_id["tiny-channel"].useful_flops("backward") == 2.5 * 40 * 2 * (4096 + 1024)
    assert by_id["tiny-ssd"].useful_flops("forward") == 40 * 2 * (2 * 64 * 24 + 4 * 8 * 16)
    assert by_id["tiny-lla"].useful_flops("forward") == 2 * (40 * 41 // 2) * 2 * 16 * 21
    assert by_id["tiny-lla"].useful_flops("backward") == 2 * (40 * 41 // 2) * 2 * 16 * 28
    assert by_id["tiny-selective"].useful_flops("forward") == 7 * 40 * 32 * 2


def test_a_rival_that_computes_something_else_is_not_timed():
    with pytest.raises(Unfit, match="not the same problem"):
        require_agreement(torch.ones(3), torch.tensor([1.0, 1.0, 1.1]))


def test_attention_over_all_tokens_is_left_out_where_it_would_take_minutes():
    case = next(case for case in CASES if case.id == "scalar-64k")
    with pytest.raises(Unfit, match="GFLOP for one call"):
        sequences._full(case)


def test_an_unknown_case_or_rival_names_those_of_its_op():
    with pytest.raises(ValueError, match="Did you mean scalar-16k"):
        run("linear", cases=["scalar-16"])
    with pytest.raises(ValueError, match="rival='natten' is unknown"):
        run("scan", rivals=["natten"])
    with pytest.raises(ValueError, match="No bench is called 'mamba'"):
        run("mamba")
