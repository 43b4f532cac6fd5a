"""Peak memory and time of the generators' loss on large vocabularies, on the CPU.

  python benchmarks/generator_memory.py

A training step of the last layer alone: loss of N tokens of width d over K codes, forward and backward, in
float32. "plain" is torch's cross_entropy of all logits; "chunked" is the project's loss over K codes,
"factorised" its loss over two numbers with K1 * K2 = K. Each runs in a process of its own; memory is what the
peak adds to that of a process that holds tables and inputs.
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from modeling_simvq.code_prediction import make_codes
from modeling_simvq.configuration_simvq_generation import SimVQAudioGenerationConfig

WAYS = ("plain", "chunked", "factorised")


def measure(way: str, size: int, tokens: int, width: int, runs: int) -> None:
    """Print MiB and milliseconds of one way, in this process."""
    torch.manual_seed(0)
    first = 2 ** (math.floor(math.log2(size)) // 2)
    config = SimVQAudioGenerationConfig(
        codebook_size=size,
        hidden_size=width,
        num_attention_heads=1,
        code_factors=(first, size // first) if way == "factorised" else None,
    )
    codes = make_codes(config)
    targets = torch.randint(0, size, (tokens,))
    hidden = torch.randn(tokens, width, requires_grad=True)

    def step() -> float:
        codes.zero_grad()
        hidden.grad = None
        start = time.perf_counter()
        if way == "plain":
            F.cross_entropy(codes.logits(hidden), targets).backward()
        else:
            codes.loss(hidden, targets).backward()
        return time.perf_counter() - start

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [step() for _ in range(runs)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{(peak - before) / 1024:.0f} {1e3 * statistics.median(times):.0f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 65536, 262_144], help="K")
    parser.add_argument("--tokens", type=int, default=1024, help="N")
    parser.add_argument("--width", type=int, default=256, help="d")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "K"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], int(options.one[1]), options.tokens, options.width, options.runs)
        return
    print(f"N = {options.tokens:,}, d = {options.width}, {torch.get_num_threads()} threads")
    print("| K | " + " | ".join(f"{way}, MiB | ms" for way in WAYS) + " |")
    print("|---" * (1 + 2 * len(WAYS)) + "|")
    for size in options.sizes:
        cells = []
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, str(size)]
            for name in ("tokens", "width", "runs"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, capture_output=True, text=True)
            # What the kernel ends for want of memory is not a figure.
            cells += [f"{int(part):,}" for part in done.stdout.split()] or ["failed", "failed"]
        print(f"| {size:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
