"""Published checkpoint files: what is read, what is refused, and how names become ours."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nearfield.hosts.checkpoints import WRAPPERS, read, rename

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def same(found: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def saved(tmp_path: Path, held: Any, name: str = "weights.pth") -> Path:
    torch.save(held, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "name", ["weights.pth", "weights.pt", "weights.bin", "weights.tar", "weights.pth.tar"]
)
def test_tensors_are_found_in_what_wraps_them(tmp_path: Path, wrapper: str, name: str) -> None:
    assert same(read(saved(tmp_path, STATE, name)))
    assert same(read(saved(tmp_path, {wrapper: STATE, "epoch": 3, "args": {"lr": 0.1}}, name)))
    assert same(read(saved(tmp_path, {"state_dict": {wrapper: STATE}, "best": torch.tensor(0.8)}, name)))


def test_averaged_weights_come_first_unless_others_are_preferred(tmp_path: Path) -> None:
    other = {name: -value for name, value in STATE.items()}
    path = saved(tmp_path, {"model": other, "model_ema": STATE, "state_dict": other})
    assert same(read(path)) and same(read(path, prefer=["model"]), other)


def test_the_prefix_of_parallel_training_goes_where_all_have_it(tmp_path: Path) -> None:
    parallel = nn.DataParallel(nn.Linear(3, 2)).state_dict()
    assert read(saved(tmp_path, parallel)).keys() == {"weight", "bias"}
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert read(saved(tmp_path, mixed)).keys() == {"module.a", "b"}


def test_safetensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({f"module.{name}": value for name, value in STATE.items()}, tmp_path / "a.safetensors")
    assert same(read(tmp_path / "a.safetensors"))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "b.safetensors")


def test_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    assert same(read(saved(tmp_path, {**STATE, "epoch": 4, "names": ["cat"]})))


class Harmful:
    """Would write a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, old: bool) -> None:
    written = tmp_path / "ran"
    path = tmp_path / "weights.pth"
    held = {"state_dict": STATE, "hook": Harmful(written)}
    torch.save(held, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="nothing but weights"):
        read(path)
    path.write_bytes(pickle.dumps(held))
    with pytest.raises(ValueError, match="nothing but weights"):
        read(path)
    torch.save(nn.Linear(2, 2), path)  # a whole module is code too
    with pytest.raises(ValueError, match="nothing but weights"):
        read(path)
    assert not written.exists()


@pytest.mark.parametrize(
    "held", [{}, {"epoch": 3}, {"optimizer": {"a": torch.ones(1)}}, [torch.ones(1)], torch.ones(1)]
)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, held: Any) -> None:
    with pytest.raises(
        ValueError, match="holds (no tensors by name; it has (nothing|epoch|optimizer)|a (list|Tensor))"
    ):
        read(saved(tmp_path, held))


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="is no file"):
            read(path)
    (tmp_path / "text.pth").write_text("not found")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read"):
        read(tmp_path / "text.pth")


def test_names_go_through_every_rule_in_turn() -> None:
    rules = [(r"^a\.", "b."), (r"^b\.(weight)$", r"c.\1.x"), (r"bias", None)]
    assert rename(STATE, rules).keys() == {"c.weight.x"}
    assert rename(STATE, []).keys() == STATE.keys()
    assert torch.equal(rename(STATE, rules)["c.weight.x"], STATE["a.weight"])


def test_two_tensors_under_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"become 'a'; one of them is 'a\.bias'"):
        rename(STATE, [(r"\..*", "")])
