"""Streams: every rank and worker reads rows of its own, and can go on from any place of them."""

import hashlib
import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from training.data.order import Permutation, key_of, seeds_of
from training.data.reader import Decoder, RowReader
from training.data.shards import shard_bytes, shard_files, shard_lengths, whole_shards
from training.data.source import DataSettings

logger = logging.getLogger(__name__)

# With fewer shards for each part than this, Parquet files are read by row groups, as shards of their own: they
# are dealt out more evenly then, and found again faster. Of more files the footers would take long to read.
FEWEST_SHARDS = 8
NO_END = 2**62  # rows, more than there are
DEALING = 2  # version of how rows are shared out and shuffled


class PartRows:
    """Rows of one part of a stream, in order, from any place.

    Where the lengths of the shards are known, each part has as many rows, one part behind the other; a shard at
    a border belongs to both. Otherwise `whole_shards` are dealt out; of all others every part reads all rows
    and keeps its share, each one in turn. Nothing is decoded.

    Args:
        order: numbers of the source's shards.
        part, parts: which of how many.
        limit: rows of the whole stream that there are to share; then the source counts as a single shard.
        lengths: rows of each shard, by its number.
        sizes: of each shard in bytes, where the lengths are not known.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        order: list[int],
        part: int,
        parts: int,
        limit: int | None = None,
        lengths: list[int] | None = None,
        sizes: list[int] | None = None,
    ):
        self.source, self.part, self.parts = source, part, parts
        # Numbers of shards, None for the whole source, and which of their rows are this part's: None for its
        # share of the rows of all such shards together.
        self.shards: list[tuple[int | None, range | None]] = []
        if limit is not None:
            self.shards = [(None, range(part, limit, parts))]
        elif lengths is not None:
            total, before = sum(lengths), 0
            first, end = part * total // parts, (part + 1) * total // parts
            for shard in order:
                rows = range(max(first - before, 0), min(end - before, lengths[shard]))
                before += lengths[shard]
                if rows:
                    self.shards.append((shard, rows))
        else:
            whole = whole_shards(order, parts, sizes)
            own, shared = set(whole[part::parts]), set(order) - set(whole)
            self.shards += [
                (shard, range(NO_END)) if shard in own else (shard, None)
                for shard in order
                if shard in own or shard in shared
            ]
        self._shard, self._rows, self._seen, self._shared = 0, None, 0, 0

    def read(self, mark: dict | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows behind a mark, or all of them."""
        mark = mark or {"shard": 0, "state": None, "seen": 0, "shared": 0}
        self._shard, self._rows, self._shared = mark["shard"], None, mark["shared"]
        for number in range(mark["shard"], len(self.shards)):
            shard, own = self.shards[number]
            rows = self.source
            if shard is not None:
                rows = rows.shard(rows.num_shards, shard)
            self._shard, self._rows, self._seen = number, rows, 0
            if number == mark["shard"] and mark["state"] is not None:
                rows.load_state_dict(mark["state"])
                self._seen = mark["seen"]
            shared = own is None
            if shared:  # behind the rows of such shards before
                own = range((self.part - self._shared) % self.parts, NO_END, self.parts)
            for batch in _batches(rows) if self._seen < own.stop else ():
                self._seen += 1
                if self._seen - 1 in own:
                    yield {name: values[0] for name, values in batch.items()}
                if self._seen == own.stop:
                    break
            if shared:
                self._shared += self._seen
        self._shard, self._rows = len(self.shards), None

    def mark(self) -> dict:
        """Return the place behind the row that came last: numbers, texts, lists and dicts."""
        state = None if self._rows is None else self._rows.state_dict()
        seen = 0 if state is None else self._seen
        return {"shard": self._shard, "state": state, "seen": seen, "shared": self._shared}


