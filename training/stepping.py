"""One step of a tokenizer and its discriminator, and the guard against values that are not finite."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn

from training.recipe import Recipe
from training.settings import LoopSettings

logger = get_logger(__name__)


class DivergedError(RuntimeError):
    """Training met non-finite values again and again. The message names the term and the layer."""


@dataclass
class StepResult:
    """Figures (detached scalars), codes and latents of a forward pass; skipped: 1 if the step was not taken."""

    figures: dict[str, Tensor]
    codes: Tensor
    latents: Tensor
    skipped: int = 0


class NonFiniteGuard:
    """Counts consecutive bad steps and stops the run with a diagnosis when there are too many."""

    def __init__(self, limit: int):
        self.limit = limit
        self.in_a_row = 0
        self._last_bad_step: int | None = None

    def good(self) -> None:
        """A step was fine."""
        self.in_a_row = 0

    def bad(self, figures: dict[str, Tensor], module: nn.Module, step: int) -> None:
        """The update of `module` was skipped; a step counts once, whichever of the two was bad."""
        self.in_a_row += step != self._last_bad_step
        self._last_bad_step = step
        terms = [name for name, value in figures.items() if not torch.isfinite(value).all()]
        layer = next(
            (
                name
                for name, parameter in module.named_parameters()
                if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
            ),
            None,
        )
        cause = (
            f"terms: {', '.join(terms) or 'all finite'}; first layer with such a gradient: {layer}"
        )
        logger.warning(
            f"step {step} skipped, its values are not finite ({cause})", main_process_only=False
        )
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"{self.in_a_row} steps in a row were not finite ({cause}). Go on from the last checkpoint "
                "with warmup_steps, max_grad_norm=1, a lower learning_rate or mixed_precision=bf16"
            )


class Adversaries:
    """Generator's and discriminator's step on one batch.

    The discriminator is frozen, and called without its DistributedDataParallel wrapper, while the
    generator's gradients are made: its own then hold nothing of the generator's loss. (In the original
    the generator's backward pass leaks into them.)
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        model: nn.Module,
        discriminator: nn.Module,
        model_optimizer,
        discriminator_optimizer,
        guard: NonFiniteGuard,
        settings: LoopSettings,
    ):
        self.accelerator, self.recipe, self.guard = accelerator, recipe, guard
        self.model, self.discriminator = model, discriminator
        self.model_optimizer, self.discriminator_optimizer = (
            model_optimizer,
            discriminator_optimizer,
        )
        self.max_grad_norm = settings.max_grad_norm

    def step(self, inputs: Tensor, step: int, quantize: bool) -> StepResult:
        """Forward and backward of both; optimiser steps when gradients are due.

        Args:
            inputs: a batch of the model's inputs.
            step: optimiser steps of the generator so far.
            quantize: False in the autoencoder phase, which trains without quantizer and commitment loss.
        """
        accelerator, recipe = self.accelerator, self.recipe
        plain_discriminator = accelerator.unwrap_model(self.discriminator)
        plain_discriminator.requires_grad_(False)
        output = self.model(inputs, quantize=quantize)
        reconstruction = recipe.reconstruction(output)
        with accelerator.autocast():
            total, terms = recipe.loss.generator(
                inputs,
                reconstruction,
                output.commitment_loss if quantize else output.commitment_loss * 0,
                plain_discriminator,
                step,
                last_layer=recipe.last_layer(accelerator.unwrap_model(self.model)),
            )
        figures = {f"generator/{name}": value for name, value in terms.items()}
        accelerator.backward(total)
        skipped = self._update("generator", self.model, self.model_optimizer, figures, step)

        if step >= recipe.loss.discriminator_start:
            terms, bad = self._judge(inputs, reconstruction.detach(), plain_discriminator, step)
            figures |= terms
            skipped |= bad
        if accelerator.sync_gradients and not skipped:
            self.guard.good()
        return StepResult(figures, recipe.codes(output), output.latents.detach(), int(skipped))

    def _judge(
        self, inputs: Tensor, reconstruction: Tensor, plain_discriminator: nn.Module, step: int
    ) -> tuple[dict[str, Tensor], bool]:
        """The discriminator's turn: its figures, and whether its step was skipped."""
        plain_discriminator.requires_grad_(True)
        with self.accelerator.autocast():
            total, terms = self.recipe.loss.discriminator(
                inputs, reconstruction, self.discriminator, step
            )
        figures = {f"discriminator/{name}": value for name, value in terms.items()}
        self.accelerator.backward(total)
        skipped = self._update(
            "discriminator", self.discriminator, self.discriminator_optimizer, figures, step
        )
        return figures, skipped

    def _update(self, name: str, module: nn.Module, optimizer, figures: dict, step: int) -> bool:
        """Clip and step if gradients are due; True if the step was skipped for not being finite."""
        accelerator = self.accelerator
        if not accelerator.sync_gradients:
            return False
        # Only this optimiser: Accelerate's own clipping would unscale both, and the other one may hold
        # gradients of earlier forward passes that are still scaled.
        accelerator.unscale_gradients(optimizer)
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(module.parameters(), self.max_grad_norm, norm)
        # With fp16 the scaler finds overflows by itself, skips the step and lowers its scale: no fault.
        skipped = accelerator.scaler is None and not bool(torch.isfinite(norm))
        if skipped:
            self.guard.bad(figures, accelerator.unwrap_model(module), step)
        else:
            optimizer.step()
            figures[f"{name}/gradient_norm"] = norm.detach()
        optimizer.zero_grad(set_to_none=True)
        return skipped
