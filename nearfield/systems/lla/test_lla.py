"""The small models and the untrained estimators behind the claims of local linear attention."""

import pytest
import torch

from nearfield.data import sequences
from nearfield.systems.lla.model import MIXERS, Rows, SequenceModel, accuracy, mqar, tracking
from nearfield.systems.lla.study import average, error, recursive_ridge, regress
from nearfield.train import Recipe, command, recipe


def made(noise=0.0, segment=None):
    draw = torch.Generator().manual_seed(0)
    return sequences.regression(2, tokens=40, dim=3, segment=segment, noise=noise, generator=draw)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_does_not_see_what_comes_later(mixer):
    torch.manual_seed(0)
    model = SequenceModel(mixer, vocabulary=16, dim=16)
    ids = torch.randint(0, 16, (2, 12))
    asked = torch.zeros_like(ids, dtype=torch.bool)
    asked[:, 5] = True
    other = ids.clone()
    other[:, 6:] = (ids[:, 6:] + 1) % 16
    assert torch.allclose(model(ids, asked), model(other, asked), atol=1e-5)
    assert model(ids, asked).shape == (2, 16)


def test_accuracy_counts_what_is_asked_and_nothing_else():
    tokens = sequences.Tokens(torch.tensor([[1, 2, 3]]), torch.tensor([[sequences.IGNORED, 2, 0]]))

    class Echo(torch.nn.Linear):
        def forward(self, ids, asked):
            return torch.nn.functional.one_hot(ids[asked], 4).float()

    assert accuracy(Echo(1, 1), tokens) == 0.5
    assert Rows(tokens)[0]["targets"].tolist() == [sequences.IGNORED, 2, 0]


def test_estimators_predict_from_what_came_before_and_from_that_only():
    pairs = made()
    later = pairs._replace(values=pairs.values.clone())
    later.values[:, 20:] += 1
    for estimate in (
        lambda m: regress(m, 4.0, 0.01),
        lambda m: average(m, 4.0),
        lambda m: recursive_ridge(m, 0.01),
    ):
        assert torch.equal(estimate(pairs)[:, :20], estimate(later)[:, :20])


def test_one_linear_map_is_found_by_regression_and_not_by_averages():
    pairs = made()
    assert error(pairs, recursive_ridge(pairs, 1e-6)) < 0.2  # the first predictions know little
    assert error(pairs, regress(pairs, 1.0, 1e-6)) < error(pairs, average(pairs, 8.0)) / 2


def test_the_recipe_is_whole_and_its_task_trains():
    full = recipe.load(command.find("lla"))
    small = recipe.load(command.find("lla"), ["steps=1", "options.num_sequences=8", "options.vocabulary=64"])
    assert full.steps == 4000 and full.task.endswith("model:mqar")
    task = command.build(small)
    batch = {name: value[None] for name, value in task.data[0].items()}
    assert float(task.loss(task.model, batch).mean.detach()) > 0
    assert set(task.evaluate(task.model)) == {"accuracy"}


@pytest.mark.parametrize("task", [mqar, tracking])
def test_an_unknown_mixer_is_refused(task):
    with pytest.raises(ValueError, match="mixer='mamba' is unknown. Choose one of lla, softmax, gla"):
        task(Recipe(steps=1), mixer="mamba", num_sequences=4)
