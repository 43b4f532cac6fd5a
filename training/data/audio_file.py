"""A recording as a file holds it, read by libsndfile to its real end.

The number of samples is certain, and a crop is read from its place, where the header is checked (WAV, AIFF,
CAF, AU, FLAC) or not needed, because uncompressed samples fill the file (the rest of what libsndfile knows).
MP3 and Ogg are read from their start, their pieces counted (audio_pieces.py). What has a header without a
length is read whole.
"""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile

from modeling_simvq.feature_extraction_simvq import LOUDEST
from training.data.audio_headers import mended_header
from training.data.audio_pieces import Piece, mpeg_pieces, ogg_pieces, wav_stream
from training.data.file_views import FileView, file_size
from training.data.reader import UnreadableSample

# A frame of these depends on those before it: after a seek libsndfile decodes other samples.
DECODED_FROM_THE_START = ("OGG", "MP3", "MPEG")
# Values that are read at once: what a header declares is never allocated before it is there.
BLOCK_VALUES = 1 << 20
# A recording that is taken whole has at most so many samples, 3 hours at 24 kHz: a megabyte of FLAC can hold
# a day of silence.
MOST_SAMPLES = 1 << 28
# libsndfile's number of frames of a file that does not tell is larger than this.
UNKNOWN_FRAMES = 1 << 40


class AudioFile:
    """A recording in a file. Of use once: for one call of `read`.

    Args:
        file: anything libsndfile knows, at its start.
        whole: whether all of it will be read.

    Attributes:
        rate: samples per second.
        frames: samples of a channel; None if only reading tells.

    Raises:
        UnreadableSample: if it is no recording, or its structure is damaged.
    """

    def __init__(self, file: BinaryIO, whole: bool):
        if replaced := mended_header(file, whole):
            file = FileView(file, 0, file_size(file), replaced)
        file.seek(0)
        self._file, self._pieces = file, []
        self._first = _opened(file)
        self.rate = self._first.samplerate
        if self._first.format in DECODED_FROM_THE_START or "MPEG" in self._first.subtype:
            self._pieces = _pieces(file, self._first)
        if self._pieces:
            self._count_pieces()
        else:
            self.frames = self._first.frames if self._first.frames <= UNKNOWN_FRAMES else None

    def _count_pieces(self) -> None:
        """Measure every piece: only libsndfile tells an encoder's delay."""
        self._first.close()
        self.frames = 0
        for piece in self._pieces:
            with _opened(piece.view(self._file)) as recording:
                if recording.samplerate != self.rate:
                    raise UnreadableSample(
                        f"its parts have sampling rates of {self.rate} and {recording.samplerate} Hz"
                    )
                self.frames += recording.frames if piece.frames is None else piece.frames

    def close(self) -> None:
        """Release libsndfile's buffers; the file stays open."""
        self._first.close()

    def read(self, begin: int, end: int | None) -> np.ndarray:
        """Frames [begin, end), or to the end of the file, the channels averaged, float32.

        Raises:
            UnreadableSample: if they are not there, are not finite, were never scaled or are more than
                MOST_SAMPLES.
        """
        place, blocks, kept = 0, [], 0
        if not self._pieces and _can_seek(self._first) and begin:
            try:
                place = self._first.seek(begin)
            except soundfile.LibsndfileError:
                raise UnreadableSample("it is damaged, or ends before its header says") from None
        for block in self._blocks(place, end):
            block_begin, place = place, place + len(block)
            block = block[max(0, begin - block_begin) :]
            _check_samples(block)
            blocks.append(block.T.mean(axis=0))
            kept += len(block)
            if kept > MOST_SAMPLES:
                raise too_long()
        if end is not None and place < end:
            raise UnreadableSample(f"it ends after {place} of {self.frames} samples")
        return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)

    def _blocks(self, place: int, end: int | None) -> Iterator[np.ndarray]:
        """(n, channels) from `place` on, at most to `end`."""
        if not self._pieces:
            yield from _blocks(self._first, None if end is None else end - place)
        for piece in self._pieces:
            if end is not None and place >= end:
                break
            with _opened(piece.view(self._file)) as recording:
                there = recording.frames if piece.frames is None else piece.frames
                wanted = there if end is None else min(there, end - place)
                for block in _blocks(recording, wanted):
                    wanted, place = wanted - len(block), place + len(block)
                    yield block
            if wanted:
                raise UnreadableSample(f"it is damaged: {wanted} samples are missing at {place}")


class _SoundFile(soundfile.SoundFile):
    """A file of unknown length cannot be moved to its end, as SoundFile does after the last block."""

    def seekable(self) -> bool:
        return super().seekable() and self.frames <= UNKNOWN_FRAMES


def _can_seek(recording: soundfile.SoundFile) -> bool:
    return recording.seekable() and recording.format not in DECODED_FROM_THE_START


def _opened(file: BinaryIO) -> soundfile.SoundFile:
    try:
        return _SoundFile(file)
    except soundfile.LibsndfileError as error:
        raise UnreadableSample(error.error_string.rstrip(".")) from None
    except TypeError:  # a file named .raw, which has no header
        raise UnreadableSample("raw samples without a sampling rate") from None


def _pieces(file: BinaryIO, recording: soundfile.SoundFile) -> list[Piece]:
    """List the pieces of a file where they are more than libsndfile sees; [] where it sees all."""
    place = file.tell()  # libsndfile continues from there
    if recording.format == "OGG":
        pieces = ogg_pieces(file)
    else:
        begin, end = wav_stream(file) if recording.format.startswith("WAV") else (0, None)
        pieces = mpeg_pieces(file, begin, end)
    if len(pieces) == 1 and pieces[0].frames is None:
        pieces = []
    file.seek(place)
    return pieces


def _blocks(recording: soundfile.SoundFile, count: int | None) -> Iterator[np.ndarray]:
    """(n, channels) from where the recording stands, at most `count` in all."""
    most = max(1, BLOCK_VALUES // recording.channels)
    while count is None or count > 0:
        wanted = most if count is None else min(most, count)
        block = recording.read(wanted, dtype="float32", always_2d=True)
        yield block
        if len(block) < wanted:
            break
        count = None if count is None else count - len(block)


def _check_samples(block: np.ndarray) -> None:
    loudest = np.abs(block).max(initial=0.0)
    if not np.isfinite(loudest):
        raise UnreadableSample("it has NaN or infinite samples")
    if loudest > LOUDEST:
        raise UnreadableSample(f"its samples reach {loudest:g}: they were never scaled to [-1, 1]")


def too_long() -> UnreadableSample:
    """Make the error for a recording of more than MOST_SAMPLES."""
    return UnreadableSample(f"it is longer than {MOST_SAMPLES:,} samples: cut it into parts")
