"""PSNR of images."""

from training.metrics import bases
from training.metrics.images import image_figures


class Psnr(bases.PictureMetric):
    """PSNR in dB: a mean over images, 100 for identical ones."""

    def prepare(self):
        """See PictureMetric."""
        return lambda original, decoded: float(image_figures(original, decoded)["psnr"])
