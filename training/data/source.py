"""Source of samples: anything that Datasets opens; one split, one column, cells still encoded."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, ClassVar

import datasets

from training.data.files import TABLES
from training.data.local import open_local
from training.runtime.settings import SettingsError, at_least, setting

Source = datasets.Dataset | datasets.IterableDataset


class NoSuchSplit(SettingsError):
    """A dataset lacks a split; the message names those that it has.

    Attributes:
        fault: the message without its advice, which is for the settings of the trainers.
    """

    def __init__(self, fault: str, advice: str):
        super().__init__(f"{fault}: {advice}")
        self.fault = fault


def _reads_nothing(_: BinaryIO) -> bool:
    return False


@dataclass(frozen=True)
class Kind:
    """Kind of a dataset's content: its name for Datasets, and in messages.

    Attributes:
        feature: datasets.Image, or a kind of datasets.Audio.
        folder, media_column: Datasets' names for a folder of such files, and for their column.
        plural, counted: what messages call the samples.
        extensions: of files that the decoder reads, lower case.
        reads: whether an open file holds one, whatever it is called.
        while_opening: context in which Datasets opens a source.
    """

    feature: type
    folder: str
    column_setting: str
    plural: str
    counted: str
    media_column: str = ""
    extensions: frozenset[str] = frozenset()
    reads: Callable[[BinaryIO], bool] = _reads_nothing
    while_opening: Callable[[], AbstractContextManager] = nullcontext

    def count(self, number: int, text: str = "{}") -> str:
        """Return "1 image", or with the text "training {}" "2,000 training images"."""
        noun = re.sub(r"s\b", "", self.counted, count=1) if number == 1 else self.counted
        return f"{number:,} {text.format(noun)}"


@dataclass
class DataSettings:
    """The dataset."""

    kind: ClassVar[Kind]

    dataset: str = setting("", "Hub id, folder of files, parquet or arrow file or folder")
    config_name: str | None = setting(None, "configuration of a dataset that has several")
    revision: str | None = setting(None, "branch, tag or commit of a Hub dataset")
    train_split: str = setting("train", "split to train on; train[:95%] is a part, a+b two of them")
    validation_split: str | None = setting("validation", "split to validate on; null for none")
    streaming: bool = setting(
        False, "read tables and archives while training instead of storing them first"
    )
    shuffle_buffer: int = setting(
        10_000, "samples to shuffle among when streaming, of all workers of a process"
    )
    num_workers: int = setting(2, "processes that decode, per training process")
    max_train_samples: int | None = setting(None, "use only the first so many samples")
    max_validation_samples: int | None = setting(None, "validate on only the first so many")

    def __post_init__(self):
        at_least(self, 1, "shuffle_buffer")
        at_least(self, 0, "num_workers")
        for name in ("max_train_samples", "max_validation_samples"):
            if getattr(self, name) is not None:
                at_least(self, 1, name)

    @property
    def column(self) -> str:
        """Name of the column that holds the samples."""
        return getattr(self, self.kind.column_setting)


def open_split(
    config: DataSettings, split: str, all_columns: bool = False, beside: Sequence[str] = ()
) -> Source:
    """Open a split through Datasets, cells of its samples {"bytes", "path"} still encoded.

    Args:
        all_columns: keep labels, texts and whatever else there is; otherwise the samples' column alone.
        beside: names of other splits that are used, in addition to those of the settings (see data_files).

    Raises:
        SettingsError: if the source, the split or the column is not there, naming what is.
    """
    source = open_table(config, split, beside)
    kind, column = config.kind, config.column
    # A stream of JSON lines or of tar files may learn its columns only from its first row.
    names = source.column_names or list(next(iter(source), {}))
    if column not in names:
        raise SettingsError(
            f"{kind.column_setting}: {config.dataset} has no column {column!r}, "
            f"it has {', '.join(names)}"
        )
    feature = (source.features or {}).get(column)
    # Other than Image or Audio: encoded bytes or paths, or such in a struct.
    text = isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_") in (
        "binary",
        "string",
    )
    if not (
        text
        or feature is None
        or isinstance(feature, dict)
        or issubclass(kind.feature, type(feature))
    ):
        raise SettingsError(
            f"{kind.column_setting}: column {column!r} of {config.dataset} holds {feature}, not "
            f"{kind.plural}; the columns are {', '.join(names)}"
        )
    if not all_columns:
        source = source.select_columns([column])
    if source.features is None:
        # A stream of text learns its columns from its rows, and Datasets casts only those that it knows.
        return source.map(partial(_as_cell, column=column))
    return source.cast_column(column, kind.feature(decode=False))


def _as_cell(row: dict, column: str) -> dict:
    cell = row[column]
    if cell is None or isinstance(cell, dict):
        return {column: cell}
    is_path = isinstance(cell, str)
    return {column: {"bytes": None if is_path else cell, "path": cell if is_path else None}}


def open_splits(config: DataSettings, splits: Sequence[str], setting: str) -> list[Source]:
    """Open several splits with all their columns, before anything is made of the first.

    Args:
        setting: that names the splits.

    Raises:
        SettingsError: as of open_split, naming the setting where a split is not there.
    """
    try:
        return [open_split(config, split, all_columns=True, beside=splits) for split in splits]
    except NoSuchSplit as error:
        raise SettingsError(f"{error.fault}: set {setting} to those it has") from error


def open_table(config: DataSettings, split: str, beside: Sequence[str] = ()) -> Source:
    """Open a split as it is, all columns.

    Args:
        beside: as of open_split.

    Raises:
        SettingsError: if the source or the split is not there, naming what is.
    """
    path = Path(config.dataset).expanduser()
    try:
        with config.kind.while_opening():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return _open_saved(config, path, split)
            if path.exists():
                return open_local(config, path, split, beside)
            return _open_published(config, path, split)
    except SettingsError:
        raise
    except ValueError as error:
        reason = " ".join(str(error).split("\n")[:2])
        if reason.startswith(("Unknown split", "Bad split")):  # and the splits there are
            raise _no_split(config, split, reason) from error
        if reason.startswith("BuilderConfig"):  # not found, and those there are
            reason += " Set config_name to one of them, or to null."
        raise SettingsError(f"cannot open the dataset {config.dataset!r}: {reason}") from error
    except (OSError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # the outer one says only that something failed
        reason = (str(error) or type(error).__name__).splitlines()[0]
        advice = (
            ". Check the network; for a gated dataset accept its terms on its page and run "
            f"`hf auth login`; or set dataset to a local folder of {config.kind.plural}"
        )
        raise SettingsError(
            f"cannot open the dataset {config.dataset!r}: {reason}{'' if path.exists() else advice}"
        ) from error


def _open_saved(config: DataSettings, path: Path, split: str) -> Source:
    """Open a folder that save_to_disk wrote; a dataset without splits counts as the training split."""
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        saved = {config.train_split: saved}
    parts = [split] if split in saved else re.split(r"\s*\+\s*", split)
    for part in parts:
        if part not in saved:
            found = f"it has {', '.join(map(repr, saved))}"
            raise _no_split(config, split, found)
    source = datasets.concatenate_datasets([saved[part] for part in parts])
    if not config.streaming:
        return source
    # Workers share a stream by its shards.
    return source.to_iterable_dataset(num_shards=max(1, min(config.num_workers, len(source))))


def _open_published(config: DataSettings, path: Path, split: str) -> Source:
    """Open a dataset of the Hub; which of its files belong to a split is its card's or Datasets' rule."""
    if (
        config.dataset.startswith((".", "/", "~"))
        or config.dataset.count("/") > 1
        or path.suffix in TABLES
    ):
        raise SettingsError(f"dataset: there is no file or folder {config.dataset}")
    arguments = {"path": config.dataset, "name": config.config_name, "revision": config.revision}
    if not config.streaming:
        # Reads all of it now: what is damaged is an error before anything has begun.
        return datasets.load_dataset(**arguments, split=split)
    builder = datasets.load_dataset_builder(**arguments)
    if hasattr(builder.config, "on_bad_files"):
        # A Parquet shard that is not whole is skipped and named, rather than end a run in its third day.
        builder.config.on_bad_files = "warn"
    return builder.as_streaming_dataset(split=split)


def _no_split(config: DataSettings, split: str, found: str) -> NoSuchSplit:
    name = "train_split" if split == config.train_split else "validation_split"
    off = (
        "" if name == "train_split" else "; in training validation_split=null turns validation off"
    )
    fault = f"{config.dataset} has no split {split!r} ({found})"
    return NoSuchSplit(fault, f"set {name} to one it has{off}")
