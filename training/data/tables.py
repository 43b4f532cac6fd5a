"""Files of many samples on this machine: tables, tar archives, and what the card beside them declares."""

import contextlib
import hashlib
import os
import re
import tarfile
from glob import glob
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import yaml
from datasets.data_files import DataFilesDict, DataFilesList, sanitize_patterns
from datasets.fingerprint import Hasher
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData, metadata_load

from training.data.files import ARCHIVES, METADATA, TABLES, TEXT_TABLES, FolderFiles, Splits
from training.data.left_out import list_files, say_left_out
from training.data.split_lists import lists_of_splits
from training.data.splits import take_split
from training.data.table_paths import paths_from
from training.runtime.settings import SettingsError

BUILDERS = {**TABLES, **TEXT_TABLES, **ARCHIVES}
Source = datasets.Dataset | datasets.IterableDataset


def chosen_tables(config, found: FolderFiles) -> list[str]:
    """Files that hold the samples: tables that have the column or lie alone, then tar archives, then texts.

    Texts that are the splits of files beside them go before these files themselves.
    """
    tables = found.tables
    alone = not (found.media or found.archives)
    if tables and (alone or config.column in _columns(found, tables[0])):
        _same_type(config, tables)
        return tables
    texts = [
        path
        for path in found.text_tables
        if path.rpartition("/")[2] not in ("dataset_infos.json", "dataset_info.json")
    ]
    if found.media:
        return lists_of_splits(config, found, texts)
    if found.archives:
        found.left_out += [*tables, *found.text_tables]
        return found.archives
    if texts:
        _same_type(config, texts)
    return texts


def _same_type(config, files: list[str]) -> None:
    by_builder = {builder_of(path): path for path in reversed(files)}
    if len(by_builder) > 1:
        raise SettingsError(
            f"dataset: {config.dataset} holds files of several types ({', '.join(by_builder.values())}): "
            "name the folder or the file that is meant"
        )


def builder_of(path: str) -> str:
    """Name of Datasets' builder for a file."""
    return BUILDERS[os.path.splitext(path)[1].lower()]


def _columns(found: FolderFiles, path: str) -> list[str]:
    """Return the column names of a table; none if it cannot be read."""
    file = f"{found.root}/{path}"
    try:
        if builder_of(path) == "parquet":
            return pyarrow.parquet.read_schema(file).names
        with pa.memory_map(file) as source:
            try:
                return pa.ipc.open_stream(source).schema.names
            except pa.ArrowInvalid:
                return pa.ipc.open_file(source).schema.names
    except (pa.ArrowException, OSError):
        return []


def load_files(config, root: Path, files: list[str], features: datasets.Features | None) -> Source:
    """Tables or tar archives as one split.

    A tar file's member of the kind is the column of samples; relative paths in a table count from its folder.
    """
    files = _with_samples(config, root, files)
    source = _load(config, root, files, features)
    if builder_of(files[0]) != "webdataset":
        return _with_paths(config, root, files, features, source)
    names = source.column_names or []
    members = [
        name for name in names if f".{name.rpartition('.')[2].lower()}" in config.kind.extensions
    ]
    if config.column in names or len(members) != 1:
        return source
    return source.rename_column(members[0], config.column)


def _with_paths(config, root: Path, files: list[str], features, source: Source) -> Source:
    folders = [(root / path).parent for path in files]
    resolved = paths_from(config, source, folders[0])
    if resolved is source or len(set(folders)) == 1:
        return resolved
    parts = []
    for folder, group in groupby(zip(folders, files, strict=True), itemgetter(0)):
        part = _load(config, root, [path for _, path in group], features)
        parts.append(paths_from(config, part, folder))
    return datasets.concatenate_datasets(parts)


def _load(config, root: Path, files: list[str], features: datasets.Features | None) -> Source:
    arguments = {"path": builder_of(files[0]), "data_files": data_files_of(root, files)}
    if features is not None:
        arguments["features"] = features
    if arguments["path"] == "csv":
        arguments["index_col"] = False  # else a comma at the end of each row moves all columns
    if config.streaming:
        builder = datasets.load_dataset_builder(**arguments)
        if hasattr(builder.config, "on_bad_files"):
            # A Parquet shard that is not whole is skipped and named, rather than end a run in its third day.
            builder.config.on_bad_files = "warn"
        return builder.as_streaming_dataset(split="train")
    # Reads all of it now: what is damaged is an error before anything has begun.
    return datasets.load_dataset(**arguments, split="train")


def _with_samples(config, root: Path, files: list[str]) -> list[str]:
    """Leave out files of 0 bytes; put first a tar archive with members: of it Datasets learns the columns."""
    empty = [path for path in files if not (root / path).stat().st_size]
    files = [path for path in files if path not in empty]
    if files and builder_of(files[0]) == "webdataset":
        first = next((path for path in files if not _is_empty_tar(root / path)), None)
        files, empty = (files, empty) if first else ([], empty + files)
        files.sort(key=lambda path: path != first)
    if not files:
        raise SettingsError(
            f"dataset: {config.dataset} holds nothing: {list_files(empty)} are empty"
        )
    say_left_out(config, empty, "of 0 bytes")
    return files


