"""The one training loop, of every recipe, through Accelerate."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from training.data.stream_loader import StreamLoader
from training.loop.averaging import WeightAverage
from training.loop.batches import (
    Progress,
    TrainingBatches,
    count_steps,
    data_layout,
    same_random_numbers,
)
from training.loop.checkpoints import CheckpointStore
from training.loop.finite import BufferKeeper, DivergedError
from training.loop.optimizers import follow_settings, set_peak_rate, step_all
from training.loop.preparation import prepare, set_modes
from training.loop.recipe import Recipe
from training.loop.records import drop_figures_after, write_validation
from training.loop.reports import Reports
from training.loop.run_record import RunRecord
from training.loop.saved_models import BEST, MODEL, ModelFolders
from training.loop.settings import LoopSettings
from training.runtime.step_window import StepWindow
from training.runtime.stop_signals import Stopped, StopRequest
from training.runtime.unwrapped import unwrapped

logger = get_logger(__name__)


class Trainer:
    """Trains a recipe's model and writes checkpoints, figures, images and the final model.

    Accelerate gives devices, processes, mixed precision and accumulation.

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
        self.output_dir = Path(settings.output_dir)
        if record is not None:
            record.config = recipe.model.config.to_dict()
        set_modes(recipe, settings, accelerator)
        self.ema = WeightAverage(recipe.model, settings.ema_decay, accelerator)
        processes = accelerator.num_processes
        self.total_steps = total = count_steps(recipe.train_loader, settings, processes)
        self.progress = Progress()
        self.progress.layout = data_layout(recipe.train_loader, settings, processes)
        prepared = prepare(recipe, settings, accelerator, self.ema, total)
        self.modules, self.schedulers = prepared.modules, prepared.schedulers
        self.model = next(iter(self.modules.values()))
        self.batches = TrainingBatches(prepared.train_loader, accelerator, self.progress, total)
        self.validation_loader = prepared.validation_loader
        parts = self.modules, prepared.optimizers, self.ema.module
        self.stepper = recipe.stepper(recipe, accelerator, settings, *parts, total)
        self.reports = Reports(recipe, accelerator, self.progress)
        means = self.reports.means
        self.window = StepWindow(lambda result: means.add(result.figures, result.weights))
        self.buffers = BufferKeeper([*recipe.modules.values(), *recipe.companions])
        self.store = self._make_store(record)
        self.models = ModelFolders(recipe, self.output_dir, accelerator, record)

    def _make_store(self, record: RunRecord | None) -> CheckpointStore:
        """All that makes up the state of a run, beside what Accelerate saves."""
        shared = {
            "progress": self.progress,
            "average": self.ema.for_checkpoint(),
            "stepper": self.stepper,
        }
        schedulers = zip(self.modules, self.schedulers, strict=True)
        shared |= {f"scheduler_{name}": scheduler for name, scheduler in schedulers}
        companions = enumerate(self.recipe.companions)
        shared |= {f"companion_{number}": module for number, module in companions}
        per_rank = {"means": self.reports.means, "buffers": self.buffers}
        per_rank |= self.stepper.rank_states
        if isinstance(self.batches.loader, StreamLoader):
            per_rank["stream"] = self.batches.loader
        keep = self.settings.keep_checkpoints
        return CheckpointStore(self.accelerator, self.output_dir, keep, shared, per_rank, record)

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
            if 0 < self.progress.step <= self.progress.bad_steps:
                raise DivergedError(
                    "no step of this run was finite, so nothing was trained: look at the losses' weights, the "
                    "learning rate and the data"
                )
            # A signal that comes now changes nothing any more.
            if self.models.step_of(MODEL) != self.progress.step:
                self._save_model(last=True)
        logger.info(f"the averaged model is in {self.output_dir / MODEL}")

    def _train(self, stop: StopRequest) -> None:
        settings, progress, total = self.settings, self.progress, self.total_steps
        self._resume(settings.resume)
        if progress.step >= total:
            logger.info(f"nothing to do: the run is at step {progress.step} of {total}")
        plain = self.reports.plain_log
        hidden = plain or not self.accelerator.is_local_main_process
        # Closed on the way out of errors too, so that the message comes last.
        with tqdm(
            total=total, initial=progress.step, desc="training", unit="step", disable=hidden
        ) as bar:
            self.reports.start()
            for batch in self.batches:
                if not self._train_batch(batch):
                    continue
                bar.update()
                ends = progress.step == total
                if ends or progress.step % settings.log_every == 0:
                    line = self._log()
                    bar.set_postfix_str(line)
                    if plain:
                        logger.info(f"step {progress.step} of {total}: {line}")
                if number := stop.received():
                    self._save()
                    message = f"stopped at step {progress.step} of {total}: resume=latest goes on"
                    raise Stopped(number, message)
                if self._validation_due():
                    self.validate()
                if ends or progress.step % settings.save_every == 0:
                    self._save()

    def _train_batch(self, batch: dict) -> bool:
        """Train on one batch; True if the optimisers were due."""
        progress = self.progress
        for name in self.recipe.batch_counts:
            self.reports.means.count(name, batch[name].sum())
        if not self.window:  # the first batch of a step
            self.buffers.keep()
        self.stepper.note_batch(batch)
        with self.accelerator.accumulate(*self.modules.values()):
            result = self.stepper.step(batch, progress.step)
            self.window.note(result)
            if not self.accelerator.sync_gradients:
                return False
        skipped = bool(result.skipped)
        self.stepper.settle(skipped)
        self.window.settle(skipped)
        step_all(self.schedulers)
        if skipped:
            self.buffers.restore()
            progress.bad_steps += 1
        else:
            self.ema.update_parameters(unwrapped(self.accelerator, self.model))
        progress.step += 1
        return True

    def _log(self) -> str:
        """Report the figures of the steps; returns the progress bar's line."""
        figures, remark = self.stepper.report(self.progress.step)
        figures["run/learning_rate"] = self.schedulers[0].get_last_lr()[0]
        figures["run/overflows"] = self.stepper.guard.overflows
        return self.reports.send(figures, remark, self.batches.waited())

    def _validation_due(self) -> bool:
        step = self.progress.step
        regular = step % self.settings.validate_every == 0
        return self.progress.validated < step and (regular or step == self.total_steps)

    def validate(self) -> dict[str, float] | None:
        """Validate the averaged model and record its figures; save it if it is the best."""
        if self.validation_loader is None:
            return None
        # A validation more or less, as at the end of a part of a run, leaves the training as it is.
        with same_random_numbers():
            model = self.ema.eval().module
            result = self.recipe.validate(model, self.validation_loader, self.accelerator)
            self.ema.free()
        self.progress.figures, self.progress.validated = result.figures, self.progress.step
        write_validation(self.output_dir, self.progress.step, result, self.accelerator)
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

    def _save(self) -> None:
        """Save a checkpoint, unless there is something in it that nobody would want to continue from."""
        states = {n: m.state_dict() for n, m in self.recipe.modules.items()}
        states |= {f"{n} optimizer": o.state_dict() for n, o in self.stepper.optimizers.items()}
        self.stepper.guard.check(states | {"average": self.ema.state_dict()})
        self.store.save(self.progress.step)
        self._save_model()

    def _save_model(self, name: str = MODEL, last: bool = False) -> None:
        """Save the average as `name` in output_dir; only the last one that cannot be written ends the run."""
        progress = self.progress
        figures = progress.figures if progress.validated == progress.step else None
        # A save more or less, as at a stop, leaves the training as it is.
        with same_random_numbers():
            self.models.save(name, self.ema.for_saving(), progress.step, figures, last=last)
