"""Batches of a stream on one rank: where they stand, and when all ranks end."""

import logging
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from training.data.stream import SampleStream, Start
from training.runtime.stop_signals import shield_worker

logger = logging.getLogger(__name__)

# A rank waits for one whose source is slow, as for one that downloads.
PATIENCE = timedelta(hours=3)


class StreamLoader(DataLoaderStateMixin):
    """Loader of a SampleStream, which Accelerate leaves as it is: each rank reads for itself.

    In training all ranks end an epoch when the first of them has no full batch left; what others still have is
    left out of this epoch. In validation they go on until all are done, and those that are done before get
    blanks, marked invalid. Batches are on Accelerate's device then, as those of a loader that it prepares.

    Args:
        together: whether ranks go through batches together; otherwise each gets what it has, on the CPU.
    """

    def __init__(self, dataset: SampleStream, together: bool):
        self.dataset, self.together = dataset, together
        self.batch_size, self.num_workers = dataset.batch_size, dataset.num_workers
        self.prefetch_factor = None
        self.gradient_state, self._drop_last = GradientState(), dataset.train
        self._loader = self._make(self.num_workers > 0)
        self._group: dist.ProcessGroup | None = None
        self._state: dict | None = None
        self._loaded: dict | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next epoch."""
        self.dataset.set_epoch(epoch)

    def first_batch(self) -> dict[str, Tensor]:
        """Return the first batch, on the CPU, by workers that then end."""
        return next(self._batches(self._make(persistent=False)))[0]

    def skip(self, epoch: int, batches: int) -> None:
        """Let an epoch begin behind so many batches of this rank: at the state that was loaded, if it fits.

        It does not where the ranks, the workers or the batch size were others; then rows are read up to there.
        """
        state, self._loaded = self._loaded, None
        if state is not None and state["epoch"] == epoch:
            self.dataset.start = Start(**state)
            return
        logger.info(f"the stream is read again up to batch {batches} of its epoch")
        self.dataset.start = Start(epoch, turn=batches % self.dataset.workers, skipped=batches)

    def state_dict(self) -> dict:
        """Return where this rank stands: behind the batch that came last."""
        return {"layout": self._layout(), "state": self._state}

    def load_state_dict(self, state: dict) -> None:
        """Take a state for the next `skip`, if it fits."""
        fits = state["layout"] == self._layout()
        self._loaded = state["state"] if fits else None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.begin()
        try:
            batches = self._batches(self._loader)
            current = next(batches, None)
            more = self._agreed(current is not None)
            while more:
                batch, state = current or (self._filler(), self._state)
                if self.together and is_initialized():
                    batch = send_to_device(batch, AcceleratorState().device, non_blocking=True)
                # Whether this is the last one has to be known with it: gradients are not accumulated beyond.
                current = next(batches, None)
                more = self._agreed(current is not None)
                self.end_of_dataloader = not more
                self._state = state
                yield batch
        finally:
            self.end()

    def _batches(self, loader: DataLoader) -> Iterator[tuple[dict[str, Tensor], dict]]:
        """Yield full batches, made of the workers' last ones too, and the state behind each."""
        start = self.dataset.current_start()
        places, pending = start.places or [None] * self.dataset.workers, start.pending
        for worker, place, batch in loader:
            places = [*places[:worker], place, *places[worker + 1 :]]
            size = len(batch["valid"])
            if size < self.batch_size:
                batch = batch if pending is None else _joined(pending, batch)
                size = len(batch["valid"])
                pending = _cut(batch, self.batch_size, size) if size > self.batch_size else None
                if size < self.batch_size:
                    pending = batch
                    continue
                batch = _cut(batch, 0, self.batch_size)
            turn = (worker + 1) % self.dataset.workers
            state = {"epoch": start.epoch, "places": places, "turn": turn, "pending": pending}
            yield batch, state
        if pending is not None and not self.dataset.train:
            blanks = self.batch_size - len(pending["valid"])
            if blanks and self.together and self.dataset.ranks > 1:  # ranks gather equal shapes
                pending = _joined(pending, _cut(self._filler(), 0, blanks))
            yield pending, {}

    def _filler(self) -> dict[str, Tensor]:
        return default_collate([self.dataset.reader.sample(None, 0)] * self.batch_size)

    def _agreed(self, there_is_one: bool) -> bool:
        """Tell whether all ranks go on: by gloo, so that no device waits."""
        if not self.together or self.dataset.ranks == 1:
            return there_is_one
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        flag = torch.tensor(int(there_is_one))
        operation = dist.ReduceOp.MIN if self.dataset.train else dist.ReduceOp.MAX
        dist.all_reduce(flag, operation, self._group)
        return bool(flag)

    def _make(self, persistent: bool) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=persistent,
            worker_init_fn=shield_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def _layout(self) -> dict:
        """Return what a state depends on."""
        names = ("seed", "batch_size", "rank", "ranks", "workers", "block", "limit")
        return {name: getattr(self.dataset, name) for name in names} | {
            "shards": self.dataset.source.num_shards,
            "dealing": self.dataset.dealing(),
        }


def _joined(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([values, second[name]]) for name, values in first.items()}


def _cut(batch: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: values[begin:end] for name, values in batch.items()}
