"""The Accelerator of one run: devices, precision, processes and accumulation are its business."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nearfield.train.recipe import Recipe

REPLICATED = (
    "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_HPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_SDAA",
)  # fmt: skip


@contextmanager
def accelerator_of(recipe: Recipe) -> Iterator[Any]:
    """An Accelerator of the recipe's precision. What it sets for the whole process is taken back."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, is_initialized
    from accelerate.utils import GradientAccumulationPlugin

    before = is_initialized()
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            # a plugin, because a plain number gives way to an environment variable
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=recipe.gradient_accumulation, sync_with_dataloader=False
            ),
        )
        if recipe.mixed_precision == "fp16" and accelerator.scaler is None:
            raise ValueError(
                f"mixed_precision='fp16' needs a GPU; the device is {accelerator.device.type}, where "
                "Accelerate would train in float32 without a word. Set mixed_precision='bf16' or 'no'."
            )
        if accelerator.distributed_type.value not in ("NO", *REPLICATED):
            raise NotImplementedError(
                f"Training with {accelerator.distributed_type.value}, where each process holds a part of the "
                "weights: checkpoints of parts are missing. Launch with plain data parallelism."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
            raise ValueError(
                f"{os.environ['WORLD_SIZE']} processes were started, but Accelerate takes each for the only "
                "one. Without a GPU, launch with ACCELERATE_USE_CPU=true in the environment."
            )
        yield accelerator
    finally:
        if not before:  # otherwise no later run in this process could take another precision
            AcceleratorState._reset_state()
            GradientState._reset_state()
