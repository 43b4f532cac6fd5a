"""Tokens a second of the generators, with and without the cache of keys and values.

  python benchmarks/sampling_speed.py         a small model, on the CPU
  python benchmarks/sampling_speed.py --device cuda --hidden-size 768 --layers 12 --batch 16

All ways take turns, so that whatever else the machine does falls on all of them; medians of several runs.
Weights are random: they change no time.
"""

import argparse
import statistics
import time

import torch
from tqdm import tqdm

from modeling_simvq import SimVQForImageGeneration, SimVQImageGenerationConfig

WAYS = {
    "with cache": {},
    "without cache": {"use_cache": False},
    "with cache and guidance": {"guidance_scale": 2.0},
}


def measure(model: SimVQForImageGeneration, batch: int, runs: int) -> dict[str, float]:
    """Median tokens per second of each way, after one run that warms up."""
    labels = torch.zeros(batch, dtype=torch.int64)
    rates = {name: [] for name in WAYS}
    for number in tqdm(range(runs + 1), leave=False):
        for name, settings in WAYS.items():
            start = time.perf_counter()
            codes = model.generate_images(labels, **settings).cpu()
            if number:
                rates[name].append(codes.numel() / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=16, help="codes along a side of the picture")
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
    parser.add_argument("--codebook-size", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    config = SimVQImageGenerationConfig(
        codebook_size=options.codebook_size,
        grid_size=(options.side, options.side),
        hidden_size=options.hidden_size,
        intermediate_size=8 * options.hidden_size // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
    )
    torch.manual_seed(0)
    model = SimVQForImageGeneration(config).to(options.device).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{size / 1e6:.1f} M parameters, {options.batch} pictures of {options.side} x {options.side} codes, "
        f"K = {options.codebook_size:,}, {options.device}, {torch.get_num_threads()} threads, "
        f"median of {options.runs}"
    )
    for name, rate in measure(model, options.batch, options.runs).items():
        print(f"{name}: {rate:,.0f} tokens/s, {rate / options.side**2:.2f} pictures/s")


if __name__ == "__main__":
    main()
