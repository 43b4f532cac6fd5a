"""Shards of a stream: how long they are, and which are dealt out whole."""

import logging
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.file_utils import xgetsize, xopen

logger = logging.getLogger(__name__)

# Under what names the builders of Datasets keep the files of a source, one for each shard.
FILES = ("files", "tar_paths", "base_files")
# A shard is uneven that has so many times the bytes of the median: whoever got it would be left with rows when
# all others are done.
UNEVEN = 2
# Sizes of more files than this are not asked for, one by one, on a network.
MOST_REMOTE = 4096


def shard_lengths(source: datasets.IterableDataset) -> list[int] | None:
    """Return the rows of each shard: of Parquet files from their footers, of saved datasets; None of others."""
    return _of_each_shard(source, _lengths)


def shard_bytes(source: datasets.IterableDataset) -> list[int] | None:
    """Return the bytes of each shard's file; None where shards are no files."""
    if source.num_shards > MOST_REMOTE and not _is_local(source):
        return None
    return _of_each_shard(source, lambda kwargs: map(xgetsize, _files(kwargs)))


def shard_files(source: datasets.IterableDataset) -> list[str]:
    """Return the names of the shards' files; [] where shards are no files."""
    return _of_each_shard(source, lambda kwargs: map(str, _files(kwargs))) or []


def whole_shards(order: list[int], parts: int, sizes: list[int] | None) -> list[int]:
    """Return the shards that are dealt out whole to the parts of a stream, as far as they go round.

    None, if there are fewer than two for each part: with one each, whatever a shard has more than the shortest
    one would be left out of every epoch. All others are read by every part, which keeps a share of their rows.

    Args:
        order: numbers of the shards.
        sizes: of each shard, by its number, in any unit; if they are not known, all count as even.
    """
    even = order
    if sizes is not None and order:
        bound = UNEVEN * statistics.median(sizes[shard] for shard in order)
        even = [shard for shard in order if 0 < sizes[shard] <= bound]
    return even[: len(even) - len(even) % parts] if len(even) >= 2 * parts else []


def _of_each_shard(
    source: datasets.IterableDataset, values_of: Callable[[dict], Iterable[int]]
) -> list[int] | None:
    # Datasets has no public way to ask. Where it keeps its files otherwise than expected, nothing is known.
    try:
        values = [value for kwargs in _kwargs(source._ex_iterable) for value in values_of(kwargs)]
    except (AttributeError, KeyError, TypeError, OSError, ValueError, pa.ArrowException) as error:
        logger.debug(f"sizes of the shards are not known: {error!r}")
        return None
    return values if len(values) == source.num_shards else None


def _kwargs(iterable: Any) -> list[dict[str, Any]]:
    """Return what the readers were made with that lie behind each other in a source."""
    if hasattr(iterable, "ex_iterables"):
        return [kwargs for one in iterable.ex_iterables for kwargs in _kwargs(one)]
    if not hasattr(iterable, "kwargs"):
        return _kwargs(iterable.ex_iterable)
    return [iterable.kwargs]


def _files(kwargs: dict[str, Any]) -> list[str]:
    (name,) = set(FILES) & set(kwargs)
    return kwargs[name]


def _is_local(source: datasets.IterableDataset) -> bool:
    return _of_each_shard(source, lambda kwargs: ["://" in file for file in _files(kwargs)]) == (
        [False] * source.num_shards
    )


def _lengths(kwargs: dict[str, Any]) -> list[int]:
    lengths, footers = [], {}
    if saved := [one for one in kwargs.get("shards", ()) if isinstance(one, datasets.Dataset)]:
        return list(map(len, saved))
    for file, groups in zip(kwargs["files"], kwargs["row_groups_list"], strict=True):
        if file not in footers:
            with xopen(file, "rb") as opened:
                footers[file] = pq.read_metadata(opened)
        footer = footers[file]
        chosen = range(footer.num_row_groups) if groups is None else groups
        lengths.append(sum(footer.row_group(group).num_rows for group in chosen))
    return lengths
