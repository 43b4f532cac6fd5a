"""FID of reconstructions."""

import torch
from torch.nn import Identity
from torchmetrics.image.fid import FrechetInceptionDistance

from training.metrics import bases
from training.metrics.images import to_bytes
from training.metrics.inception import load_inception
from training.runtime.float64 import float64_device, to_float64


class Rfid(bases.ImageMetric):
    """rFID: Frechet distance of Inception's features (2015-12-05, 2048) of reconstructions and their originals.

    Not gFID, which compares generated images with a dataset.
    """

    @torch.no_grad()
    def _compute(self, predictions, references) -> dict[str, float]:
        if len(predictions) < 2:
            raise ValueError(f"rFID needs at least two images, got {len(predictions)}")
        device = bases.default_device()
        network = load_inception().to(device)
        features = Identity()
        features.num_features = 2048
        distance = FrechetInceptionDistance(feature=features).to(float64_device(device))
        for pictures, real in ((references, True), (predictions, False)):
            for picture in pictures:
                found = network(to_bytes(bases.pixels(picture)).to(device))
                distance.update(to_float64(found), real=real)
        return {"rfid": float(distance.compute())}
