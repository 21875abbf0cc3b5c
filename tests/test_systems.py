"""The contract of every system, over all cards."""

import importlib
import inspect
import json
import re
import time
from dataclasses import replace

import pytest
import torch

from nearfield import catalog, create, load, save, store, systems

CARDS = catalog.cards()
CLAIMS = [(card, claim) for card in CARDS for claim in card.claims]
MODELS = [(card, name) for card in CARDS for name in card.params]
NAMES = {
    "card.toml",
    "__init__.py",
    "layer.py",
    "model.py",
    "steer.py",
    "study.py",
    "convert.py",
    "weights.py",
}
NAMES |= {"claims.py", "recipe.toml", "README.md"}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)
def test_a_folder_holds_the_named_files_and_no_folders(card):
    for path in (catalog.HOME / card.slug).iterdir():
        if path.name != "__pycache__":
            assert path.name in NAMES | {f"test_{card.slug}.py"}, (
                f"{path.name} has no place in a system's folder"
            )


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)
def test_what_a_card_names_is_there(card):
    assert re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv), card.arxiv
    assert card.summary.endswith(".") and len(card.summary) <= 140
    for address in card.entry.values():
        assert callable(catalog.resolve(address)), address
    for claim in card.claims:
        signature = inspect.signature(claim.function())
        full = signature.parameters["full"]
        assert full.kind is full.KEYWORD_ONLY and full.default is False and len(signature.parameters) == 1


@pytest.mark.parametrize(("card", "name"), MODELS, ids=[name for _, name in MODELS])
def test_a_model_has_the_parameters_of_its_card(card, name):
    with torch.device("meta"):
        model = create(name)
    assert sum(p.numel() for p in model.parameters()) == card.params[name]


@pytest.mark.parametrize(("card", "claim"), CLAIMS, ids=[f"{card.slug}-{claim.id}" for card, claim in CLAIMS])
def test_a_claim_runs_in_its_seconds(card, claim):
    if "cuda" in claim.needs and torch.cuda.is_available():
        pytest.skip("GPU claims run under -m gpu")
    torch.set_num_threads(1)
    begin = time.process_time()
    outcome = systems.attempt(claim)
    # CPU time on one thread: neither other work on the machine nor waiting for it counts
    assert time.process_time() - begin <= claim.smoke_seconds
    json.dumps(outcome.json(), allow_nan=False)
    result = outcome.result
    if result.skipped:
        assert result.holds is None or result.found
    else:
        assert result.found and result.holds in (True, False)
    if result.plot is not None:
        figure = pytest.importorskip("matplotlib.figure").Figure()
        result.plot(figure.subplots())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "claim", [claim for _, claim in CLAIMS if "cuda" in claim.needs], ids=lambda claim: claim.id
)
def test_a_gpu_claim_runs(claim):
    assert systems.attempt(claim).result.found


def claim_of(here, *needs):
    return replace(CARDS[0].claims[0], id="tried", here=here, needs=needs)


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        ("native", "compiled CPU kernels"),
        ("package:no_such_one", "package no-such-one"),
        ("data:none", "the data none"),
    ],
)
def test_what_is_missing_makes_a_claim_skipped_not_failed(need, reason):
    if need == "native" and systems.missing("native") is None:
        pytest.skip("the kernels are here")
    outcome = systems.attempt(claim_of("nearfield.core.dims:per_dim", need))
    assert outcome.json()["holds"] is None and reason in outcome.json()["skipped"]


def test_an_unknown_need_is_an_error():
    with pytest.raises(ValueError, match="needs='gpu' is unknown"):
        systems.missing("gpu")


def test_a_backend_that_cannot_run_makes_a_claim_skipped(monkeypatch):
    from nearfield.core.errors import BackendUnavailable

    def claim(*, full=False):
        raise BackendUnavailable("no such backend here")

    monkeypatch.setattr(catalog, "resolve", lambda address: claim)
    assert systems.attempt(claim_of("nearfield.x:y")).result.skipped == "no such backend here"


def test_a_claim_that_does_not_hold_is_a_result(monkeypatch, tmp_path):
    drawn = []

    def plot(axes):
        drawn.append(axes)

    monkeypatch.setattr(
        catalog, "resolve", lambda address: lambda *, full=False: catalog.Result("a = 2", False, plot)
    )
    card = replace(CARDS[0], slug="tried", claims=(claim_of("nearfield.x:y"),))
    report = systems.run(card, full=True)
    assert report.json()["mode"] == "full" and report.json()["claims"][0]["holds"] is False
    pytest.importorskip("matplotlib")
    report.save(tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new" / "folder" / "tried.json").read_text())
    assert (
        written["claims"] == report.json()["claims"]
        and written["made"]["versions"]["torch"] == torch.__version__
    )
    assert drawn and (tmp_path / "new" / "folder" / "tried-tried.svg").stat().st_size > 0


def test_an_unknown_claim_answers_with_the_nearest():
    with pytest.raises(LookupError, match=r"no claim 'per-axes'.*per-axis"):
        systems.run(catalog.find("fna"), claim="per-axes")


class Small(torch.nn.Module):
    def __init__(self, width=3, name="a"):
        super().__init__()
        self.line = torch.nn.Linear(width, width)


@pytest.fixture
def small(monkeypatch):
    """A card that offers `small`."""
    card = replace(
        CARDS[0], slug="tried", kind=("model",), entry={"small": f"{__name__}:Small"}, params={"small": 12}
    )
    monkeypatch.setattr(catalog, "cards", lambda home=None: (card,))
    monkeypatch.setattr(catalog, "resolve", lambda address: Small)


def test_create_builds_saves_and_loads_the_same_model(small, tmp_path):
    model = create("small", width=4)
    folder = save(model, tmp_path / "kept")
    again = load(folder)
    assert again.line.in_features == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    other = create("small", weights=folder / "model.safetensors", width=4)
    assert torch.equal(other.line.weight, model.line.weight)
    with pytest.raises(FileExistsError, match="not empty"):
        save(model, folder)


def test_a_killed_save_leaves_nothing_to_load(small, tmp_path, monkeypatch):
    import safetensors.torch

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_model", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(create("small"), tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_weights_must_fit_exactly(small, tmp_path):
    folder = save(create("small"), tmp_path / "kept")
    with pytest.raises(ValueError, match="does not fit small"):
        create("small", weights=folder, width=5)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "config", ["", "[]", "{}", '{"nearfield_entry": 3}', '{"nearfield_entry": {"name": "small"}}']
)
def test_a_folder_of_something_else_is_refused(small, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json does not say"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no nearfield\.json"):
        load(tmp_path / "nowhere")


def test_options_are_checked_and_operators_come_back_bound(small):
    with pytest.raises(TypeError, match="small has no option depth. It has: width, name"):
        create("small", depth=3)


def test_operators_come_back_with_their_options_bound():
    operator = create("neighborhood_attention", scale=1.0)
    pattern = create("neighborhood", kernel_size=3, stride=2)
    q, k, v = torch.randn(3, 1, 6, 2, 8).unbind(0)
    function = importlib.import_module("nearfield.ops.neighborhood").neighborhood_attention
    assert torch.equal(operator(q, k, v, pattern), function(q, k, v, pattern, scale=1.0))
    with pytest.raises(TypeError, match="no option scales"):
        create("neighborhood_attention", scales=1.0)
    with pytest.raises(TypeError, match="no weights to load"):
        create("neighborhood_attention", weights="somewhere")
    with pytest.raises(LookupError, match="neighborhood"):
        create("neighbourhood")
    assert store.BUILT not in vars(pattern)
