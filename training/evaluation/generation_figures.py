"""Figures of generated images against real ones: gFID, Inception Score, nearest training images, sheets."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.data.images import to_values
from training.evaluation.generated_pictures import Generated
from training.evaluation.report import (
    Findings,
    Fingerprint,
    sample_hashes,
)
from training.evaluation.sheets import ClassGrid, write_neighbours
from training.loop.validation import measured_batches
from training.metrics.images import to_bytes
from training.metrics.inception import (
    frechet_distance,
    inception_score,
)
from training.metrics.neighbours import NearestPictures, neighbour_metrics, pixel_vectors
from training.runtime.float64 import to_float64

# Rows of neighbours.png.
SHOWN = 12


@dataclass
class RealPictures:
    """Real images that generated ones are compared with; loaders are prepared.

    Attributes:
        train: of the generator's training images; None if neither gFID nor neighbours ask for them.
        held_out: of images that it never saw, or None.
        reference: which of the two gFID compares with, "train" or "validation".
    """

    train: DataLoader | None
    held_out: DataLoader | None
    reference: str


@dataclass
class _Taken:
    """Part of a set of images that is kept."""

    count: int = 0
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    features: list[Tensor] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def keep(self, figures: dict[str, Tensor], neighbours: int) -> None:
        """Count a batch; keep the vectors of the first `neighbours` images, and the first SHOWN images."""
        self.fingerprint.add(figures["hash"])
        left = max(0, neighbours - self.count)
        if left:
            self.features.append(figures["features"][:left])
            self.pixels.append(pixel_vectors(figures["pictures"][:left]))
            shown = max(0, SHOWN - self.count)
            self.pictures.append(figures["pictures"][:left][:shown].clone())
        self.count += len(figures["hash"])

    def nearest(self) -> dict[str, NearestPictures]:
        """Return a search for each space."""
        features, pixels = torch.cat(self.features), torch.cat(self.pixels)
        return {
            "feature": NearestPictures(features, kept=SHOWN),
            # Root mean square difference, in grey levels.
            "pixel": NearestPictures(pixels, pixels.shape[1] ** -0.5, kept=SHOWN),
        }


def evaluate(
    generated: Generated,
    real: RealPictures,
    accelerator: Accelerator,
    inception: nn.Module,
    *,
    classifier: nn.Module | None = None,
    neighbours: int = 0,
    folder: Path | None = None,
) -> Findings | None:
    """Measure generated images of all ranks, each counted once.

    Args:
        generated: its loader prepared.
        inception: 8-bit images to features, for gFID and neighbours.
        classifier: 8-bit images to logits, for the Inception Score.
        neighbours: how many images' nearest training images are sought.
        folder: for samples.png and neighbours.png.

    Returns:
        On the main process findings, whose fingerprint is of the reference images; None on the others.

    Raises:
        ValueError: if there are fewer than two readable images of a kind that is needed.
    """
    main = accelerator.is_main_process
    fid = frechet_distance(accelerator.device)

    def passed(loader: DataLoader, pixels, desc: str):
        def measure(batch: dict[str, Tensor]):
            values, labels = pixels(batch)
            pictures = to_bytes(values)
            figures = {"pictures": pictures, "features": inception(pictures), "label": labels}
            figures["hash"] = sample_hashes(pictures).to(pictures.device)
            if classifier is not None and loader is generated.loader:
                figures["logits"] = classifier(pictures)
            return figures, labels  # there are no codes

        for figures, *_ in measured_batches(loader, accelerator, measure, desc):
            if main:
                yield figures

    grid, taken = ClassGrid(generated.names), _Taken()
    for figures in passed(generated.loader, generated.pixels, "generated images"):
        fid.update(to_float64(figures["features"]), real=False)
        grid.add(figures["pictures"], figures["label"])
        if classifier is not None:
            taken.logits.append(figures["logits"].cpu())
        taken.keep(figures, neighbours)

    def plain(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return to_values(batch["pixel_values"]), batch["unreadable"]

    held_out, train = _Taken(), _Taken()
    if real.held_out is not None:
        for figures in passed(real.held_out, plain, "held-out images"):
            held_out.keep(figures, neighbours)
            if real.reference == "validation":
                fid.update(to_float64(figures["features"]), real=True)
    groups = {"sample": taken, "held-out image": held_out}
    groups = {title: group.nearest() for title, group in groups.items() if group.features}
    if real.train is not None:
        for figures in passed(real.train, plain, "training images"):
            train.keep(figures, 0)
            for searches in groups.values():
                searches["feature"].add(figures["features"], figures["pictures"])
                searches["pixel"].add(pixel_vectors(figures["pictures"]), figures["pictures"])
            if real.reference == "train":
                fid.update(to_float64(figures["features"]), real=True)
    reference = train if real.reference == "train" else held_out
    # Every rank has to fail where the main process does.
    counts = torch.tensor([taken.count, reference.count, train.count], device=accelerator.device)
    made, against, trained = accelerator.gather(counts)[:3].tolist()
    for number, kind in ((made, "generated images"), (against, f"{real.reference} images")):
        if number < 2:
            raise ValueError(f"gFID needs at least two {kind}, {number} can be read")
    if neighbours and not trained:
        raise ValueError("no training image can be read: neighbours=0 does without")
    if not main:
        return None
    metrics = {"gfid": float(fid.compute())}
    if classifier is not None:
        metrics["inception_score"] = inception_score(torch.cat(taken.logits))
    if neighbours:
        metrics |= neighbour_metrics(groups["sample"], groups.get("held-out image"))
    if folder is not None:
        grid.write(folder / "samples.png")
        if neighbours:
            pictures = {"sample": taken.pictures, "held-out image": held_out.pictures}
            rows = {title: {"pictures": torch.cat(pictures[title])} for title in groups}
            for title, searches in groups.items():
                rows[title] |= {n: (s.pictures, s.distances) for n, s in searches.items()}
            write_neighbours(folder / "neighbours.png", rows)
    return Findings(
        metrics, {}, taken.count, str(reference.fingerprint), reference_samples=reference.count
    )
