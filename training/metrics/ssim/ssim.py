"""SSIM of pictures."""

from training.image_recipe import picture_figures
from training.metrics import bases


class Ssim(bases.PictureMetric):
    """SSIM: a mean over pictures, 7 x 7 uniform window per channel, data range 1, as scikit-image has it."""

    def prepare(self):
        """See PictureMetric."""
        return lambda original, decoded: float(picture_figures(original, decoded)["ssim"])
