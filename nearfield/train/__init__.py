"""Training: one short loop on Accelerate, with losses, schedules, averaged weights and low-rank updates."""

from nearfield.train.ema import Ema
from nearfield.train.loop import Diverged, fit
from nearfield.train.losses import Loss
from nearfield.train.recipe import Recipe
from nearfield.train.result import Task, TrainResult

__all__ = ["Diverged", "Ema", "Loss", "Recipe", "Task", "TrainResult", "fit"]
