"""What `nearfield train` does: a system's recipe read, its task built and trained."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearfield import catalog
from nearfield.train import recipe as recipes
from nearfield.train.loop import Progress, fit
from nearfield.train.recipe import Recipe
from nearfield.train.result import Task, TrainResult

RECIPE = "recipe.toml"


def run(
    system: str,
    *,
    data: str | None = None,
    out: Path | None = None,
    steps: int | None = None,
    settings: Sequence[str] = (),
    resume: bool = True,
    progress: Progress | None = None,
) -> TrainResult | None:
    """Train what a system's `recipe.toml`, or a recipe by its path, says.

    The result, in the main process; `None` in the others of `accelerate launch`. Raises `LookupError` for a
    system without a recipe, naming those with one.
    """
    from nearfield.core.errors import require

    require("accelerate", extra="train")
    overrides = [*settings, *([] if steps is None else [f"steps={steps}"])]
    path = find(system)
    recipe = recipes.load(path, overrides)
    import torch

    torch.manual_seed(recipe.seed)  # the weights that a run starts from are of its seed too
    task = build(recipe, data)
    result = fit(
        task.model,
        task.data,
        task.loss,
        recipe=recipe,
        out=out or Path("out") / "train" / (path.parent.name if path.name == RECIPE else path.stem),
        evaluate=task.evaluate,
        resume=resume,
        progress=progress,
    )
    return result if result.is_main_process else None


def find(system: str, home: Path = catalog.HOME) -> Path:
    """The recipe of a system, or the path itself if it is that of a TOML file."""
    if system.endswith(".toml"):
        return Path(system)
    path = home / catalog.find(system, home).slug / RECIPE
    if not path.is_file():
        have = sorted(found.parent.name for found in home.glob(f"*/{RECIPE}"))
        known = f"These have one: {', '.join(have)}." if have else "No system has one yet."
        raise LookupError(
            f"{system} has no {RECIPE}. {known} The path of a recipe of your own will do as well."
        )
    return path


def build(recipe: Recipe, data: str | None = None) -> Task:
    """The model, data and loss of a recipe's task: `task(recipe, data=…, **recipe.options)`."""
    module, colon, name = recipe.task.partition(":")
    if not colon or not module or not name.isidentifier():
        raise ValueError(f"task={recipe.task!r} must be 'module:function'.")
    try:
        function = catalog.resolve(recipe.task)
    except AttributeError:
        raise LookupError(f"The module {module} of the recipe's task has no {name}.") from None
    parameters = inspect.signature(function).parameters
    allowed = [each for each in parameters if each not in ("recipe", "data")]
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for option in recipe.options:
        if option not in allowed and not open_ended:
            hint = f"{name} has {', '.join(allowed)}." if allowed else f"{name} has none."
            raise ValueError(catalog.unknown("option", option, allowed, hint))
    given: dict[str, Any] = dict(recipe.options)
    if data is not None:
        if "data" not in parameters and not open_ended:
            raise ValueError(f"--data {data}: {recipe.task} makes its own data. Leave it out.")
        given["data"] = data
    task = function(recipe, **given)
    if not isinstance(task, Task):
        raise TypeError(f"{recipe.task} gave a {type(task).__name__}. It must give a nearfield.train.Task.")
    return task
