"""Rows to samples to batches: unreadable rows are skipped and counted, and order survives a resume."""

import io
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.utils.file_utils import xopen
from torch import Tensor
from torch.utils.data import DataLoader

from hub_cards.user_error import UserError
from training.data.order import SeededOrder
from training.data.source import DataSettings, Source
from training.runtime.settings import SettingsError
from training.runtime.stop_signals import shield_worker

logger = logging.getLogger(__name__)

# So many broken files in a row mean that something else is wrong.
MOST_UNREADABLE_IN_A_ROW = 100
# Names of broken files that a worker writes to the log; the rest are only counted.
NAMED_UNREADABLE = 100


class UnreadableSample(UserError):
    """A file or a cell holds nothing that can be decoded. The message names it and the reason."""


@dataclass(frozen=True)
class Decoder:
    """Decoder of one modality's samples. Decoders of other rows have `read` and `blank` too.

    Args:
        column: that holds the cells.
        key: name of the samples in a batch.
        shape: their shape; all are alike.
        decode: cell, name of the cell and generator of the random crop (None takes the middle) to a sample;
            raises UnreadableSample. It must be picklable.
    """

    column: str
    key: str
    shape: tuple[int, ...]
    decode: Callable[[dict | None, str, torch.Generator | None], Tensor]

    def read(self, row: dict, name: str, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return what a row gives to a batch."""
        return {self.key: self.decode(row.get(self.column), name, generator)}

    def blank(self) -> dict[str, Tensor]:
        """Return what stands in the place of an unreadable row."""
        return {self.key: torch.zeros(self.shape)}


@contextmanager
def open_cell(cell: dict | None, name: str) -> Iterator[BinaryIO]:
    """Open what a cell holds, for reading; whatever fails inside becomes an UnreadableSample.

    Args:
        cell: {"bytes": ..., "path": ...}, one of which may be None; path may be a URL of fsspec.
        name: what to call it in errors when it has no path.
    """
    cell = cell if isinstance(cell, dict) else {}
    path, content = cell.get("path"), cell.get("bytes")
    try:
        if content is None and not path:
            raise UnreadableSample("no bytes and no path")
        with io.BytesIO(content) if content is not None else _open_path(path) as file:
            if not file.read(1):
                raise UnreadableSample("the file is empty")
            file.seek(0)
            yield file
    except Exception as error:  # decoders of broken files raise nearly anything
        reason = str(error) or type(error).__name__
        if path:  # possibly of a file in an archive, zip://NAME::ARCHIVE
            inside = path if os.path.exists(path) else path.split("::")[0]
            file_name = os.path.basename(inside)
            raise UnreadableSample(f"{file_name}: {reason} ({path})") from error
        raise UnreadableSample(f"{name}: {reason}") from error


def _open_path(path: str) -> BinaryIO:
    """Open a path, which is taken literally if there is such a file, and else may be a URL of fsspec."""
    if os.path.isfile(path):
        return open(path, "rb")
    if os.path.exists(path):
        raise UnreadableSample("a folder or a device, not a file")
    if path.startswith("zip://"):
        for mark in re.finditer("::", path):
            if os.path.isfile(path[mark.end() :]):
                archive = _open_archive(path[mark.end() :], os.getpid())
                return archive.open(path[len("zip://") : mark.start()])
    return xopen(path, "rb")


@lru_cache(maxsize=16)
def _open_archive(path: str, process: int) -> zipfile.ZipFile:
    """A zip archive that stays open, for its list of members is long; each process needs its own."""
    return zipfile.ZipFile(path)


class _Reader:
    """Rows to samples; keeps the account of unreadable ones, each worker its own."""

    def __init__(self, config: DataSettings, decoder: Decoder):
        self.column, self.plural, self.decoder = config.column, config.kind.plural, decoder
        self.named: set[str] = set()
        self.in_a_row = 0

    def read(self, row: dict, name: str, generator: torch.Generator | None) -> dict | None:
        """The decoded sample, or None where the row is unreadable."""
        try:
            values = self.decoder.read(row, name, generator)
        except UnreadableSample as error:
            self._note(str(error))
            return None
        self.in_a_row = 0
        return values

    def _note(self, text: str) -> None:
        self.in_a_row, self.last = self.in_a_row + 1, text
        if text not in self.named and len(self.named) < NAMED_UNREADABLE:
            self.named.add(text)
            logger.warning(f"skipped {text}")
        if self.in_a_row >= MOST_UNREADABLE_IN_A_ROW:
            self.fail(self.in_a_row)

    def fail(self, count: int) -> None:
        raise UnreadableSample(
            f"{count} {self.plural} in a row cannot be read (the last: {self.last}): does column "
            f"{self.column!r} hold {self.plural}, and are the files whole?"
        )

    def sample(self, values: dict | None, unreadable: int) -> dict[str, Tensor]:
        """A sample; without values a blank one, marked invalid."""
        blank = values is None
        return {
            **(self.decoder.blank() if blank else values),
            "valid": torch.tensor(not blank),
            "unreadable": torch.tensor(unreadable),
        }


class SampleDataset(torch.utils.data.Dataset):
    """A dataset with a length.

    In training an unreadable row is replaced by the next readable one, so that batches keep their
    size; in validation it comes as a blank marked invalid, so that no sample counts twice.

    An item's key is an index or, from SeededOrder, (index, seed of the random crop).

    Args:
        total: samples of all ranks, where this is the part of one.
    """

    def __init__(
        self,
        source: datasets.Dataset,
        config: DataSettings,
        decoder: Decoder,
        train: bool,
        total: int | None = None,
    ):
        self.source, self.train = source, train
        self.total = len(source) if total is None else total
        self.reader = _Reader(config, decoder)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        index, crop_seed = key if isinstance(key, tuple) else (key, key)
        generator = torch.Generator().manual_seed(crop_seed) if self.train else None
        for skipped in range(len(self.source) if self.train else 1):
            place = (index + skipped) % len(self.source)
            values = self.reader.read(self.source[place], f"row {place}", generator)
            if values is not None:
                return self.reader.sample(values, skipped)
        if self.train:
            self.reader.fail(len(self.source))
        return self.reader.sample(None, 1)


def sample_counts(config: DataSettings, loaders: dict[str, DataLoader | None]) -> str:
    """Describe how many samples there are: a split that holds too few is seen at the start.

    Args:
        loaders: made by build_dataloader; keys such as "training {}" say what their samples are.
    """
    parts = []
    for text, loader in loaders.items():
        if loader is None:
            continue
        total = getattr(loader.dataset, "total", None)
        if total is None:
            parts.append(f"{text.format(config.kind.counted)} streamed, length unknown")
        else:
            parts.append(config.kind.count(total, text))
    return ", ".join(parts)


def _generator(seed: int, *more: int) -> torch.Generator:
    state = np.random.SeedSequence((seed % 2**32, *more)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


class SampleStream(torch.utils.data.IterableDataset):
    """A dataset that is read on the way; unreadable rows as in SampleDataset.

    Workers share the source's shards. Those skipped after a worker's last sample are only in the log.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        config: DataSettings,
        decoder: Decoder,
        train: bool,
        seed: int,
    ):
        self.source, self.train, self.seed = source, train, seed
        self.name = config.dataset
        self.reader = _Reader(config, decoder)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; reaches persistent workers too, through shared memory."""
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        key = (self.seed, self.source.epoch, worker.id if worker else 0)
        generator = _generator(*key) if self.train else None
        skipped, empty = 0, True
        for number, row in enumerate(self._rows()):
            values = self.reader.read(row, f"row {number} of the stream", generator)
            if values is None and self.train:
                skipped += 1
                continue
            yield self.reader.sample(values, skipped if self.train else int(values is None))
            skipped, empty = 0, False
        if empty and skipped:
            self.reader.fail(skipped)

    def _rows(self) -> Iterator[dict]:
        try:
            yield from self.source
        except OSError as error:  # of Arrow too, which names no file
            reason = str(error).rstrip(".")
            raise OSError(
                f"the stream of {self.name} cannot be read any further: {reason}. Look at the network, and for "
                "a damaged shard to replace or take away; resume=latest then goes on from the last checkpoint"
            ) from error


def build_dataloader(
    source: Source,
    split: str,
    config: DataSettings,
    decoder: Decoder,
    *,
    batch_size: int,
    train: bool,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> DataLoader:
    """Batch what the decoder reads of a source, with "valid": (B,) bool and "unreadable": (B,) int64.

    Training data are shuffled and lose their last partial batch; validation data keep order and rest.
    `unreadable` counts the files skipped for a sample; `valid` is false only for blanks in validation.

    Args:
        source: an opened split, of open_split for one.
        split: what messages call it.
        shard: rank and number of ranks, to read only this rank's part; for those who do not let Accelerate
            share out the batches.

    Raises:
        SettingsError: if the source has fewer samples than a training batch.
    """
    limit = config.max_train_samples if train else config.max_validation_samples
    streaming = isinstance(source, datasets.IterableDataset)
    if limit is not None:
        source = source.take(limit) if streaming else source.select(range(min(limit, len(source))))
    sampler = None
    if streaming:
        source = split_dataset_by_node(source, *shard)
        if train:
            source = source.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
        dataset = SampleStream(source, config, decoder, train, seed)
    else:
        if len(source) < (batch_size if train else 1):
            raise SettingsError(
                f"split {split!r} of {config.dataset} has {len(source)} {config.kind.plural}, too "
                f"few for batch_size={batch_size}"
            )
        rank, ranks = shard
        total = len(source)
        # With fewer samples than ranks the last ones have nothing to do.
        source = split_dataset_by_node(source, rank, ranks) if rank < total else source.select([])
        dataset = SampleDataset(source, config, decoder, train, total)
        sampler = SeededOrder(len(source), seed) if train else None
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=train,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        worker_init_fn=shield_worker,
        pin_memory=torch.cuda.is_available(),
    )


def first_batch(loader: DataLoader) -> dict[str, Tensor]:
    """The first batch of a loader of build_dataloader, whose workers do not start for it.

    A loader keeps its workers when it has once been iterated, and Accelerate trains from another one that
    it makes of it, with as many of its own: the first ones would idle to the end.
    """
    streaming = isinstance(loader.dataset, torch.utils.data.IterableDataset)
    once = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=None if streaming else loader.sampler,
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
    )
    return next(iter(once))
