"""Drift loss of NSVQ (arXiv 2602.18896, 2606.11363): codes that nobody picks follow the latents too."""

import torch
from torch import Tensor, nn

from modeling_simvq import SimVQ
from modeling_simvq.index_backpropagation import IndexBackpropagation
from modeling_simvq.quantization_baselines import CodebookQuantizer
from modeling_simvq.straight_through import to_rows
from training.runtime.settings import SettingsError

# Latents whose weights for all codes exist at a time.
BLOCK = 128
# The kernel's temperature, on squared distances, falls from the first to the last over a run.
FIRST_TEMPERATURE, LAST_TEMPERATURE = 10.0, 1e-3


class DriftLoss:
    """The loss of a quantizer's codes, beside the quantizer's own; its temperature falls over a run.

    Args:
        weight: of a code that is not picked, where all are as near.
        steps: of the run.

    Raises:
        SettingsError: if the codes are not trained, or are not vectors of the latents' width.
    """

    def __init__(self, quantizer: nn.Module, weight: float, steps: int):
        self.quantizer, self.weight, self.steps = quantizer, weight, max(1, steps)
        if trained_codes(quantizer) is None:
            raise SettingsError(
                "drift_weight: it takes a quantizer whose codes are trained as they are: simvq, vq, diveq or "
                "ibq, and one of them"
            )

    def __call__(self, latents: Tensor, codes: Tensor, step: int) -> Tensor:
        """Return the loss, a scalar with gradient.

        Args:
            latents: (B, d, *spatial) that were quantized.
            codes: (B, *spatial) that were picked.
        """
        progress = min(1.0, step / self.steps)
        temperature = FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** progress
        with torch.autocast(latents.device.type, enabled=False):
            rows = to_rows(latents.float())
            table = trained_codes(self.quantizer)
            return drift_loss(table, rows, codes.flatten(), self.weight, temperature)


def drift_loss(
    table: Tensor, rows: Tensor, codes: Tensor, weight: float, temperature: float
) -> Tensor:
    """Return the weighted squared errors of latents to codes that they did not pick, as a mean over latents.

    A code weighs `weight` times K times the softmax, over the codes, of the negative squared distance over the
    temperature; at most 1, which is what the picked code weighs in the quantizer's own loss. Neither weights
    nor latents have a gradient, so the sum is one of K x d numbers: a matrix of latents x codes exists for
    BLOCK latents only.

    Args:
        table: codes (K, d).
        rows: latents (N, d).
        codes: (N,) that were picked.

    Returns:
        A scalar, with gradient for the codes.
    """
    size, width = table.shape
    with torch.no_grad():
        weights, sums = table.new_zeros(size), torch.zeros_like(table)
        constant = table.new_zeros(())
        squares = table.square().sum(dim=1)
        for block, picked in zip(rows.split(BLOCK), codes.split(BLOCK), strict=True):
            # Without the latent's own square, which a softmax does not see.
            nearness = (2 * block @ table.T - squares) / temperature
            some = (weight * size * nearness.softmax(dim=1)).clamp_(max=1.0)
            some.scatter_(1, picked[:, None], 0.0)
            weights += some.sum(dim=0)
            sums += some.T @ block
            constant += some.sum(dim=1) @ block.square().sum(dim=1)
    total = (weights * table.square().sum(dim=1)).sum() - 2 * (sums * table).sum() + constant
    return total / (len(rows) * width)


def check_trained(setting: str, value: float, quantizer: nn.Module) -> None:
    """Refuse a setting that moves codes, in a run that leaves them as they are.

    Raises:
        SettingsError: naming the setting and its value.
    """
    if not any(parameter.requires_grad for parameter in quantizer.parameters()):
        raise SettingsError(
            f"{setting}={value:g} moves codes that this run does not train: set it to 0, or train=all or "
            "train=quantizer"
        )


def trained_codes(quantizer: nn.Module) -> Tensor | None:
    """Return the codes (K, d) of a quantizer with their gradient; None if they are not trained as they are."""
    if isinstance(quantizer, SimVQ) and not isinstance(quantizer.projection, nn.Identity):
        return quantizer._project(quantizer._rows())
    table = trained_table(quantizer)
    return None if table is None else table.view(-1, quantizer.codebook_dim)


def trained_table(quantizer: nn.Module) -> nn.Parameter | None:
    """Return the parameter that holds the codes as they are, (K, d) or (1, K, d); None if there is none."""
    if isinstance(quantizer, SimVQ):
        plain = isinstance(quantizer.projection, nn.Identity) and quantizer.train_basis
        return quantizer.basis if plain else None
    if isinstance(quantizer, IndexBackpropagation):
        return quantizer.table
    if isinstance(quantizer, CodebookQuantizer) and not quantizer.unit_length:
        table = quantizer.inner._codebook.embed
        whole = table.shape[-1] == quantizer.codebook_dim
        return table if whole and isinstance(table, nn.Parameter) else None
    return None
