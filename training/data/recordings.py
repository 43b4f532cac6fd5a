"""Recordings for training: any Datasets source, decoded by libsndfile, no more of them than a crop needs."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, ClassVar

import datasets
import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from training.data.audio_file import MOST_SAMPLES, AudioFile, too_long
from training.data.loader import build_dataloader
from training.data.reader import Decoder, UnreadableSample, open_cell
from training.data.source import DataSettings, Kind, open_split
from training.runtime.settings import SettingsError, at_least, setting

# Seconds read on both sides of a crop that is resampled; soxr's filter reaches less far.
RESAMPLING_MARGIN = 0.1
# Files that are taken for recordings by their names; of others the content decides (is_recording).
EXTENSIONS = (
    ".aif .aifc .aiff .au .caf .flac .mp1 .mp2 .mp3 .nist .oga .ogg .opus .raw .rf64 .snd .sph"
)
EXTENSIONS += " .voc .w64 .wav .wave"
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000


def is_recording(file: BinaryIO) -> bool:
    """Tell whether libsndfile reads an open file, whatever its name."""
    try:
        with soundfile.SoundFile(file) as recording:
            # It takes nearly any file with the right two bytes for MP3.
            return recording.format not in ("MP3", "MPEG") or len(recording.read(1)) == 1
    except Exception:  # parsers of broken files raise nearly anything
        return False


def _as_stored(value) -> dict | None:
    """Return what Datasets stores for a recording that is a file or its bytes already; None for others."""
    if isinstance(value, (str, Path)):
        return {"bytes": None, "path": str(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, dict) and "array" not in value:
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    return None


class EncodedAudio(datasets.Audio):
    """datasets.Audio that needs no torchcodec to store what is a file or its bytes already.

    Datasets imports torchcodec before it looks at the value, although only arrays need it, and torchcodec
    needs FFmpeg: with the class of Datasets recordings could not be streamed on most machines.
    """

    def encode_example(self, value) -> dict:
        """Return {"bytes", "path"}."""
        stored = _as_stored(value)
        return super().encode_example(value) if stored is None else stored


@contextmanager
def builders_without_torchcodec() -> Iterator[None]:
    """Let Datasets' own builders, which make a table of an audio folder, do without torchcodec too."""
    theirs = datasets.Audio.encode_example

    def encode_example(self: datasets.Audio, value) -> dict:
        stored = _as_stored(value)
        return theirs(self, value) if stored is None else stored

    datasets.Audio.encode_example = encode_example
    try:
        yield
    finally:
        datasets.Audio.encode_example = theirs


@dataclass
class AudioDataConfig(DataSettings):
    """The recordings."""

    kind: ClassVar[Kind] = Kind(
        EncodedAudio,
        "audiofolder",
        "audio_column",
        "recordings",
        "recordings",
        media_column="audio",
        extensions=frozenset(EXTENSIONS.split()),
        reads=is_recording,
        while_opening=builders_without_torchcodec,
    )

    dataset: str = setting(
        "mythicinfinity/libritts", "Hub id, folder of recordings, parquet or arrow file or folder"
    )
    config_name: str | None = setting("all", "configuration of a dataset that has several")
    train_split: str = setting(
        "train.clean.100+train.clean.360+train.other.500",
        "split to train on; train[:95%] is a part, a+b two of them",
    )
    validation_split: str | None = setting("dev.clean", "split to validate on; null for none")
    audio_column: str = setting("audio", "column that holds the recordings")
    sampling_rate: int = setting(24_000, "samples per second; other recordings are resampled")
    clip_seconds: float = setting(1.0, "length of the crops; shorter recordings are repeated")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "sampling_rate")
        if not 1 <= self.clip_seconds * self.sampling_rate < math.inf:
            raise SettingsError(f"clip_seconds must be positive, got {self.clip_seconds}")

    @property
    def clip_samples(self) -> int:
        """Length of a crop in samples."""
        return round(self.clip_seconds * self.sampling_rate)


