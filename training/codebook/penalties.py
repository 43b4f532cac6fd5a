"""Losses of a codebook beside the quantizer's own: those that the settings ask for."""

from torch import Tensor, nn

from modeling_simvq.several_quantizers import levels_of
from training.codebook.decorrelation import Decorrelation
from training.codebook.drift import DriftLoss, check_trained
from training.codebook.gram import GramPenalty


class CodebookPenalties:
    """Weighted sum of the losses whose weight is not zero.

    Args:
        settings: decorrelation_weight, gram_weight and drift_weight are taken.
        total_steps: of the run.

    Raises:
        SettingsError: if one of them does not suit the quantizer, or this run does not train it.
    """

    def __init__(self, quantizer: nn.Module, settings, total_steps: int):
        levels, self._drift = levels_of(quantizer), None
        self._penalties: dict[str, tuple[float, Decorrelation | GramPenalty]] = {}
        if weight := settings.decorrelation_weight:
            self._penalties["decorrelation"] = (weight, Decorrelation(levels))
        if weight := settings.gram_weight:
            self._penalties["gram"] = (weight, GramPenalty(levels))
        if weight := settings.drift_weight:
            self._drift = DriftLoss(quantizer, weight, total_steps)
        for name in ("decorrelation_weight", "gram_weight", "drift_weight"):
            if weight := getattr(settings, name):
                check_trained(name, weight, quantizer)

    def add(
        self, total: Tensor, terms: dict[str, Tensor], latents: Tensor, codes: Tensor, step: int
    ) -> Tensor:
        """Return a loss with these added; they join its terms, for the log.

        Args:
            latents: (B, d, *spatial) as they were quantized.
            codes: (B, *spatial) that were picked.
        """
        found = {name: (weight, penalty()) for name, (weight, penalty) in self._penalties.items()}
        if self._drift is not None:
            found["drift"] = (1.0, self._drift(latents, codes, step))
        for name, (weight, value) in found.items():
            total = total + weight * value
            terms[name] = value.detach()
        if found:
            terms["total"] = total.detach()
        return total
