"""Claim (h): what a training step of the quantizer holds in memory, against the size of the codebook.

python -m training.experiments.memory

A trained codebook needs a gradient and two moments of Adam for every code: O(K d). SimVQ needs them for W
alone: O(d^2). Counted from the tensors, and measured as the peak of a step in a process of its own.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_simvq import SimVQ
from training.experiments.report import new_figure, publish, settings_hash
from training.experiments.runs import REPOSITORY

SYSTEMS = {
    "SimVQ": {},
    "trained codebook": {"train_basis": True, "train_projection": False},
}
WIDTH, TOKENS, SEED = 128, 4096, 0
MIB = 2**20


def measure(system: str, size: int) -> dict[str, float]:
    """Memory of one training step, in MiB: of the quantizer alone, its latents as leaves.

    Returns:
        codebook: the frozen or trained codes; training: gradients and moments of Adam; peak: the most that the
        step held above what existed before it (codes, W and latents).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    quantizer = SimVQ(size, WIDTH, **SYSTEMS[system]).to(device)
    latents = torch.randn(1, WIDTH, TOKENS, device=device, requires_grad=True)
    trained = [p for p in quantizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained)
    _small_step(device)  # threads and kernels exist before, whatever is measured
    before = reset_peak(device)
    quantized, _, loss = quantizer(latents)
    (loss + quantized.square().mean()).backward()
    optimizer.step()
    most = peak_memory(device) - before
    held = [p.grad for p in trained]
    held += [v for p in trained for v in optimizer.state[p].values() if v.ndim]
    codebook = quantizer.basis
    return {
        "codebook": codebook.numel() * codebook.element_size() / MIB,
        "training": sum(t.numel() * t.element_size() for t in held) / MIB,
        "peak": most / MIB,
    }


def _small_step(device: str) -> None:
    quantizer = SimVQ(64, WIDTH).to(device)
    latents = torch.randn(1, WIDTH, 64, device=device, requires_grad=True)
    quantizer(latents)[2].backward()
    torch.optim.Adam(p for p in quantizer.parameters() if p.requires_grad).step()


def reset_peak(device: str) -> int:
    """Begin to measure; returns the bytes that are held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
    return _status("VmRSS")


def peak_memory(device: str) -> int:
    """Return the most bytes that were held since."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(REPOSITORY / "docs/results/memory"))
    parser.add_argument(
        "--sizes", default="4096,16384,65536,262144,1048576", help="codebook sizes K"
    )
    parser.add_argument(
        "--measure", nargs=2, metavar=("SYSTEM", "K"), help="one step, in this process"
    )
    known = parser.parse_args(arguments)
    if known.measure:
        print(json.dumps(measure(known.measure[0], int(known.measure[1]))))
        return
    if platform.system() != "Linux" and not torch.cuda.is_available():
        parser.error("the peak is read from /proc, which only Linux has, or from CUDA")
    sizes = [int(size) for size in known.sizes.split(",")]
    runs = []
    for system, size in tqdm([(s, k) for s in SYSTEMS for k in sizes], desc="memory", unit="step"):
        command = [sys.executable, "-m", __spec__.name, "--measure", system, str(size)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {system} at K = {size:,}: {done.stderr.strip().splitlines()[-1:]}")
        settings = {"options": SYSTEMS[system], "d": WIDTH, "latents": TOKENS, "seed": SEED}
        key = settings_hash(settings | {"size": size})
        found = {"variant": system, "size": size, "settings": settings, "hash": key}
        runs.append(found | json.loads(done.stdout))
    figure, axes = new_figure(2)
    for axis, (key, title) in zip(
        axes,
        [("training", "gradients and moments of Adam, MiB"), ("peak", "peak of a step, MiB")],
        strict=True,
    ):
        for system in SYSTEMS:
            points = [(run["size"], run[key]) for run in runs if run["variant"] == system]
            axis.plot(*zip(*points, strict=True), marker="o", label=system)
        axis.set(xscale="log", yscale="log", xlabel="K, number of codes", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    rows = ["| system | K | codes, MiB | gradients and moments, MiB | peak of a step, MiB |"]
    rows.append("|---|---|---|---|---|")
    for run in runs:
        cells = (f"{run[key]:,.2f}" for key in ("codebook", "training", "peak"))
        rows.append(f"| {run['variant']} | {run['size']:,} | {' | '.join(cells)} |")
    text = (
        "The quantizer alone, trained by Adam in float32. The peak is what the step held above the codes, W "
        "and latents that were there before."
    )
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (peak resident set)"
    scale = f"Scale: d = {WIDTH}, {TOKENS:,} latents, on {where}; each figure from a process of its own."
    publish(Path(known.output), {"runs": runs}, "Memory of training", text, rows, figure, scale)


if __name__ == "__main__":
    main()
