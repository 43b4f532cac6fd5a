"""Watch over a codebook in training: usage, scale and rank of the latents, and a warning of collapse."""

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn

from training.codebook.advice import CodebookFigures, CollapseAdviser
from training.codebook.usage import CodeCounter, latent_statistics
from training.runtime.step_window import StepWindow

logger = get_logger(__name__)


class CodebookWatch:
    """Figures of a quantizer between two reports.

    Args:
        config: of the tokenizer; its codebook_size is taken.
    """

    def __init__(self, quantizer: nn.Module, config, accelerator: Accelerator):
        self.quantizer, self.accelerator = quantizer, accelerator
        self.counter = CodeCounter(config.codebook_size, accelerator.device, config.num_quantizers)
        self.adviser = CollapseAdviser()
        self._window = StepWindow(self._count)
        self._latents: Tensor | None = None  # of the last batch that counts

    def note(self, codes: Tensor, latents: Tensor) -> None:
        """Take note of a forward pass; it counts when its step is settled."""
        self._window.note((codes, latents))

    def settle(self, skipped: bool) -> None:
        """End a step: count its codes and keep its last latents, unless it was skipped."""
        self._window.settle(skipped)

    def _count(self, told: tuple[Tensor, Tensor]) -> None:
        codes, self._latents = told
        self.counter.update(codes)

    def report(self, step: int, advise: bool) -> tuple[dict[str, float], str]:
        """Figures over all ranks since the last report, and a word on them; few codes in use are warned of.

        Args:
            advise: False while unused codes are no fault: the quantizer takes no part, or has hardly begun.
        """
        if self._latents is None:
            return {}, "every step was skipped"
        usage = self.counter.read(self.accelerator)
        latents = latent_statistics(self._latents, self.quantizer.codebook())
        if advise:
            figures = CodebookFigures(usage, *latents.values(), self.quantizer.codebook_dim)
            if advice := self.adviser.advise(figures):
                logger.warning(f"step {step}: {advice}")
        else:
            self.adviser.rest()
        self.counter.reset()
        figures = {f"codebook/{name}": value for name, value in (usage.metrics() | latents).items()}
        return figures, str(usage)
