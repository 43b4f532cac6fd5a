"""Files of codes, each with a record of the rows it was made of, to tell whether the source still has them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import pyarrow.parquet
from datasets.table import embed_table_storage

RECORD_KEY = (
    b"simvq_rows"  # in the metadata of a Parquet file, so that it comes and goes with the codes
)
# A file that was changed later than this before the codes were written is read again: clocks of file servers
# differ, and one that is older is surely what was read.
SECONDS_OF_DOUBT = 3600


@dataclass(frozen=True)
class Record:
    """Record of the rows that a file of codes was made of.

    Attributes:
        rows: of the source.
        unreadable: of these, how many could not be read and were left out.
        names: digest of the rows, of files beside the dataset only their names and sizes.
        contents: digest of the rows with the contents of such files.
    """

    rows: int
    unreadable: int
    names: str
    contents: str


def relative_texts(row: dict, dataset: str) -> dict:
    """A row whose texts that are paths below a local dataset, as of its tar files, count from there."""
    folder = Path(dataset).expanduser().absolute()
    if not folder.exists():
        return row
    start = f"{folder if folder.is_dir() else folder.parent}{os.sep}"
    return {
        key: value.removeprefix(start) if isinstance(value, str) else value
        for key, value in row.items()
    }


class RowDigests:
    """Digests of rows of a dataset, whose samples are still encoded.

    Args:
        column: of the samples, cells {"bytes", "path"}.
        dataset: folder or name; names of files count from there, so that a folder may be moved.
    """

    def __init__(self, column: str, dataset: str):
        self.column, self.folder = column, Path(dataset).expanduser().absolute()

    def names(self) -> "RunningDigest":
        """Digest that opens no file: of a file beside the dataset its name and its size."""
        return RunningDigest(self, lambda path: str(path.stat().st_size).encode())

    def contents(self) -> "RunningDigest":
        """Digest of everything, files beside the dataset included."""
        return RunningDigest(self, _digest_file)

    def still_hold(
        self, open_rows: Callable[[], Iterable[dict]], record: Record, codes: Path
    ) -> bool:
        """Tell whether a file of codes was made of the rows that open_rows gives, each time anew."""
        names, newest = self.names(), 0.0
        for row in open_rows():
            names.add(row)
            if (path := self.file_of(row)) is not None:
                stat = path.stat()
                newest = max(newest, stat.st_mtime, stat.st_ctime)
        if names.rows != record.rows:
            return False
        if newest + SECONDS_OF_DOUBT < codes.stat().st_mtime:
            return names.value == record.names
        contents = self.contents()
        for row in open_rows():
            contents.add(row)
        return contents.value == record.contents

    def file_of(self, row: dict) -> Path | None:
        """The file beside the dataset that a row's cell names; None if the cell holds the bytes itself."""
        cell = row.get(self.column)
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            path = Path(cell["path"])
            return path if path.is_file() else None
        return None


class RunningDigest:
    """Digest of rows that come one by one.

    Args:
        of_file: what counts of a file beside the dataset.
    """

    def __init__(self, digests: RowDigests, of_file: Callable[[Path], bytes]):
        self.digests, self.of_file = digests, of_file
        self.rows, self._digest = 0, hashlib.blake2b(digest_size=16)

    def add(self, row: dict) -> None:
        """Take the next row."""
        column, path = self.digests.column, self.digests.file_of(row)
        if path is not None:
            name = os.path.relpath(path.absolute(), self.digests.folder)
            row = row | {column: {"name": name, "file": self.of_file(path)}}
        elif isinstance(cell := row.get(column), dict) and cell.get("bytes") is not None:
            # The same shard may be opened from anywhere: the folder in front of a name says nothing.
            row = row | {column: {**cell, "path": os.path.basename(str(cell.get("path") or ""))}}
        _add(self._digest, row)
        self.rows += 1

    @property
    def value(self) -> str:
        return self._digest.hexdigest()


def _digest_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def _add(digest, value) -> None:
    """Feed a value of a row, such that values that differ give different bytes."""
    if isinstance(value, dict):
        digest.update(b"{%d" % len(value))
        for key in sorted(value):
            _add(digest, key)
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(b"[%d" % len(value))
        for item in value:
            _add(digest, item)
    else:
        content = value if isinstance(value, bytes) else repr(value).encode(errors="surrogatepass")
        digest.update(f"{type(value).__name__} {len(content)} ".encode() + content)


def code_path(folder: Path, split: str, index: int) -> Path:
    """Return the path of a file of codes."""
    return folder / "data" / f"{split}-{index:05}.parquet"


def list_code_files(folder: Path, split: str) -> dict[int, Path]:
    """Number to file of the codes of a split that are there, in order; files of other names are not ours."""
    name = re.compile(rf"{re.escape(split)}-(\d{{5,}})\.parquet")
    data = folder / "data"
    found = [
        (m, p) for p in (data.iterdir() if data.is_dir() else ()) if (m := name.fullmatch(p.name))
    ]
    files = {int(match[1]): path for match, path in found}
    return dict(sorted(files.items()))


def clear_unfinished(folder: Path, splits: list[str]) -> None:
    """Delete what a killed run had begun to write."""
    name = re.compile(rf"({'|'.join(map(re.escape, splits))})-\d{{5,}}\.\d+\.unfinished")
    for path in (folder / "data").glob("*.unfinished"):
        if name.fullmatch(path.name):
            path.unlink()


def write_code_file(table: datasets.Dataset, path: Path, record: Record) -> None:
    """Write a file of codes whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = table.with_format("arrow")[:]
    about = table.features.arrow_schema.metadata | {RECORD_KEY: json.dumps(asdict(record)).encode()}
    # Media that were passed on become part of the file: their own files lie on this machine.
    _write_table(embed_table_storage(rows), path, about)


def _write_table(rows: pyarrow.Table, path: Path, about: dict[bytes, bytes]) -> None:
    rows = rows.replace_schema_metadata(about)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    with pyarrow.parquet.ParquetWriter(unfinished, rows.schema) as writer:
        if rows.num_rows:  # Datasets cannot read a row group of none
            writer.write_table(rows)
    os.replace(unfinished, path)  # a kill leaves the whole file or none


def read_features(path: Path) -> datasets.Features:
    """Return the columns of a file of codes.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is no file of codes") from error


def restate_features(path: Path, features: datasets.Features) -> None:
    """Write a file of codes again with the same rows, and with columns that name more classes."""
    rows = pyarrow.parquet.read_table(path)
    record = rows.schema.metadata[RECORD_KEY]
    # The reader calls the elements of lists otherwise than Datasets does, which would be other bytes.
    rows = rows.select(list(features)).cast(features.arrow_schema).combine_chunks()
    _write_table(rows, path, features.arrow_schema.metadata | {RECORD_KEY: record})


def read_record(path: Path) -> Record:
    """The record of a file of codes.

    Raises:
        ValueError: if the file is damaged or was written by a version that kept none.
    """
    try:
        return Record(**json.loads(pyarrow.parquet.read_schema(path).metadata[RECORD_KEY]))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} does not tell which rows it was made of") from error
