"""One step of a tokenizer and its discriminator."""

import torch
from torch import Tensor, nn

from training.codebook_start import match_codes_to_latents
from training.codebook_watch import CodebookWatch
from training.stepping import Stepper, StepResult


class Adversaries(Stepper):
    """Tokenizer's and discriminator's step on one batch.

    The discriminator is frozen, and called without its DistributedDataParallel wrapper, while the
    tokenizer's gradients are made: its own then hold nothing of the tokenizer's loss. (In the original
    the generator's backward pass leaks into them.)

    The first `autoencoder_steps` train without quantizer and commitment loss.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.model, self.discriminator = self.modules["generator"], self.modules["discriminator"]
        quantizer = self.accelerator.unwrap_model(self.model).quantizer
        self.watch = CodebookWatch(quantizer, self.recipe.model.config, self.accelerator)
        self._codes_matched = False

    def step(self, batch: dict[str, Tensor], step: int) -> StepResult:
        accelerator, recipe = self.accelerator, self.recipe
        inputs, quantize = recipe.inputs(batch), step >= self.settings.autoencoder_steps
        if step == self.settings.autoencoder_steps > 0 and not self._codes_matched:
            self._match_codes(inputs)
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
        skipped = self._update("generator", self.model, self.optimizers["generator"], figures, step)
        if step >= recipe.loss.discriminator_start:
            terms, bad = self._judge(inputs, reconstruction.detach(), plain_discriminator, step)
            figures |= terms
            skipped |= bad
        if accelerator.sync_gradients and not skipped:
            self.guard.good()
        self.watch.update(recipe.codes(output), output.latents.detach())
        return StepResult(figures, int(skipped))

    def report(self, step: int) -> tuple[dict[str, float], str]:
        return self.watch.report(step, quantizing=step >= self.settings.autoencoder_steps)

    @torch.no_grad()
    def _match_codes(self, inputs: Tensor) -> None:
        """End of the autoencoder phase: the codes start where the latents are."""
        model = self.accelerator.unwrap_model(self.model)
        latents = model(inputs, quantize=False).latents
        quantizers = [model.quantizer, self.average.quantizer]
        match_codes_to_latents(quantizers, latents, self.accelerator)
        self._codes_matched = True

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
            "discriminator",
            self.discriminator,
            self.optimizers["discriminator"],
            figures,
            step,
        )
        return figures, skipped