def _is_empty_tar(path: Path) -> bool:
    try:
        with tarfile.open(path) as archive:
            return archive.next() is None
    except (tarfile.TarError, OSError):
        return False  # Datasets tells what is wrong with it


def data_files_of(root: Path, files: list[str]) -> DataFilesDict:
    """Files for Datasets, which takes these as names rather than patterns, and notices when one has changed."""
    paths = [str(literal_path(root / path)) for path in files]
    return DataFilesDict({"train": DataFilesList(paths, [_state_of(path) for path in paths])})


def _state_of(path: str) -> tuple[str, ...]:
    """Return what changes whenever a file does: copies may keep its time of change, but not the inode's."""
    state = os.stat(path)
    return str(state.st_mtime_ns), str(state.st_ctime_ns), str(state.st_size)


# What a card declares


def is_card(path: str) -> bool:
    """Tell whether a file describes tables."""
    return path in ("README.md", "dataset_infos.json") or path in METADATA


def _card(path: Path) -> DatasetCardData | None:
    """Read the card in a folder; None if there is none, or none that can be read."""
    readme = path / "README.md"
    try:
        data = metadata_load(readme) if readme.is_file() else None
        return DatasetCardData(**data) if data else None
    except (ValueError, TypeError, OSError, yaml.YAMLError):
        return None


def declares_files(path: Path) -> bool:
    """Tell whether a folder's card names the files of each split, as the Hub's and tokenize_dataset's do."""
    card = _card(path)
    configs = MetadataConfigs.from_dataset_card_data(card) if card is not None else {}
    return any("data_files" in options for options in configs.values())


def declared_features(path: Path, config_name: str | None) -> datasets.Features | None:
    """Types of the columns that a card states."""
    card = _card(path)
    infos = DatasetInfosDict.from_dataset_card_data(card) if card is not None else {}
    info = infos.get(config_name or "default")
    if info is None and len(infos) == 1:
        (info,) = infos.values()
    return info.features if info is not None else None


def open_declared(config, path: Path, split: str) -> Source:
    """Open a split of a folder whose card names the files, by patterns."""
    if re.search(r"[*?\[\]{}]|::|://", str(path)):
        # To Datasets such a name of the folder would be part of the patterns.
        splits = _expanded(config, path)
        features = declared_features(path, config.config_name)
        return take_split(
            splits, split, lambda name: load_files(config, path, splits.files[name], features)
        )
    builder = datasets.load_dataset_builder(str(path), config.config_name)
    options = {}
    if hasattr(builder.config, "index_col"):  # as in _load
        options["index_col"] = builder.config.index_col = False
    if not config.streaming:
        # Datasets keeps the rows by the folder's last name and by what the card says, neither of which
        # tells one folder of codes from another, or from what it held before. Any argument becomes part of
        # the key; the description changes nothing else.
        state = Hasher.hash(_states_of(builder.config.data_files))
        source = datasets.load_dataset(
            str(path), builder.config.name, split=split, description=f"files {state}", **options
        )
        return paths_from(config, source, path)
    if hasattr(builder.config, "on_bad_files"):
        builder.config.on_bad_files = "warn"
    return paths_from(config, builder.as_streaming_dataset(split=split), path)


def _states_of(files: DataFilesDict) -> list:
    """Return name and state of every file that a card names; of those elsewhere, what Datasets knows."""
    return [
        (split, path, _state_of(path) if os.path.exists(path) else found.origin_metadata)
        for split, found in files.items()
        for path in found
    ]


def _expanded(config, path: Path) -> Splits:
    """Files of the splits of a card, each pattern expanded below the folder."""
    configs = MetadataConfigs.from_dataset_card_data(_card(path))
    name = config.config_name or configs.get_default_config_name() or "default"
    if name not in configs:
        raise ValueError(f"BuilderConfig {name!r} not found. Available: {list(configs)}")
    found = {}
    for split, patterns in sanitize_patterns(configs[name]["data_files"]).items():
        found[split] = sorted(
            {file for p in patterns for file in glob(p, root_dir=path, recursive=True)}
        )
        if not found[split] or not all(
            Path(file).suffix.lower() in BUILDERS for file in found[split]
        ):
            raise SettingsError(
                f"dataset: the card in {path} names files of split {split!r} that are no tables here "
                f"({', '.join(patterns)}): give the folder a name without brackets, stars and colons"
            )
    return Splits(found, "", True, [])


def literal_path(path: Path) -> Path:
    """The same folder or file by a path that Datasets does not take for a chain of URLs."""
    if "::" not in str(path):
        return path
    aliases = Path(datasets.config.HF_DATASETS_CACHE) / "literal-paths"
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    alias = aliases / (name + path.suffix if path.is_file() else name)
    aliases.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # made before, or by another process just now
        alias.symlink_to(path)
    return alias
