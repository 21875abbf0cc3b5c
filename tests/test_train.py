"""Training: the loop against a plain one, breaks that change nothing, several processes, and its parts."""

import copy
import json
import math
import random
import signal
import sys
import textwrap
import time

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nearfield import catalog, cli
from nearfield.core.errors import MissingPackage
from nearfield.testing import assert_close
from nearfield.train import (
    Diverged,
    Ema,
    Loss,
    Recipe,
    checkpoint,
    command,
    fit,
    lora,
    losses,
    randomness,
)
from nearfield.train.optimizer import make_optimizer
from nearfield.train.order import Order
from nearfield.train.recipe import load, recipe_from
from nearfield.train.schedules import SCHEDULES, Schedule

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are tiny: a second thread would only be waited for."""
    torch.set_num_threads(1)


class Digits:
    """29 samples whose targets count or do not, unevenly."""

    def __len__(self):
        return 29

    def __getitem__(self, i):
        draw = torch.Generator().manual_seed(i)
        return {
            "x": torch.randn(4, 6, generator=draw),
            "y": torch.tensor([i % 5] * (i % 4) + [-100] * (4 - i % 4)),
        }


def network(dropout=0.2):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(8, 5))


def entropy(model, batch):
    return losses.cross_entropy(model(batch["x"]), batch["y"])


def recipe(**changes):
    given = {"steps": 12, "batch_size": 4, "log_every": 1, "checkpoint_every": 5, "lr": 0.01, "warmup": 3}
    return Recipe(**{**given, **changes})


def plain(model):
    """A network without what looks at the whole batch or draws random numbers."""
    return nn.Sequential(model[0], nn.ReLU(), model[4])


# The loop


def test_the_loop_is_the_loop_one_would_write():
    chosen, model, bare = recipe(clip=0.5, weight_decay=0.1), network(), network()
    result = fit(model, Digits(), entropy, recipe=chosen)
    torch.manual_seed(0)
    optimizer = make_optimizer(bare, chosen)
    order = Order(29, 4, seed=0, stop=12)
    found = {}
    for step, indices in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * Schedule("cosine", steps=12, warmup=3).factor(step)
        batch = torch.utils.data.default_collate([Digits()[i] for i in indices])
        loss = F.cross_entropy(bare(batch["x"]).flatten(0, 1), batch["y"].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 0.5)
        optimizer.step()
        found[step + 1] = loss.item()
    assert result.losses == pytest.approx(found, rel=1e-5) and result.steps == 12
    for ours, theirs in zip(model.state_dict().values(), bare.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_accumulating_n_batches_is_one_of_n_times_the_size():
    whole, parts = plain(network()), plain(network())
    once = fit(whole, Digits(), entropy, recipe=recipe(batch_size=12))
    thrice = fit(parts, Digits(), entropy, recipe=recipe(batch_size=4, gradient_accumulation=3))
    assert once.losses == pytest.approx(thrice.losses, abs=1e-6)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_mean_of_means_would_be_noticed(monkeypatch):
    once = fit(plain(network()), Digits(), entropy, recipe=recipe(batch_size=12))

    def mean(model, batch):
        return entropy(model, batch).mean

    thrice = fit(plain(network()), Digits(), mean, recipe=recipe(gradient_accumulation=3))
    assert once.losses != pytest.approx(thrice.losses, abs=1e-4)


def test_a_scalar_loss_is_the_mean_over_the_batch():
    def squares(model, batch):
        return model(batch["x"]).square().mean()

    def counted(model, batch):
        return Loss(model(batch["x"]).square().mean(-1).sum(), batch["x"].shape[0] * 4)

    one = fit(plain(network()), Digits(), squares, recipe=recipe(gradient_accumulation=2))
    other = fit(plain(network()), Digits(), counted, recipe=recipe(gradient_accumulation=2))
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    assert "tokens_per_second" not in one.records[0] and other.records[0]["tokens_per_second"] > 0


def test_losses_of_several_steps_are_averaged_by_count():
    each = fit(plain(network()), Digits(), entropy, recipe=recipe())
    every = fit(plain(network()), Digits(), entropy, recipe=recipe(log_every=4))
    taken = [sum(i % 4 for i in indices) for indices in Order(29, 4, seed=0, stop=12)]
    mean = sum(n * each.losses[s + 1] for s, n in enumerate(taken[:4])) / sum(taken[:4])
    assert list(every.losses) == [4, 8, 12] and every.losses[4] == pytest.approx(mean, rel=1e-5)


def test_a_batch_without_targets_moves_nothing():
    class Nothing(Digits):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "y": torch.full((4,), -100)}

    model, before = plain(network()), plain(network()).state_dict()
    result = fit(model, Nothing(), entropy, recipe=recipe(steps=2, optimizer="sgd"))
    assert result.losses == {1: 0.0, 2: 0.0}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_caller_keeps_random_numbers_mode_and_methods():
    model = network().eval()
    torch.manual_seed(7)
    before, numbers = random.getstate(), numpy.random.get_state()[1].copy()
    expected = torch.Generator().manual_seed(7)
    fit(model, Digits(), entropy, recipe=recipe(steps=2, mixed_precision="bf16"))
    assert random.getstate() == before and (numpy.random.get_state()[1] == numbers).all()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert not model.training and "forward" not in vars(model)
    fit(model, Digits(), entropy, recipe=recipe(steps=1))  # another precision in the same process
    assert model(torch.randn(2, 4, 6)).dtype == torch.float32


def test_bfloat16_stays_near_float32():
    half = fit(plain(network()), Digits(), entropy, recipe=recipe(mixed_precision="bf16"))
    full = fit(plain(network()), Digits(), entropy, recipe=recipe())
    assert half.losses != full.losses and half.losses == pytest.approx(full.losses, rel=0.02)


def test_evaluating_changes_nothing_of_training():
    def look(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(100), random.random(), numpy.random.rand()
        return {"loss": float(model(torch.ones(1, 4, 6)).square().mean())}

    without = fit(network(), Digits(), entropy, recipe=recipe(ema=0.8))
    told = []
    with_it = fit(
        network(),
        Digits(),
        entropy,
        recipe=recipe(ema=0.8, eval_every=5),
        evaluate=look,
        progress=lambda *what: told.append(what),
    )
    assert with_it.losses == without.losses and list(with_it.evaluations) == [5, 10, 12]
    assert told[-1] == ("training", 12, 12)


def test_with_ema_the_average_is_what_is_evaluated_and_left():
    seen, model = [], network()
    result = fit(
        model,
        Digits(),
        entropy,
        recipe=recipe(ema=0.9, eval_every=12),
        evaluate=lambda m: seen.append(copy.deepcopy(m.state_dict())) or {"loss": 0.0},
    )
    raw = network()
    assert fit(raw, Digits(), entropy, recipe=recipe()).losses == result.losses
    assert all(torch.equal(v, seen[0][k]) for k, v in model.state_dict().items())
    assert not torch.equal(model[0].weight, raw[0].weight)


def test_plateau_lowers_the_rate_and_needs_a_loss():
    flat = {"schedule": "plateau", "patience": 1, "warmup": 0, "floor": 0.01, "eval_every": 1}
    result = fit(
        network(), Digits(), entropy, recipe=recipe(steps=8, **flat), evaluate=lambda m: {"loss": 1.0}
    )
    rates = [record["lr"] for record in result.records if "lr" in record]
    assert rates == pytest.approx([0.01] * 3 + [0.001] * 2 + [0.0001] * 3)
    with pytest.raises(ValueError, match="follows the loss of evaluate, which gave accuracy"):
        fit(network(), Digits(), entropy, recipe=recipe(**flat), evaluate=lambda m: {"accuracy": 1.0})


def test_processes_that_know_nothing_of_one_another_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, .* launch with ACCELERATE_USE_CPU=true"):
        fit(network(), Digits(), entropy, recipe=recipe())


def test_a_loss_that_is_no_number_ends_the_run_before_a_checkpoint(tmp_path):
    def burst(model, batch):
        burst.calls += 1
        found = entropy(model, batch)
        return Loss(found.total * (math.nan if burst.calls == 10 else 1), found.count)

    burst.calls = 0
    with pytest.raises(Diverged, match="At step 10 the loss is nan .* Lower lr"):
        fit(network(), Digits(), burst, recipe=recipe(log_every=50), out=tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]


def test_what_cannot_be_trained_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="nothing to train"):
        fit(network().requires_grad_(False), Digits(), entropy, recipe=recipe())
    with pytest.raises(TypeError, match="data is a list_iterator, which has no samples by number"):
        fit(network(), iter([1]), entropy, recipe=recipe())
    with pytest.raises(TypeError, match=r"The loss gave \[4\]. It must give a scalar"):
        fit(network(), Digits(), lambda m, b: m(b["x"]).mean((1, 2)), recipe=recipe())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="mixed_precision='fp16' needs a GPU; the device is cpu"):
            fit(network(), Digits(), entropy, recipe=recipe(mixed_precision="fp16"))
        assert fit(network(), Digits(), entropy, recipe=recipe(steps=1)).steps == 1
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingPackage, match=r"pip install 'nearfield\[train\]'"):
        fit(network(), Digits(), entropy, recipe=recipe())


def test_vectors_and_named_parameters_do_not_decay():
    model = network()
    model.no_weight_decay = lambda: {"4.weight"}
    decayed, others = make_optimizer(model, recipe(weight_decay=0.3)).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)] and decayed["weight_decay"] == 0.3
    assert others["weight_decay"] == 0 and len(others["params"]) == 5


def test_muon_turns_matrices_of_layers_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    model, twin = network(dropout=0.0), network(dropout=0.0)
    twin.load_state_dict(model.state_dict())
    optimizer = make_optimizer(model, recipe(optimizer="muon", lr=0.1, weight_decay=0.0))
    matrices = [p for p in twin.parameters() if p.ndim == 2]
    theirs = (
        torch.optim.Muon(matrices, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in twin.parameters() if p.ndim != 2], lr=0.1, weight_decay=0.0),
    )
    for _ in range(3):
        for each in (model, twin):
            each.zero_grad()
            entropy(each, torch.utils.data.default_collate([Digits()[n] for n in range(8)])).total.backward()
        optimizer.step()
        for each in theirs:
            each.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="numbered layers"):
        make_optimizer(nn.Linear(2, 2), recipe(optimizer="muon"))


# Breaks


class Killed(BaseException):
    """What a kill is to a process, as far as one process can tell of itself."""


@pytest.mark.parametrize(
    ("dies", "optimizer", "several"),
    [(1, "adamw", 1), (7, "sgd", 2), (15, "adam", 1), (16, "muon", 1), (20, "adamw", 2)],
)
def test_a_run_that_was_killed_gives_the_losses_it_would_have_given(tmp_path, dies, optimizer, several):
    chosen = recipe(optimizer=optimizer, gradient_accumulation=several, ema=0.9, log_every=3, steps=16)
    whole_model, model = network(), network()
    whole = fit(whole_model, Digits(), entropy, recipe=chosen)
    calls = 0

    def deadly(m, batch):
        nonlocal calls
        calls += 1
        if calls == dies:
            raise Killed
        return entropy(m, batch)

    with pytest.raises(Killed):
        fit(network(), Digits(), deadly, recipe=chosen, out=tmp_path)
    torch.manual_seed(99)
    again = fit(model, Digits(), entropy, recipe=chosen, out=tmp_path)
    last = (dies - 1) // several // 5 * 5
    assert again.losses == whole.losses and again.resumed_from == (last or None)
    for ours, theirs in zip(model.state_dict().values(), whole_model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == list(whole.losses)


def test_a_break_that_forgot_the_random_numbers_would_be_noticed(tmp_path, monkeypatch):
    whole = fit(network(), Digits(), entropy, recipe=recipe(), out=tmp_path)
    last = tmp_path / "checkpoints" / "step-000000012" / "state.json"
    last.unlink()
    assert fit(network(), Digits(), entropy, recipe=recipe(), out=tmp_path).losses == whole.losses
    last.unlink()
    monkeypatch.setattr(randomness, "restore", lambda found: None)
    assert fit(network(), Digits(), entropy, recipe=recipe(), out=tmp_path).losses != whole.losses


def test_sigkill(tmp_path, python):
    script = f"""
        import os, signal
        from tests_of_train import Digits, entropy, network, recipe
        from nearfield.train import fit
        calls = 0
        def deadly(model, batch):
            global calls
            calls += 1
            if calls == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return entropy(model, batch)
        fit(network(), Digits(), deadly, recipe=recipe(), out={str(tmp_path)!r})
    """
    helper = (
        f"import importlib.util as u, sys\ns = u.spec_from_file_location('tests_of_train', {__file__!r})\n"
    )
    helper += "m = u.module_from_spec(s)\nsys.modules['tests_of_train'] = m\ns.loader.exec_module(m)\n"
    done = python("-c", helper + textwrap.dedent(script), OMP_NUM_THREADS="1")
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = fit(network(), Digits(), entropy, recipe=recipe(), out=tmp_path)
    assert again.resumed_from == 5
    assert again.losses == pytest.approx(fit(network(), Digits(), entropy, recipe=recipe()).losses, rel=1e-6)


def test_half_a_checkpoint_is_passed_over_and_two_whole_ones_kept(tmp_path, monkeypatch):
    folder, save = tmp_path / "checkpoints", checkpoint.save_file

    def half(tensors, path):
        save(tensors, path)
        if "step-000000010" in path and "optimizer" in path:
            raise Killed

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(Killed):
        fit(network(), Digits(), entropy, recipe=recipe(), out=tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [".step-000000010.part", "step-000000005"]
    monkeypatch.setattr(checkpoint, "save_file", save)
    again = fit(network(), Digits(), entropy, recipe=recipe(), out=tmp_path)
    assert again.resumed_from == 5
    assert sorted(p.name for p in folder.iterdir()) == ["step-000000010", "step-000000012"]
    weights = folder / "step-000000012" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert checkpoint.newest(folder)[0]["step"] == 10


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save = checkpoint.save_file

    def full(tensors, path):
        if "step-000000010" in path:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="could not be written .No space left on device"):
        fit(network(), Digits(), entropy, recipe=recipe(), out=tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]


def test_checkpoints_hold_no_pickles(tmp_path):
    fit(network(), Digits(), entropy, recipe=recipe(ema=0.9), out=tmp_path)
    written = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {".safetensors", ".json", ".jsonl"}


def test_another_run_is_not_gone_on_with_unless_asked_to_begin_anew(tmp_path):
    first = fit(network(), Digits(), entropy, recipe=recipe(), out=tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    done = fit(network(), Digits(), entropy, recipe=recipe(log_every=3), out=tmp_path)
    assert done.resumed_from == 12 and done.losses == first.losses
    with pytest.raises(ValueError, match="differs in lr, seed. Give the same settings to go on, or --fresh"):
        fit(network(), Digits(), entropy, recipe=recipe(lr=1.0, seed=3), out=tmp_path)
    with pytest.raises(ValueError, match=r"of another model: 0.bias, 0.weight"):
        fit(plain(network())[1:], Digits(), entropy, recipe=recipe(), out=tmp_path)
    anew = fit(network(), Digits(), entropy, recipe=recipe(seed=3), out=tmp_path, resume=False)
    assert anew.resumed_from is None and anew.losses != first.losses and (tmp_path / "mine.txt").exists()


def test_an_endless_schedule_may_be_prolonged(tmp_path):
    long = fit(network(), Digits(), entropy, recipe=recipe(schedule="constant", steps=15))
    fit(network(), Digits(), entropy, recipe=recipe(schedule="constant", steps=10), out=tmp_path)
    longer = fit(network(), Digits(), entropy, recipe=recipe(schedule="constant", steps=15), out=tmp_path)
    assert longer.resumed_from == 10 and longer.losses == long.losses


def test_tied_weights_and_weights_written(tmp_path):
    from safetensors.torch import load_model

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    class Tokens(Digits):
        def __getitem__(self, i):
            return {"tokens": torch.randint(7, (5,), generator=torch.Generator().manual_seed(i))}

    def loss(model, batch):
        return losses.next_token(model(batch["tokens"]), batch["tokens"])

    model, other = Tied(), Tied()
    fit(model, Tokens(), loss, recipe=recipe(ema=0.9), out=tmp_path)
    assert fit(other, Tokens(), loss, recipe=recipe(ema=0.9), out=tmp_path).resumed_from == 12
    assert torch.equal(other.head.weight, model.embed.weight) and other.head.weight is other.embed.weight
    load_model(fresh := Tied(), tmp_path / "model.safetensors")
    assert torch.equal(fresh.head.weight, model.head.weight)


# The order of samples


@given(
    st.integers(1, 40),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 9),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_order(num_samples, batch_size, num_processes, start, seed, shuffle):
    same = {"seed": seed, "shuffle": shuffle, "stop": 12}
    many = [
        list(Order(num_samples, batch_size, **same, process=i, num_processes=num_processes))
        for i in range(num_processes)
    ]
    one = list(Order(num_samples, batch_size * num_processes, **same))
    assert [[x for each in many for x in each[i]] for i in range(12)] == one
    assert list(Order(num_samples, batch_size * num_processes, **same, start=start)) == one[start:]
    laid_out = [index for batch in one for index in batch]
    for epoch in range(len(laid_out) // num_samples):
        assert sorted(laid_out[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


def test_epochs_differ_and_made_data_may_have_no_end():
    first, second = Order(50, 50, seed=0, stop=2)  # two batches, each a whole epoch
    assert first != second
    assert Order(10**15, 3, seed=0, shuffle=False, start=5, stop=6).batch(5) == [15, 16, 17]


# Several processes


TASK = """
    import torch
    from torch import nn
    from nearfield.train import Task, losses

    class Digits:
        def __len__(self):
            return 29
        def __getitem__(self, i):
            draw = torch.Generator().manual_seed(i)
            y = torch.tensor([i % 5] * (i % 4) + [-100] * (4 - i % 4))
            return {"x": torch.randn(4, 6, generator=draw), "y": y}

    def tiny(recipe, *, width=8):
        def loss(model, batch):
            return losses.cross_entropy(model(batch["x"]), batch["y"], label_smoothing=recipe.label_smoothing)
        model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 5))
        return Task(model, Digits(), loss, lambda m: {"loss": float(m[0].weight.detach().square().mean())})
