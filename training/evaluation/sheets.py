"""Generated pictures for people to look at: some of each class, and beside their nearest training pictures."""

from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES, EACH = 10, 8


class ClassGrid:
    """The first pictures of the first classes."""

    def __init__(self, names: list[str]):
        self.names = names
        self.pictures: dict[int, list[Tensor]] = {}

    def add(self, pictures: Tensor, labels: Tensor) -> None:
        """Add pictures (B, 3, H, W) uint8 with the numbers (B,) of their classes, -1 for none."""
        for picture, label in zip(pictures, labels.tolist(), strict=True):
            if label in self.pictures or len(self.pictures) < CLASSES:
                row = self.pictures.setdefault(label, [])
                # Without classes all of them fill the grid.
                if len(row) < (EACH if label >= 0 else CLASSES * EACH):
                    row.append(picture.cpu().clone())  # a view would keep the batch

    def write(self, path: Path) -> None:
        """Write a PNG, a row a class."""
        rows = []
        for label, pictures in sorted(self.pictures.items()):
            name = self.names[label] if 0 <= label < len(self.names) else ""
            for start in range(0, len(pictures), EACH):
                rows.append((name, pictures[start : start + EACH]))
        figure, axes = plt.subplots(
            len(rows), EACH, figsize=(EACH * 1.2, len(rows) * 1.3), squeeze=False
        )
        for line, (name, pictures) in zip(axes, rows, strict=True):
            for cell, axis in enumerate(line):
                axis.axis("off")
                if cell < len(pictures):
                    axis.imshow(pictures[cell].permute(1, 2, 0).numpy())
            line[0].set_title(name[:40], fontsize=8, loc="left")
        _save(figure, path)


def write_neighbours(path: Path, groups: dict[str, dict]) -> None:
    """Write a PNG: pictures beside their nearest training pictures, with the distances.

    Args:
        groups: title to {"pictures": (N, 3, H, W) uint8, and name of a space: (pictures, distances (N,))}.
    """
    count = max(len(group["pictures"]) for group in groups.values())
    wide = max(len(group) for group in groups.values())
    figure, axes = plt.subplots(
        count, wide * len(groups), figsize=(1.5 * wide * len(groups), 1.65 * count), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for number, (title, group) in enumerate(groups.items()):
        for row, picture in enumerate(group["pictures"]):
            line = axes[row, number * wide : (number + 1) * wide]
            line[0].imshow(picture.permute(1, 2, 0).cpu().numpy())
            line[0].set_title(title, fontsize=7)
            spaces = [(name, found) for name, found in group.items() if name != "pictures"]
            for axis, (name, (pictures, distances)) in zip(line[1:], spaces, strict=True):
                axis.imshow(pictures[row].permute(1, 2, 0).cpu().numpy())
                axis.set_title(f"{name} {float(distances[row]):.3g}", fontsize=7)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
