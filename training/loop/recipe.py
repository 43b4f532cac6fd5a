"""Interface between the training loop and a task. The loop itself knows no images, codes or adversaries."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.loop.steps import Stepper


@dataclass
class Validation:
    """Figures of a validation, and images and audio for people.

    Attributes:
        figures: of merit, for a card too.
        images: name to (3, H, W) in [0, 1].
        sounds: name to (samples,) in [-1, 1], at sampling_rate.
        diagnostics: how the training goes; scalars and lists, of which trackers take the scalars.
    """

    figures: dict[str, float]
    pictures: dict[str, Tensor] = field(default_factory=dict)
    sounds: dict[str, Tensor] = field(default_factory=dict)
    sampling_rate: int = 0
    diagnostics: dict[str, float | list[float]] = field(default_factory=dict)


class Recipe(Protocol):
    """One task: model, what a step is, data and validation.

    Attributes:
        model: what is averaged, validated and saved.
        modules: what is trained, by name, each with an optimiser of its own; the model comes first.
        companions: modules that no optimiser trains, but that belong on the device and in checkpoints.
        stepper: class of the steps; see training.loop.steps.Stepper.
        train_loader, validation_loader: batches are dicts.
        headline: the validation figure by which one model is better than another, and 1 or -1 if it should
            be large or small.
        loss_figure: the figure of steps that reports lead with, MODULE/TERM.
        remarks: what is worth a warning before the training begins.
        batch_counts: keys of a batch that hold per-sample counts to be summed and reported.
        frozen: parts of the model that stay as they are.
        of_images: whether all modules take images (B, C, H, W), so that these may lie channels last.
        forward_methods: names of methods, beside forward, that parts of a model which may be sharded call on
            each other; none if it is never sharded.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    companions: list[nn.Module]
    stepper: type[Stepper]
    train_loader: DataLoader
    validation_loader: DataLoader | None
    headline: tuple[str, int]
    loss_figure: str
    remarks: tuple[str, ...]
    batch_counts: tuple[str, ...]
    frozen: list[nn.Module]
    of_images: bool
    forward_methods: tuple[str, ...]

    def batch_weight(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Return the weight of a batch's mean loss beside other batches', scalar > 0; None if all are alike."""

    def validate(
        self, model: nn.Module, loader: DataLoader, accelerator: Accelerator
    ) -> Validation:
        """Measure the averaged model on the validation set; figures are equal on all ranks."""

    def save(self, model: nn.Module, folder: Path) -> Path:
        """Write a folder that the Auto classes load; returns what is to be published, it or one beside it."""
