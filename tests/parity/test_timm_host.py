"""timm builds, trains and stores our models with its own tools."""

import warnings

import pytest
import torch

from nearfield import catalog, create
from nearfield.hosts import timm as host

timm = pytest.importorskip("timm")

NAMES = host.register()
TINY = "nearfield_davit_tiny"
SIDE = 32


def picture(count=2, channels=3):
    return torch.randn(count, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=5, drop_path_rate=0.2)


def test_every_classifier_of_the_cards_is_listed_once():
    assert TINY in NAMES and len(set(NAMES)) == len(NAMES)
    assert set(timm.list_models("nearfield_*")) == set(NAMES)
    assert not timm.list_models("nearfield_*", pretrained=True)
    with warnings.catch_warnings(action="error"):  # timm warns of a name that is overwritten
        assert host.register() == NAMES
    assert timm.models.model_entrypoint("davit_tiny").__module__ == "timm.models.davit"


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_model_has_its_card_s_size_and_settings(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    entry = name.removeprefix("nearfield_")
    card, _ = catalog.find_entry(entry)
    assert sum(p.numel() for p in model.parameters()) == card.params[entry]
    config = model.pretrained_cfg
    assert (
        model.default_cfg is config and len(config["mean"]) == len(config["std"]) == config["input_size"][0]
    )
    assert config["architecture"] == name and config["paper_ids"] == f"arXiv:{card.arxiv}"


def test_options_of_timm_reach_the_model(model):
    assert model.num_classes == 5 and model(picture()).shape == (2, 5)
    assert max(m.rate for m in model.modules() if hasattr(m, "rate")) == pytest.approx(0.2)
    grey = timm.create_model(TINY, in_chans=1, num_classes=0, drop_rate=0.0, global_pool="avg", img_size=None)
    assert grey(picture(channels=1)).shape == (2, grey.num_features)
    ours = timm.create_model(TINY, window_size=4, num_classes=2)
    assert {m.window_size for m in ours.modules() if hasattr(m, "window_size")} == {4}


def test_what_a_model_lacks_is_refused_in_a_sentence():
    with pytest.raises(TypeError, match=r"has no option drop_rate, given 0\.1"):
        timm.create_model(TINY, drop_rate=0.1)
    with pytest.raises(TypeError, match="has no option depht"):
        timm.create_model(TINY, depht=3)
    with pytest.raises(ValueError, match="no weights to download"):
        timm.create_model(TINY, pretrained=True)


def test_maps_of_the_stages_come_by_features_only():
    pyramid = timm.create_model(TINY, features_only=True)
    channels, reductions = pyramid.feature_info.channels(), pyramid.feature_info.reduction()
    assert (channels, reductions) == ([96, 192, 384, 768], [4, 8, 16, 32])
    for shown, width, reduction in zip(pyramid(picture()), channels, reductions, strict=True):
        assert shown.shape == (2, width, SIDE // reduction, SIDE // reduction)
    pyramid = timm.create_model(TINY, features_only=True, out_indices=(1, 2))
    assert [list(shown.shape) for shown in pyramid(picture())] == [[2, 192, 4, 4], [2, 384, 2, 2]]
    assert pyramid.feature_info.channels() == [192, 384]


def test_official_and_own_checkpoints_load(tmp_path, model):
    theirs = timm.create_model("davit_tiny", num_classes=5).eval()
    for number, state in enumerate((model.state_dict(), theirs.state_dict())):
        torch.save({"state_dict": state}, tmp_path / f"{number}.pth")
        overlay = {"file": str(tmp_path / f"{number}.pth"), "num_classes": 5}
        ours = timm.create_model(TINY, num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        expected = (model.eval(), theirs)[number](picture())
        assert torch.allclose(ours(picture()), expected, atol=1e-5)
    new = timm.create_model(
        TINY, num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay
    )  # a new head
    assert torch.equal(new.stem.proj.weight, ours.stem.proj.weight) and new.num_classes == 7


def test_timms_tools_train_it(tmp_path, model):
    from timm.models import load_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, ModelEmaV3

    model.train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert (
        len(scales) == sum(len(stage.blocks) for stage in model.stages) + 2
    )  # the stem, each block, the head
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    undecayed = {
        id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]
    }
    assert undecayed >= {id(p) for p in model.parameters() if p.ndim <= 1}
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2)
    ema = ModelEmaV3(model, decay=0.9)
    labels, losses = torch.tensor([0, 1]), []
    for step in range(2):
        loss = torch.nn.functional.cross_entropy(model(picture()), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        scheduler.step(step)
        ema.update(model, step=step)
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses)))
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), max_history=1)
    saver.save_checkpoint(epoch=0, metric=1.0)
    again = timm.create_model(TINY, num_classes=5)
    load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=False)
    with torch.no_grad():
        assert torch.equal(again.eval()(picture()), model.eval()(picture()))
    ours = create(
        "davit_tiny", weights=tmp_path / "last.pth.tar", num_classes=5
    )  # takes the averaged weights
    assert torch.equal(ours.head.weight, ema.module.head.weight)
