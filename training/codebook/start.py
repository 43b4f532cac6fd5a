"""Give the codes the mean and the covariance of the latents, when quantization begins."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from modeling_simvq import SimVQ
from training.runtime.float64 import to_float64


@torch.no_grad()
def match_codes_to_latents(
    quantizers: list[nn.Module], latents: Tensor, accelerator: Accelerator
) -> None:
    """Set W and b so that W c + b is distributed as the latents are, to second order.

    C is N(0, 1/m), so W is sqrt(m) times a Cholesky factor of the latents' covariance, and b their mean. With
    features in the place of C it is their own covariance that is taken out. Quantizers that have no such W
    stay as they are.
    An autoencoder that was trained without quantization has latents of any scale and orientation; codes far
    from them would all but a few stay unused at first.

    Args:
        quantizers: all are set to the same W and b (the trained model's and the average's).
        latents: (B, d, *spatial) of this process; moments are taken over all processes.
    """
    quantizers = [q for q in quantizers if isinstance(q, SimVQ) and _has_matrix(q)]
    rows = to_float64(latents).movedim(1, -1).reshape(-1, latents.shape[1])
    moments = torch.cat([rows.mean(dim=0, keepdim=True), rows.T @ rows / len(rows)])
    mean, *second = accelerator.reduce(moments, reduction="mean")
    covariance = torch.stack(second) - torch.outer(mean, mean)
    # Directions that the latents do not use get a thousandth of the mean spread, so that W has full rank.
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean().clamp(min=1e-12))
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not factor.isfinite().all():
        return  # latents that are not finite: the guard of the steps reports them
    for quantizer in quantizers:
        _spread(quantizer, factor, mean)


@torch.no_grad()
def whiten_codes(quantizer: nn.Module) -> None:
    """Set W and b so that the codes have mean zero and the identity as covariance, as whitened latents have.

    A quantizer that has no such W stays as it is.
    """
    if isinstance(quantizer, SimVQ) and _has_matrix(quantizer):
        identity = torch.eye(quantizer.codebook_dim, dtype=to_float64(quantizer.basis[:0]).dtype)
        _spread(quantizer, identity, identity.new_zeros(quantizer.codebook_dim))


def _has_matrix(quantizer: nn.Module) -> bool:
    linear = isinstance(quantizer.projection, nn.Linear)
    return linear and quantizer.basis.shape[1] >= quantizer.codebook_dim


def _spread(quantizer: SimVQ, factor: Tensor, mean: Tensor) -> None:
    """Set W and b so that the codes have this mean (d,) and the covariance factor factor^T, (d, d)."""
    given = quantizer.basis_init == "given"
    whitening, centre = _whitening(quantizer.basis, len(mean), given)
    weight = factor @ whitening
    quantizer.projection.weight.copy_(weight)
    quantizer.projection.bias.copy_(mean - weight @ centre)


def _whitening(basis: Tensor, width: int, given: bool) -> tuple[Tensor, Tensor]:
    """A matrix (width, m) that makes a row `width` uncorrelated numbers of variance one; and the rows' mean."""
    rows = to_float64(basis)
    if not given:
        identity = torch.eye(width, rows.shape[1], dtype=rows.dtype, device=rows.device)
        return identity * math.sqrt(rows.shape[1]), torch.zeros_like(rows[0])
    centre = rows.mean(dim=0)
    values, vectors = torch.linalg.eigh((rows - centre).T @ (rows - centre) / len(rows))
    values = values[-width:].clamp(min=1e-6 * float(values.mean()) + 1e-12)
    return (vectors[:, -width:] / values.sqrt()).T, centre
