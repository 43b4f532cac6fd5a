"""Speed and memory of the audio tokenizer at its published size, on the CPU.

  python benchmarks/audio_speed.py            real-time factor of encode and decode, a 10-second clip
  python benchmarks/audio_speed.py --memory   peak memory of a 10-minute clip, decoded whole and in chunks
  python benchmarks/audio_speed.py --stream   streams on one thread: real-time factor, time of a chunk; and
                                              transformers' Mimi (8 codebooks)
  python benchmarks/audio_speed.py --hour     memory of an hour's stream through a small model

The real-time factor is seconds of computing per second of audio, median of several runs. Weights are random:
they change neither. Memory is measured in a process of its own for each way.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import MimiConfig, MimiModel

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel

RATE = 24_000


def make_model(codebook_size: int, **changes) -> SimVQAudioModel:
    """The published architecture with folded weight norm, as for inference."""
    torch.manual_seed(0)
    model = SimVQAudioModel(SimVQAudioConfig(codebook_size=codebook_size, **changes)).eval()
    model.remove_weight_norm()
    return model


@torch.no_grad()
def measure_speed(codebook_size: int, seconds: float, runs: int) -> None:
    """Print the real-time factors."""
    model = make_model(codebook_size)
    clip = torch.randn(1, 1, round(seconds * model.config.sampling_rate)) * 0.1
    encoding, decoding = [], []
    for number in tqdm(range(runs + 1), desc=f"K = {codebook_size:,}", leave=False):
        start = time.perf_counter()
        codes = model.encode(clip).audio_codes
        middle = time.perf_counter()
        model.decode(audio_codes=codes)
        if number:  # the first run warms up
            encoding.append((middle - start) / seconds)
            decoding.append((time.perf_counter() - middle) / seconds)
    both = statistics.median(a + b for a, b in zip(encoding, decoding, strict=True))
    print(
        f"K = {codebook_size:>7,}: encode {statistics.median(encoding):.3f}, decode "
        f"{statistics.median(decoding):.3f}, together {both:.3f} of real time "
        f"({torch.get_num_threads()} threads, {seconds:g}-second clip, median of {runs})"
    )


def stream_of_ours(codebook_size: int) -> Callable[[Tensor], Tensor]:
    """Return what codes and decodes the next samples, with the published sizes."""
    stream = make_model(codebook_size, streaming=True).stream()
    return lambda samples: stream.decode(stream.encode(samples))


def stream_of_mimi() -> Callable[[Tensor], Tensor]:
    """Return the same of transformers' Mimi; its decoder's convolutions keep no state there."""
    torch.manual_seed(0)
    model, state = MimiModel(MimiConfig()).eval(), {}

    def step(samples: Tensor) -> Tensor:
        encoded = model.encode(samples, num_quantizers=8, use_streaming=True, **state.get("in", {}))
        decoded = model.decode(encoded.audio_codes, **state.get("out", {}), use_cache=True)
        state["in"] = {
            "encoder_past_key_values": encoded.encoder_past_key_values,
            "padding_cache": encoded.padding_cache,
        }
        state["out"] = {"decoder_past_key_values": decoded.decoder_past_key_values}
        return decoded.audio_values

    return step


@torch.no_grad()
def measure_streams(chunk_ms: float, seconds: float) -> None:
    """Print the real-time factor of streams of each model, and the slowest of 19 in 20 chunks."""
    chunk = round(chunk_ms * RATE / 1000)
    steps = {f"SimVQ, K = {size:,}": stream_of_ours(size) for size in (4096, 65_536)}
    steps["Mimi, 8 codebooks"] = stream_of_mimi()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(10 + round(seconds * RATE / chunk)), desc=f"{chunk_ms:g} ms", leave=False):
        samples = torch.randn(1, 1, chunk) * 0.1
        for name, step in steps.items():
            start = time.perf_counter()
            step(samples)
            times[name].append(time.perf_counter() - start)
    for name, taken in times.items():
        late = sorted(taken[10:])  # the first ones warm up
        print(
            f"{name:<18} chunks of {chunk_ms:g} ms: {statistics.median(late) / chunk * RATE:.2f} of real "
            f"time, a chunk in {1000 * statistics.median(late):.1f} ms, 19 of 20 within "
            f"{1000 * late[len(late) * 19 // 20]:.1f} ms"
        )


@torch.no_grad()
def measure_hour(minutes: float) -> None:
    """Print how the memory of this process grows with a stream, in chunks of 80 ms."""
    sizes = {
        "num_filters": 8,
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_decoder_layers": 4,
    }
    stream = make_model(4096, streaming=True, codebook_dim=8, **sizes).stream()
    held, count = [], round(minutes * 60 / 0.08)
    for number in tqdm(range(count), desc="an hour", leave=False):
        stream.decode(stream.encode(torch.randn(1, 1, 1920) * 0.1))
        if number % (count // 60) == 0:
            held.append(psutil.Process().memory_info().rss / 2**20)
    print(
        f"{minutes:g} minutes in {count:,} chunks: {held[1]:.1f} MiB after {minutes / 60:g} min, "
        f"{held[-1]:.1f} MiB at the end, at most {max(held[1:]):.1f}"
    )


@torch.no_grad()
def measure_memory(way: str, minutes: float) -> None:
    """Print the peak memory of this process above its start."""
    model = make_model(4096)
    if way == "chunks":
        model.enable_chunking()
    clip = torch.randn(1, 1, round(60 * minutes * model.config.sampling_rate)) * 0.1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    codes = model.encode(clip).audio_codes
    middle = time.perf_counter()
    encoded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.decode(audio_codes=codes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{minutes:g} minutes, decoded {'whole' if way == 'whole' else 'in chunks'}: encode "
        f"{(encoded - before) / 1024:,.0f} MiB and {middle - start:.0f} s, with decode "
        f"{(peak - before) / 1024:,.0f} MiB and {time.perf_counter() - start:.0f} s"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument("--stream", action="store_true", help="measure streams")
    parser.add_argument("--hour", action="store_true", help="measure memory of a long stream")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a stream")
    parser.add_argument("--minutes", type=float, help="of --memory and --hour")
    parser.add_argument("--way", choices=("whole", "chunks"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure_memory(options.way, options.minutes)
    elif options.hour:
        torch.set_num_threads(1)
        measure_hour(options.minutes or 60)
    elif options.stream:
        torch.set_num_threads(1)
        for chunk_ms in (80, 160, 320):
            measure_streams(chunk_ms, options.seconds)
    elif options.memory:
        for way in ("whole", "chunks"):
            command = [
                sys.executable,
                __file__,
                "--way",
                way,
                "--minutes",
                str(options.minutes or 10),
            ]
            subprocess.run(command, check=True)
    else:
        for codebook_size in (4096, 262_144):
            measure_speed(codebook_size, seconds=10.0, runs=5)


if __name__ == "__main__":
    main()
