"""Rows of a dataset to files of codes."""

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import datasets
from torch import Tensor

from training.data.reader import MOST_UNREADABLE_IN_A_ROW, UnreadableSample
from training.tokenization.code_files import Record, RowDigests, write_code_file
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
        self, rows: list[dict], first: int, path: Path, features: datasets.Features | None
    ) -> None:
        """Encode rows of the source and write them as one file; rows that cannot be read are left out.

        Args:
            first: number of the first row in its split.
            features: of the other columns; None if the source does not know them.
        """
        found, unreadable = [], 0
        for group in self._decoded(rows, first):
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
        if not found and (first == 0 or len(rows) >= MOST_UNREADABLE_IN_A_ROW):
            raise UnreadableSample(
                f"none of {len(rows)} rows can be read: does column {self.tokens.source_column!r} hold "
                f"{self.tokens.plural}?"
            )
        digests = self.digests.names(rows), self.digests.contents(rows)
        self._save(found, path, features, Record(len(rows), unreadable, *digests))

    def _decoded(
        self, rows: list[dict], first: int
    ) -> Iterator[list[tuple[dict, int, list | None]]]:
        """Rows with their number and the samples of all variants, None if unreadable: about a batch at a time.

        While one batch is encoded, the pool decodes the next.
        """
        size = max(1, self.batch_size // len(self.variants))

        def begin(start: int) -> list[tuple[dict, int, Future]]:
            group = enumerate(rows[start : start + size], start=first + start)
            return [(row, n, self.pool.submit(self._decode, row, n)) for n, row in group]

        ahead = begin(0)
        for start in range(size, len(rows) + size, size):
            group, ahead = [(row, n, future.result()) for row, n, future in ahead], begin(start)
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
