"""Rows of a dataset to files of codes."""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import datasets
from torch import Tensor

from training.data.reader import MOST_UNREADABLE_IN_A_ROW, UnreadableSample
from training.tokenization.code_files import (
    Record,
    RowDigests,
    RunningDigest,
    write_code_file,
)
from training.tokenization.encoders import AudioTokens, ImageTokens, Variant


class FileWriter:
    """Encodes rows of a source, in all variants, and writes them as files.

    Args:
        variants: made of each sample.
        batch_size: samples that are encoded at a time.
        workers: threads that decode.
    """

    def __init__(
        self,
        tokens: ImageTokens | AudioTokens,
        variants: list[Variant],
        batch_size: int,
        digests: RowDigests,
        workers: int,
    ):
        self.tokens, self.variants = tokens, variants
        self.batch_size, self.digests = batch_size, digests
        self._crops = any(variant.crop is not None for variant in variants)
        self._flips = any(variant.flipped for variant in variants)
        self.samples = self.codes = 0  # made so far
        self.pool = ThreadPoolExecutor(max(1, workers))

    def write(
        self, rows: Iterable[dict], first: int, path: Path, features: datasets.Features | None
    ) -> int:
        """Encode rows of the source and write them as one file; rows that cannot be read are left out.

        Of the samples no more than two batches are in memory; the codes of all rows are.

        Args:
            first: number of the first row in its split.
            features: of the other columns; None if the source does not know them.

        Returns:
            Rows of the source.
        """
        found, unreadable = [], 0
        names, contents = self.digests.names(), self.digests.contents()
        for group in self._decoded(_added(rows, names, contents), first):
            unreadable += sum(samples is None for *_, samples in group)
            made = [
                (row, number, variant, sample)
                for row, number, samples in group
                for variant, sample in zip(self.variants, samples or (), strict=False)
            ]
            for begin in range(0, len(made), self.batch_size):
                batch = made[begin : begin + self.batch_size]
                codes = self.tokens.encode([sample for *_, sample in batch])
                self.samples += len(codes)
                self.codes += sum(one.size for one in codes)
                for (row, number, variant, _), one in zip(batch, codes, strict=True):
                    others = {k: v for k, v in row.items() if k != self.tokens.source_column}
                    found.append(
                        others
                        | {"source_row": number}
                        | self._marks(variant)
                        | {self.tokens.column: one}
                    )
        # A few rows at the end of a dataset may all be broken; a whole dataset, or very many, may not.
        if not found and (first == 0 or names.rows >= MOST_UNREADABLE_IN_A_ROW):
            raise UnreadableSample(
                f"none of {names.rows} rows can be read: does column {self.tokens.source_column!r} hold "
                f"{self.tokens.plural}?"
            )
        record = Record(names.rows, unreadable, names.value, contents.value)
        self._save(found, path, features, record)
        return names.rows

    def _decoded(
        self, rows: Iterator[dict], first: int
    ) -> Iterator[list[tuple[dict, int, list | None]]]:
        """Rows with their number and the samples of all variants, None if unreadable: about a batch at a time.

        While one batch is encoded, the pool decodes the next.
        """
        size = max(1, self.batch_size // len(self.variants))

        numbered = enumerate(rows, start=first)

        def begin() -> list[tuple[dict, int, Future]]:
            group = islice(numbered, size)
            return [(row, n, self.pool.submit(self._decode, row, n)) for n, row in group]

        ahead = begin()
        while ahead:
            group, ahead = [(row, n, future.result()) for row, n, future in ahead], begin()
            yield group

    def _decode(self, row: dict, number: int) -> list[Tensor] | None:
        try:
            cell = row.get(self.tokens.source_column)
            return self.tokens.decode(cell, number, self.variants)
        except UnreadableSample as error:
            logging.warning(f"skipped {error}")
            return None

    @property
    def _own(self) -> dict:
        own = {"source_row": datasets.Value("int64")}
        own |= {"crop": datasets.Value("int32")} if self._crops else {}
        own |= {"flipped": datasets.Value("bool")} if self._flips else {}
        return own | {self.tokens.column: self.tokens.feature}

    def schema(self, features: datasets.Features | None) -> datasets.Features | None:
        """Return the columns of a file: those beside the samples, then ours, the codes last; None of None."""
        return None if features is None else datasets.Features({**features, **self._own})

    def _marks(self, variant: Variant) -> dict:
        marks = {"crop": variant.crop} if self._crops else {}
        return marks | ({"flipped": variant.flipped} if self._flips else {})

    def _save(
        self, rows: list[dict], path: Path, features: datasets.Features | None, record: Record
    ) -> None:
        if features is None:
            inferred = datasets.Dataset.from_list(rows).features
            features = {k: v for k, v in inferred.items() if k not in self._own}
        schema = self.schema(features)
        columns = {name: [row[name] for row in rows] for name in schema}
        table = datasets.Dataset.from_dict(columns, features=schema)
        write_code_file(table, path, record)


def _added(rows: Iterable[dict], *digests: RunningDigest) -> Iterator[dict]:
    """Pass rows on, and add each to the digests."""
    for row in rows:
        for digest in digests:
            digest.add(row)
        yield row
