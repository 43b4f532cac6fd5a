"""Batches of a run over its epochs, and where it stands in them."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from training.data.loader import Loader
from training.data.stream_loader import StreamLoader
from training.loop.settings import LoopSettings
from training.runtime.settings import SettingsError

logger = get_logger(__name__)

ORDER = 2  # version of training.data.order; checkpoints of the first one have none


class Progress:
    """Position of a run: saved with every checkpoint."""

    def __init__(self):
        self.step = 0  # optimiser steps of the model
        self.epoch = 0
        self.batches = 0  # batches taken from the current epoch
        self.bad_steps = 0  # steps skipped because something was not finite
        self.skipped: dict[str, int] = {}  # broken samples, by kind
        self.validated = 0  # step of the last validation
        self.figures: dict[str, float] | None = None  # of the last validation
        self.layout: dict[str, int] = {}  # what the order of the data depends on

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        layout, self.layout = self.layout, {}
        vars(self).update({name: state[name] for name in vars(self)})
        changed = [
            f"{k} {self.layout.get(k)} -> {v}" for k, v in layout.items() if v != self.layout.get(k)
        ]
        if changed:
            logger.warning(
                f"resume: {', '.join(changed)}: the run goes on at the same place in the data, but not with "
                "the very figures that it would have had"
            )
            per_batch, before = (x["batch_size"] * x["processes"] for x in (layout, self.layout))
            self.batches = self.batches * before // per_batch
        self.layout = layout


def count_steps(loader: Loader, settings: LoopSettings, processes: int) -> int:
    """Return the number of optimiser steps of a run.

    Args:
        loader: of all processes, not yet prepared.

    Raises:
        SettingsError: if a stream does not end by itself, or there are fewer batches than processes.
    """
    try:
        batches = len(loader)
    except TypeError:  # a stream has no length
        if settings.max_steps is None:
            raise SettingsError(
                "max_steps is needed when streaming: a stream has no length"
            ) from None
        return settings.max_steps
    shares = batches / processes
    # As Accelerate shares batches out: what is no full round is dropped, or filled up with the first ones.
    per_process = int(shares) if loader.drop_last else math.ceil(shares)
    if per_process == 0:
        raise SettingsError(
            f"the training set has {batches} batch(es) for {processes} process(es): lower batch_size"
        )
    steps = settings.epochs * math.ceil(per_process / settings.gradient_accumulation_steps)
    return min(steps, settings.max_steps or steps)


def data_layout(loader: Loader, settings: LoopSettings, processes: int) -> dict[str, int]:
    """Return what the order of the data depends on."""
    layout = {
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "processes": processes,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "order": ORDER,
    }
    if isinstance(loader, StreamLoader):  # its workers share it out
        layout["num_workers"] = loader.num_workers
    return layout


class TrainingBatches:
    """Batches over epochs, from where the progress stands, until all steps are done.

    Args:
        loader: prepared.
        progress: whose epoch and batches are counted here.
    """

    def __init__(
        self, loader: Loader, accelerator: Accelerator, progress: Progress, total_steps: int
    ):
        self.loader, self.accelerator = loader, accelerator
        self.progress, self.total_steps = progress, total_steps
        self._waited = 0.0

    def __iter__(self) -> Iterator[dict]:
        progress = self.progress
        while progress.step < self.total_steps:
            loader = self.loader
            loader.set_epoch(progress.epoch)
            if progress.batches:
                loader = rest_of_epoch(loader, self.accelerator, progress.epoch, progress.batches)
            # A new iterator draws a seed for its workers; a run that was not interrupted has fewer of them.
            with same_random_numbers():
                iterator = iter(loader)
                batch = self._next(iterator)
            while batch is not None:
                progress.batches += 1
                yield batch
                if progress.step >= self.total_steps:
                    return
                batch = self._next(iterator)
            if progress.batches == 0:
                raise SettingsError(
                    f"the training set has too few samples for {self.accelerator.num_processes} process(es) "
                    f"with a batch of {loader.batch_size} each: lower batch_size"
                )
            progress.epoch += 1
            progress.batches = 0

    def waited(self) -> float:
        """Return the seconds that this process has waited for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _next(self, batches: Iterator[dict]) -> dict | None:
        """Return the next batch, None at the end."""
        start = time.perf_counter()
        batch = next(batches, None)
        self._waited += time.perf_counter() - start
        return batch


def rest_of_epoch(loader: Loader, accelerator: Accelerator, epoch: int, batches: int) -> Loader:
    """Return what of an epoch lies behind so many batches.

    Args:
        loader: prepared, and set to the epoch.
    """
    if isinstance(loader, StreamLoader):
        loader.skip(epoch, batches)
        return loader
    return accelerator.skip_first_batches(loader, batches)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Keep the training's random numbers as if nothing had been done meanwhile."""
    random_state = torch.get_rng_state()
    yield
    torch.set_rng_state(random_state)
