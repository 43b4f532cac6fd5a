"""Checkpoints of a run: written beside and renamed, verified when they are read, never lost to a failure.

Accelerate writes models, optimisers, gradient scaler and random states; what else makes up a run's state
is handed over as objects with state_dict and load_state_dict.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils import load as load_random_states
from accelerate.utils.constants import FSDP_MODEL_NAME, SCALER_NAME

from hub_cards.user_error import UserError
from training.loop.checkpoint_files import (
    DamagedCheckpoint,
    check_fit,
    flush_to_disk,
    load_tensors,
    seal,
    unlisted,
    verify,
)
from training.loop.run_record import RunRecord
from training.runtime.sharding import is_sharding
from training.runtime.unwrapped import unwrapped

logger = get_logger(__name__)

SHARED_STATE = "run_state.pt"
RANK_STATE = "rank_state_{}.pt"
RANDOM_STATE = "random_states_{}.pkl"
# State that a run can go on without: checkpoints of earlier versions lack it, and of what was not streamed.
NOT_IN_OLD = ("stream", "unused")


class CheckpointError(UserError):
    """A checkpoint cannot be found, read or written. The message names it and the remedy."""


class Stateful(Protocol):
    """Object that a checkpoint can hold: its state is a dict of tensors, numbers, texts, lists and dicts."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = (output_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Step at which a checkpoint was written; -1 for a folder that someone has renamed."""
    found = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return int(found.group(1)) if found else -1


def refuse_to_mix(output_dir: Path, resume: str | None) -> None:
    """A new run must not write among the checkpoints of another, which would be lost one by one.

    Raises:
        CheckpointError: if `resume` is None and there are checkpoints.
    """
    found = list_checkpoints(output_dir)
    if resume is None and found:
        raise CheckpointError(
            f"output_dir: {output_dir} has checkpoints up to step {step_of(found[-1])}: set resume=latest "
            "to go on from there, or choose another output_dir"
        )


