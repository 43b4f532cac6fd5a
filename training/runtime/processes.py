"""Many processes: notice those that were meant to work together and do not, and shut them down in order."""

import gc
import os
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from training.runtime.kept_memory import keep_freed_memory
from training.runtime.launch_options import refuse_half_precision
from training.runtime.settings import SettingsError
from training.runtime.sharding import is_sharding

# What launchers tell the processes that they start: torchrun and Accelerate, Open MPI, Intel MPI and MPICH,
# MVAPICH, and Slurm's srun.
SIZE_VARIABLES = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)

# Processes wait for each other while one machine downloads a dataset or writes a large file. NCCL gives up
# after 10 minutes, gloo after 30. A process that dies is noticed by the launcher, not by this.
PATIENT = InitProcessGroupKwargs(timeout=timedelta(hours=3))


def join_processes() -> Accelerator:
    """Accelerate for the commands that do not train: all processes of the launch, or SettingsError."""
    refuse_half_precision()
    accelerator = Accelerator(kwargs_handlers=[PATIENT])
    check_processes(accelerator)
    refuse_sharding(accelerator)
    keep_freed_memory(accelerator.device)
    return accelerator


def refuse_sharding(accelerator: Accelerator) -> None:
    """Refuse sharded models, for all but the code models' trainer: tokenizers are small.

    Raises:
        SettingsError: if the launch splits models among processes.
    """
    if is_sharding(accelerator):
        raise SettingsError(
            "the launch splits models (FSDP), which only training/train_generator.py does: take "
            "training/configs/accelerate/eight_gpus.yaml"
        )


def check_processes(accelerator: Accelerator) -> None:
    """Fail if this launch was meant for more processes than work together.

    Without this, `accelerate launch --cpu --num_processes 2`, a configuration of MULTI_CPU, several processes
    on a machine that lacks GPUs, and --num_processes 4 where one GPU is visible would each train alone: with
    a smaller batch than meant, or several at a time in the same folder.

    Raises:
        SettingsError: naming where the other number stands, and what to type instead.
    """
    for source, number in _meant():
        if number > accelerator.num_processes:
            raise SettingsError(
                f"the launch is meant for {number} processes ({source}), but this one works "
                f"{'alone' if accelerator.num_processes == 1 else f'with {accelerator.num_processes}'}. "
                f"On GPUs: accelerate launch --multi_gpu --num_processes {number}, where so many GPUs are "
                f"visible (here: {torch.cuda.device_count()}); on CPU the same with ACCELERATE_USE_CPU=true "
                "in the environment, and without --cpu"
            )


def _meant() -> list[tuple[str, int]]:
    """Sources that say how many processes there should be, and the number that each gives."""
    found = []
    for name in SIZE_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdecimal():
            found.append((f"{name}={value}", int(value)))
    if "LOCAL_RANK" not in os.environ:
        # Accelerate starts a single process as a child, and tells it nothing of --num_processes.
        found += _launcher_says(_parent_command())
    return found


def _parent_command() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent is not None else []
    except psutil.Error:
        return []


def _launcher_says(command: list[str]) -> list[tuple[str, int]]:
    """Return the number of processes that a command line of `accelerate launch` or its configuration names."""
    for place, word in enumerate(command):
        name = Path(word).name
        if word == "accelerate.commands.launch" or name == "accelerate-launch":
            return _launch_options(command[place + 1 :])
        if name == "accelerate" and command[place + 1 : place + 2] == ["launch"]:
            return _launch_options(command[place + 2 :])
    return []


def _launch_options(words: list[str]) -> list[tuple[str, int]]:
    from accelerate.commands.config import config_args  # they take their time to import
    from accelerate.commands.launch import launch_command_parser

    options, _ = launch_command_parser().parse_known_args(words)
    if options.num_processes is not None:
        return [(f"--num_processes {options.num_processes}", options.num_processes)]
    file = options.config_file
    if file is None and not options.cpu and os.path.isfile(config_args.default_config_file):
        file = config_args.default_config_file
    if file is None:
        return []
    number = config_args.load_config_from_file(file).num_processes
    return [(f"num_processes: {number} in {file}", number)]


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of each entry over all processes; a collective call, nothing in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def end_processes(accelerator: Accelerator) -> None:
    """End the trackers and the process group. Call it last, when no prepared model is referred to any more.

    A DistributedDataParallel model keeps its process group alive, and so gloo's threads, which may still
    hold tensors of the last exchange. A thread that lets go of one while the interpreter ends waits for the
    lock of an interpreter that is gone, and the process aborts with all its work done ("terminate called
    without an active exception"; pytorch pull request 179291). So models go first, then the group, then the
    interpreter.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
