"""Speed and memory of the SimVQ quantizer beside the published formulation and vector-quantize-pytorch.

  python benchmarks/quantizer.py                     training step, search, decoding and peak memory
  python benchmarks/quantizer.py --quick             two small sizes
  python benchmarks/quantizer.py --search            the search beside the matrix product alone, and no training
  python benchmarks/quantizer.py --products          the matrix product alone, in every way that torch has
  python benchmarks/quantizer.py --device cuda       the sizes of a GPU, with torch.compile of the plain formula
  python benchmarks/quantizer.py --json results.json the same figures, with the machine's description

The systems take turns within one process, and every figure is the median of several turns, so a ratio compares
runs of the same minute. Peak memory is measured in a process of its own, above what the process held once the
quantizer and its inputs existed. vector-quantize-pytorch is left out if it is not installed (pip install
'modeling-simvq[baselines]'), and others than ours where their N x K buffers would not fit into memory.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from modeling_simvq import SimVQ, nearest_code

CPU_SIZES = [  # K, N, d
    (1024, 4096, 128),
    (8192, 4096, 128),
    (65_536, 4096, 128),
    (262_144, 256, 128),
    (262_144, 4096, 128),
    (262_144, 4096, 512),
]
QUICK_SIZES = [(1024, 4096, 128), (16_384, 4096, 128)]
GPU_SIZES = [
    (codes, tokens, width)
    for width in (128, 512)
    for codes in (8192, 65_536, 262_144, 1_048_576)
    for tokens in (256, 4096, 16_384)
]


class Published(nn.Module):
    """The formulation of the paper's code: all codes projected inside autograd, all N x K distances at once."""

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.basis = nn.Parameter(
            torch.randn(codebook_size, codebook_dim) * codebook_dim**-0.5, False
        )
        self.projection = nn.Linear(codebook_dim, codebook_dim)

    def search(self, rows: Tensor, codebook: Tensor) -> Tensor:
        """argmin of |z|^2 + |e|^2 - 2 z.e."""
        squares = rows.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
        return (squares - 2 * torch.einsum("nd,kd->nk", rows, codebook)).argmin(dim=1)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, d, h, w) to quantized latents, codes and loss."""
        z = latents.movedim(1, -1).contiguous()
        codebook = self.projection(self.basis)
        codes = self.search(z.view(-1, z.shape[-1]), codebook)
        q = F.embedding(codes, codebook).view(z.shape)
        loss = 0.25 * F.mse_loss(q.detach(), z) + F.mse_loss(q, z.detach())
        q = z + (q - z).detach()
        return q.movedim(-1, 1).contiguous(), codes, loss


def make(system: str, codes: int, width: int, device: str) -> nn.Module:
    """A quantizer by name."""
    if system == "ours":
        return SimVQ(codes, width).to(device)
    if system == "vector-quantize-pytorch":
        from vector_quantize_pytorch import SimVQ as Peer

        return Peer(dim=width, codebook_size=codes, channel_first=True, rotation_trick=False).to(
            device
        )
    module = Published(codes, width).to(device)
    if system == "compiled":
        module.search = torch.compile(module.search)
    return module


def systems(device: str) -> list[str]:
    """Ours first, then what can be compared with here."""
    names = ["ours", "published"]
    try:
        import vector_quantize_pytorch  # noqa: F401

        names.append("vector-quantize-pytorch")
    except ImportError:
        print("vector-quantize-pytorch is not installed: left out", file=sys.stderr)
    return [*names, "compiled"] if device == "cuda" else names


def make_latents(tokens: int, width: int, device: str) -> Tensor:
    """Images of 16 x 16 tokens, as long as codes are."""
    torch.manual_seed(0)
    return torch.randn(tokens // 256, width, 16, 16, device=device) * width**-0.5


def train_step(module: nn.Module, latents: Tensor) -> None:
    """Forward and backward."""
    latents = latents.clone().requires_grad_()
    quantized, _, loss = module(latents)
    (quantized.sum() + loss).backward()


def interleaved(turns: dict[str, Callable[[], object]], runs: int, device: str) -> dict[str, float]:
    """Median seconds of each, taking turns. What runs out of memory is NaN.

    Only the second half of a turn counts: the first finds another system's data in the caches, and may have to
    give back to the operating system what that one freed.
    """
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(runs):
        for name, turn in turns.items():
            if len(taken[name]) < number:  # it failed before
                continue
            try:
                for _ in range(2):
                    start = time.perf_counter()
                    turn()
                    if device == "cuda":
                        torch.cuda.synchronize()
                    seconds = time.perf_counter() - start
                taken[name].append(seconds)
            except (torch.OutOfMemoryError, MemoryError):
                if device == "cuda":
                    torch.cuda.empty_cache()
    return {
        name: statistics.median(times) if len(times) == runs else float("nan")
        for name, times in taken.items()
    }


def products(rows: Tensor, codes: Tensor, device: str) -> dict[str, Callable[[], None]]:
    """The float32 product of these shapes alone, in every way to make it and to cut it into tiles."""
    turns = {}
    for height, width in ((1024, 512), (2048, 512), (4096, 256), (4096, 512), (512, 1024)):
        height, width = min(height, len(rows)), min(width, len(codes))
        if device == "cuda":
            height, width = len(rows), min(len(codes), 1 << 30 >> (len(rows) - 1).bit_length())
        out = rows.new_empty(height * width)

        def by_blas(height=height, width=width, out=out):
            for some in rows.split(height):
                for tile in codes.split(width):
                    torch.mm(
                        some, tile.T, out=out[: len(some) * len(tile)].view(len(some), len(tile))
                    )

        def by_convolution(height=height, width=width):
            for some in rows.split(height):
                # In batches of 32 a single thread takes it to oneDNN, otherwise to the BLAS.
                pixels = some.view(32, 1, -1, some.shape[1]).permute(0, 3, 1, 2)
                for tile in codes.split(width):
                    F.conv2d(pixels, tile[:, :, None, None])

        turns[f"mm {height} x {width}"] = by_blas
        if device == "cpu":
            turns[f"convolution {height} x {width}"] = by_convolution
    return turns


def search_inputs(codes: int, tokens: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Queries (tokens, width) and codes (codes, width)."""
    rows = make_latents(tokens, width, device).movedim(1, -1).reshape(-1, width)
    return rows, torch.randn(codes, width, device=device) * width**-0.5


