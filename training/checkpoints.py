"""Checkpoints of a run: written beside and renamed, so that a killed run leaves no half of one."""

import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger

logger = get_logger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that was asked for is not there, or cannot be loaded."""


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (output_dir / "checkpoints").glob("step-*")
    return sorted(
        (path for path in found if re.fullmatch(r"step-\d+", path.name)),
        key=lambda path: int(path.name.removeprefix("step-")),
    )


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, keep: int) -> None:
    """Save the whole state of a run and delete all but the newest `keep` checkpoints."""
    final = output_dir / "checkpoints" / f"step-{step:08d}"
    if final.exists():
        return
    partial = final.with_name(f".partial-{final.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in partial.rglob("*"):
            _flush_to_disk(path)
        _flush_to_disk(partial)
        os.replace(partial, final)
        _flush_to_disk(final.parent)
        for old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names; None if it is "latest" and the run has none yet."""
    if resume == "latest":
        found = list_checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(f"resume: there is no checkpoint folder {resume}")
    return path
