"""Time and memory of a training step of SimVQ, its remedies and its successors.

  python benchmarks/remedies.py --threads 1                 K = 8,192, the scale of the experiments
  python benchmarks/remedies.py --sizes 65536 --runs 11 --output build/step_times

The step is the trainer's own, at the settings of training/configs/experiments_small.yaml, on photographs that
come with installed packages. SimVQ and one of the others, each in a process of its own, take turns. The peak is
what a step held above what there was before the first one. Figures are medians of the turns, ratios too.
results.json, a table and a figure go to docs/results/remedies_cost, or --output.
"""

import argparse
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from turns import take_turns  # noqa: E402

from training.demo.image import write_training_folder  # noqa: E402
from training.experiments.bars import draw_panels  # noqa: E402
from training.experiments.memory import MIB, peak_memory, reset_peak  # noqa: E402
from training.experiments.remedies import remedies  # noqa: E402
from training.experiments.report import publish  # noqa: E402
from training.experiments.runs import REPOSITORY  # noqa: E402
from training.experiments.tasks import TASKS  # noqa: E402
from training.loop.trainer import Trainer  # noqa: E402
from training.recipes.image import build_image_recipe  # noqa: E402
from training.recipes.run import make_accelerator  # noqa: E402
from training.runtime.setting_values import read_yaml  # noqa: E402
from training.runtime.settings import build_settings, convert_values  # noqa: E402

CONFIG = REPOSITORY / "training" / "configs" / "experiments_small.yaml"
STEPS = 1000


def make_trainer(folder: Path, changes: dict) -> Trainer:
    """Return a trainer whose codes take part from the first step."""
    write_training_folder(folder / "pictures")
    settings = read_yaml(CONFIG) | changes | {"max_steps": STEPS, "log_every": 10 * STEPS}
    settings |= {"dataset": str(folder / "pictures"), "output_dir": str(folder / "run")}
    if "autoencoder_steps" in settings:  # what is timed are the steps after that phase
        settings = settings | {"autoencoder_steps": 1, "end_phase_early": False}
    kinds = TASKS["images"].groups
    groups = build_settings(kinds, convert_values(kinds, settings))
    loop = groups.pop("loop")
    accelerator = make_accelerator(loop)
    recipe = build_image_recipe(**groups, batch_size=loop.batch_size, seed=0)
    return Trainer(recipe, loop, accelerator)


def serve(changes: dict, threads: int | None, pipe: Connection) -> None:
    """Make a step for each question, and answer with its seconds, the threads and the peak in bytes."""
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), changes)
        batches, before = iter(trainer.batches), reset_peak(device)
        while pipe.recv():
            batch, start = next(batches), time.perf_counter()
            trainer._train_batch(batch)
            seconds = time.perf_counter() - start
            pipe.send((seconds, torch.get_num_threads(), peak_memory(device) - before))


def compare(codebook_size: int, options: argparse.Namespace) -> list[dict]:
    """Return, of each remedy, K, milliseconds of a step, their ratio to SimVQ's, and the peak in MiB."""
    width = int(read_yaml(CONFIG)["codebook_dim"])  # a number once it is converted
    found = []
    for name, changes in remedies(STEPS, width).items():
        servers = {
            kind: (serve, ({"codebook_size": codebook_size, **some}, options.threads))
            for kind, some in {"SimVQ": {}, name: changes}.items()
        }
        answers = take_turns(servers, options.runs, name)
        seconds = {kind: [answer[0] for answer in some] for kind, some in answers.items()}
        pairs = zip(seconds[name], seconds["SimVQ"], strict=True)
        ratio = statistics.median(theirs / simvq for theirs, simvq in pairs)
        _, options.threads, most = answers[name][-1]
        median = 1000 * statistics.median(seconds[name])
        about = {"remedy": name, "codebook_size": codebook_size}
        found.append(about | {"milliseconds": median, "ratio": ratio, "peak_mib": most / MIB})
    return found


def draw(found: list[dict], several: bool):
    """Draw time and memory as bars."""
    names = [
        f"{one['remedy']}, K = {one['codebook_size']:,}" if several else one["remedy"]
        for one in found
    ]
    panels = {"ratio": ("step time over SimVQ's", "{:.2f}"), "peak_mib": ("peak, MiB", "{:,.0f}")}
    return draw_panels(
        names, [(*title, [one[key] for one in found]) for key, title in panels.items()]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="8192", help="codebook sizes K")
    parser.add_argument("--runs", type=int, default=7, help="turns that count")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--output", default=str(REPOSITORY / "docs/results/remedies_cost"))
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    found = [one for size in sizes for one in compare(size, options)]
    rows = ["| | K | step, ms | ratio to SimVQ | peak, MiB |", "|---" * 5 + "|"]
    rows += [
        f"| {one['remedy']} | {one['codebook_size']:,} | {one['milliseconds']:,.0f} | {one['ratio']:.2f} "
        f"| {one['peak_mib']:,.0f} |"
        for one in found
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    scale = (
        f"Scale: steps of experiments_small.yaml, on {device}, {options.threads} thread(s), medians of "
        f"{options.runs} turns."
    )
    text = (
        "SimVQ and one of the others take turns, each in a process of its own. The peak is what a step held "
        "beyond what there was before the first one."
    )
    figure = draw(found, len(sizes) > 1)
    publish(Path(options.output), {"steps": found}, "Cost of a step", text, rows, figure, scale)


if __name__ == "__main__":
    main()
