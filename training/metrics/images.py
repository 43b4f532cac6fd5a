"""Metrics of reconstructed images: L1, PSNR, SSIM."""

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor


def to_bytes(pixels: Tensor) -> Tensor:
    """Round images in [-1, 1] to uint8."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_figures(pixels: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    """Return L1, PSNR and SSIM of every image, each (B,).

    PSNR and SSIM are of 8-bit images with data range 1; SSIM with skimage's 7 x 7 uniform window, as in
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
    pairs = zip(original.cpu().numpy(), decoded.cpu().numpy(), strict=True)
    ssim = [structural_similarity(a, b, channel_axis=0, data_range=1.0) for a, b in pairs]
    ssim = torch.tensor(np.array(ssim), dtype=torch.float32, device=pixels.device)
    return {"l1": l1, "psnr": psnr, "ssim": ssim}
