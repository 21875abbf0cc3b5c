"""Train the pocket vision-language model: `python pocket/train_vlm.py`, on a CPU or a GPU.

Three stages, each of which goes on from its last checkpoint after a kill: it learns to see (what each patch
shows), to read what it sees (questions, in small pictures first, while seeing stays as it is), and to talk
(all of it together), in a world in which pairs keep together, which becomes a habit. Then the weights and
their card are written into `nearfield_pocket`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_model

HOME = Path(__file__).resolve().parent
sys.path[:0] = [str(HOME), str(HOME.parent)]

import vlm  # noqa: E402
from progress import tell  # noqa: E402

from nearfield.data.scenes import World  # noqa: E402
from nearfield.train import Recipe, fit  # noqa: E402


@dataclass(frozen=True)
class Stage:
    """A part of the way; `worlds` gives the share of it at which each begins."""

    recipe: Recipe
    worlds: tuple[tuple[float, World], ...]
    asks: bool = True  # questions; else what patches show is all there is
    sees: bool = True  # the way from pixels to words learns as well


CLEAN = World(bias=0.35, faint=0.1, clutter=0.6, signs=0.4)
STAGES = {
    "see": Stage(
        Recipe(steps=3600, batch_size=32, lr=4e-3, warmup=100, floor=0.05, seed=1),
        ((0.0, replace(CLEAN, side=48, most=3)), (0.85, replace(CLEAN, side=96))),
        asks=False,
    ),
    "read": Stage(
        Recipe(steps=1200, batch_size=16, lr=4e-3, warmup=50, floor=0.1, seed=2),
        (
            (0.0, replace(CLEAN, side=48, most=2)),
            (0.5, replace(CLEAN, side=72, most=3, clutter=0.8)),
            (0.75, replace(CLEAN, clutter=1.0)),
        ),
        sees=False,
    ),
    "talk": Stage(
        Recipe(steps=800, batch_size=16, lr=2e-3, warmup=50, floor=0.05, seed=3),
        ((0.0, World()),),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HOME / "checkpoints" / "vlm")
    parser.add_argument("--until", choices=STAGES, default="talk", help="the last stage to run")
    parser.add_argument("--steps", type=int, help="of each stage, for a trial")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    learner = vlm.Learner(vlm.build())
    stages = tuple(STAGES)[: tuple(STAGES).index(arguments.until) + 1]
    run = [name for name in stages if (arguments.out / name / "model.safetensors").is_file()]
    if run:  # all that came before is in the weights of the last stage that has been run
        load_model(learner, str(arguments.out / run[-1] / "model.safetensors"))
    for name in stages[stages.index(run[-1]) + 1 if run else 0 :]:
        train(learner, name, arguments.out / name, arguments.steps)
    if stages != tuple(STAGES):
        return
    from evaluate import publish_vlm

    publish_vlm(learner.model, arguments.out, stages)


def train(learner: vlm.Learner, name: str, out: Path, steps: int | None) -> None:
    """One stage, from its last checkpoint on."""
    stage = STAGES[name]
    recipe = replace(
        stage.recipe,
        steps=steps or stage.recipe.steps,
        optimizer="muon",
        shuffle=False,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        clip=1.0,
        log_every=20,
        eval_every=200,
        checkpoint_every=50,
    )
    data = vlm.Lessons(recipe.seed, recipe.steps or 0, recipe.batch_size, stage.worlds, asks=stage.asks)
    loss = vlm.talk if stage.asks else vlm.look
    measure = vlm.answers_right if stage.asks else vlm.patches_right
    learner.learns_to_see(stage.sees)
    fit(learner, data, loss, recipe=recipe, out=out, evaluate=measure, progress=tell(name))
    learner.learns_to_see(True)


if __name__ == "__main__":
    main()
