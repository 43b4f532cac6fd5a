"""Bases of the metrics in this folder: evaluate.Metric over images and over speech.

From the root of the repository, with no network: evaluate.load("training/metrics/psnr"). They measure with the
functions of the evaluators, so that both give the same figures.
"""

import statistics
from abc import abstractmethod
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from modeling_simvq.image_processing_simvq import pil_to_rgb
from training.metrics.images import to_bytes
from training.metrics.speech import KEYS, LOADERS, SpeechPair, as_written

# Decoders have no bound: their pixels are clamped to [-1, 1], as everywhere else. After a short training they
# reach 2 to 3 at edges; a picture in [0, 255] has more than this unless it is nearly black.
LARGEST_PIXEL = 16.0
PICTURES = """
    predictions, references: reconstructions and originals, RGB: tensors (B, 3, H, W) in [-1, 1] as models give
        them, which are clamped and rounded to 8 bits, or lists of PIL images, 8-bit arrays (H, W, 3) or tensors
        (3, H, W).
"""
SPEECH = """
    predictions, references: reconstructions and originals, mono, in [-1, 1]: tensors (B, 1, L) as models give
        them, or lists of waveforms (L,).
    sampling_rate: of all of them, in Hz.
"""


def metric_info(description: str, inputs: str, feature) -> evaluate.MetricInfo:
    """Info of a metric whose predictions and references are of one kind."""
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=inputs,
        features=datasets.Features({"predictions": feature, "references": feature}),
    )


def default_device() -> torch.device:
    """Return the device that Accelerate would use."""
    return Accelerator().device


def pixels(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    values = torch.from_numpy(np.array(pil_to_rgb(picture)))
    return values.permute(2, 0, 1)[None] / 127.5 - 1


class TakesTensors:
    """Gives evaluate.Metric what its features can hold: `row` of each sample, whatever it came as."""

    row: Callable

    def add_batch(self, **batch) -> None:
        """Describe the metric; evaluate.Metric calls this from compute."""
        rows = {
            name: values if values is None else [self.row(value) for value in values]
            for name, values in batch.items()
        }
        super().add_batch(**rows)

    def add(self, **samples) -> None:
        """Return evaluate.Metric's description."""
        super().add(**{name: self.row(value) for name, value in samples.items()})


def image_row(image):
    """An image for datasets.Image: a PIL image or an 8-bit array as it is, of a tensor (3, H, W) the array.

    Raises:
        ValueError: if it is none of these, or a tensor is far from [-1, 1], as pixels in [0, 255] are.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or len(image) != 3:
            raise ValueError(
                f"a tensor must be (3, H, W), or (B, 3, H, W) in all, got {tuple(image.shape)}"
            )
        if image.is_floating_point():
            largest = image.detach().abs().max()
            if not largest <= LARGEST_PIXEL:  # NaN too
                raise ValueError(
                    "tensors of floating point must lie in [-1, 1], which decoders may exceed a little, "
                    f"got {largest:g}"
                )
            image = to_bytes(image.detach().clamp(-1, 1))
        elif image.dtype != torch.uint8:
            raise ValueError(
                f"tensors must be uint8, or floating point in [-1, 1], got {image.dtype}"
            )
        return image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        raise ValueError(
            f"arrays must be uint8 (H, W, 3), got {image.dtype}: others as tensors in [-1, 1]"
        )
    return image


def waveform_row(waveform) -> np.ndarray:
    """A mono waveform (L,), from one with a dimension for the channel or without.

    Raises:
        ValueError: if it has several channels.
    """
    if isinstance(waveform, Tensor):
        waveform = waveform.detach().float().cpu().numpy()
    waveform = np.asarray(waveform, dtype=np.float32)
    if waveform.size != waveform.shape[-1]:
        raise ValueError(f"a waveform must be mono, (L,) or (1, L), got {waveform.shape}")
    return waveform.reshape(-1)


class ImageMetric(TakesTensors, evaluate.Metric):
    """A metric of images."""

    row = staticmethod(image_row)

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(type(self).__doc__, PICTURES, datasets.Image())


class PictureMetric(ImageMetric):
    """A mean over images."""

    def _compute(self, predictions, references, **options) -> dict[str, float]:
        measure = self.prepare(**options)
        pairs = zip(references, predictions, strict=True)
        with torch.no_grad():
            values = [measure(pixels(original), pixels(decoded)) for original, decoded in pairs]
        return {self.name: statistics.fmean(values)}

    @abstractmethod
    def prepare(self, **options) -> Callable[[Tensor, Tensor], float]:
        """A function of original and reconstruction, (1, 3, H, W) in [-1, 1]."""


class SpeechMetric(TakesTensors, evaluate.Metric):
    """A mean over recordings, of those that have the metric; `failures` counts the others."""

    row = staticmethod(waveform_row)

    def _info(self) -> evaluate.MetricInfo:
        feature = datasets.List(datasets.Value("float32"))
        return metric_info(type(self).__doc__, SPEECH, feature)

    def prepare(self, **options) -> Callable[[SpeechPair], dict[str, float]]:
        """A function that measures a recording."""
        return LOADERS[self.name](default_device(), **options)

    def _compute(self, predictions, references, sampling_rate: int, **options) -> dict[str, float]:
        measure = self.prepare(**options)
        found = []
        for original, decoded in zip(references, predictions, strict=True):
            waveforms = np.float32(original), as_written(np.float32(decoded))
            found.append(measure(SpeechPair(*waveforms, sampling_rate)))
        results, failures = {}, 0
        for key in KEYS.get(self.name, (self.name,)):
            values = [scores[key] for scores in found if np.isfinite(scores[key])]
            results[key] = statistics.fmean(values) if values else float("nan")
            failures = max(failures, len(found) - len(values))
        return results | {"failures": failures}
