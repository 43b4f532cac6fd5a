"""What the metrics of this folder share: evaluate.Metric over pictures and over speech.

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

from training.speech_metrics import KEYS, LOADERS, SpeechPair, as_written

PICTURES = """
    predictions, references: reconstructions and originals, 8-bit RGB as PIL pictures or arrays (H, W, 3).
"""
SPEECH = """
    predictions, references: reconstructions and originals, mono waveforms in [-1, 1].
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
    """Where Accelerate would compute."""
    return Accelerator().device


def pixels(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    values = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
    return values.permute(2, 0, 1)[None] / 127.5 - 1


class PictureMetric(evaluate.Metric):
    """A mean over pictures."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(type(self).__doc__, PICTURES, datasets.Image())

    def _compute(self, predictions, references, **options) -> dict[str, float]:
        measure = self.prepare(**options)
        pairs = zip(references, predictions, strict=True)
        with torch.no_grad():
            values = [measure(pixels(original), pixels(decoded)) for original, decoded in pairs]
        return {self.name: statistics.fmean(values)}

    @abstractmethod
    def prepare(self, **options) -> Callable[[Tensor, Tensor], float]:
        """A function of original and reconstruction, (1, 3, H, W) in [-1, 1]."""


class SpeechMetric(evaluate.Metric):
    """A mean over recordings, of those that have the metric; `failures` counts the others."""

    def _info(self) -> evaluate.MetricInfo:
        feature = datasets.List(datasets.Value("float32"))
        return metric_info(type(self).__doc__, SPEECH, feature)

    def _compute(self, predictions, references, sampling_rate: int, **options) -> dict[str, float]:
        measure = LOADERS[self.name](default_device(), **options)
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
