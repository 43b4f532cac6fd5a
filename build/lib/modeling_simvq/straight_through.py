"""Gradients past the choice of a code, and the two layouts of latents: (B, d, *spatial) and rows (N, d)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# From this size on, torch copies one transposed matrix on the CPU block by block, a batch of them element by
# element.
BLOCKED_COPY = 60 * 60


def straight_through(
    latents: Tensor, z: Tensor, q: Tensor, commitment_cost: float
) -> tuple[Tensor, Tensor]:
    """Put the codes' vectors in the place of the latents, and compute the commitment loss.

    ``z + sg(q - z)`` and ``beta * mse(z, sg(q)) + mse(q, sg(z))`` in one: written out, they would pass over the
    latents eight times and change their layout four times. The value is q to the last bit, so that decoding
    the codes gives the same image.

    Args:
        latents: (B, d, *spatial), whose gradient is that of the result, and of the loss.
        z: the latents as rows, (N, d), without gradient. Overwritten.
        q: the vectors of their codes, (N, d).
        commitment_cost: beta.

    Returns:
        q as (B, d, *spatial), and the loss ().
    """
    return _StraightThrough.apply(latents, z, q, commitment_cost)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, latents: Tensor, z: Tensor, q: Tensor, commitment_cost: float
    ) -> tuple[Tensor, Tensor]:
        quantized = to_channels_first(q, latents.shape)
        rows = z.sub_(q)
        # The difference in both layouts: another copy costs less time than a change of layout in backward.
        difference = latents - quantized if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(rows, difference)
        ctx.commitment_cost = commitment_cost
        ctx.set_materialize_grads(False)
        mean_square = torch.linalg.vector_norm(rows).square() / max(z.numel(), 1)
        return quantized, (1 + commitment_cost) * mean_square

    @staticmethod
    def backward(ctx, grad_quantized: Tensor | None, grad_loss: Tensor | None) -> tuple:
        if grad_loss is None:
            return grad_quantized, None, None, None
        rows, difference = ctx.saved_tensors
        scale = grad_loss * (2 / max(rows.numel(), 1))
        grad_latents = grad_q = None
        if ctx.needs_input_grad[0]:
            to_encoder = scale * ctx.commitment_cost
            if grad_quantized is None:
                grad_latents = difference * to_encoder
            else:
                # addcmul would be slow with the expanded gradient of a sum.
                grad_latents = (difference * to_encoder).add_(grad_quantized)
        if ctx.needs_input_grad[2]:
            grad_q = rows * -scale
        return grad_latents, None, grad_q, None


def rotate(z: Tensor, q: Tensor) -> Tensor:
    """Return q with the gradient of the rotation and scaling from z to q (arXiv 2410.06424, section 4.2).

    Args:
        z, q: (B, d, *spatial).
    """
    with torch.no_grad():
        z_length, q_length = (x.norm(dim=1, keepdim=True).clamp(min=1e-6) for x in (z, q))
        z_unit, q_unit = z / z_length, q / q_length
        middle = F.normalize(z_unit + q_unit, dim=1, eps=1e-6)
    along_middle = (z * middle).sum(dim=1, keepdim=True) * middle
    along_z = (z * z_unit).sum(dim=1, keepdim=True) * q_unit
    rotated = (z - 2 * along_middle + 2 * along_z) * (q_length / z_length)
    return with_gradient_of(rotated, q)


def with_gradient_of(source: Tensor, value: Tensor) -> Tensor:
    """Return `value` to the last bit, with the gradient of `source`, a tensor of the same shape."""
    return value.detach() + (source - source.detach())


def to_rows(latents: Tensor) -> Tensor:
    """Return a copy of (B, d, *spatial) as rows (N, d), without gradient."""
    batch, width, *spatial = latents.shape
    latents = latents.detach().reshape(batch, width, math.prod(spatial))
    return _swapped(latents).flatten(0, 1)


def to_channels_first(rows: Tensor, shape: torch.Size) -> Tensor:
    """Return a copy of rows (N, d) as (B, d, *spatial), without gradient.

    Contiguous here and in lookup: convolutions round differently in different memory layouts.
    """
    return _swapped(rows.view(shape[0], math.prod(shape[2:]), shape[1])).view(shape)


def _swapped(matrices: Tensor) -> Tensor:
    """Return a contiguous copy of (B, n, m) as (B, m, n)."""
    batch, height, width = matrices.shape
    swapped = matrices.new_empty(batch, width, height)
    # Asked first: an exported graph would hold for one side of the comparison only.
    plain = not torch.compiler.is_compiling() and matrices.device.type == "cpu"
    if plain and height * width >= BLOCKED_COPY:
        for matrix, copy in zip(matrices, swapped, strict=True):
            copy.copy_(matrix.T)
        return swapped
    return swapped.copy_(matrices.mT)
