"""PSNR of pictures."""

from training.image_recipe import picture_figures
from training.metrics import bases


class Psnr(bases.PictureMetric):
    """PSNR in dB: a mean over pictures, 100 for identical ones."""

    def prepare(self):
        """See PictureMetric."""
        return lambda original, decoded: float(picture_figures(original, decoded)["psnr"])