class CheckpointStore:
    """Writes and reads a run's checkpoints; every method is to be called by all ranks.

    All ranks need the same file system: the main process renames what they all have written.

    Args:
        output_dir: the run's folder.
        keep: finished checkpoints to keep.
        shared: state that is the same on all ranks, by name.
        per_rank: state that each rank has for itself.
        record: the settings, which every checkpoint holds too, and which decide what a resume may change.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        keep: int,
        shared: dict[str, Stateful],
        per_rank: dict[str, Stateful],
        record: RunRecord | None = None,
    ):
        self.accelerator, self.output_dir, self.keep = accelerator, output_dir, keep
        self.shared, self.per_rank, self.record = shared, per_rank, record
        self.folder = output_dir / "checkpoints"
        self.last: Path | None = None  # the newest one that this process wrote or read
        # Without the names that DistributedDataParallel adds, a checkpoint fits any number of processes.
        accelerator.register_save_state_pre_hook(self._unwrap_states)
        accelerator.register_load_state_pre_hook(self._unwrap_models)

    def start(self, resume: str | None) -> bool:
        """Clear away what a killed run left, and load what `resume` names; True if something was loaded.

        Args:
            resume: "latest" for the newest whole checkpoint, if there is any; a checkpoint's path; or None
                for a new run.

        Raises:
            CheckpointError: if there is no such checkpoint, none is whole, or a new run would mix with
                the checkpoints of another one.
        """
        checkpoint, problem = None, None
        if self.accelerator.is_main_process:
            try:
                for partial in self.folder.glob(".partial-*"):
                    shutil.rmtree(partial)
                checkpoint = self._choose(resume)
            except (CheckpointError, OSError) as error:
                problem = str(error)
        checkpoint, problem = broadcast_object_list([checkpoint, problem])
        if problem is not None:
            raise CheckpointError(problem)
        if checkpoint is None:
            return False
        self._together(lambda: self._load(checkpoint), f"cannot load the checkpoint {checkpoint}")
        if self.accelerator.is_main_process:
            self._set_newer_aside(checkpoint)
        self.accelerator.wait_for_everyone()
        self.last = checkpoint
        return True

    def save(self, step: int) -> None:
        """Save the run's state and delete all but the newest `keep` checkpoints.

        Raises:
            CheckpointError: if it cannot be written; nothing of it stays then, and earlier ones are whole.
        """
        final = self.folder / f"step-{step:08d}"
        if final == self.last:
            return
        partial = self.folder / f".partial-{final.name}"
        # The state of what is sharded is gathered from all ranks.
        shared = {name: thing.state_dict() for name, thing in self.shared.items()}
        need = self._bytes(shared)
        failure = (
            f"cannot write the checkpoint {final} of about {_megabytes(need)} (earlier ones are "
            "whole, and resume=latest goes on from the newest once there is room)"
        )
        try:
            self._together(lambda: self._prepare(partial, need), failure, main_only=True)
            self._together(lambda: self._write(partial, shared), failure)
            self._together(lambda: self._finish(partial, final), failure, main_only=True)
        except CheckpointError:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.last = final

    def _choose(self, resume: str | None) -> Path | None:
        refuse_to_mix(self.output_dir, resume)
        found = list_checkpoints(self.output_dir)
        if resume is None:
            return None
        if resume != "latest":
            path = Path(resume)
            if not path.is_dir():
                raise CheckpointError(f"resume: there is no checkpoint folder {resume}")
            try:
                verify(path)
            except DamagedCheckpoint as error:
                raise CheckpointError(f"resume: {path} is damaged: {error}") from None
            return path
        damaged = []
        for path in reversed(found):
            try:
                verify(path)
            except (DamagedCheckpoint, OSError) as error:
                damaged.append(f"{path} is damaged ({error})")
                continue
            for note in damaged:
                logger.warning(f"{note}: going on from {path}")
            return path
        if damaged:
            raise CheckpointError(
                f"resume: no checkpoint is whole: {'; '.join(damaged)}. To begin again, move them away"
            )
        return None

    def _set_newer_aside(self, checkpoint: Path) -> None:
        """Checkpoints behind the one that was loaded must be neither taken for newest nor push others out."""
        for newer in list_checkpoints(self.output_dir):
            if newer.resolve() != checkpoint.resolve() and step_of(newer) >= step_of(checkpoint):
                aside = newer.with_name(f"aside-{newer.name}")
                for number in range(2, 1000):
                    if not aside.exists():
                        break
                    aside = newer.with_name(f"aside-{newer.name}-{number}")
                os.replace(newer, aside)
                logger.warning(f"{newer} is not part of the run any more, it is now {aside.name}")

    def _prepare(self, partial: Path, need: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OSError(f"the disk has {_megabytes(free)} left")
        partial.mkdir()

    def _write(self, partial: Path, shared: dict[str, dict]) -> None:
        self.accelerator.save_state(str(partial))
        rank = self.accelerator.process_index
        own = {name: thing.state_dict() for name, thing in self.per_rank.items()}
        torch.save(own, partial / RANK_STATE.format(rank))
        if self.accelerator.is_main_process:
            torch.save(shared, partial / SHARED_STATE)
            if self.record is not None:
                self.record.write_checkpoint(partial)

    def _finish(self, partial: Path, final: Path) -> None:
        seal(partial)
        os.replace(partial, final)
        flush_to_disk(final.parent)
        for old in list_checkpoints(self.output_dir)[: -self.keep]:
            if others := unlisted(old):
                logger.warning(f"{old} is not deleted: it holds {others[0]}, which no run wrote")
                continue
            # Renamed first: a half deleted one would pass for a damaged checkpoint.
            doomed = old.with_name(f".partial-{old.name}")
            os.replace(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _load(self, checkpoint: Path) -> None:
        if not checkpoint.is_dir():
            raise OSError(
                "this process does not see it: output_dir must be on a shared file system"
            )
        if any(path.name == ".metadata" for path in checkpoint.rglob("*")):
            raise DamagedCheckpoint(
                "it has .metadata of a sharded state, which only an unsafe unpickler reads: use "
                "fsdp_state_dict_type FULL_STATE_DICT"
            )
        sharding = is_sharding(self.accelerator)
        if sharding != any(checkpoint.glob(f"{FSDP_MODEL_NAME}*")):
            began, now = ("without", "with") if sharding else ("with", "without")
            raise CheckpointError(
                f"it is of a launch {began} FSDP, and this one is {now} it: resume as it began"
            )
        rank = self.accelerator.process_index
        # Of an average sharded, only the first rank reads the whole.
        state, own = load_tensors(checkpoint / SHARED_STATE, mapped=sharding), None
        if (checkpoint / RANK_STATE.format(rank)).is_file():
            own = load_tensors(checkpoint / RANK_STATE.format(rank))
            # Accelerate continues without the random states where it cannot read them.
            load_random_states(checkpoint / RANDOM_STATE.format(rank))
        if self.record is not None:
            self.record.resume(checkpoint, state["progress"]["step"])
        accelerator = self.accelerator
        check_fit(checkpoint, [unwrapped(accelerator, m) for m in accelerator._models])
        with without_scaler(accelerator, unless=(checkpoint / SCALER_NAME).is_file()):
            accelerator.load_state(str(checkpoint))
        for things, states in ((self.shared, state), (self.per_rank, own)):
            for name, thing in things.items() if states is not None else ():
                if name in states or name not in NOT_IN_OLD:
                    thing.load_state_dict(states[name])

    def _bytes(self, shared: dict[str, dict]) -> int:
        """Size of a checkpoint, without the few kilobytes around the tensors."""
        accelerator = self.accelerator
        things = [*accelerator._models, *accelerator._optimizers]
        ranks = sum(_tensor_bytes(thing.state_dict()) for thing in self.per_rank.values())
        once = sum(_tensor_bytes(thing.state_dict()) for thing in things) + _tensor_bytes(shared)
        return once + ranks * accelerator.num_processes

    def _together(self, action, failure: str, main_only: bool = False) -> None:
        """Do something on all ranks, or on the main one; if it fails on one of them, all raise."""
        problem = cause = None
        if self.accelerator.is_main_process or not main_only:
            try:
                action()
            # Writers and readers of torch and safetensors raise nearly anything.
            except Exception as error:
                problem, cause = _reason(error), error
        problems = [text for text in gather_object([problem]) if text is not None]
        if problems:
            raise CheckpointError(f"{failure}: {problems[0]}") from cause

    def _unwrap_states(self, models: list, states: list[dict], folder: str) -> None:
        if states:  # none with FSDP, which writes for itself
            states[:] = [unwrapped(self.accelerator, model).state_dict() for model in models]

    def _unwrap_models(self, models: list, folder: str) -> None:
        models[:] = [unwrapped(self.accelerator, model) for model in models]


@contextmanager
def without_scaler(accelerator: Accelerator, unless: bool) -> Iterator[None]:
    """Load a checkpoint of a run without gradient scaler into one that has one, which then starts afresh."""
    scaler = accelerator.scaler
    if not unless:
        accelerator.scaler = None
    try:
        yield
    finally:
        accelerator.scaler = scaler


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:600]} ..."


def _tensor_bytes(state) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_tensor_bytes, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(_tensor_bytes, state))
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
