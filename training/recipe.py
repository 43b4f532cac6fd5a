"""What the training loop needs to know of a modality. The loop itself knows neither pictures nor sound."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader


@dataclass
class Validation:
    """Figures of a validation, and pictures and sounds for people.

    Attributes:
        pictures: name to (3, H, W) in [0, 1].
        sounds: name to (samples,) in [-1, 1], at sampling_rate.
    """

    figures: dict[str, float]
    pictures: dict[str, Tensor] = field(default_factory=dict)
    sounds: dict[str, Tensor] = field(default_factory=dict)
    sampling_rate: int = 0


class Recipe(Protocol):
    """One modality: model, discriminator, losses, data and validation.

    Attributes:
        model: returns, when called with (inputs, quantize=...), an output with the recipe's
            reconstruction and codes, `commitment_loss` and `latents`.
        discriminator: any module; only `loss` calls it.
        loss: module with `generator(inputs, reconstruction, commitment_loss, discriminator, step,
            last_layer)` and `discriminator(inputs, reconstruction, discriminator, step)`, each returning
            a scalar and a dict of detached figures. `step` counts the generator's optimiser steps. Before
            its attribute `discriminator_start` the discriminator is not called.
        train_loader, validation_loader: batches are dicts.
        batch_counts: keys of a batch that hold per-sample counts to be summed and reported.
    """

    model: nn.Module
    discriminator: nn.Module
    loss: nn.Module
    train_loader: DataLoader
    validation_loader: DataLoader | None
    batch_counts: tuple[str, ...]

    def inputs(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's input, which is also what it has to reconstruct."""

    def reconstruction(self, output) -> Tensor:
        """The reconstruction in a model's output."""

    def codes(self, output) -> Tensor:
        """The codes in a model's output."""

    def last_layer(self, model: nn.Module) -> Tensor:
        """The weight at which an adaptive adversarial weight compares gradients."""

    def validate(
        self, model: nn.Module, loader: DataLoader, accelerator: Accelerator
    ) -> Validation:
        """Figures of the averaged model over the validation set, equal on all ranks."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a folder that the Auto classes load."""
