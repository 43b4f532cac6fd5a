"""SSIM of images."""

from training.metrics import bases
from training.metrics.images import image_figures


class Ssim(bases.PictureMetric):
    """SSIM: a mean over images, 7 x 7 uniform window per channel, data range 1, as scikit-image has it."""

    def prepare(self):
        """See PictureMetric."""
        return lambda original, decoded: float(image_figures(original, decoded)["ssim"])
