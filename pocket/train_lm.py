"""Train the pocket language models: `python pocket/train_lm.py`, on a CPU or a GPU.

The base model learns to look back in short drills, then from texts and tasks; its twin goes on from there
with instructions and responses. Each stage goes on from its last checkpoint after a kill. Then weights and
cards are written into `nearfield_pocket`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).resolve().parent
sys.path[:0] = [str(HOME), str(HOME.parent)]

import lm  # noqa: E402
from progress import tell  # noqa: E402

from nearfield.train import Recipe, fit  # noqa: E402

STAGES = {
    "drill": Recipe(steps=900, batch_size=48, lr=8e-3, warmup=50, floor=0.5, seed=3),
    "base": Recipe(steps=3000, batch_size=16, lr=5e-3, warmup=100, floor=0.03, seed=1),
    "chat": Recipe(steps=600, batch_size=16, lr=3e-3, warmup=40, floor=0.05, seed=2),
}
WINDOWS: dict[str, dict[str, Any]] = {
    "drill": {"lengths": ((0.0, 64), (0.6, 112)), "shares": (0.4, 0.0), "drills": True},
    "base": {"lengths": ((0.0, 256), (0.93, 512)), "shares": (lm.TASKS, 0.0)},
    "chat": {"lengths": ((0.0, 256),), "shares": (0.1, 0.7)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HOME / "checkpoints" / "lm")
    parser.add_argument("--until", choices=STAGES, default="chat", help="the last stage to run")
    parser.add_argument("--steps", type=int, help="of each stage, for a trial")
    arguments = parser.parse_args()
    corpus = lm.corpus(arguments.out)
    torch.manual_seed(0)
    model = lm.build()
    for name, recipe in STAGES.items():
        recipe = replace(
            recipe,
            steps=arguments.steps or recipe.steps,
            optimizer="muon",
            shuffle=False,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            clip=1.0,
            log_every=20,
            eval_every=250,
            checkpoint_every=50,
        )
        done = arguments.out / name / "model.safetensors"
        if done.is_file():
            from safetensors.torch import load_model

            load_model(model, str(done))
        else:
            data = lm.Windows(corpus, recipe.seed, recipe.steps or 0, recipe.batch_size, **WINDOWS[name])
            measure = lm.judge(corpus, "instruction" if name == "chat" else "recall")
            fit(
                model,
                data,
                lm.loss,
                recipe=recipe,
                out=arguments.out / name,
                evaluate=measure,
                progress=tell(name),
            )
        if name == arguments.until != tuple(STAGES)[-1]:
            return
    from evaluate import publish_lm

    publish_lm(corpus, arguments.out, tuple(STAGES))


if __name__ == "__main__":
    main()
