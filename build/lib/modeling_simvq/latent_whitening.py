"""Whitening of latents before they are quantized: no direction of them is too faint for the codes to see."""

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from .float32_module import Float32Module

# Of the mean variance; added to every direction, so that the faintest is amplified by 30 and not without bound.
RIDGE = 1e-3


class Whitening(Float32Module):
    """Affine map that gives latents mean zero and the identity as covariance (arXiv 1806.00420, section 3.1).

    Not in the paper. A small encoder begins with the loudest direction of its data (the level of speech, the
    brightness of images) and keeps to it: its latents vary along two to four directions, and most codes, which
    fill all of them, are never the nearest. Whitened latents cannot collapse in that way, and codes that begin
    as N(0, I) begin where the latents are.

    Training takes the moments of each batch, of all processes together, with gradients; a batch should hold
    several times as many latents as they have dimensions. Evaluation applies the running mean of training's
    maps: one linear layer.

    Args:
        dim: d, width of the latents.
        momentum: share of the newest batch in the running mean.

    Attributes:
        weight: (d, d), lower triangular, and bias: (d,), the map of evaluation. Float32 buffers, the identity
            before any training.
    """

    def __init__(self, dim: int, momentum: float = 0.05):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("weight", torch.eye(dim, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(dim, dtype=torch.float32))

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map latents.

        Args:
            latents: (B, d, *spatial), any floating-point type.
            mask: (B, *spatial), true for the latents that count for the moments; None if all do.

        Returns:
            Of the shape and type of latents, computed in float32 or better.
        """
        with torch.autocast(device_type=latents.device.type, enabled=False):
            rows = latents.to(torch.promote_types(latents.dtype, torch.float32)).movedim(1, -1)
            weight, bias = self.weight.to(rows.dtype), self.bias.to(rows.dtype)
            if self.training:
                weight, bias = whitening_map(rows.flatten(0, -2) if mask is None else rows[mask])
                self._follow(weight.detach(), bias.detach())
            return F.linear(rows, weight, bias).movedim(-1, 1).contiguous().to(latents.dtype)

    @torch.no_grad()
    def _follow(self, weight: Tensor, bias: Tensor) -> None:
        # Of latents that are not finite nothing stays; where, because asking would wait for a GPU.
        weight, bias = weight.to(self.weight.dtype), bias.to(self.bias.dtype)
        known = weight.isfinite().all() & bias.isfinite().all()
        self.weight.lerp_(torch.where(known, weight, self.weight), self.momentum)
        self.bias.lerp_(torch.where(known, bias, self.bias), self.momentum)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget what training has seen."""
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, momentum={self.momentum}"


def whitening_map(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight (d, d) and bias (d,) that whiten rows (N, d), those of all processes together.

    The weight is the inverse of the Cholesky factor of their covariance. Rows that are not finite make it NaN.
    """
    mean = _over_processes(rows.mean(dim=0))
    centred = rows - mean
    covariance = _over_processes(centred.mT @ centred / len(rows))
    variance = covariance.diagonal().mean()
    identity = torch.eye(len(mean), dtype=rows.dtype, device=rows.device)
    factor, _ = torch.linalg.cholesky_ex(covariance + (RIDGE * variance + 1e-12) * identity)
    weight = torch.linalg.solve_triangular(factor, identity, upper=False)
    return weight, -weight @ mean


class _Sum(torch.autograd.Function):
    """Sum over the processes; the gradient too is that of all of their losses."""

    @staticmethod
    def forward(ctx, moment: Tensor) -> Tensor:
        total = moment.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


def _over_processes(moment: Tensor) -> Tensor:
    """Return the mean of a moment over the processes of a training, which have batches of one size."""
    alone = not (distributed.is_available() and distributed.is_initialized())
    if alone or distributed.get_world_size() == 1:
        return moment
    return _Sum.apply(moment) / distributed.get_world_size()
