"""DimVQ's own penalty: the Gram matrix of the codes as directions. It takes the whole codebook, O(K d^2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.codebook.drift import trained_codes
from training.runtime.settings import SettingsError


class GramPenalty:
    """Mean square of the entries off the diagonal of G = U^T U; row k of U (K, d) is code k at length one.

    G is a sum over codes, as published, so the penalty grows with K^2; the published weight is 0.001.

    Args:
        quantizers: each with codes that are trained.

    Raises:
        SettingsError: if one has none.
    """

    def __init__(self, quantizers: list[nn.Module]):
        if any(trained_codes(quantizer) is None for quantizer in quantizers):
            raise SettingsError(
                "gram_weight: it takes a quantizer whose codes are trained as they are: simvq, vq, diveq or ibq"
            )
        self.quantizers = quantizers

    def __call__(self) -> Tensor:
        """Return the penalty, a scalar with gradient, the mean over the quantizers."""
        return torch.stack([self._of(quantizer) for quantizer in self.quantizers]).mean()

    @staticmethod
    def _of(quantizer: nn.Module) -> Tensor:
        codes = trained_codes(quantizer)
        with torch.autocast(codes.device.type, enabled=False):
            directions = F.normalize(codes.float(), dim=1)
            gram = directions.T @ directions
            width = len(gram)
            off = gram.square().sum() - gram.diagonal().square().sum()
            return off / max(1, width * (width - 1))
