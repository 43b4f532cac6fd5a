"""Speed and memory of the audio tokenizer at its published size, on the CPU.

  python benchmarks/audio_speed.py            real-time factor of encode and decode, a 10-second clip
  python benchmarks/audio_speed.py --memory   peak memory of a 10-minute clip, decoded whole and in chunks

The real-time factor is seconds of computing per second of audio, median of several runs. Weights are random:
they change neither. Memory is measured in a process of its own for each way.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel


def make_model(codebook_size: int) -> SimVQAudioModel:
    """The published architecture with folded weight norm, as for inference."""
    torch.manual_seed(0)
    model = SimVQAudioModel(SimVQAudioConfig(codebook_size=codebook_size)).eval()
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
    parser.add_argument("--minutes", type=float, default=10.0, help="clip for --memory")
    parser.add_argument("--way", choices=("whole", "chunks"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure_memory(options.way, options.minutes)
    elif options.memory:
        for way in ("whole", "chunks"):
            command = [sys.executable, __file__, "--way", way, "--minutes", str(options.minutes)]
            subprocess.run(command, check=True)
    else:
        for codebook_size in (4096, 262_144):
            measure_speed(codebook_size, seconds=10.0, runs=5)


if __name__ == "__main__":
    main()
