"""The training image nearest to each of some images: do samples copy what the generator was trained on?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_simvq import nearest_code
from training.runtime.float64 import float64_device, to_float64

# Images are compared pixel by pixel at this side: finer detail tells noise apart, not images.
PIXEL_SIDE = 32


class NearestPictures:
    """Nearest of a stream of candidates to each query, exactly; memory does not grow with the stream.

    Args:
        queries: (N, d) vectors.
        scale: factor on Euclidean distances.
        kept: of so many queries, the first, the nearest image itself is kept.
    """

    def __init__(self, queries: Tensor, scale: float = 1.0, kept: int = 0):
        self.queries, self.scale, self.kept = queries, scale, kept
        self.nearest = torch.full(
            (len(queries),), torch.inf, dtype=torch.float64, device=float64_device(queries.device)
        )
        self.pictures: Tensor | None = None

    def add(self, candidates: Tensor, pictures: Tensor) -> None:
        """Add candidates (B, d), and what to keep of them: images (B, 3, H, W) uint8."""
        if not len(candidates) or not len(self.queries):
            return
        index = nearest_code(self.queries, candidates)
        # From the difference itself, so that a copy lies at exactly 0.
        difference = to_float64(self.queries) - to_float64(candidates[index])
        distance = torch.linalg.vector_norm(difference, dim=1)
        nearer = distance < self.nearest
        self.nearest = torch.where(nearer, distance, self.nearest)
        shown, index = nearer[: self.kept].to(index.device), index[: self.kept]
        if self.pictures is None:
            self.pictures = pictures.new_zeros(len(shown), *pictures.shape[1:])
        self.pictures[shown] = pictures[index[shown]]

    @property
    def distances(self) -> Tensor:
        """Distances (N,) float64 to the nearest candidate so far; inf before there is one."""
        return self.nearest * self.scale


def pixel_vectors(pictures: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 to vectors (B, d): averaged to at most PIXEL_SIDE x PIXEL_SIDE."""
    sides = [min(PIXEL_SIDE, side) for side in pictures.shape[-2:]]
    return F.adaptive_avg_pool2d(pictures.float(), sides).flatten(1)


def share_nearer(samples: Tensor, held_out: Tensor) -> float:
    """Share of the samples that lie nearer to the training set than 95 % of held-out real images do.

    About 0.05 for new images of the same kind; a copying generator comes near 1.

    Args:
        samples, held_out: distances (N,) to the nearest training image.
    """
    return float((samples < torch.quantile(held_out, 0.05)).double().mean())


def neighbour_metrics(
    samples: dict[str, NearestPictures], held_out: dict[str, NearestPictures] | None
) -> dict[str, float]:
    """Median distances by space, of samples and of held-out images where there are any, and share_nearer."""
    metrics = {}
    for space, search in samples.items():
        metrics[f"nearest_{space}"] = float(search.distances.median())
        if held_out is not None:
            yardstick = held_out[space].distances
            metrics[f"nearest_{space}_held_out"] = float(yardstick.median())
            metrics[f"nearer_{space}"] = share_nearer(search.distances, yardstick)
    return metrics
