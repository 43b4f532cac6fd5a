"""Launcher of the two demos: they run the real trainers, and show the result in a process of its own."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hub_cards.user_error import one_line_errors
from training.runtime.folder_lock import clear_folder

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINTS = REPOSITORY / "hub_cards" / "checkpoints"
# Time of a training step over that of the model's forward and backward pass: losses, optimiser, average.
AROUND_IT = 1.3


def steps_of_a_minute(model_dir: Path, shape: tuple[int, ...]) -> int:
    """Return how many steps of fine-tuning this machine makes in about a minute: 20 to 150.

    Args:
        shape: of a batch of the model's inputs.
    """
    import torch
    from transformers import AutoModel

    import modeling_simvq  # noqa: F401  (registers the Auto classes)

    model, inputs = AutoModel.from_pretrained(model_dir).train(), torch.rand(shape) - 0.5

    def step() -> float:
        start = time.perf_counter()
        output = model(inputs)
        (output[0].square().mean() + output.commitment_loss).backward()
        return time.perf_counter() - start

    step()  # warms up
    # Starting the trainer takes the rest of the minute.
    return max(20, min(150, int(45 / (AROUND_IT * step()))))


def launch_trainer(script: str, config: str, *overrides: str) -> None:
    """Run a trainer as a user would, on all cores."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    # Accelerate gives a process one thread unless told otherwise.
    command += ["--num_cpu_threads_per_process", str(os.cpu_count())]
    command += [str(REPOSITORY / "training" / script)]
    command += ["--config", str(REPOSITORY / "training" / "configs" / config), *overrides]
    subprocess.run(command, check=True)


def clear_run(folder: Path) -> None:
    """Remove the run of an earlier demo."""
    clear(folder, not folder.exists() or (folder / "settings.json").is_file())


def clear(folder: Path, ours: bool) -> None:
    """Remove what an earlier demo left.

    Raises:
        SystemExit: if there is something, and it is not `ours` or still being written.
    """
    if ours:
        with one_line_errors():
            clear_folder(folder)
    elif any(folder.iterdir()):
        sys.exit(f"error: {folder} holds files that no demo wrote: name another output_dir")


def run_demo(
    module: str,
    description: str,
    train: Callable[[Path], None],
    show: Callable[[Path, bool], None],
) -> None:
    """Command line of a demo: show the shipped model, fine-tune it, show the result in a new process.

    Args:
        train: called with output_dir; leaves output_dir/run/model.
        show: called with output_dir, and whether the model is fine-tuned by now.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("output_dir", type=Path, help="folder for data, model and results")
    parser.add_argument(
        "--only-shipped",
        action="store_true",
        help="reconstruct with the shipped model, train nothing",
    )
    parser.add_argument("--tuned", action="store_true", help=argparse.SUPPRESS)  # the new process
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    show(options.output_dir, options.tuned)
    if options.tuned or options.only_shipped:
        return
    try:
        train(options.output_dir)
        again = [sys.executable, "-m", module, str(options.output_dir), "--tuned"]
        subprocess.run(again, check=True)
    except subprocess.CalledProcessError as error:  # it has said itself what went wrong
        sys.exit(error.returncode)
