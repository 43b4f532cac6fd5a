"""Singular spectra of W, C and the codebook, and the ranks that follow from them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hub_cards.spectral_rank import spectral_rank

CHUNK_ROWS = 65_536


@dataclass
class Spectrum:
    """Singular values of a matrix.

    Attributes:
        shape: rows and columns.
        values: (min(shape),) float64, descending, over the largest; zeros if the matrix is zero.
    """

    shape: tuple[int, int]
    values: Tensor

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the values, scaled to sum to one."""
        return spectral_rank(self.values)

    @property
    def numerical_rank(self) -> int:
        """Return the rank as torch.linalg.matrix_rank does for float32."""
        return int((self.values > max(self.shape) * torch.finfo(torch.float32).eps).sum())

    @property
    def variance_rank(self) -> int:
        """Dimensions that hold 90 % of the sum of squares."""
        sums = self.values.square().cumsum(dim=0)
        return int((sums < 0.9 * sums[-1]).sum()) + 1 if sums[-1] > 0 else 0


@torch.no_grad()
def spectrum(rows: Tensor, centred: bool = True) -> Spectrum:
    """Singular values of rows (N, d), about their mean if `centred`.

    Raises:
        ValueError: if a value is not finite.
    """
    rows = rows.detach().cpu()
    if not rows.isfinite().all():
        raise ValueError("the codebook or a latent holds NaN or infinity: the training diverged")
    mean = sum(some.double().sum(dim=0) for some in rows.split(CHUNK_ROWS)) / len(rows)
    # The square roots of the covariance's eigenvalues: d x d, where the SVD would be N x d. In float64 they
    # are right to 1e-8 of the largest, below what float32 can tell from zero.
    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for some in rows.split(CHUNK_ROWS):
        some = some.double() - mean if centred else some.double()
        covariance += some.T @ some
    values = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt().flip(0)[: min(rows.shape)]
    return Spectrum(tuple(rows.shape), values / values[0] if values[0] > 0 else values)


def spectra(quantizer: nn.Module, most_rows: int | None = None) -> dict[str, Spectrum]:
    """Spectra of W (as it is) and of C and the codebook (vectors about their mean), of those there are.

    Args:
        quantizer: SimVQ, or one of modeling_simvq/quantization_baselines.py.
        most_rows: codes beyond this are left out, evenly, to bound the cost.
    """
    found, projection = {}, getattr(quantizer, "projection", None)
    if isinstance(projection, nn.Linear):
        found["W"] = spectrum(projection.weight, centred=False)
    if projection is not None and not isinstance(projection, nn.Identity):
        found["C"] = spectrum(_thinned(quantizer.basis, most_rows))
    return found | {"codebook": spectrum(_thinned(quantizer.codebook(), most_rows))}


def _thinned(rows: Tensor, most_rows: int | None) -> Tensor:
    return rows if most_rows is None else rows[:: max(1, len(rows) // most_rows)]


def ranks_of(found: dict[str, Spectrum]) -> dict[str, float]:
    """Scalars for trackers: rank_w, rank_codebook (effective), numerical_rank_w; W's only if there is one."""
    ranks = {"rank_codebook": found["codebook"].effective_rank}
    if "W" in found:
        ranks |= {"rank_w": found["W"].effective_rank}
        ranks |= {"numerical_rank_w": found["W"].numerical_rank}
    return ranks


def rounded_values(found: dict[str, Spectrum]) -> dict[str, list[float]]:
    """Singular values of W and of the codebook over the largest, as they go into figures.jsonl."""
    return {
        f"spectrum_{name.lower()}": [float(f"{value:.4g}") for value in spectrum.values]
        for name, spectrum in found.items()
        if name in ("W", "codebook")
    }
