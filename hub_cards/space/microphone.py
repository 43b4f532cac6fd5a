"""Speech as it is spoken: pieces from a visitor's microphone to codes, and to sound that plays meanwhile."""

import base64
import io
import json
import math
import queue
import shutil
import threading
import time
import wave
from collections.abc import Iterator

import numpy as np
import soxr
import torch

EVERY_SECONDS = 0.2  # a piece of the microphone
LONGEST_SECONDS = 60
# After the last piece, if the page does not tell of an end: it was closed.
PATIENCE_SECONDS = 5
RATES = range(8_000, 192_001)
# Gradio sends a stream of sound through it.
CAN_PLAY = shutil.which("ffmpeg") is not None


class Recording:
    """Pieces of one visitor's recording that wait for the tokenizer, in the order in which they were spoken."""

    def __init__(self):
        self._ready: queue.Queue = queue.Queue()
        self._early: dict[int, tuple] = {}
        self._next, self._lock = 0, threading.Lock()

    def add(self, text: str) -> None:
        """Take a piece as microphone.js sends it. Requests may overtake each other: a piece waits for its turn.

        Raises:
            ValueError: if it is something else.
        """
        try:
            sent = json.loads(text)
            samples = np.frombuffer(base64.b64decode(sent["samples"], validate=True), "<i2")
            number, rate, last = int(sent["number"]), int(sent["rate"]), bool(sent["last"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("The page sent something that is no sound.") from error
        if len(samples) and (rate not in RATES or len(samples) > LONGEST_SECONDS * rate):
            raise ValueError(f"The page sent {len(samples):,} samples at {rate:,} Hz at once.")
        with self._lock:
            self._early[number] = (samples / np.float32(32768), rate, last)
            while self._next in self._early:
                self._ready.put(self._early.pop(self._next))
                self._next += 1

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Wait for pieces, (L,) float32 and their rate, until the recording ends."""
        last = False
        while not last:
            try:
                samples, rate, last = self._ready.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                return
            if len(samples):
                yield samples, rate


class Resampler:
    """Pieces of any rate to pieces of `sampling_rate` that join without a seam."""

    def __init__(self, sampling_rate: int):
        self.sampling_rate = sampling_rate
        self._stream: soxr.ResampleStream | None = None

    def next(self, samples: np.ndarray, rate: int) -> np.ndarray:
        """Return what the samples (L,) float32 settle. All pieces are of one rate."""
        if self._stream is None:
            self._stream = soxr.ResampleStream(rate, self.sampling_rate, 1, dtype="float32")
        return self._stream.resample_chunk(samples)

    def rest(self) -> np.ndarray:
        """Return what is still inside."""
        empty = np.empty(0, np.float32)
        return empty if self._stream is None else self._stream.resample_chunk(empty, last=True)


def answers(model, recording: Recording) -> Iterator[tuple[bytes | None, str]]:
    """Code and decode a recording while it comes in.

    Args:
        model: a streaming tokenizer.

    Yields:
        The next decoded sound, a WAV file, None if there is none yet; and a line about the codes so far.

    Raises:
        ValueError: if the model makes something that is not finite.
    """
    config, stream = model.config, model.stream()
    resampler, heard, codes, busy = Resampler(config.sampling_rate), 0, 0, 0.0

    def through(samples: np.ndarray) -> torch.Tensor:
        nonlocal heard, codes
        heard += len(samples)
        found = stream.encode(torch.from_numpy(samples)[None, None].to(model.device))
        codes += found.numel()
        return stream.decode(found)

    def answer(made: torch.Tensor) -> tuple[bytes | None, str]:
        seconds = max(heard, 1) / config.sampling_rate
        levels = getattr(config, "num_quantizers", 1)
        rate = config.frame_rate * levels * math.log2(config.codebook_size)
        line = (
            f"**{codes:,} codes** in {seconds:.1f} s, {rate:.0f} bit/s; latency "
            f"{1000 * stream.latency / config.sampling_rate:.0f} ms, computing takes "
            f"{busy / seconds:.2f} of real time"
        )
        if not made.isfinite().all():
            raise ValueError("The model's audio holds values that are not finite numbers.")
        return write_wav(made[0, 0].float().cpu().numpy(), config.sampling_rate), line

    for samples, rate in recording:
        start = time.perf_counter()
        made = through(resampler.next(samples, rate))
        busy += time.perf_counter() - start
        yield answer(made)
        if heard > LONGEST_SECONDS * config.sampling_rate:
            break
    start = time.perf_counter()
    made = [through(resampler.rest())]
    last_codes, last = stream.flush()
    codes += last_codes.numel()
    busy += time.perf_counter() - start
    yield answer(torch.cat([*made, last], dim=-1))


def write_wav(samples: np.ndarray, rate: int) -> bytes | None:
    """Return samples (L,) as a WAV file, None if there are none, or if no stream of sound can be played."""
    if not (len(samples) and CAN_PLAY):
        return None
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return content.getvalue()
