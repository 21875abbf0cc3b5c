"""The training loop, on Accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearfield.core.errors import require
from nearfield.train import checkpoint, randomness
from nearfield.train.devices import accelerator_of
from nearfield.train.ema import Ema
from nearfield.train.log import Log
from nearfield.train.losses import Loss
from nearfield.train.optimizer import make_optimizer
from nearfield.train.order import Order, batches
from nearfield.train.recipe import Recipe
from nearfield.train.result import Evaluate, LossFunction, TrainResult
from nearfield.train.schedules import Schedule

Progress = Callable[[str, float, float], None]
WEIGHTS, CHECKPOINTS, LOG = "model.safetensors", "checkpoints", "log.jsonl"


class Diverged(ValueError):
    """The loss or the gradient is no number any more."""


def fit(
    model: nn.Module,
    data: Any,
    loss: LossFunction,
    *,
    recipe: Recipe,
    out: str | Path | None = None,
    evaluate: Evaluate | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> TrainResult:
    """Train the model in place, and tell how it went.

    `data[i]` is a dict; `loss(model, batch)` a `Loss`, or a scalar that is the mean over the batch. With
    `out`, that folder gets `log.jsonl`, `checkpoints` and at the end `model.safetensors`; a run that was
    killed goes on from its last checkpoint and gives the losses that it would have given. `resume=False`
    begins anew there. With `recipe.ema` the model ends with its averaged weights.
    """
    require("accelerate", extra="train")
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or not len(data):
        raise TypeError(
            f"data is a {type(data).__name__}, which has no samples by number. Give a dataset with a length "
            "and data[i]; for a stream, make sample i from the number i and set shuffle=false."
        )
    was_training, own_forward = model.training, vars(model).get("forward")
    with randomness.kept(), accelerator_of(recipe) as accelerator:
        # each process draws its own, as dropout needs; the order of samples does not depend on them
        randomness.seed(recipe.seed + accelerator.process_index)
        try:
            run = _Run(accelerator, model, data, loss, recipe, None if out is None else Path(out), evaluate)
            return run.go(resume, progress if accelerator.is_main_process else None)
        finally:
            model.train(was_training)
            _give_back(accelerator, model, own_forward)


class _Run:
    """One run: what it is made of, and where it stands."""

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        data: Any,
        loss: LossFunction,
        recipe: Recipe,
        out: Path | None,
        evaluate: Evaluate | None,
    ):
        self.accelerator, self.data, self.loss, self.evaluate = accelerator, data, loss, evaluate
        self.recipe, self.out, self.plain = recipe, out, model
        self.num_processes = accelerator.num_processes
        self.steps = recipe.total(len(data), self.num_processes)
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(model, recipe))
        # the wrapper is for fp16; without that it searches for an optional package at every step, which shows
        self.stepping = self.optimizer if accelerator.scaler is not None else self.optimizer.optimizer
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.schedule = Schedule(
            recipe.schedule,
            steps=self.steps,
            warmup=recipe.warmup_steps(self.steps),
            floor=recipe.floor,
            patience=recipe.patience,
        )
        self.ema = None if recipe.ema is None else Ema(model, recipe.ema, warmup=recipe.ema_warmup)
        self.step, self.seconds = 0, 0.0
        device = accelerator.device
        self.exact = torch.float32 if device.type == "mps" else torch.float64
        self.seen = torch.zeros(2, dtype=self.exact, device=device)  # total and count since the last record
        self.norm: Tensor | None = None

    def go(self, resume: bool, progress: Progress | None) -> TrainResult:
        start = self._begin(resume)
        self.log = Log(
            None if self.out is None else self.out / LOG,
            until=self.step,
            writes=self.accelerator.is_main_process,
        )
        self.accelerator.wait_for_everyone()
        # the clock of the run goes on where it stopped; that of the record starts anew
        self.began = time.perf_counter() - self.seconds
        self.marked, self.marked_step = time.perf_counter(), self.step
        self.plain.train()
        self.plain.zero_grad()
        upcoming, told = self._batches(), 0.0
        while self.step < self.steps:
            self._update(upcoming)
            if self._due(self.recipe.log_every):
                self._record()
            if self.evaluate is not None and self._due(self.recipe.eval_every):
                self._evaluate(self.evaluate)
            if self.out is not None and self._saves():
                self._save(self.out / CHECKPOINTS)
            if progress is not None and (time.perf_counter() - told > 0.1 or self.step == self.steps):
                told = time.perf_counter()
                progress("training", self.step, self.steps)
        if self.ema is not None:
            self.ema.copy_to(self.plain)
        if self.out is not None and self.accelerator.is_main_process:
            self._save_weights(self.out / WEIGHTS)
        self.accelerator.wait_for_everyone()
        return TrainResult(
            steps=self.step,
            seconds=time.perf_counter() - self.began,
            records=tuple(self.log.records),
            num_parameters=sum(p.numel() for p in self.parameters),
            num_processes=self.num_processes,
            is_main_process=self.accelerator.is_main_process,
            resumed_from=start,
            out=self.out,
        )

    def _due(self, every: int) -> bool:
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def _batches(self) -> Iterator[dict[str, Any]]:
        several = self.recipe.gradient_accumulation
        order = Order(
            len(self.data),
            self.recipe.batch_size,
            seed=self.recipe.seed,
            shuffle=self.recipe.shuffle,
            process=self.accelerator.process_index,
            num_processes=self.num_processes,
            start=self.step * several,
            stop=self.steps * several,
        )
        return batches(self.data, order, device=self.accelerator.device, workers=self.recipe.workers)

    def _update(self, upcoming: Iterator[dict[str, Any]]) -> None:
        """One step: gradients of total / count over all batches and processes, exactly."""
        recipe, accelerator = self.recipe, self.accelerator
        several = recipe.gradient_accumulation
        first = counted = torch.zeros((), dtype=self.exact, device=accelerator.device)
        for number in range(several):
            batch = next(upcoming)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    total, count = self._loss(batch)
                if number == 0:
                    first = self._mean_count(count)  # the final count is known only after the last batch
                accelerator.backward(total / first.to(total.dtype))
            counted = counted + count
            self.seen += torch.stack([total.detach().to(self.exact), count])
        if several > 1:  # Accelerate divided by their number
            factor = several * first / self._mean_count(counted)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        rate = recipe.lr * self.schedule.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.step += 1
        if recipe.clip is not None or self._due(recipe.log_every) or self._saves():
            self.norm = accelerator.clip_grad_norm_(self.parameters, recipe.clip or math.inf)
        self.stepping.step()
        self.stepping.zero_grad()
        if self.ema is not None:
            self.ema.update(self.plain)

    def _loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        from accelerate.utils import find_batch_size

        found = self.loss(self.model, batch)
        if isinstance(found, Loss):
            self.counts = "tokens"
            total, count = found.total, found.count
        else:
            if not isinstance(found, Tensor) or found.ndim:
                given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise TypeError(
                    f"The loss gave {given}. It must give a scalar tensor, the mean over the batch, or a "
                    "nearfield.train.Loss(total, count)."
                )
            self.counts = "samples"
            count = find_batch_size(batch)
            if count is None:
                raise TypeError(
                    "The batch holds no tensor, so its size is unknown. Let the loss give a Loss."
                )
            total = found * count
        if total.dtype in (torch.bfloat16, torch.float16):
            total = total.float()
        return total, torch.as_tensor(count, dtype=self.exact, device=total.device)

    def _mean_count(self, count: Tensor) -> Tensor:
        """The count of a process on average; gradients are averaged over processes too."""
        return (self._summed(count) / self.num_processes).clamp(min=1e-12)

    def _summed(self, tensor: Tensor) -> Tensor:
        return tensor if self.num_processes == 1 else self.accelerator.reduce(tensor, "sum")

    def _record(self) -> None:
        total, count = self._summed(self.seen).tolist()
        self.seen.zero_()
        loss = total / count if count else 0.0
        norm = float(self.norm) if self.norm is not None else math.nan
        self._check(loss, norm)
        now = time.perf_counter()
        passed = max(now - self.marked, 1e-9)
        per_step = self.recipe.batch_size * self.recipe.gradient_accumulation * self.num_processes
        samples = per_step * (self.step - self.marked_step)
        self.marked, self.marked_step = now, self.step
        record = {
            "step": self.step,
            "loss": loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "seconds": round(now - self.began, 4),
            "samples_per_second": round(samples / passed, 2),
        }
        if self.counts == "tokens":
            record["tokens_per_second"] = round(count / passed, 2)
        self.log.add(record)
        if self.evaluate is None or not self.recipe.eval_every:
            self.schedule.observe(loss)

    def _check(self, loss: float, norm: float) -> None:
        """In fp16 a gradient that overflows is skipped by the scaler, which is no divergence."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            return
        kept = "" if self.out is None else " The last checkpoint is from before."
        raise Diverged(
            f"At step {self.step:,} the loss is {loss} and the gradient norm {norm}. Lower lr, or set "
            f"clip=1.0 or a longer warmup.{kept}"
        )

    def _evaluate(self, evaluate: Evaluate) -> None:
        """Figures on the averaged weights, if there are any. Training's random numbers are left alone."""
        self.plain.eval()
        swapped = nullcontext() if self.ema is None else self.ema.swapped(self.plain)
        try:
            with randomness.kept(), swapped, torch.no_grad():
                found = {name: float(value) for name, value in evaluate(self.plain).items()}
        finally:
            self.plain.train()
        if self.num_processes > 1:  # all must lower the learning rate at the same step
            names, device = sorted(found), self.accelerator.device
            mean = self.accelerator.reduce(
                torch.tensor([found[n] for n in names], dtype=self.exact, device=device), "mean"
            )
            found = dict(zip(names, mean.tolist(), strict=True))
        self.log.add({"step": self.step, "evaluate": found})
        if self.recipe.schedule == "plateau" and self.recipe.eval_every:
            if "loss" not in found:
                raise ValueError(
                    f"schedule='plateau' follows the loss of evaluate, which gave {', '.join(found)}. Name "
                    "one figure loss, or set eval_every=0 to follow the training loss."
                )
            self.schedule.observe(found["loss"])

    def _saves(self) -> bool:
        return self.out is not None and self._due(self.recipe.checkpoint_every)

    def _begin(self, resume: bool) -> int | None:
        """Go on from the newest checkpoint; the step it is of, or `None` where the run begins."""
        if self.out is None:
            return None
        self.out.mkdir(parents=True, exist_ok=True)
        folder = self.out / CHECKPOINTS
        if not resume:
            if self.accelerator.is_main_process:
                checkpoint.clear(folder)
                (self.out / LOG).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            return None
        found = checkpoint.newest(folder)
        if found is None:
            return None
        state, tensors = found
        changed = self.recipe.differs(state["recipe"])
        if changed or state["num_processes"] != self.num_processes:
            what = ", ".join(changed) or f"the number of processes ({state['num_processes']} then)"
            raise ValueError(
                f"{folder} is of a run that differs in {what}. Give the same settings to go on, or --fresh "
                "(resume=False) to begin anew."
            )
        if state["step"] > self.steps:
            raise ValueError(f"{folder} is at step {state['step']:,}, beyond the {self.steps:,} asked for.")
        checkpoint.load_model(self.plain, tensors["model"])
        checkpoint.load_optimizer(self.optimizer.optimizer, tensors.get("optimizer", {}))
        if self.ema is not None:
            self.ema.load(tensors["ema"], state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.schedule.load(state["schedule"])
        mine = tensors[f"process-{self.accelerator.process_index}"]
        self.seen.copy_(mine.pop("seen"))
        randomness.restore(mine)
        self.step, self.seconds = state["step"], state["seconds"]
        return self.step

    def _save(self, folder: Path) -> None:
        from accelerate.utils import gather_object

        seen, norm = self._summed(self.seen).tolist(), float(self.norm) if self.norm is not None else 0.0
        self._check(seen[0], norm)
        mine = {**randomness.randomness(), "seen": self.seen.cpu()}
        everyone = gather_object([mine]) if self.num_processes > 1 else [mine]
        if self.accelerator.is_main_process:
            tensors = {
                "model": checkpoint.model_tensors(self.plain),
                "optimizer": checkpoint.optimizer_tensors(self.optimizer.optimizer),
                **{f"process-{i}": each for i, each in enumerate(everyone)},
            }
            state: dict[str, Any] = {
                "recipe": self.recipe.json(),
                "num_processes": self.num_processes,
                "seconds": time.perf_counter() - self.began,
                "schedule": self.schedule.state(),
            }
            if self.ema is not None:
                tensors["ema"], state["ema"] = self.ema.state()
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            checkpoint.write(folder, self.step, {k: t for k, t in tensors.items() if t}, state)
        self.accelerator.wait_for_everyone()

    def _save_weights(self, path: Path) -> None:
        from safetensors.torch import save_model

        partial = path.with_name(f".{path.name}.part")
        save_model(self.plain, str(partial))
        partial.replace(path)


def _give_back(accelerator: Any, model: nn.Module, forward: Any) -> None:
    """Take Accelerate's mixed precision off the model, and the `forward` that it leaves on the instance."""
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)
    if forward is not None:
        model.forward = forward
