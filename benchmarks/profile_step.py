"""Profile a training step and the encoding of a folder at the published size.

  python benchmarks/profile_step.py                      K = 262,144, batch 2, three steps and 8 images, CPU
  python benchmarks/profile_step.py --batch-size 64      on a GPU: Accelerate takes it if there is one
  python benchmarks/profile_step.py --encode-only --compile --channels-last --dtype bfloat16

The step is the trainer's own (model, LPIPS, discriminator, both optimisers, weight average, code
statistics), on photographs that come with installed packages. First the parts of a step, by the clock; then
the ten operators that take longest. Weights are random: they change no time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor
from training.data.images import ImageDataConfig
from training.demo.image import load_photo, write_training_folder
from training.loop.trainer import Trainer
from training.recipes.image import ImageLossSettings, ImageModelSettings, build_image_recipe
from training.recipes.run import make_accelerator
from training.recipes.tokenizer import TokenizerLoopSettings
from training.runtime.settings import parse_settings

CONFIG = (
    Path(__file__).resolve().parent.parent / "training" / "configs" / "imagenet128_k262144.yaml"
)


class Clock:
    """Seconds spent in methods, by name."""

    def __init__(self, cuda: bool):
        self.seconds: dict[str, float] = defaultdict(float)
        self.cuda = cuda

    def watch(self, owner: object, method: str, name: str) -> None:
        """Time every call of owner.method under this name."""
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            with self(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)

    def __call__(self, name: str) -> "Span":
        return Span(self, name)


class Span:
    """Adds the time between entry and exit to its clock."""

    def __init__(self, clock: Clock, name: str):
        self.clock, self.name = clock, name

    def _now(self) -> float:
        if self.clock.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> None:
        self.start = self._now()

    def __exit__(self, *_) -> None:
        self.clock.seconds[self.name] += self._now() - self.start


def make_trainer(
    folder: Path, codebook_size: int, batch_size: int, precision: str, **more
) -> Trainer:
    """Make the trainer of the published configuration, on the photographs; `more` are other settings of it."""
    write_training_folder(folder / "photos")
    groups = {
        "data": ImageDataConfig,
        "model": ImageModelSettings,
        "loss": ImageLossSettings,
        "loop": TokenizerLoopSettings,
    }
    overrides = {
        "dataset": folder / "photos",
        "output_dir": folder / "run",
        "codebook_size": codebook_size,
        "batch_size": batch_size,
        "mixed_precision": precision,
        "num_workers": 0,
        "tracker": "none",
    } | more
    arguments = ["--config", str(CONFIG), *(f"{name}={value}" for name, value in overrides.items())]
    settings = parse_settings(groups, "", arguments)
    accelerator = make_accelerator(settings["loop"])
    recipe = build_image_recipe(
        settings["model"], settings["data"], settings["loss"], batch_size=batch_size, seed=0
    )
    return Trainer(recipe, settings["loop"], accelerator)


def profile_training(options: argparse.Namespace) -> None:
    """Parts of a training step, then its operators."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            Path(folder), options.codebook_size, options.batch_size, options.mixed_precision
        )
        cuda = trainer.accelerator.device.type == "cuda"
        batches = iter(trainer.batches)
        trainer._train_batch(next(batches))  # warms up
        clock = Clock(cuda)
        model = trainer.accelerator.unwrap_model(trainer.model)
        clock.watch(model.quantizer, "forward", "quantizer, forward")
        clock.watch(model, "forward", "model, forward (with the quantizer)")
        clock.watch(trainer.recipe.loss, "generator", "losses of the generator, forward")
        clock.watch(trainer.accelerator, "backward", "backward passes")
        clock.watch(trainer.stepper, "_judge", "discriminator's turn (with its backward)")
        clock.watch(trainer.stepper, "_due", "gradient norms")
        clock.watch(trainer.stepper, "_apply", "optimisers")
        clock.watch(trainer.ema, "update_parameters", "weight average")
        clock.watch(trainer.stepper.watch, "settle", "code statistics")
        clock.watch(trainer, "_log", "report of the figures")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with profile(activities=activities) as profiler:
            for _ in range(options.steps):
                with clock("step"):
                    with clock("waiting for data"):
                        batch = next(batches)
                    trainer._train_batch(batch)
        total = clock.seconds.pop("step")
        print(
            f"training step: {total / options.steps:.2f} s "
            f"(batch {options.batch_size}, K = {options.codebook_size:,}, {options.mixed_precision}, "
            f"{trainer.accelerator.device.type}, {torch.get_num_threads()} threads)"
        )
        for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
            print(f"  {seconds / total:6.1%}  {1e3 * seconds / options.steps:9.1f} ms  {name}")
        print_operators(profiler, cuda)


def print_operators(profiler: profile, cuda: bool) -> None:
    """The ten operators with the largest share of their own time."""
    rows = profiler.key_averages()
    own = (
        (lambda row: row.self_device_time_total) if cuda else (lambda row: row.self_cpu_time_total)
    )
    total = sum(map(own, rows))
    print("  ten longest operators:")
    for row in sorted(rows, key=own, reverse=True)[:10]:
        print(f"  {own(row) / total:6.1%}  {own(row) / 1e3:9.1f} ms  {row.key} x {row.count}")


@torch.inference_mode()
def profile_encoding(options: argparse.Namespace) -> None:
    """Encode images of 128 x 128 as a user would."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SimVQImageModel(SimVQImageConfig(codebook_size=options.codebook_size)).eval().to(device)
    processor = SimVQImageProcessor(
        size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}, size_divisor=8
    )
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    encode = torch.compile(model.encode) if options.compile else model.encode
    photos = [load_photo(name) for name in ("astronaut", "coffee", "rocket", "chelsea")] * 2
    dtype = getattr(torch, options.dtype)

    def batches() -> DataLoader:
        return DataLoader(
            photos,
            batch_size=4,
            collate_fn=lambda some: processor(some, return_tensors="pt").pixel_values,
        )

    def run(clock: Clock) -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32), clock("all"):
            for pixels in batches():
                with clock("model and quantizer"):
                    codes = encode(pixels.to(device)).image_codes
                with clock("codes to the host"):
                    codes.cpu()

    run(Clock(False))
    times = []
    for _ in range(options.runs):
        clock = Clock(device == "cuda")
        run(clock)
        times.append(clock.seconds)
    median = {name: statistics.median(row[name] for row in times) for name in times[0]}
    ways = [name for name in ("compile", "channels_last") if getattr(options, name)] + [
        options.dtype
    ]
    print(
        f"encoding: {len(photos) / median['all']:.2f} pictures a second ({', '.join(ways)}, "
        f"K = {options.codebook_size:,}, {device}, {torch.get_num_threads()} threads, median of {options.runs})"
    )
    for name, seconds in median.items():
        if name != "all":
            print(f"  {seconds / median['all']:6.1%}  {name}")
    print(
        f"  {1 - sum(v for k, v in median.items() if k != 'all') / median['all']:6.1%}  reading and resizing"
    )
    with profile() as profiler:
        run(Clock(False))
    print_operators(profiler, False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codebook-size", type=int, default=262_144, help="K")
    parser.add_argument("--batch-size", type=int, default=2, help="of a training step")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--encode-only", action="store_true", help="skip training")
    parser.add_argument("--runs", type=int, default=3, help="of encoding")
    parser.add_argument("--compile", action="store_true", help="torch.compile for encoding")
    parser.add_argument("--channels-last", action="store_true", help="for encoding")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args()
    if not options.encode_only:
        profile_training(options)
    profile_encoding(options)


if __name__ == "__main__":
    main()
