"""Penalty on correlated dimensions of a codebook, a remedy for one that spans few of them. From W alone."""

import torch
from torch import Tensor, nn

from modeling_simvq import SimVQ
from training.runtime.settings import SettingsError


class Decorrelation:
    """Mean square by which the correlations of a codebook's dimensions differ from none.

    The codes W c + b of a frozen basis C have the covariance W S W^T, S that of C: d x d numbers and O(d^3)
    work a step, where the codebook itself has K x d. It is the covariance form of DimVQ's regularisation
    ("Unveiling and Addressing Dimensional Collapse in Vector Quantization Models via Codebook Regularization",
    ICML 2026): codes standardised in each dimension, the mean of (correlation - identity) squared over all
    d x d entries.

    Args:
        quantizers: each a SimVQ with one linear layer.

    Raises:
        SettingsError: if one is something else, or its basis is trained.
    """

    def __init__(self, quantizers: list[nn.Module]):
        for quantizer in quantizers:
            linear = isinstance(getattr(quantizer, "projection", None), nn.Linear)
            if not isinstance(quantizer, SimVQ) or not linear or quantizer.train_basis:
                raise SettingsError(
                    "decorrelation_weight: it takes the quantizer simvq, of a frozen basis and one linear layer"
                )
        self.quantizers = quantizers
        self._covariances: list[tuple[tuple, Tensor] | None] = [None] * len(quantizers)

    def __call__(self) -> Tensor:
        """Return the penalty, a scalar with gradient, the mean over the quantizers."""
        penalties = [self._of(index) for index in range(len(self.quantizers))]
        return torch.stack(penalties).mean()

    def _of(self, index: int) -> Tensor:
        weight = self.quantizers[index].projection.weight
        with torch.autocast(weight.device.type, enabled=False):
            covariance = weight @ self._covariance(index) @ weight.T
            spread = covariance.diagonal().clamp(min=1e-12).rsqrt()
            correlation = covariance * spread[:, None] * spread
            return (correlation - torch.eye(len(weight), device=weight.device)).square().mean()

    @torch.no_grad()
    def _covariance(self, index: int) -> Tensor:
        """Covariance (m, m) of C, again only when C has changed: codes_from_latents draws it once."""
        basis = self.quantizers[index].basis
        key = (basis.data_ptr(), basis._version, basis.device)
        kept = self._covariances[index]
        if kept is None or kept[0] != key:
            kept = self._covariances[index] = (
                key,
                torch.cov(basis.T, correction=0).view(basis.shape[1], basis.shape[1]),
            )
        return kept[1]
