"""Folders and files on this machine as datasets: Datasets is told which files belong; it does not guess."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from training.data.files import (
    TABLES,
    FolderFiles,
    Splits,
    label_names,
    label_of,
    list_folder,
    split_files,
)
from training.data.left_out import count_files, list_files, say_left_out, say_once
from training.data.splits import asked_names, take_split
from training.data.tables import (
    BUILDERS,
    builder_of,
    chosen_tables,
    data_files_of,
    declared_features,
    declares_files,
    is_card,
    literal_path,
    load_files,
    open_declared,
)
from training.runtime.settings import SettingsError

ROWS = 50_000  # of a table of paths that are made at once
Source = datasets.Dataset | datasets.IterableDataset


def open_local(config, path: Path, split: str, beside: Sequence[str] = ()) -> Source:
    """Open a split of a local folder or file, all columns.

    Args:
        config: DataSettings.
        beside: names of other splits that are used, in addition to those of the settings.

    Raises:
        SettingsError: if nothing of the kind is there.
        ValueError: if the split is not there, in the words of Datasets: "Unknown split ...".
    """
    path = path.resolve()
    if path.is_file():
        return _open_file(config, path, split)
    if declares_files(path):
        return open_declared(config, path, split)
    kind = config.kind
    found = list_folder(path, kind.extensions, kind.reads)
    asked = asked_names(config.train_split, config.validation_split, split, *beside)
    tables = chosen_tables(config, found)
    if not tables:
        return _open_media(config, found, asked, split)
    if config.config_name not in (None, "default") and Path(tables[0]).suffix in TABLES:
        raise ValueError(f"BuilderConfig {config.config_name!r} not found. Available: ['default']")
    splits = split_files(tables, asked, many=True, folders={})
    media = found.media
    if media and tables[0] in found.text_tables:
        media = []
        say_once(f"{config.dataset}: the samples are those that {list_files(tables)} list")
    beside = [p for p in (*media, *found.metadata, *found.left_out) if not is_card(p)]
    say_left_out(config, beside, f"beside its {builder_of(tables[0])} files")
    say_left_out(config, splits.left_out, f"in none of the splits {', '.join(splits.files)}")
    if splits.note:
        say_once(f"{config.dataset}: {splits.note}")
    features = declared_features(path, config.config_name)

    def load(name: str) -> Source:
        return load_files(config, path, splits.files[name], features)

    return take_split(splits, split, load)


def only_split(config, path: Path) -> str | None:
    """Return the name of all of a local folder or file without splits; None if it has splits."""
    path = path.resolve()
    if path.is_file():
        return _split_of_file(config)
    if declares_files(path):
        return None
    found = list_folder(path, config.kind.extensions, config.kind.reads)
    asked = asked_names(config.train_split, config.validation_split)
    if tables := chosen_tables(config, found):
        splits = split_files(tables, asked, many=True, folders={})
    else:
        splits, _ = _split_media(found, asked)
    return None if splits.named else "train"


def _split_of_file(config) -> str:
    # A file is one split, the training split, of which the settings may take parts.
    return re.match(r"[\w.]*", config.train_split).group()


def _open_file(config, path: Path, split: str) -> Source:
    if path.suffix.lower() == ".zip":
        raise SettingsError(f"dataset: {path} is an archive: name the folder that holds it")
    if path.suffix.lower() not in BUILDERS:
        known = ", ".join(sorted(BUILDERS))
        raise SettingsError(
            f"dataset: {path} is no folder, and no file that holds samples ({known})"
        )
    splits = Splits({_split_of_file(config): [path.name]}, "", False, [])
    return take_split(splits, split, lambda _: load_files(config, path.parent, [path.name], None))


# Files of the kind


def _open_media(config, found: FolderFiles, asked: set[str], split: str) -> datasets.Dataset:
    """Open a table of the files' paths, when streaming too: files are opened one by one anyway."""
    kind = config.kind
    splits, folders = _split_media(found, asked)
    left_out = [*found.left_out, *found.text_tables, *found.tables, *found.archives]
    if not found.media:
        there = f" ({count_files(left_out)}: {list_files(left_out)})" if left_out else ""
        raise SettingsError(f"dataset: {config.dataset} holds no {kind.plural}{there}")
    if found.archives:
        raise SettingsError(
            f"dataset: {config.dataset} holds both tar archives ({list_files(found.archives)}) and "
            f"{kind.count(len(found.media))} ({list_files(found.media)}): keep one of them there"
        )
    say_left_out(config, left_out, f"not readable as {kind.counted}")
    say_left_out(config, splits.left_out, f"in none of the splits {', '.join(splits.files)}")
    if splits.note:
        say_once(f"{config.dataset}: {splits.note}")
    if found.metadata:
        return _open_described(config, found, splits, split)
    classes = label_names(splits, folders)
    features = datasets.Features({kind.media_column: kind.feature(decode=False)})
    if classes:
        features["label"] = datasets.ClassLabel(names=classes)

    def load(name: str) -> Source:
        files = splits.files[name]
        numbers = {label: number for number, label in enumerate(classes)}
        labels = [numbers.get(label_of(p, splits, folders)) for p in files] if classes else None
        table = _table(found, files, labels, features)
        print_of = hashlib.sha256()
        for number, path in enumerate(files):
            # By name and size: a copy elsewhere, or at another time, is the same.
            line = f"{path}\0{found.sizes[path]}\0{labels and labels[number]}\0"
            print_of.update(line.encode())
        info = datasets.DatasetInfo(features=features)
        return datasets.Dataset(
            datasets.table.InMemoryTable(table), info=info, fingerprint=print_of.hexdigest()[:16]
        )

    return take_split(splits, split, load)


