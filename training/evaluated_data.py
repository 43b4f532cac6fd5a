"""What an evaluation measures on: the images at the size of the training, and words for which data they are."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoImageProcessor

from hub_cards.model_card import TRAINING_SETTINGS, is_hub_id
from training.data_source import DataSettings
from training.image_data import ImageDataConfig
from training.settings import SettingsError, at_least, setting

# A folder that holds one of these is several splits.
SPLIT_FOLDERS = {
    "train",
    "training",
    "validation",
    "valid",
    "val",
    "dev",
    "test",
    "testing",
    "eval",
}


@dataclass
class EvaluatedImages(ImageDataConfig):
    """The images."""

    resolution: int | None = setting(
        None,
        "short side, and side of the crop, in pixels; by default that of the model's processor",
    )

    def __post_init__(self):
        DataSettings.__post_init__(self)
        if self.resolution is not None:
            at_least(self, 1, "resolution")


def trained_resolution(processor) -> int | None:
    """The side in pixels that a model's image processor crops to, which is that of its training."""
    side = getattr(processor, "crop_size", None)
    return int(side["height"]) if side else None


def at_trained_resolution(data: ImageDataConfig, model: str) -> int | None:
    """Set data.resolution to that of the model's processor, unless one is given; and say so where they differ.

    Args:
        model: folder, or name on the Hub.

    Returns:
        That of the processor; None if the model has none.

    Raises:
        SettingsError: if neither is known.
    """
    try:
        trained = trained_resolution(AutoImageProcessor.from_pretrained(model))
    except (OSError, ValueError):  # no processor was saved with it
        trained = None
    return set_resolution(data, trained, model)


def set_resolution(data: ImageDataConfig, trained: int | None, model: str) -> int | None:
    """at_trained_resolution, where the model's own resolution is known already."""
    if data.resolution is None:
        if trained is None:
            raise SettingsError(f"resolution: {model} holds no image processor: set it in pixels")
        data.resolution = trained
    elif trained not in (None, data.resolution):
        logging.warning(resolution_note(data.resolution, trained))
    return trained


def resolution_note(used: int, trained: int | None) -> str:
    """A sentence where images have another size than in training; "" where they do not."""
    if trained in (None, used):
        return ""
    return f"Images of {used} x {used} pixels; the model was trained at {trained} x {trained}."


def data_name(data: DataSettings, split: str, given: str | None = None) -> tuple[str, str | None]:
    """What to call a data set for people, and its split; None if it is a folder or file without splits.

    Args:
        given: the user's own name for it.
    """
    whole = is_whole(data, split)
    name = given or (data.dataset if is_hub_id(data.dataset) else _local_name(data))
    return (name if given or whole else f"{name}, {split}"), None if whole else split


def is_whole(data: DataSettings, split: str) -> bool:
    """Whether `split` is all of a local folder or file without splits: that is called train."""
    path = Path(data.dataset).expanduser()
    if split != "train" or data.train_split != "train" or not path.exists():
        return False
    if path.is_file():
        return True
    if (path / "dataset_dict.json").is_file():
        return False
    folders = {child.name.lower() for child in path.iterdir() if child.is_dir()}
    if (path / "data").is_dir():
        folders |= {child.name.lower() for child in (path / "data").iterdir()}
    files = {child.name.split("-")[0].lower() for child in path.glob("**/*.parquet")}
    return not (folders | files) & SPLIT_FOLDERS


def evaluated_split(data: DataSettings) -> str | None:
    """data.validation_split; of a folder or file without splits all there is, unless a split was named."""
    default = type(data).__dataclass_fields__["validation_split"].default
    return (
        "train"
        if data.validation_split == default and is_whole(data, "train")
        else data.validation_split
    )


def measured_on(
    data: DataSettings, split: str, count: int, noun: str, model: str, given: str | None = None
) -> str:
    """A sentence: on how many samples of what was measured, and what the model was trained on.

    Args:
        noun: what the samples are, in the singular.
        model: folder, or name on the Hub; a run's settings lie beside a folder.
    """
    number = f"{count:,} {noun}{'' if count == 1 else 's'}"
    if is_hub_id(data.dataset):
        place = f"{data.dataset} ({split})"
    elif is_whole(data, split):
        place = f"the local files {_local_name(data)!r}, which have no splits"
    else:
        place = f"the local files {_local_name(data)!r} ({split})"
    if given:
        place = f"{given}: {place}"
    return f"Measured on {number} of {place}; {_trained_on(data, split, model)}."


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
    """Of the run that made a local model. Its own file tells the path, which the model's copy does not."""
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


def _local_name(data: DataSettings) -> str:
    """Of a local folder the name alone: a page that is shared need not tell where it lay."""
    return Path(data.dataset).expanduser().resolve().name


def join_sentences(*sentences: str) -> str:
    """One paragraph of those that are not empty."""
    return " ".join(sentence for sentence in sentences if sentence)