def decode_audio(
    cell: dict | None,
    sampling_rate: int,
    clip_samples: int | None = None,
    generator: torch.Generator | None = None,
    name: str = "a recording without a path",
) -> Tensor:
    """Decode a cell of an audio column to a mono waveform (1, samples) float32 at `sampling_rate`.

    As the original (fixture data_audio): the mean of the channels, soxr's HQ
    resampling, no change of gain, a random crop of longer recordings, repetition of shorter ones. Unlike it
    the last start can be drawn too, and no more is read from the file than the crop needs.

    Args:
        cell: {"bytes": ..., "path": ...}, one of which may be None; path may be a URL of fsspec. WAV, FLAC,
            MP3, Ogg and whatever else libsndfile knows.
        clip_samples: length of the result; None for the whole recording.
        generator: draws the start of the crop. Without one the crop is the middle, since recordings tend to
            begin and end in silence.
        name: what to call the recording in errors when it has no path.

    Raises:
        UnreadableSample: if the file cannot be decoded, has no samples, ends before its header says (within
            the crop), has NaN, infinite or never scaled samples there, or is taken whole and longer than
            MOST_SAMPLES. It names the file.
    """
    with open_cell(cell, name) as file, closing(AudioFile(file, clip_samples is None)) as recording:
        rate = recording.rate
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise UnreadableSample(f"its sampling rate is {rate} Hz")
        whole = recording.read(0, None) if recording.frames is None else None
        frames = recording.frames if whole is None else len(whole)
        length = -(-frames * sampling_rate // rate)  # rounded up
        if length == 0:
            raise UnreadableSample("it has no samples")
        if clip_samples is None and length > MOST_SAMPLES:
            raise too_long()
        surplus = 0 if clip_samples is None else max(0, length - clip_samples)
        if generator is not None and surplus:
            start = int(torch.randint(0, surplus + 1, (1,), generator=generator))
        else:
            start = surplus // 2

        def read(begin: int, end: int) -> np.ndarray:
            return recording.read(begin, end) if whole is None else whole[begin:end]

        waveform = _resampled(read, frames, rate, start, length - surplus, sampling_rate)
    if clip_samples is not None and length < clip_samples:
        waveform = np.resize(waveform, clip_samples)  # repeats it
    return torch.from_numpy(waveform)[None]


def _resampled(
    read: Callable[[int, int], np.ndarray],
    frames: int,
    rate: int,
    start: int,
    length: int,
    sampling_rate: int,
) -> np.ndarray:
    """Samples [start, start + length) of what the whole recording would be at `sampling_rate`.

    Args:
        read: first and last frame to their values.
        frames, rate: of the recording.
    """
    if rate == sampling_rate:
        return read(start, start + length)
    # Every block of so many frames becomes a whole number of samples: if reading begins with a block, the
    # samples lie where they would if the whole were resampled.
    common = math.gcd(rate, sampling_rate)
    block_frames, block_samples = rate // common, sampling_rate // common
    margin = math.ceil(RESAMPLING_MARGIN * rate)
    first_block = max(0, start // block_samples - math.ceil(margin / block_frames))
    begin = first_block * block_frames
    end = min(frames, -(-(start + length) * rate // sampling_rate) + margin)
    resampled = soxr.resample(read(begin, end), rate, sampling_rate, "HQ")
    skipped = start - first_block * block_samples
    waveform = np.zeros(length, np.float32)  # soxr may round the length down
    taken = resampled[skipped : skipped + length]
    waveform[: len(taken)] = taken
    return waveform


def _decode(
    cell: dict | None,
    name: str,
    generator: torch.Generator | None,
    sampling_rate: int,
    clip_samples: int,
) -> Tensor:
    return decode_audio(cell, sampling_rate, clip_samples, generator, name)


def build_audio_dataloader(
    config: AudioDataConfig, split: str, *, batch_size: int, train: bool, seed: int
) -> DataLoader:
    """Open a split and batch it: {"input_values": (B, 1, clip_samples), "valid": (B,), "unreadable": (B,)}.

    See build_dataloader: random crops in training, the middle in validation.
    """
    samples = config.clip_samples
    decode = partial(_decode, sampling_rate=config.sampling_rate, clip_samples=samples)
    decoder = Decoder(config.column, "input_values", (1, samples), decode)
    source = open_split(config, split)
    return build_dataloader(
        source, split, config, decoder, batch_size=batch_size, train=train, seed=seed
    )
