"""Data of an evaluation: the words that name them."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from hub_cards.tokenizer_card import TRAINING_SETTINGS, is_hub_id
from training.data.local import only_split
from training.data.source import DataSettings


@dataclass(frozen=True)
class EvaluatedOn:
    """The data of an evaluation, in words.

    Attributes:
        split: to open.
        name: of the data, for people: the user's own, or the Hub id or the folder's name, with the split.
        named_split: the split, where the data have several; otherwise None.
        place: what they are, whatever they are called.
    """

    split: str | None
    name: str
    named_split: str | None
    place: str


def evaluated_on(
    data: DataSettings, given: str | None = None, split: str | None = None
) -> EvaluatedOn:
    """Find out what a split of the data is to be called.

    A local folder or file without splits is taken whole where no split was named, and called by its name: that
    Datasets calls it train says nothing about the model.

    Args:
        given: the user's own name for the data.
        split: data.validation_split by default.
    """
    path = Path(data.dataset).expanduser()
    split = split or data.validation_split
    default = type(data).__dataclass_fields__["validation_split"].default
    only = _only_split(data, path)
    undivided = only is not None and split in (only, default)
    split = only if undivided else split
    if is_hub_id(data.dataset):
        name, place = f"{data.dataset}, {split}", f"{data.dataset} ({split})"
    elif undivided:
        # Of a local folder the name alone: a page that is shared need not tell where it lay.
        name = path.resolve().name
        place = f"the local files {name!r}, which have no splits"
    else:
        name = f"{path.resolve().name}, {split}"
        place = f"the local files {path.resolve().name!r} ({split})"
    if given:
        name, place = given, f"{given}: {place}"
    return EvaluatedOn(split, name, None if undivided else split, place)


def _only_split(data: DataSettings, path: Path) -> str | None:
    if not path.exists() or (path / "dataset_dict.json").is_file():
        return None
    if (path / "state.json").is_file():  # of save_to_disk, without splits
        return data.train_split
    return only_split(data, path)


def measured_on(on: EvaluatedOn, data: DataSettings, count: int, noun: str, model: str) -> str:
    """A sentence: on how many samples of what was measured, and what the model was trained on.

    Args:
        noun: what the samples are, in the singular.
        model: folder, or name on the Hub; a run's settings lie beside a folder.
    """
    number = f"{count:,} {noun}{'' if count == 1 else 's'}"
    return f"Measured on {number} of {on.place}; {_trained_on(data, on.split, model)}."


def _trained_on(data: DataSettings, split: str, model: str) -> str:
    settings = _run_settings(Path(model))
    trained, part = settings.get("dataset"), settings.get("train_split") or "train"
    if not isinstance(trained, str):
        return "what the model was trained on is not recorded beside it"
    if not _same(trained, data.dataset):
        if is_hub_id(trained):
            return f"the model was trained on {trained} ({part})"
        here = Path(trained).expanduser().exists()
        return f"the model was trained on {'other ' if here else ''}local files"
    if part != split:
        return f"the model was trained on split {part} of the same"
    logging.warning("the model was trained on what it is measured on: on other data it is worse")
    return "the model was trained on the same"


def _run_settings(model: Path) -> dict:
    """Read the settings of the run that made a local model: its own file has the paths, the model's has not."""
    for file in (model.resolve().parent / "settings.json", model / TRAINING_SETTINGS):
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and "dataset" in content:
            return content
    return {}


def _same(one: str, other: str) -> bool:
    paths = Path(one).expanduser(), Path(other).expanduser()
    if all(path.exists() for path in paths):
        return paths[0].resolve() == paths[1].resolve()
    return one == other


def join_sentences(*sentences: str) -> str:
    """One paragraph of those that are not empty."""
    return " ".join(sentence for sentence in sentences if sentence)