def _batches(rows: datasets.IterableDataset) -> Iterator[dict]:
    """Yield rows as batches of one: plain iteration in a worker would share a shard out once more.

    Raises:
        OSError: whatever is wrong with the file.
    """
    try:
        yield from rows.iter(batch_size=1)
    except (
        tarfile.TarError,
        pa.ArrowException,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        files = shard_files(rows)
        raise OSError(f"{', '.join(files)}: {error}" if files else str(error)) from error


def _finer(source: datasets.IterableDataset) -> datasets.IterableDataset:
    try:
        return source.reshard()
    except Exception as error:  # a damaged file; it is named when its turn comes
        logger.debug(f"not read by row groups: {error}")
        return source


class BlockShuffle:
    """Rows in random order within blocks of them, each with its number in the order.

    The first block has from 1 to `size` rows, by the key, so that the last ones of a stream, which fill no
    batch, are others in every epoch. While a block is given out, the next one is read, row for row: there are
    never more than `size` rows in memory. Any place of the order is a mark and two numbers, and to find it
    again no more than two blocks are read, however far it is.

    Args:
        key: of the order; the permutation of a block follows from it and the block's number.
        place: to begin at, of `place` at an earlier time.
    """

    def __init__(self, rows: PartRows, size: int, key: int, place: dict | None = None):
        self.rows, self.size, self.key = rows, size, key
        self.place = place or {"block": 0, "mark": None, "given": 0}

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        number, mark, given = (self.place[name] for name in ("block", "mark", "given"))
        source, shortest = self.rows.read(mark), 1 + key_of(self.key) % self.size
        block = list(islice(source, self.size if number else shortest))
        while block:
            next_mark, following = self.rows.mark(), []
            permutation = Permutation(len(block), key_of(self.key, number))
            before = 0 if not number else shortest + (number - 1) * self.size
            for place, index in enumerate(permutation(np.arange(len(block))).tolist()):
                row, block[index] = block[index], None
                following.extend(islice(source, 1))
                self.place = {"block": number, "mark": mark, "given": place + 1}
                if place >= given:
                    yield before + place, row
            following.extend(islice(source, self.size - len(following)))
            number, mark, given, block = number + 1, next_mark, 0, following


@dataclass(frozen=True)
class Start:
    """Place in an epoch at which a stream begins, if not at its beginning.

    Attributes:
        epoch: that it is about.
        places: of the workers, as they gave them; None for the beginning.
        turn: number of the worker whose turn it is.
        skipped: batches of the rank to be read and dropped without decoding.
        pending: samples that are left of workers that have ended.
    """

    epoch: int = -1
    places: list[dict | None] | None = None
    turn: int = 0
    skipped: int = 0
    pending: dict[str, Tensor] | None = None


class SampleStream(torch.utils.data.IterableDataset):
    """Batches of one rank, read on the way; unreadable rows as in SampleDataset.

    Yields (worker, place, batch): the batch, the number of the worker that made it, and where this worker then
    stands. Every worker's last batch may be smaller. In training the order is random: of the shards, and of the
    rows in blocks of shuffle_buffer, which the workers of a rank share.

    Args:
        rank, ranks: whose part of the stream this is.

    Attributes:
        start: to be set before the workers start.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        config: DataSettings,
        decoder: Decoder,
        *,
        batch_size: int,
        train: bool,
        seed: int,
        rank: int,
        ranks: int,
    ):
        self.train, self.seed, self.batch_size = train, seed, batch_size
        self.rank, self.ranks = rank, ranks
        self.num_workers, self.workers = config.num_workers, max(1, config.num_workers)
        self.limit = config.max_train_samples if train else config.max_validation_samples
        self.name, self.reader = config.dataset, RowReader(config, decoder)
        self.source, self.lengths, self.sizes = source, None, None
        if self.limit is None and source.num_shards < FEWEST_SHARDS * self.parts:
            self.source = _finer(source)
            self.lengths = shard_lengths(self.source)
        if self.limit is None and self.lengths is None and self.parts > 1:
            self.sizes = shard_bytes(self.source)
            self._say_what_is_shared()
        self.block = max(1, config.shuffle_buffer // self.workers)
        # Shared memory reaches workers that persist.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.start = Start()

    @property
    def parts(self) -> int:
        return self.ranks * self.workers

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch.fill_(epoch)

    def dealing(self) -> str:
        """Return a digest of how shards are shared out, which a file that was replaced may change."""
        whole = whole_shards(list(range(self.source.num_shards)), self.parts, self.sizes)
        return hashlib.sha256(repr((DEALING, self.lengths, whole)).encode()).hexdigest()[:16]

    def current_start(self) -> Start:
        """Return where the epoch begins that is set."""
        return self.start if self.start.epoch == int(self.epoch) else Start(int(self.epoch))

    def __iter__(self) -> Iterator[tuple[int, dict, dict[str, Tensor]]]:
        info, start = get_worker_info(), self.current_start()
        # DataLoader asks its first worker first: the one whose turn it is must be that.
        worker = ((info.id if info else 0) + start.turn) % self.workers
        part = worker * self.ranks + self.rank
        key = key_of(self.seed, start.epoch, part)
        rows = self._rows(start.epoch, part)
        shuffle = None
        numbered = enumerate(rows.read())
        if self.train:
            place = start.places[worker] if start.places else None
            shuffle = BlockShuffle(rows, self.block, key, place)
            numbered = iter(shuffle)
        skipped = (start.skipped + self.workers - 1 - worker) // self.workers
        numbered = islice(numbered, skipped * self.batch_size, None)
        batch = []
        for sample in self._samples(self._named_errors(numbered), key, part):
            batch.append(sample)
            if len(batch) == self.batch_size:
                yield worker, shuffle and shuffle.place, default_collate(batch)
                batch = []
        if batch:
            yield worker, shuffle and shuffle.place, default_collate(batch)

    def _rows(self, epoch: int, part: int) -> PartRows:
        shards = self.source.num_shards
        order = np.arange(shards)
        if self.train:
            order = Permutation(shards, key_of(self.seed, epoch))(order)
        return PartRows(
            self.source, order.tolist(), part, self.parts, self.limit, self.lengths, self.sizes
        )

    def _say_what_is_shared(self) -> None:
        shards = self.source.num_shards
        shared = shards - len(whole_shards(list(range(shards)), self.parts, self.sizes))
        if shared and self.rank == 0:
            logger.info(
                f"{self.name}: {shared} of {shards} shards are read by each of {self.parts} workers, which "
                "keeps its share of their rows (two shards or more for each, of about equal size, would be "
                "dealt out)"
            )

    def _samples(self, rows: Iterator[tuple[int, dict]], key: int, part: int) -> Iterator[dict]:
        where = "of the stream" if self.parts == 1 else f"of part {part} of the stream"
        generator = torch.Generator() if self.train else None
        skipped, empty = 0, True
        for number, row in rows:
            if generator is not None:
                generator.manual_seed(int(seeds_of(key, np.array([number]))[0]))
            values = self.reader.read(row, f"row {number} {where}", generator)
            if values is None and self.train:
                skipped += 1
                continue
            yield self.reader.sample(values, skipped if self.train else int(values is None))
            skipped, empty = 0, False
        if empty and skipped:
            self.reader.fail(skipped)

    def _named_errors(self, rows: Iterator) -> Iterator:
        try:
            yield from rows
        except OSError as error:  # of Arrow too, which names no file
            reason = str(error).rstrip(".")
            raise OSError(
                f"the stream of {self.name} cannot be read any further: {reason}. Look at the network, and for "
                "a damaged shard to replace or take away; resume=latest then goes on from the last checkpoint"
            ) from error
