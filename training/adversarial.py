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
        self.rank_states = {"codes": self.watch.counter}
        self._codes_matched = False

    def state_dict(self) -> dict:
        return super().state_dict() | {"codes_matched": self._codes_matched}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._codes_matched = state["codes_matched"]

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
        self._backward(total)
        skipped = self._update("generator", self.model, self.optimizers["generator"], figures, step)
        if skipped:  # then neither of the two moves
            self.optimizers["discriminator"].zero_grad(set_to_none=True)
        elif step >= recipe.loss.discriminator_start:
            terms, skipped = self._judge(inputs, reconstruction.detach(), plain_discriminator, step)
            figures |= terms
        self.watch.update(recipe.codes(output), output.latents.detach())
        return StepResult(figures, int(skipped))

    def settle(self, skipped: bool) -> None:
        super().settle(skipped)
        self.watch.settle(skipped)

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
        self._backward(total)
        skipped = self._update(
            "discriminator",
            self.discriminator,
            self.optimizers["discriminator"],
            figures,
            step,
        )
        return figures, skipped
