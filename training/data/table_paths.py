"""Tables that name files: relative paths count from the table's folder."""

import itertools
import os
from functools import partial
from pathlib import Path

import datasets

Source = datasets.Dataset | datasets.IterableDataset
# Rows among which the first is looked for that names a file.
ROWS = 100
TEXT = ("string", "large_string")


def paths_from(config, source: Source, folder: Path) -> Source:
    """Return a table whose relative paths are those of files in its folder.

    Where the first is not there, but in the working directory, all of them stay as they are.

    Args:
        config: DataSettings.
        folder: of the table.
    """
    column, kind, cells = config.column, config.kind.feature, source
    if source.features is not None:
        feature = source.features.get(column)
        if not isinstance(feature, (kind, dict)) and getattr(feature, "dtype", "") not in TEXT:
            return source
        cells = source.cast_column(column, kind(decode=False))
    rows = cells.select_columns([column]) if cells.features is not None else cells
    found = (_path(row.get(column)) for row in itertools.islice(rows, ROWS))
    first = next((path for path in found if path), None)
    if first is None or not _is_relative(first):
        return source
    if not (folder / first).exists() and os.path.exists(first):
        return source
    join = partial(_joined, column=column, folder=str(folder))
    return cells.map(join, features=cells.features)


def _path(cell) -> str | None:
    """The path that a cell names; None if it holds the file itself or nothing."""
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else None
    return cell if isinstance(cell, str) else None


def _is_relative(path: str) -> bool:
    return not os.path.isabs(path) and "://" not in path


def _joined(row: dict, column: str, folder: str) -> dict:
    cell = row[column]
    path = _path(cell)
    if not path or not _is_relative(path):
        return {column: cell}
    joined = os.path.join(folder, path)
    return {column: {**cell, "path": joined} if isinstance(cell, dict) else joined}
