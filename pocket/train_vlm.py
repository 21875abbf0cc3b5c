"""Train the pocket vision-language model: `python pocket/train_vlm.py`, on a CPU or a GPU.

Three stages, each of which goes on from its last checkpoint after a kill: it learns to see (what each patch
shows), to talk (captions and answers, in small pictures first), and takes up the habit of a world in which
pairs keep together. Then the weights and their card are written into `nearfield_pocket`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

HOME = Path(__file__).resolve().parent
sys.path[:0] = [str(HOME), str(HOME.parent)]

import vlm  # noqa: E402
from progress import tell  # noqa: E402

from nearfield.data.scenes import World  # noqa: E402
from nearfield.train import Recipe, fit  # noqa: E402

CLEAN = World(bias=0.35, faint=0.1, clutter=0.6, signs=0.4)
FULL = World()
STAGES = {
    "see": (
        Recipe(steps=2400, batch_size=32, lr=1.5e-3, warmup=100, floor=0.1, seed=1),
        ((0.0, replace(CLEAN, side=48, most=3)), (0.88, replace(CLEAN, side=96))),
    ),
    "talk": (
        Recipe(steps=4000, batch_size=16, lr=1.5e-3, warmup=200, floor=0.05, seed=2),
        (
            (0.0, replace(CLEAN, side=48, most=2)),
            (0.5, replace(CLEAN, side=72, most=3, clutter=0.8)),
            (0.65, replace(CLEAN, faint=0.2, clutter=1.0)),
        ),
    ),
    "habit": (
        Recipe(steps=800, batch_size=16, lr=4e-4, warmup=50, floor=0.05, seed=3),
        ((0.0, FULL),),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HOME / "checkpoints" / "vlm")
    parser.add_argument("--until", choices=STAGES, default="habit", help="the last stage to run")
    parser.add_argument("--steps", type=int, help="of each stage, for a trial")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    learner = vlm.Learner(vlm.build())
    for name in STAGES:
        train(learner, name, arguments.out / name, arguments.steps)
        if name == arguments.until:
            return
    from evaluate import publish_vlm

    publish_vlm(learner.model, arguments.out)


def train(learner: nn.Module, name: str, out: Path, steps: int | None) -> None:
    """One stage; the weights are read where it has been run."""
    done = out / "model.safetensors"
    if done.is_file():
        from safetensors.torch import load_model

        load_model(learner, str(done))
        return
    recipe, plan = STAGES[name]
    recipe = replace(
        recipe,
        steps=steps or recipe.steps,
        shuffle=False,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        clip=1.0,
        log_every=20,
        eval_every=100,
        checkpoint_every=50,
    )
    data = vlm.Lessons(recipe.seed, recipe.steps or 0, recipe.batch_size, plan, asks=name != "see")
    loss = vlm.look if name == "see" else vlm.talk
    measure = vlm.patches_right if name == "see" else vlm.answers_right
    fit(learner, data, loss, recipe=recipe, out=out, evaluate=measure, progress=tell(name))


if __name__ == "__main__":
    main()