"""
RECIPE = """
    task = "tiny_task_of_tests:tiny"
    steps = 6
    batch_size = 4
    gradient_accumulation = 2
    log_every = 1
    clip = 0.5
    ema = 0.9
    lr = 0.01
    label_smoothing = 0.1
    [options]
    width = 12
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The path of a recipe with its task."""
    (tmp_path / "tiny_task_of_tests.py").write_text(textwrap.dedent(TASK))
    (tmp_path / "tiny.toml").write_text(textwrap.dedent(RECIPE))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "tiny.toml"
    sys.modules.pop("tiny_task_of_tests", None)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tiny, tmp_path, python):
    one = command.run(str(tiny), settings=["batch_size=8"], out=tmp_path / "one")
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = python(
        *launch, "-m", "nearfield", "train", str(tiny), "--out", str(tmp_path / "two"), "--json",
        PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # of one process only
    assert document["num_processes"] == 2 and document["steps"] == 6
    records = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").open()]
    assert {r["step"]: r["loss"] for r in records if "loss" in r} == pytest.approx(one.losses, abs=1e-6)
    norms = {r["step"]: r["gradient_norm"] for r in one.records if "loss" in r}
    assert {r["step"]: r["gradient_norm"] for r in records if "loss" in r} == pytest.approx(norms, rel=1e-4)
    assert document["evaluate"]["loss"] == pytest.approx(one.evaluations[6]["loss"], rel=1e-5)
    with pytest.raises(ValueError, match=r"differs in the number of processes \(2 then\)"):
        command.run(str(tiny), out=tmp_path / "two")


# The command


def test_train_prints_one_document_and_settings_hold(tiny, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", str(tiny), "--out", str(tmp_path / "out"), *arguments])
        return ended.value.code or 0, *capsys.readouterr()

    status, out, _ = run("--steps", "3", "--set", "options.width=5", "--set", "schedule=constant", "--json")
    document = json.loads(out)
    assert status == 0 and document["steps"] == 3 and document["num_parameters"] == 6 * 5 + 5 + 5 * 5 + 5
    status, out, _ = run("--steps", "4", "--set", "options.width=5", "--set", "schedule=constant", "--json")
    assert json.loads(out)["resumed_from"] == 3
    status, out, _ = run("--fresh", "--set", "clip=none")
    assert status == 0 and "at first" in out and "written" in out
    status, _, err = run("--set", "learning_rate=1")
    assert status == 1 and "There is no setting 'learning_rate'." in err
    status, _, err = run("--set", "options.widht=1", "--fresh")
    assert status == 1 and "There is no option 'widht'. Did you mean width? tiny has width." in err
    status, _, err = run("--data", "somewhere")
    assert status == 1 and "makes its own data" in err


def test_a_system_without_a_recipe_names_those_that_have_one(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "find", lambda name, home: type("Card", (), {"slug": name}))
    with pytest.raises(LookupError, match="fna has no recipe.toml. No system has one yet."):
        command.find("fna", tmp_path)
    (tmp_path / "lla").mkdir()
    (tmp_path / "lla" / "recipe.toml").write_text("")
    with pytest.raises(LookupError, match="fna has no recipe.toml. These have one: lla."):
        command.find("fna", tmp_path)
    assert command.find("lla", tmp_path) == tmp_path / "lla" / "recipe.toml"


@pytest.mark.parametrize(
    ("task", "message"),
    [("tiny", "must be 'module:function'"), ("json:nothing", "has no nothing"), ("json:dumps", "gave a str")],
)
def test_a_task_that_is_none_is_refused(task, message):
    with pytest.raises((ValueError, LookupError, TypeError), match=message):
        command.build(Recipe(task=task, steps=1, options={} if "dumps" not in task else {"default": str}))


def test_recipes_of_systems_can_be_read():
    for path in catalog.HOME.glob("*/recipe.toml"):
        assert load(path).task


def test_importing_train_imports_neither_accelerate_nor_peft(python):
    code = "import sys, nearfield.train, nearfield.train.lora, nearfield.train.command\n"
    done = python("-c", code + "sys.exit('accelerate' in sys.modules or 'peft' in sys.modules)")
    assert done.returncode == 0, done.stderr


# Recipes


WRONG = [
    ({"learning_rate": 1}, "There is no setting 'learning_rate'"),
    ({"batchsize": 1}, "Did you mean batch_size"),
    ({"optimizer": "adamW2"}, "no optimizer 'adamW2'. Did you mean adamw"),
    ({"schedule": "cosin"}, "no schedule 'cosin'. Did you mean cosine"),
    ({"epochs": 1.0}, "exactly one of them"),
    ({"steps": None}, "exactly one of them"),
    ({"steps": 2.5}, "steps=2.5 must be a whole number of at least 1"),
    ({"batch_size": True}, "batch_size=True must be a whole number"),
    ({"lr": "fast"}, "lr='fast' must be a number above 0"),
    ({"lr": math.nan}, "lr=nan must be a number above 0"),
    ({"clip": -1.0}, "clip=-1.0 must be a number above 0"),
    ({"warmup": 2.5}, "warmup=2.5 must be whole steps, or a share below 1"),
    ({"betas": [0.9]}, "must be two numbers"),
    ({"shuffle": 1}, "shuffle=1 must be true or false"),
    ({"schedule": "exponential"}, "Set floor=0.01"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_recipes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        recipe_from({"steps": 1, **wrong})


def test_recipes_are_read_and_overridden(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("steps = 10\nlr = 1\nclip = 1.0\nbetas = [0.9, 0.95]\n[options]\ndim = 3\n")
    found = load(
        path, ["lr=1e-3", "schedule=linear", "clip=none", "options.dim=4", "epochs=2", "betas=[0,0.5]"]
    )
    assert (found.lr, found.schedule, found.clip, found.steps, found.epochs) == (
        1e-3,
        "linear",
        None,
        None,
        2,
    )
    assert found.options == {"dim": 4} and found.betas == (0.0, 0.5)
    assert recipe_from(found.json()) == found and not found.differs(json.loads(json.dumps(found.json())))
    assert found.total(33) == 3 and Recipe(steps=40, warmup=0.1).warmup_steps(40) == 4
    for wrong, message in [
        ("lr", "says nothing"),
        ("lr=none", "may be none"),
        ("data.dim=1", "only options has settings"),
        ("lrr=1", "no setting 'lrr'. Did you mean lr"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(path, [wrong])
    path.write_text("steps = ")
    with pytest.raises(ValueError, match="is no TOML"):
        load(path)


# Schedules


@given(st.sampled_from(SCHEDULES), st.integers(1, 200), st.integers(0, 50), st.floats(0.01, 1))
@settings(max_examples=80, deadline=None)
def test_schedules_rise_then_never_rise_again(name, steps, warmup, floor):
    schedule = Schedule(name, steps=warmup + steps, warmup=warmup, floor=floor)
    shares = [schedule.factor(step) for step in range(warmup + steps + 1)]
    assert all(0 < share <= 1 for share in shares)
    assert shares[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert all(b <= a + 1e-12 for a, b in zip(shares[warmup:], shares[warmup + 1 :], strict=False))
    if name in ("linear", "cosine", "exponential"):
        assert shares[warmup] == 1 and shares[-1] == pytest.approx(floor)
        assert schedule.factor(10**9) == pytest.approx(floor)


def test_schedules_by_formula():
    assert Schedule("cosine", steps=100, floor=0.2).factor(25) == pytest.approx(0.2 + 0.4 * (1 + 0.5**0.5))
    assert Schedule("linear", steps=100).factor(25) == pytest.approx(0.75)
    assert Schedule("exponential", steps=100, floor=0.01).factor(50) == pytest.approx(0.1)
    assert Schedule("inverse_sqrt", steps=9, warmup=16).factor(63) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="Choose constant, linear"):
        Schedule("step", steps=1)


def test_plateau_is_torchs():
    seen = [3.0, 2.0, 2.5, 2.4, 2.3, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 0.9999, 0.5]
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=2, min_lr=0.005)
    ours = Schedule("plateau", steps=99, patience=2, floor=0.005)
    for loss in seen:
        theirs.step(loss)
        ours.observe(loss)
        again = Schedule("plateau", steps=99, patience=2, floor=0.005)
        again.load(json.loads(json.dumps(ours.state())))
        ours = again
        assert ours.factor(0) == pytest.approx(optimizer.param_groups[0]["lr"])


# Losses


def test_cross_entropy_against_loops():
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    target = torch.tensor([[0, 1, -100, 4], [-100, -100, 2, 3], [1, 1, 1, -100]])
    total, count = 0.0, 0
    for row in range(3):
        for place in range(4):
            wanted = int(target[row, place])
            if wanted != -100:
                log_p = logits[row, place] - logits[row, place].logsumexp(0)
                total -= 0.9 * log_p[wanted] + 0.1 * log_p.mean()
                count += 1
    found = losses.cross_entropy(logits, target, label_smoothing=0.1)
    assert_close(found.total, total, within=1e-12)
    assert int(found.count) == count and torch.isclose(found.mean, total / count)
    one_hot = F.one_hot(target.clamp(min=0), 5).double()
    soft = losses.cross_entropy(logits, one_hot)
    hard = losses.cross_entropy(logits, target.clamp(min=0))
    assert_close(soft.total, hard.total, within=1e-12)
    assert soft.count == int(hard.count) == 12


def test_ignored_targets_may_hold_anything():
    logits = torch.randn(2, 3, 5)
    target = torch.tensor([[1, -100, 2], [-100, 0, 0]])
    poisoned = logits.masked_fill((target == -100)[..., None], 1e30).requires_grad_()
    found = losses.cross_entropy(poisoned, target)
    found.total.backward()
    assert_close(found.total, losses.cross_entropy(logits, target).total)
    assert poisoned.grad.isfinite().all() and not poisoned.grad[0, 1].any()
    nothing = losses.cross_entropy(logits, torch.full((2, 3), -100))
    assert nothing.total == 0 and nothing.mean == 0


def test_next_token_answers_for_the_token_after():
    tokens = torch.tensor([[3, 1, 2, -100]])
    logits = torch.full((1, 4, 5), -50.0)
    logits[0, 0, 1] = logits[0, 1, 2] = 50.0
    found = losses.next_token(logits, tokens)
    assert found.total < 1e-6 and int(found.count) == 2


def test_distillation_against_loops_and_its_law():
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    total = 0.0
    for row, place in mask.nonzero().tolist():
        p, q = (x[row, place].div(2.0).softmax(0) for x in (teacher, student))
        total += 4.0 * sum(p[i] * (p[i] / q[i]).log() for i in range(5))
    found = losses.distillation(student, teacher, temperature=2.0, mask=mask)
    assert_close(found.total, total, within=1e-12)
    assert int(found.count) == 4 and losses.distillation(teacher, teacher).total.abs() < 1e-12
    with pytest.raises(ValueError, match="temperature=0 must lie above 0"):
        losses.distillation(student, teacher, temperature=0)


def test_layer_losses_against_loops():
    students = [torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3)]
    teachers = [torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3)]
    mask = torch.tensor([[True, True, False], [True, False, False]])
    pairs = list(zip(students, teachers, strict=True))
    outputs = losses.attention_outputs(students, teachers, mask=mask)
    expected = 1000 * sum((s[mask] - t[mask]).square().mean() for s, t in pairs) / 3
    assert_close(outputs.mean, expected, within=1e-12)
    hidden = losses.hidden_states(
        [s.flatten(2) for s in students], [t.flatten(2) for t in teachers], mask=mask
    )
    expected = sum((s[mask] - t[mask]).square().sum() / 20 for s, t in pairs)
    assert_close(hidden.total, expected, within=1e-12)
    with pytest.raises(ValueError, match="3 layers of the student and 2 of the teacher"):
        losses.hidden_states(students, teachers[:2])
    with pytest.raises(ValueError, match="must agree"):
        losses.hidden_states([students[0]], [teachers[0][:1]])
    both = losses.weighted_sum((outputs, 0.5), (losses.hidden_states(students, teachers), 2.0))
    assert both.count is outputs.count
    assert torch.isclose(both.mean, 0.5 * outputs.mean + 2 * losses.hidden_states(students, teachers).mean)


def test_gradients_of_losses_and_none_for_the_teacher():
    teacher = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(2, 3, 4, dtype=torch.float64).softmax(-1)
    for loss in (
        lambda x: losses.cross_entropy(x, torch.tensor([[1, -100, 0], [3, 3, 3]]), label_smoothing=0.1).total,
        lambda x: losses.cross_entropy(x, soft).total,
        lambda x: losses.distillation(x, teacher, temperature=1.5).total,
        lambda x: losses.hidden_states([x, x * x], [teacher, teacher]).total,
    ):
        assert torch.autograd.gradcheck(loss, student)
        loss(student).backward()
    assert teacher.grad is None


def test_half_precision_logits_are_summed_in_float32():
    logits, target = torch.randn(64, 512), torch.randint(512, (64,))
    half = losses.cross_entropy(logits.bfloat16(), target).total
    assert half.dtype == torch.float32
    assert_close(half, losses.cross_entropy(logits.bfloat16().float(), target).total, within=1e-6)
    with pytest.raises(ValueError, match=r"Targets are \[3\]; logits of \[64, 512\] need \[64\]"):
        losses.cross_entropy(logits, target[:3])
    with pytest.raises(ValueError, match="Soft targets are"):
        losses.cross_entropy(logits, logits[:, :4])


# Averaged weights


def test_ema_is_its_formula_and_copies_buffers():
    model = nn.BatchNorm1d(3)
    ema, average = Ema(model, 0.8, warmup=True), model.weight.detach().double()
    for n in range(1, 60):
        with torch.no_grad():
            model.weight.add_(torch.randn(3))
            model.running_mean.add_(1.0)
        ema.update(model)
        decay = min(0.8, n / (n + 9))
        average = decay * average + (1 - decay) * model.weight.double()
    assert_close(ema.average["weight"], average, within=1e-5)
    own = model.weight.detach().clone()
    with ema.swapped(model):
        assert_close(model.weight, average, within=1e-5)
        assert model.running_mean[0] == 59
    assert torch.equal(model.weight, own)


def test_ema_keeps_what_bfloat16_would_lose_and_leaves_the_frozen_alone():
    model = nn.Linear(4, 4).bfloat16()
    model.bias.requires_grad_(False)
    ema = Ema(model, 0.999)
    start = ema.average["weight"].clone()
    with torch.no_grad():
        model.weight.add_(0.5)
    for _ in range(10):
        ema.update(model)
    moved = (ema.average["weight"] - start) / (model.weight.float() - start)
    assert_close(moved, torch.full_like(moved, 1 - 0.999**10), within=1e-3)
    assert list(ema.average) == ["weight"]
    tensors, numbers = ema.state()
    other = Ema(model, 0.999)
    other.load(tensors, json.loads(json.dumps(numbers)))
    assert torch.equal(other.average["weight"], ema.average["weight"]) and other.updates == 10
    with pytest.raises(ValueError, match="differ in"):
        other.load({}, numbers)


# Small changes to a frozen model


class Attention(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(6, 12), nn.Linear(12, 6, bias=bias)

    def forward(self, x):
        return self.o_proj(self.q_proj(x).tanh())


@pytest.mark.parametrize("bias", [True, False])
def test_head_offsets_are_a_loop_over_heads_and_fold_exactly(bias):
    model = nn.Sequential(Attention(bias), Attention(bias)).double()
    x, before = torch.randn(2, 5, 6, dtype=torch.float64), copy.deepcopy(model)
    layers = lora.add_head_offsets(model, "*.o_proj", num_heads=3, heads={"0.o_proj": [2, 0]}, std=0.5)
    assert (
        list(layers) == ["0.o_proj"]
        and sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4
    )
    with torch.no_grad():
        layers["0.o_proj"].head_scale.normal_()
    z, layer = model[0].q_proj(x).tanh(), layers["0.o_proj"]
    for row, head in enumerate([0, 2]):
        at = slice(head * 4, head * 4 + 4)
        z[..., at] = (1 + layer.head_scale[row]) * z[..., at] + layer.head_offset[row]
    expected = before[1](F.linear(z, layer.weight, layer.bias))
    assert_close(model(x), expected, within=1e-12)
    assert_close(copy.deepcopy(model)(x), expected, within=1e-12)
    assert torch.isclose(lora.head_penalty(model), layer.head_offset.abs().sum())
    scores = lora.head_scores(model)
    assert [s[:2] for s in sorted(scores)] == [("0.o_proj", 0), ("0.o_proj", 2)] and scores[0][2] >= scores[
        1
    ][2]
    folded = lora.fold(copy.deepcopy(model))
    assert_close(folded(x), expected, within=1e-12)
    assert all(
        not name.startswith("head_") for _, m in folded.named_modules() for name in vars(m)["_parameters"]
    )
    assert torch.equal(lora.remove(model)(x), before(x))
    assert model.state_dict().keys() == before.state_dict().keys()


def test_zero_offsets_change_nothing_and_only_offsets_train(tmp_path):
    model = nn.Sequential(Attention(), nn.Linear(6, 5))
    x, before = torch.randn(2, 4, 6), model(torch.ones(1, 6))
    lora.add_head_offsets(model, "*o_proj", num_heads=4, train="scale", std=0.0)
    assert torch.equal(model(torch.ones(1, 6)), before)
    result = fit(model, Digits(), entropy, recipe=recipe(steps=5), out=tmp_path)
    assert result.num_parameters == 12 and model[0].o_proj.head_scale.any()
    assert lora.head_scores(model)[0][2] > 0
    lora.remove(model)
    assert torch.equal(model(torch.ones(1, 6)), before) and model(x).isfinite().all()


def test_head_offsets_that_do_not_fit_are_refused():
    model = nn.Sequential(Attention())
    with pytest.raises(ValueError, match="No linear layer among 'proj' is called so"):
        lora.add_head_offsets(model, "proj", num_heads=3)
    with pytest.raises(ValueError, match="is called 9.o_proj"):
        lora.add_head_offsets(model, "*o_proj", num_heads=3, heads={"9.o_proj": [0]})
    with pytest.raises(ValueError, match="reads 12 features, which num_heads=5 must divide"):
        lora.add_head_offsets(model, "*o_proj", num_heads=5)
    with pytest.raises(ValueError, match=r"heads=\[3\] must lie in 0 to 2"):
        lora.add_head_offsets(model, "*o_proj", num_heads=3, heads={"0.o_proj": [3]})
    with pytest.raises(ValueError, match="has no head offsets"):
        lora.fold(model)
    lora.add_head_offsets(model, "*o_proj", num_heads=3)
    with pytest.raises(ValueError, match="has head offsets already"):
        lora.add_head_offsets(model, "*o_proj", num_heads=3)


def test_lora_is_pefts_and_its_checkpoints_hold_only_what_trains(tmp_path, monkeypatch):
    pytest.importorskip("peft")

    def made():
        torch.manual_seed(3)
        return lora.lora(nn.Sequential(Attention(), nn.Linear(6, 5)), ["q_proj", "o_proj"], rank=2, alpha=4)

    model = made()
    result = fit(model, Digits(), entropy, recipe=recipe(steps=6), out=tmp_path)
    assert result.num_parameters == 2 * (6 + 12) * 2
    _, tensors = checkpoint.newest(tmp_path / "checkpoints")
    assert tensors["model"] and all("lora_" in name for name in tensors["model"])
    (tmp_path / "checkpoints" / "step-000000006" / "state.json").unlink()
    again = fit(made(), Digits(), entropy, recipe=recipe(steps=6), out=tmp_path)
    assert again.resumed_from == 5 and again.losses == result.losses
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackage, match=r"pip install 'nearfield\[train\]'"):
        made()


# What it costs


def test_overhead_of_the_loop():
    """What `fit` adds to a step of the bare loop: CPU time of one thread, in turn, the best of each.

    A tiny model, because what is added does not grow with the model, and its noise would.
    """
    draw = torch.randn(64, 64)

    class Rows:
        def __len__(self):
            return 64

        def __getitem__(self, i):
            return {"x": draw[i]}

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    steps = 100
    chosen = Recipe(steps=steps, batch_size=8, log_every=10, schedule="constant", clip=1.0)
    ours, theirs = [], []
    for _ in range(5):
        began = time.thread_time()
        model = nn.Linear(64, 8)
        optimizer = make_optimizer(model, chosen)
        loader = torch.utils.data.DataLoader(Rows(), batch_sampler=Order(64, 8, seed=0, stop=steps))
        for batch in loader:
            optimizer.zero_grad()
            found = loss(model, batch)
            found.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        theirs.append(time.thread_time() - began)
        began = time.thread_time()
        fit(nn.Linear(64, 8), Rows(), loss, recipe=chosen)
        ours.append(time.thread_time() - began)
    added = (min(ours) - min(theirs)) / steps * 1e3
    print(f"\nfit adds {added:.2f} ms to a step: {added / 20:.1%} of one that takes 20 ms")
    assert added < 2.0
