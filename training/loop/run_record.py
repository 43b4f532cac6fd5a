"""The settings of a run and their changes over its resumes: settings.json, there and in every checkpoint."""

import dataclasses
import json
import os
from pathlib import Path

from accelerate.logging import get_logger

from training.loop.resume_rules import changed_settings, describe, refusals
from training.runtime.settings import SettingsError

logger = get_logger(__name__)

RUN_SETTINGS = "settings.json"
MODEL_CONFIG = "config.json"
MOST_BYTES = 1 << 24


class RunRecord:
    """Record of a run's settings and from which step they applied.

    Args:
        groups: the settings, by the names of their groups.

    Attributes:
        settings: all of them, flat.
        changes: of resumes, oldest first: {"step": 400, "learning_rate": [0.001, 0.0001]}.
        latest: what this resume changes, name to (before, now).
        config: the model's configuration; kept in checkpoints, so that they can be exported without the data.
    """

    def __init__(self, groups: dict):
        flat = {k: v for group in groups.values() for k, v in dataclasses.asdict(group).items()}
        self.settings: dict = _as_read(flat)
        self.changes: list[dict] = []
        self.latest: dict[str, tuple] = {}
        self.config: dict | None = None
        self._defaults = _as_read(
            {k: v for group in groups.values() for k, v in _defaults(group).items()}
        )

    def content(self) -> dict:
        """The settings and, as "changes", what resumes have changed."""
        return self.settings | {"changes": self.changes}

    def write(self, folder: Path) -> None:
        """Write settings.json, never half of it."""
        write_json(folder / RUN_SETTINGS, self.content())

    def write_checkpoint(self, folder: Path) -> None:
        """Write settings.json and config.json into a checkpoint that is being made."""
        self.write(folder)
        if self.config is not None:
            write_json(folder / MODEL_CONFIG, self.config)

    def resume(self, checkpoint: Path, step: int) -> None:
        """Compare with the settings that a checkpoint was made with, and note what is changed from `step` on.

        Raises:
            SettingsError: naming every setting that cannot be changed.
        """
        recorded = read_record(checkpoint)
        if recorded is None:
            logger.warning(f"resume: the settings that {checkpoint} was made with are not recorded")
            return
        earlier = recorded.pop("changes", [])
        changed = changed_settings(self._defaults | recorded, self.settings)
        refused = refusals(changed, step)
        if refused:
            raise SettingsError(f"{'; '.join(refused)}, or start a new run in another output_dir")
        self._check_classes(checkpoint)
        self.latest = changed
        self.changes = [
            change
            for change in (earlier if isinstance(earlier, list) else [])
            if isinstance(change, dict) and change.get("step") in range(step + 1)
        ]
        if changed:
            self.changes.append({"step": step} | {k: list(v) for k, v in changed.items()})
            logger.info(f"resume: from step {step} on: {describe(changed)}")

    def _check_classes(self, checkpoint: Path) -> None:
        """Other data may number other classes: the model would give its samples their names."""
        before = (read_json(checkpoint / MODEL_CONFIG) or {}).get("id2label")
        now = _as_read(self.config or {}).get("id2label")
        if before and now and before != now:
            names = [", ".join(map(str, list(labels.values())[:4])) for labels in (before, now)]
            raise SettingsError(
                f"dataset: its classes are {names[1]}, ..., and the checkpoint's are {names[0]}, ...: set the "
                "dataset back, or start a new run in another output_dir"
            )


def read_record(checkpoint: Path) -> dict | None:
    """Settings recorded with a checkpoint or, with those of earlier versions, beside it; None if nowhere."""
    return read_json(checkpoint / RUN_SETTINGS) or read_json(
        checkpoint.resolve().parent.parent / RUN_SETTINGS
    )


def read_json(path: Path) -> dict | None:
    """A JSON object; None if there is none that can be read."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file in the place of another, never half of it."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(beside, path)


def _as_read(content: dict) -> dict:
    """Return the value as JSON gives it back, so that written and unwritten ones compare equal."""
    return json.loads(json.dumps(content, default=str))


def _defaults(group) -> dict:
    found = {}
    for spec in dataclasses.fields(group):
        if spec.default is not dataclasses.MISSING:
            found[spec.name] = spec.default
        elif spec.default_factory is not dataclasses.MISSING:
            found[spec.name] = spec.default_factory()
    return found