@torch.no_grad()
def measure_search(
    codes: int, tokens: int, width: int, runs: int, device: str
) -> tuple[float, float]:
    """Seconds of our search, and of the fastest product alone. They take turns: a processor's clock drifts.

    A first round over an eighth of the codes finds the fastest way to make the product.
    """
    rows, codebook = search_inputs(codes, tokens, width, device)
    tried = interleaved(products(rows, codebook[: max(codes // 8, 4096)], device), 3, device)
    ways = products(rows, codebook, device)
    turns = {
        "ours": lambda: nearest_code(rows, codebook),
        "product": ways[min(tried, key=tried.get)],
    }
    taken = interleaved(turns, runs, device)
    return taken["ours"], taken["product"]


def fits(system: str, codes: int, tokens: int, device: str) -> bool:
    """Tell whether a system's three buffers of N x K numbers fit into memory. A GPU says so itself."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return system == "ours" or device == "cuda" or 3 * 4 * codes * tokens < 0.9 * memory


def measure(codes: int, tokens: int, width: int, runs: int, device: str, names: list[str]) -> dict:
    """All figures of one size."""
    latents = make_latents(tokens, width, device)
    modules = {
        name: make(name, codes, width, device)
        for name in names
        if fits(name, codes, tokens, device)
    }
    steps = {
        name: lambda module=module: train_step(module, latents) for name, module in modules.items()
    }
    nothing = dict.fromkeys(names, float("nan"))
    row = {
        "codes": codes,
        "tokens": tokens,
        "width": width,
        "step": nothing | interleaved(steps, runs, device),
    }
    del steps, modules
    row["search"], row["product"] = measure_search(codes, tokens, width, runs, device)
    return row


def measure_decoding(
    codes: int, tokens: int, width: int, runs: int, device: str, names: list[str]
) -> dict:
    """Seconds from codes to vectors, after the first call."""
    indices = torch.randint(codes, (tokens // 256, 16, 16), device=device)
    turns = {}
    for name in names:
        module = make(name, codes, width, device).eval()
        if name == "ours":
            turns[name] = lambda module=module: module.lookup(indices)
        elif name == "vector-quantize-pytorch":
            turns[name] = lambda module=module: module.indices_to_codes(indices)
    with torch.no_grad():
        return {
            "codes": codes,
            "tokens": tokens,
            "width": width,
            "decode": interleaved(turns, runs, device),
        }


def peak_memory(system: str, codes: int, tokens: int, width: int, device: str) -> float:
    """MiB of a training step above the quantizer and its inputs, in a process of its own. NaN if it failed."""
    if not fits(system, codes, tokens, device):
        return float("nan")
    size = f"{codes},{tokens},{width}"
    command = [sys.executable, __file__, "--device", device, "--peak", system, "--size", size]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else float("nan")


def print_peak(system: str, codes: int, tokens: int, width: int, device: str) -> None:
    """Run one measurement of peak_memory."""
    train_step(
        make(system, 1024, width, device), make_latents(256, width, device)
    )  # loads the libraries
    module, latents = make(system, codes, width, device), make_latents(tokens, width, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_step(module, latents)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    status = Path("/proc/self/status")

    def kib(name: str) -> int:
        return int(re.search(rf"^{name}:\s*(\d+)", status.read_text(), re.MULTILINE)[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = kib("VmRSS")
    train_step(module, latents)
    print((kib("VmHWM") - before) / 1024)


def describe_machine(device: str) -> dict:
    """Return what the figures depend on."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    processor = name[1].strip() if name else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    machine = {"processor": processor, "threads": threads, "torch": torch.__version__}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def show(rows: list[dict], names: list[str]) -> None:
    """Print the table."""
    others = names[1:]
    print(
        "| K | N | d | step, ms | "
        + " | ".join(f"{name}, ms (ratio)" for name in others)
        + " | search, ms | of product rate | peak, MiB | "
        + " | ".join(f"{name}, MiB" for name in others)
        + " |"
    )
    print("|" + "---|" * (7 + 2 * len(others)))
    for row in rows:
        step, peak = row["step"], row["peak"]
        cells = [f"{row[key]:,}" for key in ("codes", "tokens", "width")] + [
            f"{1e3 * step['ours']:,.1f}"
        ]
        cells += [f"{1e3 * step[name]:,.1f} ({step[name] / step['ours']:.1f})" for name in others]
        cells += [f"{1e3 * row['search']:,.1f}", f"{row['product'] / row['search']:.0%}"]
        cells += [f"{peak[name]:,.0f}" for name in names]
        print("| " + " | ".join(cells) + " |")


def show_search(sizes: list[tuple], runs: int, device: str) -> None:
    """Measure the search alone, and print a table."""
    print("| K | N | d | search, ms | product, ms | of product rate |")
    print("|---|---|---|---|---|---|")
    for codes, tokens, width in sizes:
        search, product = measure_search(codes, tokens, width, runs, device)
        cells = [f"{codes:,}", f"{tokens:,}", f"{width}", f"{1e3 * search:,.1f}"]
        cells += [f"{1e3 * product:,.1f}", f"{product / search:.0%}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def show_products(sizes: list[tuple], runs: int, device: str) -> None:
    """Measure the products alone, and print a table."""
    print("| K | N | d | product in tiles of N x K | ms | GFLOP/s |\n|---|---|---|---|---|---|")
    for codes, tokens, width in sizes:
        turns = products(*search_inputs(codes, tokens, width, device), device)
        with torch.no_grad():
            taken = interleaved(turns, runs, device)
        for name, seconds in sorted(taken.items(), key=lambda item: item[1]):
            rate = 2e-9 * codes * tokens * width / seconds
            print(
                f"| {codes:,} | {tokens:,} | {width} | {name} | {1e3 * seconds:,.1f} | {rate:,.0f} |"
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two small sizes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--runs", type=int, default=5, help="turns of every system")
    parser.add_argument("--size", help="only this size, as K,N,d")
    parser.add_argument(
        "--search", action="store_true", help="the search beside the product, nothing else"
    )
    parser.add_argument("--products", action="store_true", help="the product alone, nothing else")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = QUICK_SIZES if options.quick else GPU_SIZES if options.device == "cuda" else CPU_SIZES
    if options.size:
        sizes = [tuple(int(part) for part in options.size.split(","))]
    if options.peak:
        print_peak(options.peak, *sizes[0], options.device)
        return
    machine = describe_machine(options.device)
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    if options.search:
        show_search(sizes, options.runs, options.device)
        return
    if options.products:
        show_products(sizes, options.runs, options.device)
        return
    names = systems(options.device)
    rows = []
    for size in tqdm(sizes, desc="sizes"):
        row = measure(*size, options.runs, options.device, names)
        row["peak"] = {name: peak_memory(name, *size, options.device) for name in names}
        rows.append(row)
    show(rows, names)
    largest = max(sizes)
    decoding = measure_decoding(*largest, options.runs, options.device, names)
    times = ", ".join(
        f"{name} {1e3 * seconds:.2f} ms" for name, seconds in decoding["decode"].items()
    )
    print(f"decoding {largest[1]:,} codes of {largest[0]:,}: {times}")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "sizes": rows, "decoding": decoding}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
