"""Everything that only a GPU can tell, in one command: `make gpu`.

  python benchmarks/gpu.py                           the tests that need CUDA, then all parts
  python benchmarks/gpu.py --parts steps,sampling    some parts

Parts: tests; quantizer (benchmarks/quantizer.py); steps, whole training steps with each way of
training/runtime/fast_math.py left out in turn; encoding of a folder of images; sampling of a code model. Writes
gpu.json, and a table beside it, gpu.md. Without a GPU it says so and ends with status 2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import profile_step  # noqa: E402
import quantizer as quantizer_benchmark  # noqa: E402
import sampling_speed  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from modeling_simvq import (  # noqa: E402
    SimVQForImageGeneration,
    SimVQImageConfig,
    SimVQImageGenerationConfig,
    SimVQImageModel,
    SimVQImageProcessor,
)
from training.demo.image import write_training_folder  # noqa: E402
from training.runtime import fast_math  # noqa: E402

NO_GPU = 2
# Sizes for a look at the script itself.
TINY = {"base_channels": 16, "norm_groups": 4, "channel_multipliers": [1, 2], "perceptual": "none"}
TINY |= {"resolution": 32, "discriminator_channels": 8, "num_res_blocks": 1, "codebook_dim": 16}


def tests(_options: argparse.Namespace) -> dict:
    """Run the tests that need CUDA."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "tests"]
    run = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    print(run.stdout)
    return {"status": run.returncode, "summary": run.stdout.strip().splitlines()[-1:]}


