"""The one training loop, of every recipe, through Accelerate."""

import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from training.checkpoints import CheckpointError, find_checkpoint, save_checkpoint
from training.optimizer import make_optimizer
from training.recipe import Recipe
from training.reporting import FigureMeans, write_figures, write_pictures, write_sounds
from training.schedule import make_scheduler
from training.settings import LoopSettings, SettingsError

logger = get_logger(__name__)


class Progress:
    """Where a run is: saved with every checkpoint."""

    def __init__(self):
        self.step = 0  # optimiser steps of the model
        self.epoch = 0
        self.batches = 0  # batches taken from the current epoch
        self.bad_steps = 0  # steps skipped because something was not finite
        self.skipped: dict[str, int] = {}  # broken samples, by kind

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class WeightAverage(AveragedModel):
    """Average of what is trained. The frozen basis, 134 MB at K = 262,144, is not read at every step."""

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the model's weights; buffers are copied."""
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        averaged, current = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        self.multi_avg_fn(averaged, current, self.n_averaged)
        for copy, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            copy.copy_(buffer)
        self.n_averaged += 1


class Trainer:
    """Trains a recipe's model and writes checkpoints, figures, pictures and the final model.

    Accelerate gives devices, processes, mixed precision and accumulation. The scheduler is stepped here
    and not by Accelerate, which would step it once per process.
    """

    def __init__(self, recipe: Recipe, settings: LoopSettings, accelerator: Accelerator):
        self.recipe, self.settings, self.accelerator = recipe, settings, accelerator
        self.output_dir = Path(settings.output_dir)
        if settings.gradient_checkpointing:
            # The older name is deprecated, the newer one is not in transformers 5.0.
            enable = getattr(recipe.model, "activation_checkpointing_enable", None)
            (enable or recipe.model.gradient_checkpointing_enable)()
        for module in recipe.modules.values():
            module.train()
        for module in recipe.companions:
            module.train().to(accelerator.device)
        self.ema = WeightAverage(
            recipe.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay)
        ).to(accelerator.device)
        # AveragedModel copies the weights at its first update unless told that it has one already; the
        # original averages from the first step on (fixture image_tiny1, train_trace).
        self.ema.n_averaged.fill_(1)
        self.ema.eval()
        self.total_steps = self._count_steps()
        self.progress = Progress()
        self._prepare()
        self.means = FigureMeans()
        self.figures: dict[str, float] | None = None  # of the last validation
        self.saved: Path | None = None  # what the main process has to publish at the end

    def _count_steps(self) -> int:
        settings = self.settings
        try:
            batches = len(self.recipe.train_loader)
        except TypeError:  # a stream has no length
            if settings.max_steps is None:
                raise SettingsError(
                    "max_steps is needed when streaming: a stream has no length"
                ) from None
            return settings.max_steps
        per_process = math.ceil(batches / self.accelerator.num_processes)
        steps = settings.epochs * math.ceil(per_process / settings.gradient_accumulation_steps)
        return min(steps, settings.max_steps or steps)

    def _prepare(self) -> None:
        settings, recipe, accelerator = self.settings, self.recipe, self.accelerator
        optimizers = {
            name: make_optimizer(module, settings) for name, module in recipe.modules.items()
        }
        self.schedulers = [
            make_scheduler(
                optimizer,
                schedule=settings.lr_schedule,
                warmup_steps=settings.warmup_steps,
                total_steps=self.total_steps,
                floor=settings.min_learning_rate / settings.learning_rate,
            )
            for optimizer in optimizers.values()
        ]
        names, count = list(optimizers), len(optimizers)
        *prepared, self.train_loader = accelerator.prepare(
            *recipe.modules.values(), *optimizers.values(), recipe.train_loader
        )
        self.modules = dict(zip(names, prepared[:count], strict=True))
        optimizers = dict(zip(names, prepared[count:], strict=True))
        self.model = prepared[0]
        self.validation_loader = None
        if recipe.validation_loader is not None:
            self.validation_loader = accelerator.prepare(recipe.validation_loader)
        self.stepper = recipe.stepper(
            recipe, accelerator, settings, self.modules, optimizers, self.ema.module
        )
        accelerator.register_for_checkpointing(
            self.ema, *self.schedulers, self.progress, *recipe.companions
        )

    def train(self) -> None:
        """Run to the end, or on from `resume`, and save the averaged model."""
        settings, accelerator, progress = self.settings, self.accelerator, self.progress
        if settings.resume is not None:
            self._resume(settings.resume)
        if progress.step >= self.total_steps:
            logger.info(f"nothing to do: the run is at step {progress.step} of {self.total_steps}")
        bar = tqdm(
            total=self.total_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        self._clock, self._waited = time.perf_counter(), 0.0
        for batch in self._batches():
            stepped = self._train_batch(batch)
            if not stepped:
                continue
            bar.update()
            if progress.step % settings.log_every == 0 or progress.step == self.total_steps:
                bar.set_postfix_str(self._log())
            ends = progress.step == self.total_steps
            if ends or progress.step % settings.validate_every == 0:
                self.validate()
            if ends or progress.step % settings.save_every == 0:
                save_checkpoint(
                    accelerator, self.output_dir, progress.step, settings.keep_checkpoints
                )
        bar.close()
        self._save_model()

    def _batches(self) -> Iterator[dict]:
        """Training batches over epochs, from where the progress stands, until all steps are done."""
        progress = self.progress
        while progress.step < self.total_steps:
            loader: DataLoader = self.train_loader
            loader.set_epoch(progress.epoch)
            if progress.batches:
                loader = self.accelerator.skip_first_batches(loader, progress.batches)
            for batch in self._timed(loader):
                progress.batches += 1
                yield batch
                if progress.step >= self.total_steps:
                    return
            if progress.batches == 0:
                raise SettingsError(
                    "the training set gave no batch: is batch_size too large for it?"
                )
            progress.epoch += 1
            progress.batches = 0

    def _timed(self, loader: DataLoader) -> Iterator[dict]:
        """The loader's batches; adds up how long it kept this process waiting."""
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _train_batch(self, batch: dict) -> bool:
        """One batch; True if the optimisers were due."""
        progress = self.progress
        for name in self.recipe.batch_counts:
            self.means.count(name, batch[name].sum())
        with self.accelerator.accumulate(*self.modules.values()):
            result = self.stepper.step(batch, progress.step)
            self.means.add(result.figures)
            if not self.accelerator.sync_gradients:
                return False
        progress.bad_steps += result.skipped
        with warnings.catch_warnings():
            # Rates follow the run's steps, also where an optimiser skipped one or has not begun.
            warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")
            for scheduler in self.schedulers:
                scheduler.step()
        if not result.skipped:
            self.ema.update_parameters(self.accelerator.unwrap_model(self.model))
        progress.step += 1
        return True

    def _log(self) -> str:
        """Send the window's means to the trackers; returns the progress bar's line."""
        accelerator, progress = self.accelerator, self.progress
        figures, counts = self.means.read(accelerator)
        more, remark = self.stepper.report(progress.step)
        elapsed, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        waited, self._waited = self._waited / elapsed, 0.0
        for name, count in counts.items():
            progress.skipped[name] = progress.skipped.get(name, 0) + count
            if count:
                logger.warning(
                    f"{name}: {count} samples since the last report, {progress.skipped[name]} in all"
                )
            figures[f"data/{name}"] = progress.skipped[name]
        figures |= more | {
            "run/learning_rate": self.schedulers[0].get_last_lr()[0],
            "run/steps_per_second": self.settings.log_every / elapsed,
            "run/data_wait": waited,
            "run/bad_steps": progress.bad_steps,
            "run/epoch": progress.epoch,
        }
        accelerator.log(figures, step=progress.step)
        total = figures.get("generator/total", float("nan"))
        line = f"loss {total:.3f}, {remark}".removesuffix(", ")
        return f"{line}, {waited:.0%} of the time waiting for data"

    def validate(self) -> dict[str, float] | None:
        """Validate the averaged model; figures go to the trackers and to figures.jsonl."""
        if self.validation_loader is None:
            return None
        self.ema.eval()
        result = self.recipe.validate(self.ema.module, self.validation_loader, self.accelerator)
        self.figures = result.figures
        step = self.progress.step
        figures = result.figures | result.diagnostics
        scalars = {k: v for k, v in figures.items() if not isinstance(v, list)}
        self.accelerator.log({f"validation/{k}": v for k, v in scalars.items()}, step=step)
        if self.accelerator.is_main_process:
            write_figures(self.output_dir, step, figures)
            trackers = self.accelerator.trackers
            write_pictures(self.output_dir, step, result.pictures, trackers)
            write_sounds(self.output_dir, step, result.sounds, result.sampling_rate, trackers)
            line = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
            tqdm.write(f"step {step}: {line}")
        return result.figures

    def _resume(self, resume: str) -> None:
        checkpoint = find_checkpoint(self.output_dir, resume)
        if checkpoint is None:
            logger.info("resume: no checkpoint yet, the run starts from the beginning")
            return
        try:
            self.accelerator.load_state(str(checkpoint))
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
            raise CheckpointError(f"cannot load the checkpoint {checkpoint}: {error}") from error
        logger.info(f"resumed from {checkpoint} at step {self.progress.step}")

    def _save_model(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder = self.output_dir / "model"
            self.saved = self.recipe.save(self.ema.module, folder)
            logger.info(f"the averaged model is in {folder}")
        self.accelerator.wait_for_everyone()
