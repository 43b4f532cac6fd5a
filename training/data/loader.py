"""Samples to batches: a dataset with a length is read by index, a stream as it comes (training.data.stream)."""

import datasets
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader

from training.data.order import SeededOrder
from training.data.reader import Decoder, RowReader
from training.data.source import DataSettings, Source
from training.data.stream import SampleStream
from training.data.stream_loader import StreamLoader
from training.runtime.settings import SettingsError
from training.runtime.stop_signals import shield_worker

Loader = DataLoader | StreamLoader


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
        self.reader = RowReader(config, decoder)

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


def sample_counts(config: DataSettings, loaders: dict[str, Loader | None]) -> str:
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
            shards = loader.dataset.source.num_shards
            samples = text.format(config.kind.counted)
            parts.append(f"{samples} streamed from {shards:,} shard(s), number unknown")
        else:
            parts.append(config.kind.count(total, text))
    return ", ".join(parts)


def build_dataloader(
    source: Source,
    split: str,
    config: DataSettings,
    decoder: Decoder,
    *,
    batch_size: int,
    train: bool,
    seed: int,
    shard: tuple[int, int] | None = None,
) -> Loader:
    """Batch what the decoder reads of a source, with "valid": (B,) bool and "unreadable": (B,) int64.

    Training data are shuffled and lose their last partial batch; validation data keep order and rest.
    `unreadable` counts the files skipped for a sample; `valid` is false only for blanks in validation.

    Args:
        source: an opened split, of open_split for one.
        split: what messages call it.
        shard: rank and number of ranks, to read only this rank's part, for those whose ranks do not go through
            batches together.

    Returns:
        To be prepared by Accelerate, which shares out the batches of a dataset with a length; of a stream each
        rank reads its own.

    Raises:
        SettingsError: if the source has fewer samples than a training batch.
    """
    if isinstance(source, datasets.IterableDataset):
        rank, ranks = shard or _ranks()
        stream = SampleStream(
            source,
            config,
            decoder,
            batch_size=batch_size,
            train=train,
            seed=seed,
            rank=rank,
            ranks=ranks,
        )
        return StreamLoader(stream, together=shard is None)
    limit = config.max_train_samples if train else config.max_validation_samples
    if limit is not None:
        source = source.select(range(min(limit, len(source))))
    if len(source) < (batch_size if train else 1):
        raise SettingsError(
            f"split {split!r} of {config.dataset} has {len(source)} {config.kind.plural}, too "
            f"few for batch_size={batch_size}"
        )
    rank, ranks = shard or (0, 1)
    total = len(source)
    # With fewer samples than ranks the last ones have nothing to do.
    source = split_dataset_by_node(source, rank, ranks) if rank < total else source.select([])
    dataset = SampleDataset(source, config, decoder, train, total)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=SeededOrder(len(source), seed) if train else None,
        drop_last=train,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        worker_init_fn=shield_worker,
        pin_memory=torch.cuda.is_available(),
    )


def _ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_batch(loader: Loader) -> dict[str, Tensor]:
    """The first batch of a loader of build_dataloader, whose workers do not start for it.

    A loader keeps its workers when it has once been iterated, and Accelerate trains from another one that
    it makes of it, with as many of its own: the first ones would idle to the end.
    """
    if isinstance(loader, StreamLoader):
        return loader.first_batch()
    once = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
    )
    return next(iter(once))
