"""Command that sends a recording through a streaming tokenizer, chunk by chunk, and measures it."""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import logging as transformers_logging

from .audio_stream import SimVQAudioStream
from .command_model import stored_type
from .configuration_simvq_audio import SimVQAudioConfig
from .modeling_simvq_audio import SimVQAudioModel
from .wav_file import conversion, read_wav, write_wav

# Samples of a stream may differ from those of the whole clip by rounding only.
TOLERANCE = 1e-5


@dataclass
class Streamed:
    """Result of a stream: codes (1, 1, T), samples (1, 1, L) on the CPU, and seconds that each chunk took."""

    codes: Tensor
    samples: Tensor
    seconds: list[float]


def add_to(commands) -> None:
    """Add the command to those of a command line, an argparse parser's add_subparsers()."""
    parser = commands.add_parser(
        "stream",
        help="send a recording through a streaming tokenizer",
        description="Send a recording through a streaming tokenizer chunk by chunk, write what comes out, and "
        "compare it with the whole clip at once. Exit status 1 if they differ.",
    )
    parser.add_argument("input", metavar="IN.wav", type=Path, help="a recording, PCM")
    parser.add_argument(
        "output", metavar="OUT.wav", type=Path, help="decoded recording, 16-bit PCM"
    )
    parser.add_argument(
        "--model", required=True, metavar="FOLDER_OR_HUB_ID", help="a streaming audio tokenizer"
    )
    parser.add_argument(
        "--chunk-ms", type=_milliseconds, default=80, help="length of a chunk (default: 80)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Stream the recording, write and print what comes of it; return 0 if the whole clip gives the same.

    Raises:
        ValueError, OSError: if a file or the model cannot be used; the message says what to do.
    """
    recording, rate, channels = read_wav(options.input)
    if channels > 1:
        print(f"note: the {channels} channels of {options.input} are mixed down to one")
    _check_output(options.input, options.output)
    model = load_streaming_model(options.model, options.revision)
    wanted = model.config.sampling_rate
    if rate != wanted:
        raise ValueError(
            f"{options.input} has {rate:,} samples a second and the model takes {wanted:,}: "
            f"{conversion(options.input, wanted)}"
        )
    size = min(round(options.chunk_ms * rate / 1000), recording.shape[-1])
    if size < 1:
        raise ValueError(f"--chunk-ms {options.chunk_ms:g} is less than a sample at {rate:,} Hz")
    made = stream_recording(model, recording, size)
    write_wav(options.output, made.samples[0, 0], rate)
    duration, times = recording.shape[-1] / rate, torch.tensor(made.seconds)
    chunk = f"median {1000 * times.median():.1f} ms, 95th percentile {1000 * times.quantile(0.95):.1f} ms"
    latency = 1000 * SimVQAudioStream(model).latency / rate
    _say("output", f"{options.output}, {duration:.2f} s at {rate:,} Hz")
    _say("codes", f"{made.codes.numel():,}")
    _say("algorithmic latency", f"{latency:.1f} ms")
    _say(f"chunk of {options.chunk_ms:g} ms", chunk)
    _say("real-time factor", f"{sum(made.seconds) / duration:.2f}")
    return _compare(model, recording, made)


def _compare(model: SimVQAudioModel, recording: Tensor, made: Streamed) -> int:
    """Print whether the whole clip at once gives the same; return the exit status."""
    with torch.no_grad():
        codes = model.encode(recording).audio_codes
        samples = model.decode(codes).audio_values[..., : recording.shape[-1]]
    same = torch.equal(codes, made.codes)
    difference = (samples.float() - made.samples).abs().max().item()
    _say("codes of the whole clip", "equal" if same else "DIFFERENT")
    _say("samples of the whole clip", f"differ by at most {difference:.1e}")
    return 0 if same and difference <= TOLERANCE else 1


def _say(name: str, value: str) -> None:
    print(f"{name + ':':<27}{value}", flush=True)


def load_streaming_model(name: str, revision: str | None = None) -> SimVQAudioModel:
    """Load a streaming audio tokenizer, with this package's code, ready for streams.

    Args:
        name: a folder, or an id of the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: if it is not found, is another model, or does not stream.
        OSError: if its weights are missing or damaged.
    """
    kind = stored_type(name, revision)
    if kind != SimVQAudioConfig.model_type:
        raise ValueError(
            f"{name} is of type {kind}, not {SimVQAudioConfig.model_type}: "
            "give a streaming audio tokenizer"
        )
    config = SimVQAudioConfig.from_pretrained(name, revision=revision)
    if not config.streaming:  # told before its weights are fetched
        raise ValueError(
            f"{name} cannot stream, because it sees the whole clip: give a model that was trained with "
            "streaming=True in its configuration (training/train_audio.py with streamable=true)"
        )
    transformers_logging.disable_progress_bar()
    # In half precision a chunk is rounded otherwise than the whole clip.
    model = SimVQAudioModel.from_pretrained(
        name, config=config, revision=revision, dtype=torch.float32
    )
    return model.eval()


def stream_recording(model: SimVQAudioModel, recording: Tensor, size: int) -> Streamed:
    """Send a recording (1, 1, L) through a stream in chunks of `size` samples, with a bar on a terminal.

    Raises:
        ValueError: if the model makes something that is not finite.
    """
    stream = SimVQAudioStream(model)
    # The first call of all prepares the codebook and the kernels.
    stream.decode(stream.encode(torch.zeros(1, 1, max(size, model.config.hop_length))))
    stream.reset()
    codes, samples, seconds = [], [], []
    for chunk in tqdm(recording.split(size, dim=-1), desc="streaming", unit="chunk", disable=None):
        start = time.perf_counter()
        codes.append(stream.encode(chunk))
        samples.append(stream.decode(codes[-1]))
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    last_codes, last_samples = stream.flush()
    seconds[-1] += time.perf_counter() - start
    whole = torch.cat([*samples, last_samples], dim=-1)[..., : recording.shape[-1]].float()
    if not whole.isfinite().all():
        raise ValueError(
            "the model's audio holds values that are not finite: its weights are damaged"
        )
    return Streamed(torch.cat([*codes, last_codes], dim=-1), whole, seconds)


def _check_output(source: Path, output: Path) -> None:
    """Refuse a place where the output cannot go, before time is spent."""
    if output.exists() and output.samefile(source):
        raise ValueError(f"{output} is the input itself: name another file for the output")
    if output.is_dir():
        raise ValueError(f"{output} is a folder: name a file for the output")
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent} for the output: make it first")


def _milliseconds(text: str) -> float:
    """Read the length of a chunk."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value
