"""The models in a run's folder: model/, of its newest checkpoint, and best_model/, of its best validation."""

import math
import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from training.loop.checkpoint_files import flush_to_disk, let_others_read
from training.loop.publishing import write_records
from training.loop.recipe import Recipe
from training.loop.records import naming
from training.loop.resume_rules import VALIDATION
from training.loop.run_record import RunRecord, read_json, write_json

logger = get_logger(__name__)

MODEL, BEST = "model", "best_model"
PIPELINE, BEST_PIPELINE = "pipeline", "best_pipeline"
# The mark of a run that is finished: model/ is there from the first checkpoint on.
FINISHED = "finished.json"
# In each folder, written last: step, and headline figure if the model was validated at it.
SAVED_AT = "saved_at.json"
_STAGING, _FORMER = ".partial-models", ".former-"


class ModelFolders:
    """Saves models beside and renames them, so that a kill never leaves half of one.

    Args:
        record: settings to be written beside each model.
    """

    def __init__(
        self, recipe: Recipe, output_dir: Path, accelerator: Accelerator, record: RunRecord | None
    ):
        self.recipe, self.output_dir, self.record = recipe, output_dir, record
        self.accelerator = accelerator
        self._best: float | None = None
        self._steps: dict[str, int] = {}  # of what was saved, by name
        self._published: str | None = None

    def start(self, step: int, resumed: bool, ends: bool) -> None:
        """Set aside, before the first step, what in the folder is not this run's. For all ranks.

        Args:
            step: of the checkpoint that was loaded.
            ends: whether nothing is left to be trained.
        """
        best = steps = None
        if self.accelerator.is_main_process:
            shutil.rmtree(self.output_dir / _STAGING, ignore_errors=True)
            for former in self.output_dir.glob(f"{_FORMER}*"):  # killed between two renames
                name = former.name.removeprefix(_FORMER)
                if (self.output_dir / name).exists():
                    shutil.rmtree(former)
                else:
                    os.replace(former, self.output_dir / name)
            if not ends:
                (self.output_dir / FINISHED).unlink(missing_ok=True)
            for name in (MODEL, PIPELINE, BEST, BEST_PIPELINE):
                if (reason := self._why_aside(name, step, resumed)) is not None:
                    _set_aside(self.output_dir / name, reason)
            best = self._figure(_read(self.output_dir / BEST / SAVED_AT))
            steps = _read(self.output_dir / MODEL / SAVED_AT).get("step")
            if self.record is not None:
                self.record.write(self.output_dir)
        if self.accelerator.num_processes > 1:
            best, steps = broadcast_object_list([best, steps])
        self._best = best
        if steps == step:
            self._steps[MODEL] = step

    def step_of(self, name: str) -> int | None:
        """Step of the model that lies there, if this run knows it."""
        return self._steps.get(name)

    @property
    def published(self) -> Path:
        """Return the folder to publish: the model or, for code models with their tokenizer, the pipeline."""
        found = PIPELINE if (self.output_dir / PIPELINE).is_dir() else MODEL
        return self.output_dir / (self._published or found)

    def is_best(self, figures: dict[str, float]) -> bool:
        """Tell whether a validation beats all before; the same on all ranks."""
        value = self._figure(figures)
        return value is not None and (self._best is None or value > self._best)

    def save(
        self,
        name: str,
        model: PreTrainedModel | None,
        step: int,
        figures: dict[str, float] | None,
        last: bool = False,
    ) -> None:
        """Save a model under `name` in the place of the one there. For all ranks.

        Args:
            model: only of the first rank.
            figures: of its validation; None if it has had none.
            last: whether the run ends with it.

        Raises:
            OSError: if the last model cannot be written; of others there is a warning, and the old one stays.
        """
        problem = None
        if self.accelerator.is_main_process:
            try:
                with naming(self.output_dir / name):
                    self._write(name, model, step, figures)
            except OSError as error:
                problem = str(error)
        if self.accelerator.num_processes > 1:
            (problem,) = broadcast_object_list([problem])
        if problem is None:
            self._steps[name] = step
            if name == BEST:
                self._best = self._figure(figures)
        elif last:
            raise OSError(problem)
        else:
            logger.warning(f"{problem}: training continues, and the checkpoints are whole")

    def finish(self, step: int) -> None:
        """Mark the run as finished: model saved, and published if it was to be."""
        write_json(self.output_dir / FINISHED, {"step": step})

    def _write(self, name: str, model: PreTrainedModel, step: int, figures: dict | None) -> None:
        staging = self.output_dir / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            published = self.recipe.save(model, staging / MODEL)
            self._published = published.name if name == MODEL else self._published
            for folder in staging.iterdir():
                if self.record is not None:
                    write_records(self.record.content(), figures, step, folder)
                figure, _ = self.recipe.headline
                saved = {"step": step} | {k: v for k, v in (figures or {}).items() if k == figure}
                write_json(folder / SAVED_AT, saved)
                let_others_read(folder)
                for path in [*folder.rglob("*"), folder]:
                    flush_to_disk(path)
            renamed = {MODEL: BEST, PIPELINE: BEST_PIPELINE} if name == BEST else {}
            for folder in list(staging.iterdir()):
                _replace(folder, self.output_dir / renamed.get(folder.name, folder.name))
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _figure(self, figures: dict | None) -> float | None:
        """The recipe's headline figure, so that larger is better."""
        name, sign = self.recipe.headline
        value = (figures or {}).get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            return None
        return sign * value

    def _why_aside(self, name: str, step: int, resumed: bool) -> str | None:
        """Reason why a model in the folder is none of this run from `step` on; None if it is."""
        if not resumed:
            return "was there before this run began"
        saved = _read(self.output_dir / name / SAVED_AT).get("step")
        if isinstance(saved, int) and saved > step:
            return f"is of step {saved}, and the run continues from step {step}"
        changes = self.record.latest if self.record is not None else {}
        changed = sorted(VALIDATION & changes.keys())
        if name in (BEST, BEST_PIPELINE) and changed:
            return f"was the best on other validation data ({', '.join(changed)} changed)"
        return None


def _replace(new: Path, final: Path) -> None:
    """Put a folder in the place of another; one in which others have left something is kept beside."""
    former = final.with_name(f"{_FORMER}{final.name}")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        if _touched(final):
            _set_aside(final, "holds files that were written there after it was saved")
        else:
            os.replace(final, former)
    os.replace(new, final)
    flush_to_disk(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def _touched(folder: Path) -> bool:
    """Tell whether anything was written there after us, such as an evaluation."""
    try:
        last = (folder / SAVED_AT).stat().st_mtime_ns
        return any(path.lstat().st_mtime_ns > last for path in folder.rglob("*"))
    except OSError:
        return True


def _set_aside(folder: Path, reason: str) -> None:
    """Rename a folder that must neither be taken for this run's model nor be lost."""
    if not folder.exists():
        return
    step = _read(folder / SAVED_AT).get("step")
    stem = f"aside-{folder.name}" + (f"-step-{step:08d}" if isinstance(step, int) else "")
    names = (f"{stem}-{number}" if number > 1 else stem for number in range(1, 1000))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    os.replace(folder, aside)
    logger.warning(f"{folder} {reason}: it is now {aside.name}")


def _read(path: Path) -> dict:
    return read_json(path) or {}