def quantizer(options: argparse.Namespace) -> dict:
    """Run the quantizer's own benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "quantizer.json"
        command = [sys.executable, HERE / "quantizer.py", "--device", options.device]
        command += ["--json", written] + ["--size", "256,256,16", "--runs", "1"] * options.tiny
        subprocess.run(command, check=True)
        return json.loads(written.read_text())


def steps(options: argparse.Namespace) -> dict:
    """Time whole steps of the image recipe, with all fast ways, without each of them, and without any."""
    names = [field.name for field in fields(fast_math.FastMath)]
    plans = {"all": {}} | {f"without {name}": {name: False} for name in names}
    plans["none"] = dict.fromkeys(names, False)
    found = {}
    for precision in ("no",) if options.tiny else ("no", "bf16"):
        for plan, left_out in plans.items():
            everything, fast_math.chosen = fast_math.chosen, replace(fast_math.chosen, **left_out)
            try:
                found[f"{plan}, {precision}"] = time_steps(options, precision)
            finally:
                fast_math.chosen = everything
    return found


def time_steps(options: argparse.Namespace, precision: str) -> dict[str, float]:
    """Return the median seconds of a step, images a second and, on a GPU, the peak of memory in MiB."""
    for state in (AcceleratorState, GradientState):
        state._reset_state(**{"reset_partial_state": True} if state is AcceleratorState else {})
    size, batch = (64, 2) if options.tiny else (262_144, options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        more = TINY if options.tiny else {}
        trainer = profile_step.make_trainer(Path(folder), size, batch, precision, **more)
        batches, taken = iter(trainer.batches), []
        cuda = trainer.accelerator.device.type == "cuda"
        for number in range(2 if options.tiny else 25):
            data = next(batches)
            if cuda and number == 5:
                torch.cuda.reset_peak_memory_stats()
            taken.append(timed(lambda data=data: trainer._train_batch(data), cuda))
    seconds = statistics.median(taken[1 if options.tiny else 5 :])
    result = {"seconds": seconds, "images_per_second": batch / seconds}
    if cuda:
        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        del trainer, batches
        torch.cuda.empty_cache()
    return result


@torch.inference_mode()
def encoding(options: argparse.Namespace) -> dict:
    """Encode a folder of images, from files to codes on the host."""
    device = torch.device(options.device)
    side = 32 if options.tiny else 128
    sizes = {"codebook_size": 64, "base_channels": 16, "norm_groups": 4} if options.tiny else {}
    model = SimVQImageModel(SimVQImageConfig(**({"codebook_size": 262_144} | sizes))).eval()
    fast_math.allow(device)
    fast_math.lay_out(model, device)
    model.to(device)
    processor = SimVQImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, size_divisor=8
    )
    batch = 2 if options.tiny else 32
    with tempfile.TemporaryDirectory() as folder:
        write_training_folder(Path(folder))
        known = Image.registered_extensions()
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix in known]
        paths = paths[:4] if options.tiny else paths * (256 // len(paths) + 1)

        def encode() -> None:
            for first in range(0, len(paths), batch):
                images = [Image.open(path).convert("RGB") for path in paths[first : first + batch]]
                pixels = processor(images, return_tensors="pt").pixel_values.to(device)
                model.encode(fast_math.laid_out(pixels)).image_codes.cpu()

        encode()
        seconds = statistics.median(timed(encode, device.type == "cuda") for _ in range(3))
    return {"images": len(paths), "images_per_second": len(paths) / seconds}


def sampling(options: argparse.Namespace) -> dict:
    """Sample from a code model, in tokens a second."""
    side, hidden, layers, batch = (2, 64, 1, 1) if options.tiny else (16, 768, 12, 16)
    config = SimVQImageGenerationConfig(
        codebook_size=64 if options.tiny else 8192,
        grid_size=(side, side),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )
    torch.manual_seed(0)
    model = SimVQForImageGeneration(config).to(options.device).eval()
    return sampling_speed.measure(model, batch, 1 if options.tiny else 3)


PARTS = {
    "tests": tests,
    "quantizer": quantizer,
    "steps": steps,
    "encoding": encoding,
    "sampling": sampling,
}


def timed(action: Callable[[], object], cuda: bool) -> float:
    """Return the seconds of a call, with all that it has left to the device."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(results: dict) -> str:
    """Return the figures as Markdown."""
    machine = results["machine"]
    lines = ["# On a GPU", "", ", ".join(f"{k}: {v}" for k, v in machine.items()), ""]
    if "tests" in results:
        lines += [f"Tests: {' '.join(results['tests']['summary'])}", ""]
    if "steps" in results:
        lines += ["| training step: ways, precision | ms | images a second | peak, MiB |"]
        lines += ["|---|---|---|---|"]
        for name, row in results["steps"].items():
            peak = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else ""
            rate = f"{row['images_per_second']:,.1f}"
            lines.append(f"| {name} | {1e3 * row['seconds']:,.1f} | {rate} | {peak} |")
        lines.append("")
    if "quantizer" in results:
        sizes = results["quantizer"]["sizes"]
        lines += [
            "| quantizer: K | N | d | step, ms | search, ms | peak, MiB |",
            "|---|---|---|---|---|---|",
        ]
        for row in sizes:
            taken = ", ".join(f"{name} {1e3 * s:,.2f}" for name, s in row["step"].items())
            held = ", ".join(f"{k} {v:,.0f}" for k, v in row["peak"].items() if v is not None)
            size = f"{row['codes']:,} | {row['tokens']:,} | {row['width']}"
            lines.append(f"| {size} | {taken} | {1e3 * row['search']:,.2f} | {held} |")
        lines.append("")
    if "encoding" in results:
        rate = results["encoding"]["images_per_second"]
        lines += [f"Encoding a folder: {rate:,.1f} images a second.", ""]
    if "sampling" in results:
        rates = (f"{name} {rate:,.0f}" for name, rate in results["sampling"].items())
        lines += [f"Sampling, tokens a second: {', '.join(rates)}.", ""]
    return "\n".join(lines)


def main() -> int:
    """Command line; returns the status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts")
    parser.add_argument("--output", type=Path, default=HERE / "gpu.json")
    parser.add_argument("--batch-size", type=int, default=64, help="of a training step")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("make gpu needs a GPU: torch finds no CUDA device here", file=sys.stderr)
        return NO_GPU
    results = {"machine": quantizer_benchmark.describe_machine(options.device)}
    for name in parts:
        print(f"{name} ...", flush=True)
        results[name] = PARTS[name](options)
        # After every part: what is measured stays if the next one fails.
        options.output.write_text(json.dumps(results, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(table(results))
    print(table(results))
    return int(results.get("tests", {}).get("status", 0) != 0)


if __name__ == "__main__":
    sys.exit(main())
