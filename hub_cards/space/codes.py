"""Codes as text, as numbers about them, and as an image. Nothing here knows a model or a browser."""

import math
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = 1 << 24
LONG_SIDE = 768  # of an image of codes, in pixels, unless there are more codes


@dataclass
class CodeStatistics:
    """Describe what one input's codes say about the use of the codebook.

    tokens: number of codes; distinct: how many of them differ; codebook_size: K; perplexity: exp of the
    entropy of the codes' frequencies in nats, between 1 and `distinct`; bits: tokens x log2 K.
    """

    tokens: int
    distinct: int
    codebook_size: int
    perplexity: float
    bits: float


def code_statistics(codes: np.ndarray, codebook_size: int) -> CodeStatistics:
    """Statistics of integer codes of any shape, at least one."""
    counts = np.unique(codes, return_counts=True)[1]
    frequencies = counts / counts.sum()
    perplexity = float(np.exp(-(frequencies * np.log(frequencies)).sum()))
    bits = codes.size * math.log2(codebook_size)
    return CodeStatistics(codes.size, len(counts), codebook_size, perplexity, bits)


def write_codes(codes: np.ndarray, per_line: int | None = None) -> str:
    """Codes (h, w) as text, one row a line; with `per_line` in lines of that many instead."""
    return "\n".join(" ".join(str(code) for code in row) for row in _lines(codes, per_line))


def _lines(codes: np.ndarray, per_line: int | None) -> list[np.ndarray]:
    if per_line is None:
        return list(codes)
    flat = codes.ravel()
    return [flat[start : start + per_line] for start in range(0, len(flat), per_line)]


def read_codes(
    text: str, codebook_size: int, most_rows: int, most_columns: int, one_row: bool = False
) -> np.ndarray:
    """Text to codes (h, w) int64. Integers are separated by spaces or commas, rows by line ends.

    Args:
        codebook_size: K; codes lie in [0, K).
        most_rows, most_columns: the largest grid allowed.
        one_row: line ends mean nothing: the codes are one row, (1, T).

    Raises:
        ValueError: naming the place, what stands there and what may stand there.
    """
    lines = [text] if one_row else text.splitlines()
    rows = [row for line in lines if (row := line.replace(",", " ").split())]
    valid = f"codes are integers from 0 to {codebook_size - 1}"
    if not rows:
        raise ValueError(f"There are no codes: {valid}, separated by spaces.")
    if len(rows) > most_rows or max(map(len, rows)) > most_columns:
        most = f"{most_columns} codes" if one_row else f"{most_rows} rows of {most_columns} codes"
        found = (
            f"{len(rows[0])}"
            if one_row
            else f"{len(rows)} rows of up to {max(map(len, rows))} codes"
        )
        raise ValueError(f"Too many codes: at most {most} fit here, found {found}.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"All rows must be of one length: row 1 has {len(rows[0])} codes, "
                f"row {number} has {len(row)}."
            )
        for column, word in enumerate(row, start=1):
            place = f"code {column}" if one_row else f"row {number}, code {column}"
            if not re.fullmatch(r"[+-]?[0-9]+", word):
                raise ValueError(f"{place}: {_short(word)} is not an integer; {valid}.")
            # Words of very many digits are not turned into numbers: that takes long.
            if len(word) > 20 or not 0 <= int(word) < codebook_size:
                raise ValueError(f"{place}: {_short(word)} is not a code; {valid}.")
    return np.array(rows, dtype=np.int64)


def _short(word: str) -> str:
    return word if len(word) <= 24 else word[:24] + "…"


def colours_of_codes(codes: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 of codes (...): a code always has the same, and no other below 2^24 has it."""
    # Odd factors and shifts permute the 24-bit numbers, so that neighbouring codes get unrelated colours.
    mixed = codes.astype(np.uint64) % COLOURS
    for factor in (0x9E3779, 0x85EBCB):
        mixed = ((mixed + 0x5BD1E9) * np.uint64(factor)) % COLOURS
        mixed ^= mixed >> np.uint64(11)
    return np.stack([mixed >> np.uint64(s) & np.uint64(255) for s in (16, 8, 0)], axis=-1).astype(
        np.uint8
    )


def picture_of_codes(codes: np.ndarray, per_line: int | None = None) -> Image.Image:
    """Codes (h, w) as coloured squares, a single line as bars. Lines are those of `write_codes`."""
    lines = _lines(codes, per_line)
    height, width = len(lines), max(map(len, lines))
    squares = np.full((height, width, 3), 255, np.uint8)
    for square, line in zip(squares, lines, strict=True):
        square[: len(line)] = colours_of_codes(line)
    across = max(1, LONG_SIDE // max(height, width))
    down = max(across, LONG_SIDE // 8) if height == 1 else across
    return Image.fromarray(squares.repeat(down, axis=0).repeat(across, axis=1))
