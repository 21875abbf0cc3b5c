"""timm builds, trains and stores our models with its own tools."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import nearfield
from nearfield import catalog, create
from nearfield.hosts import timm as host

timm = pytest.importorskip("timm")

NAMES = host.register()
TINY = "nearfield_ela_resnet8"  # of 79,000 parameters
DAVIT = "nearfield_davit_tiny"
SIDE = 32

# A small model of each kind of trunk: a name and options for it.
TRUNKS = {
    "Pyramid": ("nearfield_inline_pvt_tiny", {"dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}),
    "ConvNet": (TINY, {}),
    "HaloNet": ("nearfield_halonet_h0", {"num_conv_stages": 3}),
    "ConViT": ("nearfield_convit_tiny", {"depth": 3, "local_depth": 2, "img_size": SIDE}),
    "TNT": ("nearfield_tnt_tiny", {"depth": 2, "img_size": SIDE}),
    "DeiT": ("nearfield_inline_deit_tiny", {"depth": 2, "img_size": SIDE}),
    "HTNet": ("nearfield_htnet_blocks4", {"dim": 24, "depths": (1, 2), "img_size": SIDE, "patch_size": 8}),
}
# Entries of ours that timm has too, where it calls them otherwise.
TWINS = {
    "tnt_small": "tnt_s_patch16_224",
    "tnt_base": "tnt_b_patch16_224",
    "tnt_small_legacy": "tnt_s_legacy_patch16_224",
}


@pytest.fixture(autouse=True)
def _one_thread():
    """On nets this small a second thread mostly waits, at length where others use the machine."""
    torch.set_num_threads(1)


def picture(count=2, channels=3, side=SIDE):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def options_of(name):
    return inspect.signature(catalog.find_entry(name.removeprefix("nearfield_"))[1]).parameters


def test_every_classifier_of_pictures_is_listed_once():
    assert {TINY, DAVIT} <= set(NAMES) and len(set(NAMES)) == len(NAMES)
    assert set(timm.list_models("nearfield_*")) == set(NAMES)
    assert not timm.list_models("nearfield_*", pretrained=True)
    entries = {
        entry
        for card in catalog.cards()
        if "model" in card.kind and "vision" in card.domain
        for entry in card.params
    }
    left_out = entries - {name.removeprefix("nearfield_") for name in NAMES}
    assert all("_video_" in entry for entry in left_out)  # of clips
    with warnings.catch_warnings(action="error"):  # timm warns of a name that is overwritten
        assert host.register() == NAMES
    assert timm.models.model_entrypoint("davit_tiny").__module__ == "timm.models.davit"


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_model_is_the_card_s_and_says_what_it_takes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    entry = name.removeprefix("nearfield_")
    card, _ = catalog.find_entry(entry)
    assert sum(p.numel() for p in model.parameters()) == card.params[entry]
    config = model.pretrained_cfg
    assert model.default_cfg is config and timm.get_pretrained_cfg(name).to_dict() == config
    assert config["architecture"] == name and config["paper_ids"] == f"arXiv:{card.arxiv}"
    assert config["num_classes"] == model.num_classes
    first = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    assert config["first_conv"] == first
    classifiers = {path for path, _ in model.named_modules() if path.startswith("head")}
    named = config["classifier"]
    assert classifiers == ({named} if isinstance(named, str) else set(named))

    data = timm.data.resolve_model_data_config(model)
    channels, side, _ = data["input_size"]
    assert data["input_size"] == (model.get_submodule(first).in_channels, side, side)
    assert len(data["mean"]) == len(data["std"]) == channels
    last = model.feature_info[-1]["reduction"]
    tokens = model.global_pool == "token"
    assert config["pool_size"] == (None if tokens else (-(-side // last),) * 2)
    assert model.output_fmt == ("NLC" if tokens else "NHWC")
    if "image_size" in options_of(name):
        assert options_of(name)["image_size"].default == side


@pytest.mark.parametrize("name", NAMES)
def test_timms_options_reach_every_model(name):
    given = {"num_classes": 7, "in_chans": 1, "drop_rate": 0.0, "device": "meta"}
    has_drop = "drop_path" in options_of(name)
    given["drop_path_rate"] = 0.15 if has_drop else 0.0
    if "image_size" in options_of(name):
        given["img_size"] = (56, 56)
    model = timm.create_model(name, **given)
    assert model.num_classes == 7 and model.head.weight.shape[0] == 7
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert all(p.device.type == "meta" for p in model.parameters())
    if has_drop:
        assert max(m.rate for m in model.modules() if hasattr(m, "rate")) == pytest.approx(0.15)
    maps = timm.models._features.FeatureGetterNet(model, None)  # what features_only makes
    assert maps.feature_info.channels() == [info["num_chs"] for info in model.feature_info]


@pytest.mark.parametrize("name", ["convit_tiny", "tnt_tiny", "inline_deit_tiny", "inline_pvt_tiny"])
def test_positions_are_those_of_img_size(name):
    sized = timm.create_model(f"nearfield_{name}", device="meta", img_size=(64, 96))
    with torch.device("meta"):
        expected = create(name, image_size=(64, 96))
    shapes = {key: value.shape for key, value in expected.state_dict().items()}
    assert {key: value.shape for key, value in sized.state_dict().items()} == shapes
    whole = timm.create_model(f"nearfield_{name}", device="meta").state_dict()
    assert shapes != {key: value.shape for key, value in whole.items()}


def test_a_square_is_a_number_where_models_take_one():
    net = timm.create_model("nearfield_htnet_official", device="meta", img_size=(56, 56))
    assert net.tile == 56


def test_pictures_are_prepared_as_timm_does_for_its_own():
    known = set(timm.list_models())
    compared = 0
    for name in NAMES:
        entry = name.removeprefix("nearfield_")
        twin = TWINS.get(entry, entry)
        if twin not in known:
            continue
        ours, theirs = (timm.get_pretrained_cfg(each) for each in (name, twin))
        compared += 1
        keys = ["mean", "std", "interpolation"]
        if not entry.startswith("davit_large"):  # its windows of 12 are for 384 pixels, and timm says 224
            keys += ["input_size", "pool_size"]
        if theirs.hf_hub_id or theirs.url:  # others are crops of weights that do not exist
            keys.append("crop_pct")
        for key in keys:
            if not (key == "pool_size" and entry.endswith("_fl")):  # 224's, at 768 pixels
                assert getattr(ours, key) == getattr(theirs, key), (name, key)
    assert compared >= 20
    grey = timm.data.resolve_model_data_config(timm.create_model("nearfield_tnt_tiny", depth=1))
    assert grey["mean"] == grey["std"] == (0.5, 0.5, 0.5)
    flow = timm.data.resolve_model_data_config(timm.create_model("nearfield_htnet_blocks4", dim=12))
    pixels = torch.tensor([0.0, 128.0, 255.0])  # go in as they are stored
    assert torch.allclose((pixels / 255 - flow["mean"][0]) / flow["std"][0], pixels)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_nothing_is_pooled_where_timm_asks_for_that(trunk):
    name, options = TRUNKS[trunk]
    torch.manual_seed(0)
    pooled = timm.create_model(name, num_classes=0, **options).eval()
    assert type(pooled).__name__ == trunk
    model = timm.create_model(name, num_classes=0, global_pool="", **options).eval()
    model.load_state_dict(pooled.state_dict())
    x = picture()
    with torch.no_grad():
        assert torch.equal(model(x), pooled.forward_features(x))
        vector = pooled(x)
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert vector.shape == (2, pooled.num_features) and model(x).shape[-1] == pooled.num_features
    own = pooled.global_pool
    assert timm.create_model(name, num_classes=0, global_pool=own, **options).global_pool == own


def test_the_norm_behind_pooling_is_not_left_out():
    net = timm.create_model(DAVIT, num_classes=3, global_pool="").eval()
    nn.init.normal_(net.norm.weight)
    with torch.no_grad():
        features = net.forward_features(picture())
        assert torch.equal(net(picture()), net.head(net.norm(features)))


def test_types_and_devices_are_those_asked_for():
    model = timm.create_model(TINY, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(picture().bfloat16()).shape == (2, 10)


def test_what_a_model_lacks_is_refused_in_a_sentence():
    with pytest.raises(TypeError, match=r"has no option drop_rate, given 0\.1"):
        timm.create_model(TINY, drop_rate=0.1)
    with pytest.raises(TypeError, match="has no option depht"):
        timm.create_model(TINY, depht=3)
    with pytest.raises(TypeError, match="has no option img_size, given 64"):
        timm.create_model(TINY, img_size=64)
    with pytest.raises(TypeError, match=r"has no option drop_path_rate, given 0\.1"):
        timm.create_model("nearfield_htnet_blocks4", drop_path_rate=0.1)
    with pytest.raises(TypeError, match="takes square pictures"):
        timm.create_model("nearfield_htnet_blocks4", img_size=(28, 56))
    with pytest.raises(ValueError, match="no weights to download"):
        timm.create_model(TINY, pretrained=True)
    with pytest.raises(ValueError, match=r"global_pool='avg'.* in its own way only, 'token'"):
        timm.create_model("nearfield_tnt_tiny", depth=1, global_pool="avg")
    with pytest.raises(ValueError, match="leave feature_cls='fx' out"):
        timm.create_model(TINY, features_only=True, feature_cls="fx")


def test_maps_of_the_stages_come_by_features_only():
    pyramid = timm.create_model(TINY, features_only=True)
    channels, reductions = pyramid.feature_info.channels(), pyramid.feature_info.reduction()
    assert (channels, reductions) == ([16, 32, 64], [1, 2, 4])
    for shown, width, reduction in zip(pyramid(picture()), channels, reductions, strict=True):
        assert shown.shape == (2, width, SIDE // reduction, SIDE // reduction)
    pyramid = timm.create_model(TINY, features_only=True, out_indices=(0, -2), feature_cls="getter")
    assert [list(shown.shape) for shown in pyramid(picture())] == [[2, 16, 32, 32], [2, 32, 16, 16]]
    assert pyramid.feature_info.channels() == [16, 32] and len(pyramid.model.stages) == 2
    last = timm.create_model("nearfield_tnt_tiny", depth=3, img_size=SIDE, features_only=True, out_indices=1)
    assert [list(shown.shape) for shown in last(picture())] == [[2, 192, 2, 2]]


def test_official_and_own_checkpoints_load(tmp_path):
    torch.manual_seed(0)
    small = {"num_classes": 5, "depth": 2, "img_size": SIDE}
    theirs = timm.create_model("convit_tiny", local_up_to_layer=1, **small).eval()
    name, small = "nearfield_convit_tiny", {**small, "local_depth": 1}
    own = timm.create_model(name, **small).eval()
    for number, each in enumerate((own, theirs)):
        torch.save({"state_dict": each.state_dict()}, tmp_path / f"{number}.pth")
        overlay = {"file": str(tmp_path / f"{number}.pth"), "num_classes": 5}
        ours = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **small).eval()
        assert torch.allclose(ours(picture()), each(picture()), atol=1e-5)

    def adapted(**changes):
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **{**small, **changes}
        )

    other = adapted(num_classes=7)  # a new head
    assert torch.equal(other.stem.proj.weight, ours.stem.proj.weight) and other.num_classes == 7
    grey = adapted(in_chans=1).eval()  # the first layer's channels added up, as timm does
    assert torch.allclose(grey(picture(channels=1)), ours(picture(channels=1).repeat(1, 3, 1, 1)), atol=1e-4)
    maps = adapted(features_only=True, out_indices=1).eval()
    assert torch.allclose(maps(picture())[0], ours.forward_intermediates(picture(), 1)[1][0], atol=1e-6)

    nearfield.save(own, tmp_path / "own")
    for path in (tmp_path / "0.pth", tmp_path / "own" / "model.safetensors"):
        again = timm.create_model(name, checkpoint_path=str(path), **small).eval()
        assert torch.equal(again(picture()), own(picture()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures of two classes, a dark one and a bright one."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for label, level in (("dark", 0), ("bright", 120)):
        (root / "train" / label).mkdir(parents=True)
        for number in range(4):
            pixels = level + torch.randint(0, 100, (40, 36, 3), generator=generator)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / "train" / label / f"{number}.png")
    return root


@pytest.mark.parametrize("trunk", TRUNKS)
def test_timms_tools_train_an_epoch(trunk, folder, tmp_path):
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.models import load_checkpoint, resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad

    name, options = TRUNKS[trunk]
    options = {"num_classes": 2, **options}
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    model.set_grad_checkpointing()
    data = resolve_data_config({"input_size": (3, SIDE, SIDE)}, model=model)
    loader = create_loader(
        create_dataset("", root=folder, split="train"),
        data["input_size"],
        4,
        is_training=True,
        mean=data["mean"],
        std=data["std"],
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
        auto_augment="rand-m9",
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    _check_groups(model, optimizer)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=1, updates_per_epoch=len(loader))
    ema, loss_of, losses = ModelEmaV3(model, decay=0.9), LabelSmoothingCrossEntropy(0.1), AverageMeter()
    start = copy.deepcopy(model.head.weight)
    model.train()
    for step, (pictures, labels) in enumerate(loader):
        loss = loss_of(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step=step)
        scheduler.step_update(step + 1)
        losses.update(loss.item(), len(labels))
    assert epochs == 1 and losses.count == 8 and not torch.equal(model.head.weight, start)
    model.eval()
    ema.module.eval()
    with torch.no_grad():
        (correct,) = accuracy(ema.module(picture(4)), torch.zeros(4, dtype=torch.long), topk=(1,))
    assert 0 <= float(correct) <= 100

    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), max_history=1)
    saver.save_checkpoint(epoch=0, metric=float(correct))
    path = tmp_path / "last.pth.tar"
    again = timm.create_model(name, **options).eval()
    fresh = create_optimizer_v2(again, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    assert resume_checkpoint(again, str(path), fresh, log_info=False) == 1  # the next epoch
    with torch.no_grad():
        assert torch.equal(again(picture()), model(picture()))
    assert len(fresh.state_dict()["state"]) == len(list(model.parameters()))
    load_checkpoint(again, str(path), use_ema=True)
    ours = create(
        name.removeprefix("nearfield_"),
        weights=path,
        **host._translated(name, options),
    ).eval()  # takes the averaged weights too
    with torch.no_grad():
        averaged = ema.module(picture())
        assert torch.equal(again(picture()), averaged) and torch.equal(ours(picture()), averaged)


def _check_groups(model, optimizer):
    """Rates rise from the stem to the head, and what is short or named by the model is not decayed."""
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        scale |= {id(p): group["lr_scale"] for p in group["params"]}
        decay |= {id(p): group["weight_decay"] for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert scale.keys() == {id(p) for p in parameters.values()}
    rising = [scale[id(p)] for p in parameters.values()]
    assert rising == sorted(rising) and rising[-1] == 1.0
    blocks = [part for part in model.parts if not hasattr(part, "blocks")] or [
        block for part in model.parts for block in part.blocks
    ]
    assert len(set(rising)) >= len(blocks) + 2  # the stem, each block, the head
    for block in blocks:
        assert len({scale[id(p)] for p in block.parameters()}) == 1
    free = model.no_weight_decay()
    for key, p in parameters.items():
        assert (decay[id(p)] == 0) == (p.ndim <= 1 or key in free), key
