"""LPIPS of images."""

from training.losses.perceptual import load_lpips
from training.metrics import bases


class Lpips(bases.PictureMetric):
    """LPIPS of the lpips package: a mean over images. net: "alex" or "vgg"."""

    def prepare(self, net: str = "alex"):
        """See PictureMetric."""
        device = bases.default_device()
        network = load_lpips(net).to(device)
        return lambda original, decoded: float(network(decoded.to(device), original.to(device)))
