"""Rows to samples: cells are decoded, and unreadable ones are skipped, named and counted."""

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

import torch
from datasets.utils.file_utils import xopen
from torch import Tensor

from hub_cards.user_error import UserError
from training.data.source import DataSettings

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
        dtype: of the samples.
    """

    column: str
    key: str
    shape: tuple[int, ...]
    decode: Callable[[dict | None, str, torch.Generator | None], Tensor]
    dtype: torch.dtype = torch.float32

    def read(self, row: dict, name: str, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return what a row gives to a batch."""
        return {self.key: self.decode(row.get(self.column), name, generator)}

    def blank(self) -> dict[str, Tensor]:
        """Return what stands in the place of an unreadable row."""
        return {self.key: torch.zeros(self.shape, dtype=self.dtype)}


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


class RowReader:
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
