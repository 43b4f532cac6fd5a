"""Run of a trainer, from the command line to the finished model."""

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    set_seed,
)
from tqdm.contrib.logging import logging_redirect_tqdm

from training.data.loader import sample_counts
from training.loop import publishing
from training.loop.checkpoints import list_checkpoints, refuse_to_mix
from training.loop.recipe import Recipe
from training.loop.run_record import MODEL_CONFIG, RunRecord, read_json, read_record
from training.loop.settings import LoopSettings
from training.loop.trainer import Trainer
from training.recipes.starting_model import Recorded
from training.runtime import fast_math, sharding
from training.runtime.console import command
from training.runtime.folder_lock import hold_folder
from training.runtime.kept_memory import keep_freed_memory
from training.runtime.launch_options import follow_launch, refuse_compiler
from training.runtime.processes import PATIENT, check_processes, end_processes, refuse_sharding
from training.runtime.shared_folder import check_shared
from training.runtime.stop_signals import (
    STATUS_INTERRUPTED,
    Stopped,
    deaf_to_signals,
    ignore_signals,
)
from training.runtime.worker_memory import check_shared_memory

logger = get_logger(__name__)


def run(
    groups: dict[str, type],
    build_recipe: Callable[..., Recipe],
    description: str,
    may_shard: bool = False,
) -> None:
    """Parse settings, train, save: the command of a trainer. A signal ends it with a status of its own.

    Args:
        groups: dataclasses of the settings; "data" and "loop" are among them.
        build_recipe: takes all but "loop" by these names, and batch_size and seed.
        may_shard: whether the model can be trained sharded (FSDP2).
    """

    def body(**settings) -> None:
        train(settings, build_recipe, make_accelerator(settings["loop"], may_shard))
        ignore_signals()  # all is done; only the interpreter has still to end

    try:
        command(groups, body, description, with_processes=False)  # training ends its own
    except Stopped as stopped:
        ignore_signals()
        logging.getLogger(__name__).info(str(stopped))
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        ignore_signals()
        logging.getLogger(__name__).info("interrupted: resume=latest continues from the last save")
        sys.exit(STATUS_INTERRUPTED)


def make_accelerator(settings: LoopSettings, may_shard: bool = False) -> Accelerator:
    """Return Accelerate as every run here needs it. What the launch alone says goes into the settings.

    Raises:
        SettingsError: if the launch was meant for more processes than work together, says other things than
            the settings, or splits a model that cannot be split, or in a way that cannot be resumed.
    """
    follow_launch(settings)
    # Accelerate 1.15 knows this option only by the name that torch 2.15 calls old.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_config=ProjectConfiguration(settings.output_dir, settings.output_dir),
        # Resuming gives the same order of samples only with this sampler.
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=settings.seed, non_blocking=True
        ),
        step_scheduler_with_optimizer=False,
        # The discriminator runs twice before its backward pass, and a broadcast of its batch-norm
        # statistics in between would spoil the gradients of the first.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), PATIENT],
    )
    check_processes(accelerator)
    fast_math.allow(accelerator.device)
    keep_freed_memory(accelerator.device)
    if not may_shard:
        refuse_sharding(accelerator)
    elif sharding.is_sharding(accelerator):
        sharding.check_plugin(accelerator)
        refuse_compiler("sharded training")
    return accelerator


def train(settings: dict, build_recipe: Callable[..., Recipe], accelerator: Accelerator) -> None:
    """Build the recipe, train it to the end and shut the processes down in order."""
    loop = settings["loop"]
    set_seed(loop.seed)
    if loop.push_to_hub and accelerator.is_main_process:
        publishing.check_login()
    output_dir = Path(loop.output_dir)
    check_shared(accelerator, output_dir)
    # Before anything there is read or written: two runs in one folder would take each other's files away.
    with hold_folder(output_dir, accelerator=accelerator):
        refuse_to_mix(output_dir, loop.resume)
        _train(settings, build_recipe, accelerator)


def _train(settings: dict, build_recipe: Callable[..., Recipe], accelerator: Accelerator) -> None:
    loop = settings["loop"]
    groups = {name: group for name, group in settings.items() if name != "loop"}
    model, resume = settings["model"], loop.resume
    if resume and model.init_from and (recorded := _recorded(Path(loop.output_dir), resume)):
        model.go_on_from(recorded)
    recipe = build_recipe(**groups, batch_size=loop.batch_size, seed=loop.seed)
    record = RunRecord(settings)  # with the sizes that init_from has brought
    loaders = {"training {}": recipe.train_loader, "validation {}": recipe.validation_loader}
    logger.info(sample_counts(settings["data"], loaders))
    for remark in recipe.remarks:
        logger.warning(remark)
    if loop.tracker != "none":
        scalars = {
            k: v if isinstance(v, (int, float, str, bool)) else str(v)
            for k, v in record.settings.items()
        }
        accelerator.init_trackers(
            "tensorboard" if loop.tracker == "tensorboard" else "simvq", scalars
        )
    check_shared_memory(recipe.train_loader, recipe.validation_loader)
    trainer = Trainer(recipe, loop, accelerator, record)
    logger.info(
        f"{recipe.model.num_parameters():,} parameters, {trainer.total_steps:,} steps, "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"{loop.batch_size * accelerator.num_processes * loop.gradient_accumulation_steps} "
        "samples per step"
    )
    phase = getattr(loop, "autoencoder_steps", 0)
    if phase >= trainer.total_steps:
        logger.warning(
            f"autoencoder_steps={phase}: the run ends with step {trainer.total_steps}, before anything is "
            "quantized; the codes of its model have not been trained"
        )
    # Ranks differ from here on, so that each draws its own crops.
    set_seed(loop.seed, device_specific=True)
    stopped = None
    try:
        with logging_redirect_tqdm():
            trainer.train()
    except Stopped as signal:
        stopped = signal.with_traceback(None)  # which would keep the trainer alive
    if stopped is None and accelerator.is_main_process and loop.push_to_hub:
        address = publishing.publish(loop, trainer.models.published)
        logger.info(f"published: {address}")
    with deaf_to_signals():  # what is left takes no time, and must not be cut off
        if stopped is None and accelerator.is_main_process:
            trainer.models.finish(trainer.progress.step)
        del trainer
        end_processes(accelerator)
    if stopped is not None:
        raise stopped


def _recorded(output_dir: Path, resume: str) -> Recorded | None:
    """Return what the run has recorded of its model; None if there is no checkpoint, or one without record."""
    checkpoints = list_checkpoints(output_dir) if resume == "latest" else [Path(resume)]
    for checkpoint in reversed(checkpoints):
        config, settings = read_json(checkpoint / MODEL_CONFIG), read_record(checkpoint)
        if config is not None and settings is not None:
            return Recorded(config, settings)
    return None
