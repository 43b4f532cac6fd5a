"""The one training loop, of every recipe, through Accelerate."""

import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from training.loop.averaging import WeightAverage
from training.loop.checkpoints import CheckpointStore
from training.loop.finite import BufferKeeper, DivergedError
from training.loop.optimizers import follow_settings, make_optimizer
from training.loop.recipe import Recipe
from training.loop.records import (
    FigureMeans,
    drop_figures_after,
    loss_line,
    naming,
    total_loss,
    write_figures,
    write_pictures,
    write_sounds,
)
from training.loop.run_record import RunRecord
from training.loop.saved_models import BEST, MODEL, ModelFolders
from training.loop.schedule import make_scheduler, set_peak_rate
from training.runtime import sharding
from training.runtime.progress import Progress
from training.runtime.settings import LoopSettings, SettingsError
from training.runtime.step_window import StepWindow
from training.runtime.stop_signals import Stopped, StopRequest

logger = get_logger(__name__)


class Trainer:
    """Trains a recipe's model and writes checkpoints, figures, pictures and the final model.

    Accelerate gives devices, processes, mixed precision and accumulation. The scheduler is stepped here
    and not by Accelerate, which would step it once per process.

    Args:
        record: the settings of all groups; without it neither checkpoints nor models hold any.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: LoopSettings,
        accelerator: Accelerator,
        record: RunRecord | None = None,
    ):
        self.recipe, self.settings, self.accelerator = recipe, settings, accelerator
        self.output_dir, self.record = Path(settings.output_dir), record
        if record is not None:
            record.config = recipe.model.config.to_dict()
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
        )
        self.sharded = sharding.is_sharding(accelerator)
        if self.sharded:
            sharding.shard(self.ema.module, accelerator)
        else:
            self.ema.to(accelerator.device)
        # AveragedModel copies the weights at its first update unless told that it has one already; the
        # original averages from the first step on (fixture image_tiny1, train_trace).
        self.ema.n_averaged.fill_(1)
        self.ema.eval()
        self.total_steps = self._count_steps()
        self.progress = Progress()
        self._prepare()
        self.models = ModelFolders(recipe, self.output_dir, accelerator, record)
        # Without a terminal a bar is noise: the figures come as lines of the log.
        self.plain_log = not sys.stderr.isatty()
        self._waited = 0.0  # seconds for data since the last report

    @property
    def figures(self) -> dict[str, float] | None:
        """Of the last validation."""
        return self.progress.figures

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
        shares = batches / self.accelerator.num_processes
        # As Accelerate shares batches out: what is no full round is dropped, or filled up with the first ones.
        per_process = int(shares) if self.recipe.train_loader.drop_last else math.ceil(shares)
        if per_process == 0:
            raise SettingsError(
                f"the training set has {batches} batch(es) for {self.accelerator.num_processes} "
                "process(es): lower batch_size"
            )
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
        if self.sharded:
            sharding.call_as_forward(self.model, *recipe.forward_methods)
            sharding.call_as_forward(self.ema.module, *recipe.forward_methods)
        # Ranks begin with the weights of the first; so does the average, whatever another rank has drawn.
        self.ema.module.load_state_dict(accelerator.unwrap_model(self.model).state_dict())
        self.validation_loader = None
        if recipe.validation_loader is not None:
            self.validation_loader = accelerator.prepare(recipe.validation_loader)
        self.stepper = recipe.stepper(
            recipe, accelerator, settings, self.modules, optimizers, self.ema.module
        )
        self.means = FigureMeans()
        self.window = StepWindow(lambda result: self.means.add(result.figures, result.weights))
        self.buffers = BufferKeeper([*recipe.modules.values(), *recipe.companions])
        loader = recipe.train_loader
        self.progress.layout = {
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "processes": accelerator.num_processes,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        }
        if isinstance(loader.dataset, IterableDataset):  # its workers share it out
            self.progress.layout["num_workers"] = loader.num_workers
        schedulers = {f"scheduler_{n}": s for n, s in zip(names, self.schedulers, strict=True)}
        companions = {f"companion_{i}": module for i, module in enumerate(recipe.companions)}
        average = sharding.WholeState(self.ema) if self.sharded else self.ema
        self.store = CheckpointStore(
            accelerator,
            self.output_dir,
            settings.keep_checkpoints,
            {"progress": self.progress, "average": average, "stepper": self.stepper}
            | schedulers
            | companions,
            {"means": self.means, "buffers": self.buffers} | self.stepper.rank_states,
            self.record,
        )

    def train(self) -> None:
        """Run to the end, or on from `resume`, and save the averaged model.

        Raises:
            Stopped: if a signal asked for it; the state is saved.
            DivergedError: if values stay non-finite; the checkpoints that there are stay as they are.
            CheckpointError: if a checkpoint cannot be read or written.
        """
        with StopRequest(self.accelerator) as stop:
            try:
                self._train(stop)
            except DivergedError as error:
                advice = "There is no checkpoint yet: begin again with other settings"
                if self.store.last is not None:
                    advice = f"The last good checkpoint is {self.store.last}: resume from it"
                raise DivergedError(f"{error}. {advice}") from None
            # A signal that comes now changes nothing any more.
            if self.models.step_of(MODEL) != self.progress.step:
                self._save_model(last=True)
        logger.info(f"the averaged model is in {self.output_dir / MODEL}")

    def _train(self, stop: StopRequest) -> None:
        settings, progress = self.settings, self.progress
        self._resume(settings.resume)
        if progress.step >= self.total_steps:
            logger.info(f"nothing to do: the run is at step {progress.step} of {self.total_steps}")
        # Closed on the way out of errors too, so that the message comes last.
        with tqdm(
            total=self.total_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=self.plain_log or not self.accelerator.is_local_main_process,
        ) as bar:
            self._clock, self._clock_step = time.perf_counter(), progress.step
            for batch in self._batches():
                stepped = self._train_batch(batch)
                if not stepped:
                    continue
                bar.update()
                if progress.step % settings.log_every == 0 or progress.step == self.total_steps:
                    line = self._log()
                    bar.set_postfix_str(line)
                    if self.plain_log:
                        logger.info(f"step {progress.step} of {self.total_steps}: {line}")
                number = stop.received()
                if number:
                    self._save()
                    message = f"stopped at step {progress.step} of {self.total_steps}: resume=latest goes on"
                    raise Stopped(number, message)
                if self._validation_due():
                    self.validate()
                ends = progress.step == self.total_steps
                if ends or progress.step % settings.save_every == 0:
                    self._save()

    def _save(self) -> None:
        """Save a checkpoint, unless there is something in it that nobody would want to go on from."""
        states = {n: m.state_dict() for n, m in self.recipe.modules.items()}
        states |= {f"{n} optimizer": o.state_dict() for n, o in self.stepper.optimizers.items()}
        self.stepper.guard.check(states | {"average": self.ema.state_dict()})
        self.store.save(self.progress.step)
        self._save_model()

    def _batches(self) -> Iterator[dict]:
        """Training batches over epochs, from where the progress stands, until all steps are done."""
        progress = self.progress
        while progress.step < self.total_steps:
            loader: DataLoader = self.train_loader
            loader.set_epoch(progress.epoch)
            if progress.batches:
                loader = self.accelerator.skip_first_batches(loader, progress.batches)
            # A new iterator draws a seed for its workers; a run that was not interrupted has fewer of them.
            random_state = torch.get_rng_state()
            iterator = iter(loader)
            batch = self._next(iterator)
            torch.set_rng_state(random_state)
            while batch is not None:
                progress.batches += 1
                yield batch
                if progress.step >= self.total_steps:
                    return
                batch = self._next(iterator)
            if progress.batches == 0:
                raise SettingsError(
                    "the training set gave no batch: is batch_size too large for it?"
                )
            progress.epoch += 1
            progress.batches = 0

    def _next(self, batches: Iterator[dict]) -> dict | None:
        """The next batch, None at the end; adds up how long that kept this process waiting."""
        start = time.perf_counter()
        batch = next(batches, None)
        self._waited += time.perf_counter() - start
        return batch

    def _train_batch(self, batch: dict) -> bool:
        """One batch; True if the optimisers were due."""
        progress = self.progress
        for name in self.recipe.batch_counts:
            self.means.count(name, batch[name].sum())
        if not self.window:
            self.buffers.keep()
        self.stepper.note_batch(batch)
        with self.accelerator.accumulate(*self.modules.values()):
            result = self.stepper.step(batch, progress.step)
            self.window.note(result)
            if not self.accelerator.sync_gradients:
                return False
        self.stepper.settle(bool(result.skipped))
        self.window.settle(bool(result.skipped))
        if result.skipped:
            self.buffers.restore()
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
        steps, self._clock_step = progress.step - self._clock_step, progress.step
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
            "run/steps_per_second": steps / elapsed,
            "run/data_wait": waited,
            "run/bad_steps": progress.bad_steps,
            "run/overflows": self.stepper.guard.overflows,
            "run/epoch": progress.epoch,
        }
        accelerator.log(figures, step=progress.step)
        losses = loss_line(figures) if self.plain_log else f"loss {total_loss(figures):.3f}"
        line = f"{losses}, {remark}".removesuffix(", ")
        return f"{line}, {waited:.0%} of the time waiting for data"

    def validate(self) -> dict[str, float] | None:
        """Validate the averaged model; figures go to the trackers and to figures.jsonl."""
        if self.validation_loader is None:
            return None
        self.ema.eval()
        # A validation more or less, as at the end of a part of a run, leaves the training as it is.
        random_state = torch.get_rng_state()
        result = self.recipe.validate(self.ema.module, self.validation_loader, self.accelerator)
        if self.sharded:
            sharding.reshard(self.ema.module)
        torch.set_rng_state(random_state)
        step = self.progress.step
        self.progress.figures, self.progress.validated = result.figures, step
        figures = result.figures | result.diagnostics
        scalars = {k: v for k, v in figures.items() if not isinstance(v, list)}
        self.accelerator.log({f"validation/{k}": v for k, v in scalars.items()}, step=step)
        if self.accelerator.is_main_process:
            trackers = self.accelerator.trackers
            with naming(self.output_dir):
                write_figures(self.output_dir, step, figures)
                write_pictures(self.output_dir, step, result.pictures, trackers)
                write_sounds(self.output_dir, step, result.sounds, result.sampling_rate, trackers)
            line = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
            tqdm.write(f"step {step}: {line}")
        if self.models.is_best(result.figures):
            self._save_model(BEST)
        return result.figures

    def _resume(self, resume: str | None) -> None:
        progress, accelerator = self.progress, self.accelerator
        resumed = self.store.start(resume)
        if resumed:
            for scheduler in self.schedulers:
                follow_settings(scheduler.optimizer, self.settings)
                set_peak_rate(scheduler, self.settings.learning_rate)
            logger.info(f"resumed from {self.store.last} at step {progress.step}")
        elif resume is not None:
            logger.info("resume: no checkpoint yet, the run starts from the beginning")
        if accelerator.is_main_process:
            drop_figures_after(self.output_dir, progress.validated)
        self.models.start(progress.step, resumed=resumed, ends=progress.step >= self.total_steps)
        accelerator.wait_for_everyone()
        if self._validation_due():  # a signal came between the step and its validation
            self.validate()

    def _validation_due(self) -> bool:
        step = self.progress.step
        regular = step % self.settings.validate_every == 0
        return self.progress.validated < step and (regular or step == self.total_steps)

    def _save_model(self, name: str = MODEL, last: bool = False) -> None:
        """Save the average as `name` in output_dir; only the last one that cannot be written ends the run."""
        step = self.progress.step
        figures = self.figures if self.progress.validated == step else None
        # A save more or less, as at a stop, leaves the training as it is.
        random_state = torch.get_rng_state()
        model = sharding.whole_copy(self.ema.module) if self.sharded else self.ema.module
        self.models.save(name, model, step, figures, last=last)
        torch.set_rng_state(random_state)
