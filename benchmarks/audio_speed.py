"""Speed and memory of the audio tokenizer at its published size, on the CPU.

  python benchmarks/audio_speed.py            real-time factor of encode and decode, a 10-second clip
  python benchmarks/audio_speed.py --memory   peak memory of a 10-minute clip, decoded whole and in chunks
  python benchmarks/audio_speed.py --stream   a streaming model, one thread: real-time factor, time of a chunk

The real-time factor is seconds of computing per second of audio, median of several runs. Weights are random:
they change neither. Memory is measured in a process of its own for each way.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import psutil
import torch
from tqdm import tqdm

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel


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


@torch.no_grad()
def measure_stream(codebook_size: int, chunk_ms: float, seconds: float) -> None:
    """Print the real-time factor of a stream through encode and decode, and the slowest of 19 in 20 chunks."""
    model = make_model(codebook_size, streaming=True)
    rate = model.config.sampling_rate
    chunk = round(chunk_ms * rate / 1000)
    stream, times, held = model.stream(), [], []
    for number in tqdm(range(round(seconds * rate / chunk)), desc=f"{chunk_ms:g} ms", leave=False):
        samples = torch.randn(1, 1, chunk) * 0.1
        start = time.perf_counter()
        stream.decode(stream.encode(samples))
        times.append(time.perf_counter() - start)
        if number % 10 == 0:
            held.append(psutil.Process().memory_info().rss / 2**20)
    late = sorted(times[10:])  # the first ones warm up
    third = len(held) // 3
    growth = statistics.median(held[-third:]) - statistics.median(held[third : 2 * third])
    print(
        f"K = {codebook_size:>7,}, chunks of {chunk_ms:g} ms: {sum(late) / len(late) / chunk * rate:.2f} of "
        f"real time, a chunk in {1000 * statistics.median(late):.1f} ms, 19 of 20 within "
        f"{1000 * late[len(late) * 19 // 20]:.1f} ms; latency without computing "
        f"{1000 * stream.latency / rate:.1f} ms; memory {growth:+.1f} MiB over the last third of {seconds:g} s"
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
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a stream")
    parser.add_argument("--minutes", type=float, default=10.0, help="clip for --memory")
    parser.add_argument("--way", choices=("whole", "chunks"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure_memory(options.way, options.minutes)
    elif options.stream:
        torch.set_num_threads(1)
        for codebook_size in (4096, 65_536):
            for chunk_ms in (40, 80, 160):
                measure_stream(codebook_size, chunk_ms, options.seconds)
    elif options.memory:
        for way in ("whole", "chunks"):
            command = [sys.executable, __file__, "--way", way, "--minutes", str(options.minutes)]
            subprocess.run(command, check=True)
    else:
        for codebook_size in (4096, 262_144):
            measure_speed(codebook_size, seconds=10.0, runs=5)


if __name__ == "__main__":
    main()
