"""One step of a tokenizer and its discriminator."""

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn

from modeling_simvq.several_quantizers import ResidualQuantizer
from training.codebook.penalties import CodebookPenalties
from training.codebook.phase_end import PhaseEnd
from training.codebook.replacement import CodeReplacement
from training.codebook.start import (
    LatentSample,
    match_codes_to_latents,
    put_codes_on,
    takes_latents_as_codes,
)
from training.codebook.watch import CodebookWatch
from training.loop.steps import Stepper, StepResult
from training.runtime.settings import SettingsError
from training.runtime.step_window import StepWindow
from training.runtime.unwrapped import unwrapped

logger = get_logger(__name__)


class Adversaries(Stepper):
    """Tokenizer's and discriminator's step on one batch.

    The discriminator is frozen, and called without its DistributedDataParallel wrapper, while the
    tokenizer's gradients are made: its own then hold nothing of the tokenizer's loss. (In the original
    the generator's backward pass leaks into them.)

    The first `autoencoder_steps`, or fewer with end_phase_early, train without quantizer and commitment loss.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.model, self.discriminator = self.modules["generator"], self.modules["discriminator"]
        self._check_start()
        quantizer = unwrapped(self.accelerator, self.model).quantizer
        self.watch = CodebookWatch(quantizer, self.recipe.model.config, self.accelerator)
        self.rank_states = {"codes": self.watch.counter}
        self._penalties = CodebookPenalties(quantizer, self.settings, self.total_steps)
        self._phase_end: PhaseEnd | None = None
        if self.settings.end_phase_early:
            config = self.recipe.model.config
            longest = self.settings.autoencoder_steps
            self._phase_end = PhaseEnd(
                config.code_bits, config.codebook_dim, longest, self.accelerator
            )
            self.rank_states["phase_end"] = self._phase_end
        self._replacement: CodeReplacement | None = None
        if every := self.settings.replace_unused_every:
            both = [quantizer, self.average.quantizer]
            optimizer = self.optimizers["generator"]
            self._replacement = CodeReplacement(both, optimizer, every, self.accelerator)
            self.rank_states["unused"] = self._replacement.counter
        self._ended_at: int | None = None  # the step with which end_phase_early ended the phase
        self._codes_matched = False
        self._sample: LatentSample | None = None
        if self.settings.codes_from_latents and self._can_draw_codes(quantizer):
            config, processes = self.recipe.model.config, self.accelerator.num_processes
            count = -(-config.codebook_size // processes)
            self._sample = LatentSample(count, config.codebook_dim, self.accelerator.device)
            self._sampled = StepWindow(self._sample.add)
            self.rank_states["latents"] = self._sample

    def _check_start(self) -> None:
        beginning, settings = self.recipe.beginning, self.settings
        if settings.encoder_steps is not None and beginning.train != "all":
            raise SettingsError(
                f"encoder_steps={settings.encoder_steps} freezes the encoder for the rest of a run that trains "
                f"all parts, and this one has train={beginning.train}: leave encoder_steps out"
            )
        if beginning.init_from is not None and settings.autoencoder_steps:
            if not settings.codes_from_latents or beginning.train != "all":
                raise SettingsError(
                    "autoencoder_steps: after a phase without quantization the codes are set anew, and those "
                    "of init_from would be lost: set autoencoder_steps=0 and codes_from_latents=false (or, to "
                    "have new codes, codes_from_latents=true with train=all)"
                )
            logger.warning(
                f"init_from: its codes end with step {settings.autoencoder_steps}, when new ones are drawn "
                "from the latents; to keep them set autoencoder_steps=0 and codes_from_latents=false"
            )
        adapts = getattr(self.recipe.loss, "adversarial_weight", 0) is None
        if adapts and beginning.train in ("encoder", "quantizer"):
            raise SettingsError(
                "adversarial_weight: null compares gradients at the decoder's last layer, which "
                f"train={beginning.train} leaves as it is: set a number, such as 0.1"
            )

    @property
    def _first_quantized(self) -> int:
        return self.settings.autoencoder_steps if self._ended_at is None else self._ended_at

    def _can_draw_codes(self, quantizer: nn.Module) -> bool:
        can = takes_latents_as_codes(quantizer)
        if not can:
            logger.warning(
                "codes_from_latents: only simvq with one linear layer and a C as wide as the latents can have "
                "these as its codes: this quantizer starts with their mean and covariance if it can, as with "
                "codes_from_latents=false"
            )
        return can

    def state_dict(self) -> dict:
        adviser = self.watch.adviser.state_dict()
        return super().state_dict() | {
            "codes_matched": self._codes_matched,
            "adviser": adviser,
            # None while a resume may set another length.
            "first_quantized": self._ended_at,
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._codes_matched = state["codes_matched"]
        if self._phase_end is not None:
            self._ended_at = state.get("first_quantized")
        self.watch.adviser.load_state_dict(state.get("adviser", {}))  # older checkpoints have none

    def step(self, batch: dict[str, Tensor], step: int) -> StepResult:
        accelerator, recipe = self.accelerator, self.recipe
        inputs, quantize = recipe.inputs(batch), step >= self._first_quantized
        self._steps = step + 1
        if step == self._first_quantized > 0 and not self._codes_matched:
            self._match_codes(inputs)
        plain_discriminator = unwrapped(accelerator, self.discriminator)
        plain_discriminator.requires_grad_(False)
        output = self.model(inputs, quantize=quantize)
        # Without quantization the quantizer's loss counts nothing. It is left out rather than multiplied by
        # zero, because that of latents without bounds may be infinite.
        commitment_loss = output.commitment_loss
        if not quantize:
            quantizer = unwrapped(accelerator, self.model).quantizer
            commitment_loss = _no_loss(quantizer, commitment_loss)
        reconstruction = recipe.reconstruction(output)
        with accelerator.autocast():
            total, terms = recipe.loss.generator(
                inputs,
                reconstruction,
                commitment_loss,
                plain_discriminator,
                step,
                last_layer=recipe.last_layer(unwrapped(accelerator, self.model)),
            )
        codes, latents = recipe.codes(output), output.latents.detach()
        if quantize:
            total = self._penalties.add(total, terms, latents, codes, step)
        figures = {f"generator/{name}": value for name, value in terms.items()}
        self._backward(total)
        due, updates = accelerator.sync_gradients, []
        if due:
            self._freeze_encoder(step)
            updates.append(self._due("generator", self.model, figures))
        if judged := step >= recipe.loss.discriminator_start:
            terms = self._judge(inputs, reconstruction.detach(), plain_discriminator, step)
            if due:
                updates.append(self._due("discriminator", self.discriminator, terms))
        # Both at the end of the step, which then waits for the device once. Neither depends on the other's, but
        # where the tokenizer does not move the discriminator does not either.
        bad = self._apply(updates, step) if due else None
        if judged and bad != 0:
            recipe.discriminator_trained = True
            figures |= terms
        skipped = bad is not None
        self.watch.note(codes, latents)
        if self._sample is not None and not quantize:
            self._sampled.note(latents)
        if self._phase_end is not None and not quantize:
            self._phase_end.note(inputs, latents)
        if self._replacement is not None and quantize:
            self._replacement.note(codes, latents)
        return StepResult(figures, int(skipped))

    def _freeze_encoder(self, step: int) -> None:
        """Drop the encoder's gradients once encoder_steps have passed: the optimiser leaves it as it is."""
        if self.settings.encoder_steps is not None and step >= self.settings.encoder_steps:
            encoder = unwrapped(self.accelerator, self.model).encoder
            for parameter in encoder.parameters():
                parameter.grad = None

    def settle(self, skipped: bool) -> None:
        super().settle(skipped)
        self.watch.settle(skipped)
        if self._sample is not None:
            self._sampled.settle(skipped)
        if self._replacement is not None:
            self._replacement.settle(skipped, self._steps)
        if self._phase_end is not None:
            self._phase_end.settle(skipped)
            in_phase = self._steps < self._first_quantized
            if in_phase and self._phase_end.due(self._steps, self._loss_of):
                self._ended_at = self._steps
                logger.info(f"step {self._steps}: quantization begins, as end_phase_early has it")

    def _loss_of(self, inputs: Tensor, latents: Tensor) -> Tensor:
        """Return the loss of inputs, without adversary, when these latents are decoded."""
        model = unwrapped(self.accelerator, self.model)
        with self.accelerator.autocast():
            decoded = model.decode(quantized_latents=latents)
            decoded = self.recipe.reconstruction(decoded)[..., : inputs.shape[-1]]
            none = decoded.new_zeros(())
            return self.recipe.loss.generator(inputs, decoded, none, self.discriminator, -1)[0]

    def report(self, step: int) -> tuple[dict[str, float], str]:
        begun = max(self._first_quantized, self.settings.warmup_steps)
        return self.watch.report(step, advise=step > begun)

    @torch.no_grad()
    def _match_codes(self, inputs: Tensor) -> None:
        """End of the autoencoder phase: the codes start where the latents are."""
        model = unwrapped(self.accelerator, self.model)
        quantizers = [model.quantizer, self.average.quantizer]
        if self._sample is None:
            latents = model(inputs, quantize=False).latents
            match_codes_to_latents(quantizers, latents, self.accelerator)
        else:
            codebook_size = self.recipe.model.config.codebook_size
            put_codes_on(quantizers, self._sample.draw(codebook_size, self.accelerator))
            shared = self.recipe.model.config.share_basis  # then only the first has a C to set
            if isinstance(quantizers[0], ResidualQuantizer) or shared:
                latents = model(inputs, quantize=False).latents
                match_codes_to_latents(quantizers, latents, self.accelerator, first=1)
        self._codes_matched = True

    def _judge(
        self, inputs: Tensor, reconstruction: Tensor, plain_discriminator: nn.Module, step: int
    ) -> dict[str, Tensor]:
        """The discriminator's turn: its gradients, and its figures."""
        plain_discriminator.requires_grad_(True)
        with self.accelerator.autocast():
            total, terms = self.recipe.loss.discriminator(
                inputs, reconstruction, self.discriminator, step
            )
        self._backward(total)
        return {f"discriminator/{name}": value for name, value in terms.items()}


def _no_loss(quantizer: nn.Module, like: Tensor) -> Tensor:
    """Zero, with a gradient of zero for all that is trained in a quantizer.

    DistributedDataParallel waits for the gradient of every parameter. What of a quantizer its own loss reaches
    differs: not the last layer of fc and lfq, and nothing of fsq, which has no loss.

    Args:
        like: scalar of the type and on the device that is wanted.
    """
    trained = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    # Sums over no entries: no weight that is not finite gets into them.
    zeros = (parameter.flatten()[:0].sum() for parameter in trained)
    return sum(zeros, torch.zeros_like(like, requires_grad=False))
