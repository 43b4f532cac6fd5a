"""Give the codes the mean and the covariance of the latents, when quantization begins after a first phase."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from modeling_simvq import SimVQ


@torch.no_grad()
def match_codes_to_latents(
    quantizers: list[SimVQ], latents: Tensor, accelerator: Accelerator
) -> None:
    """Set W and b so that W c + b is distributed as the latents are, to second order.

    C is N(0, 1/d), so W is sqrt(d) times a Cholesky factor of the latents' covariance, and b their mean.
    An autoencoder that was trained without quantization has latents of any scale and orientation; codes far
    from them would all but a few stay unused at first.

    Args:
        quantizers: all are set to the same W and b (the trained model's and the average's).
        latents: (B, d, *spatial) of this process; moments are taken over all processes.
    """
    rows = latents.double().movedim(1, -1).reshape(-1, latents.shape[1])
    moments = torch.cat([rows.mean(dim=0, keepdim=True), rows.T @ rows / len(rows)])
    mean, *second = accelerator.reduce(moments, reduction="mean")
    covariance = torch.stack(second) - torch.outer(mean, mean)
    width = len(mean)
    # Directions that the latents do not use get a thousandth of the mean spread, so that W has full rank.
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean().clamp(min=1e-12))
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not factor.isfinite().all():
        return  # latents that are not finite: the guard of the steps reports them
    for quantizer in quantizers:
        quantizer.projection.weight.copy_(factor * math.sqrt(width))
        quantizer.projection.bias.copy_(mean)
