"""Images for a model that is there: by default at the resolution of its training."""

import logging
from dataclasses import dataclass

from transformers import AutoImageProcessor

from training.data.image_sizes import trained_resolution
from training.data.images import ImageDataConfig
from training.data.source import DataSettings
from training.runtime.settings import SettingsError, at_least, setting


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
