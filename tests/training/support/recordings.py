"""Recordings as files, sound and broken, for the tests of audio data."""

import io

import numpy as np
import soundfile

RATE = 8000


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype=None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def noise(samples: int, seed: int = 0, channels: int | None = None) -> np.ndarray:
    shape = samples if channels is None else (samples, channels)
    return (np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(np.float32)


def broken_recordings() -> dict[str, tuple[bytes, str]]:
    """Name to content and a word of the reason."""
    flac, spoilt = encoded(noise(8000), kind="FLAC"), noise(1000)
    spoilt[500] = np.nan
    return {
        "cut.flac": (flac[: len(flac) // 2], "."),
        "zero.wav": (b"", "empty"),
        "text.wav": (b"this is no recording, but text of some length", "[Ff]ormat"),
        "nan.wav": (encoded(spoilt, subtype="FLOAT"), "NaN"),
        "none.wav": (encoded(noise(0)), "no samples"),
        "header.wav": (encoded(noise(100))[:20], "."),
        "headless.raw": (b"\0" * 1000, "."),
    }
