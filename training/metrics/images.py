"""Metrics of reconstructed images: L1, PSNR, SSIM."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 7  # of SSIM, in pixels: skimage's


def to_bytes(pixels: Tensor) -> Tensor:
    """Round images in [-1, 1] to uint8."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_figures(pixels: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    """Return L1, PSNR and SSIM of every image, each (B,).

    PSNR and SSIM are of 8-bit images with data range 1; SSIM with a 7 x 7 uniform window, as in
    the paper's evaluation, but per image instead of per batch.

    Args:
        pixels, reconstruction: (B, 3, H, W) in [-1, 1].
    """
    l1 = (pixels - reconstruction).abs().mean(dim=(1, 2, 3))
    original, decoded = (
        ((x.float() + 1) * 127.5).round().clamp(0, 255) / 255 for x in (pixels, reconstruction)
    )
    error = F.mse_loss(decoded, original, reduction="none").mean(dim=(1, 2, 3))
    psnr = -10 * torch.log10(error.clamp(min=1e-10))
    return {"l1": l1, "psnr": psnr, "ssim": structural_similarity(original, decoded)}


def structural_similarity(original: Tensor, decoded: Tensor) -> Tensor:
    """Return the SSIM of every image (Wang et al. 2004), float32 (B,), on the device where the images are.

    The same as skimage's with its defaults and data range 1: a uniform window, sample covariances, the mean
    over channels and over all windows that lie inside the image. Variances are differences of large numbers,
    hence float64.

    Args:
        original, decoded: (B, C, H, W) in [0, 1], of at least 7 x 7 pixels.
    """
    a, b = original.double(), decoded.double()
    products = torch.cat([a, b, a * a, b * b, a * b], dim=1)
    # Rows, then columns: a seventh of the work of the square window for each.
    means = F.avg_pool2d(F.avg_pool2d(products, (WINDOW, 1), stride=1), (1, WINDOW), stride=1)
    mean_a, mean_b, aa, bb, ab = means.chunk(5, dim=1)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    var_a, var_b = sample * (aa - mean_a * mean_a), sample * (bb - mean_b * mean_b)
    covariance = sample * (ab - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return likeness.mean(dim=(1, 2, 3)).float()
