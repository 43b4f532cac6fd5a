"""Base of the image and audio tokenizers' recipes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.codebook.spectra import ranks_of, rounded_values, spectra
from training.loop.recipe import Validation
from training.loop.settings import LoopSettings
from training.losses.discriminator_files import save_discriminator
from training.recipes.adversarial import Adversaries
from training.recipes.starting_model import StartSettings
from training.runtime.settings import SettingsError, at_least, setting

# Codes from which a validation takes the codebook's spectrum.
SPECTRUM_ROWS = 65_536


@dataclass
class TokenizerLoopSettings(LoopSettings):
    """The run: how long, how fast, what is kept. Steps are optimiser steps of the generator."""

    autoencoder_steps: int = setting(
        0, "first train so long without quantization; the codes then start where the latents are"
    )

    codes_from_latents: bool = setting(
        False,
        "draw C from the latents when autoencoder_steps end, not only their mean and covariance",
    )

    end_phase_early: bool = setting(
        False,
        "end autoencoder_steps sooner, once the loss that log2 K bits would leave does not fall any more",
    )

    encoder_steps: int | None = setting(
        None, "freeze the encoder after so many steps; codebook and decoder go on (NSVQ)"
    )

    drift_weight: float = setting(
        0.0, "weight with which codes that are not picked follow the latents (NSVQ: 0.01)"
    )

    replace_unused_every: int = setting(
        0, "every so many steps put codes that were not picked on latents; 0 never (NSVQ, DiVeQ)"
    )

    decorrelation_weight: float = setting(
        0.0,
        "weight of a penalty on correlated dimensions of the codebook, where it spans few (DimVQ, ICML 2026)",
    )

    gram_weight: float = setting(
        0.0, "weight of DimVQ's own penalty, of the whole codebook (published: 0.001)"
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "autoencoder_steps", "decorrelation_weight", "gram_weight")
        at_least(self, 0, "drift_weight", "replace_unused_every")
        if self.encoder_steps is not None:
            at_least(self, 1, "encoder_steps")
            if self.encoder_steps < self.autoencoder_steps:
                raise SettingsError(
                    f"encoder_steps={self.encoder_steps} freezes the encoder before quantization begins, after "
                    f"autoencoder_steps={self.autoencoder_steps}: set more"
                )
        if self.end_phase_early and not self.autoencoder_steps:
            raise SettingsError(
                "end_phase_early: there is no phase to end: set autoencoder_steps, the longest that it may take"
            )
        if self.codes_from_latents and not self.autoencoder_steps:
            raise SettingsError(
                "codes_from_latents: there are latents to draw from only after a first phase: set "
                "autoencoder_steps, a few hundred for instance"
            )


class TokenizerRecipe(ABC):
    """A tokenizer against its discriminator; see training.loop.recipe.Recipe.

    Attributes:
        model: returns, when called with (inputs, quantize=...), an output with the recipe's
            reconstruction and codes, `commitment_loss` and `latents`.
        discriminator: any module; only `loss` calls it.
        loss: module with `generator(inputs, reconstruction, commitment_loss, discriminator, step,
            last_layer)` and `discriminator(inputs, reconstruction, discriminator, step)`, each returning
            a scalar and a dict of detached figures. `step` counts the generator's optimiser steps. Before
            its attribute `discriminator_start` the discriminator is not called.
        beginning: what the model began from, and which of its parts are trained.
        discriminator_sizes: what the discriminator was built with; without them it is not saved.
        discriminator_trained: whether it has taken part.
    """

    stepper = Adversaries
    loss_figure = "generator/total"
    remarks: tuple[str, ...] = ()
    batch_counts = ("unreadable",)
    forward_methods = ()
    of_images = False
    model: nn.Module
    discriminator: nn.Module
    loss: nn.Module
    train_loader: DataLoader
    validation_loader: DataLoader | None
    beginning = StartSettings()
    discriminator_sizes: dict[str, int] | None = None
    discriminator_trained = False

    @property
    def frozen(self) -> list[nn.Module]:
        return self.beginning.frozen_parts(self.model)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"generator": self.model, "discriminator": self.discriminator}

    @property
    def companions(self) -> list[nn.Module]:
        return [self.loss]

    def batch_weight(self, batch: dict[str, Tensor]) -> None:
        """None: samples are all of one size, and batches are full."""
        return None

    @abstractmethod
    def inputs(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's input, which is also what it has to reconstruct."""

    @abstractmethod
    def reconstruction(self, output) -> Tensor:
        """The reconstruction in a model's output."""

    @abstractmethod
    def codes(self, output) -> Tensor:
        """The codes in a model's output."""

    @abstractmethod
    def last_layer(self, model: nn.Module) -> Tensor:
        """The weight at which an adaptive adversarial weight compares gradients."""

    @abstractmethod
    def measure(self, model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> Validation:
        """Metrics, images and audio of a validation."""

    def validate(
        self, model: nn.Module, loader: DataLoader, accelerator: Accelerator
    ) -> Validation:
        result = self.measure(model, loader, accelerator)
        found = spectra(model.quantizer, most_rows=SPECTRUM_ROWS)
        result.diagnostics = ranks_of(found) | rounded_values(found)
        return result

    def save(self, model: nn.Module, folder: Path) -> Path:
        folder = self.save_tokenizer(model, folder)
        if self.discriminator_trained and self.discriminator_sizes is not None:
            save_discriminator(self.discriminator, self.discriminator_sizes, folder)
        return folder

    @abstractmethod
    def save_tokenizer(self, model: nn.Module, folder: Path) -> Path:
        """Write a folder that the Auto classes load, with the processor, and return it."""
