"""Text tables named like splits that list the files beside them: train.csv, validation.csv beside images/."""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from training.data.files import FolderFiles, split_files

# Rows among which one is looked for that names a file.
ROWS = 100


def lists_of_splits(config, found: FolderFiles, texts: list[str]) -> list[str]:
    """Return the texts if each lists files of the folder and they are the splits of all of it; else [].

    Not if these files have splits of their own or are described by metadata.csv and the like, nor without a
    list of the training split.

    Args:
        config: DataSettings.
        texts: the folder's text tables.
    """
    if not texts or found.metadata or len({Path(path).suffix for path in texts}) > 1:
        return []
    lists = split_files(texts, (), many=True, folders={})
    if not lists.named or lists.left_out or lists.find("train") is None:
        return []
    if split_files(found.media, (), many=False, folders={}).named:
        return []
    return (
        texts if all(_lists_files(config.column, Path(found.root, path)) for path in texts) else []
    )


def _lists_files(column: str, path: Path) -> bool:
    # Whatever else the file holds, it then is no list: it may have nothing to do with the files.
    try:
        with path.open(encoding="utf-8", newline="") as file:
            cells = list(islice(_cells(column, path.suffix.lower(), file), ROWS))
    except (OSError, ValueError, csv.Error, RecursionError):
        return False
    named = (cell for cell in cells if isinstance(cell, str) and cell)
    return any((path.parent / cell).is_file() for cell in named if "\0" not in cell)


def _cells(column: str, suffix: str, file) -> Iterator:
    if suffix == ".csv":
        for row in csv.DictReader(file):
            yield row.get(column)
    elif suffix == ".jsonl":
        for line in file:
            row = json.loads(line) if line.strip() else None
            yield row.get(column) if isinstance(row, dict) else None