def _split_media(found: FolderFiles, asked: set[str]) -> tuple[Splits, dict[str, str]]:
    """Files by split, and what folders are called that are archives."""
    folders = {p: p.rpartition("/")[2][: -len(".zip")] for p in _archives_of(found)}
    return split_files(found.media, asked, many=False, folders=folders), folders


def _archives_of(found: FolderFiles) -> set[str]:
    """Zip archives, of what their members' cells say."""
    return {cell.rpartition(f"::{found.root}/")[2] for cell in found.members.values()}


def _table(
    found: FolderFiles, files: list[str], labels: list | None, features: datasets.Features
) -> pa.Table:
    """Paths and classes as a table, made in portions: a list of a million cells would be large."""
    schema = features.arrow_schema
    batches = []
    for begin in range(0, len(files), ROWS):
        part = files[begin : begin + ROWS]
        paths = pa.array([found.cell_path(path) for path in part], pa.string())
        cells = pa.StructArray.from_arrays(
            [pa.nulls(len(part), pa.binary()), paths], names=["bytes", "path"]
        )
        columns = [cells]
        if labels is not None:
            columns.append(pa.array(labels[begin : begin + ROWS], pa.int64()))
        batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def _open_described(config, found: FolderFiles, splits: Splits, split: str) -> datasets.Dataset:
    """Files that a metadata.csv, .jsonl or .parquet describes: those that it lists, with its columns."""
    root = literal_path(Path(found.root))
    kind = config.kind
    described = datasets.load_dataset(
        kind.folder, data_files=data_files_of(root, found.metadata), split="train"
    )
    column = config.column if config.column in described.column_names else kind.media_column
    if column not in described.column_names:
        return described  # the caller names the columns that there are
    described = described.cast_column(column, kind.feature(decode=False))
    start = f"{root}/"
    rows: dict[str, list[int]] = {}
    for number, path in enumerate(_paths(described, column)):
        rows.setdefault((path or "").removeprefix(start), []).append(number)
    unlisted = [path for path in found.media if path not in rows]
    say_left_out(config, unlisted, f"not listed in {list_files(found.metadata)}")

    def load(name: str) -> Source:
        if not splits.named:
            return described
        folder = {
            path.partition("/")[0] for path in (p[len(splits.root) :] for p in splits.files[name])
        }
        chosen = [
            number
            for path, numbers in rows.items()
            if path.startswith(splits.root) and path[len(splits.root) :].partition("/")[0] in folder
            for number in numbers
        ]
        return described.select(sorted(chosen))

    return take_split(splits, split, load)


def _paths(source: datasets.Dataset, column: str) -> Iterable[str | None]:
    for batch in source.select_columns([column]).with_format("arrow").iter(ROWS):
        yield from batch.column(column).combine_chunks().field("path").to_pylist()
