"""Generated images for people to look at: some of each class, and beside their nearest training images."""

from pathlib import Path

from torch import Tensor

from hub_cards.sheets import write_titled_sheet

CLASSES, EACH = 10, 8


class ClassGrid:
    """The first images of the first classes."""

    def __init__(self, names: list[str]):
        self.names = names
        self.images: dict[int, list[Tensor]] = {}

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Add images (B, 3, H, W) uint8 with the numbers (B,) of their classes, -1 for none."""
        for image, label in zip(images, labels.tolist(), strict=True):
            if label in self.images or len(self.images) < CLASSES:
                row = self.images.setdefault(label, [])
                # Without classes all of them fill the grid.
                if len(row) < (EACH if label >= 0 else CLASSES * EACH):
                    row.append(image.cpu().clone())  # a view would keep the batch

    def write(self, path: Path) -> None:
        """Write a PNG, a row a class."""
        rows = []
        for label, images in sorted(self.images.items()):
            name = self.names[label][:40] if 0 <= label < len(self.names) else ""
            for start in range(0, len(images), EACH):
                first, *others = images[start : start + EACH]
                rows.append([(name, first), *(("", image) for image in others)])
        write_titled_sheet(path, rows)


def write_neighbours(path: Path, groups: dict[str, dict]) -> None:
    """Write a PNG: images beside their nearest training images, with the distances.

    Args:
        groups: title to {"images": (N, 3, H, W) uint8, and name of a space: (images, distances (N,))}.
    """
    rows = [[] for _ in range(max(len(group["pictures"]) for group in groups.values()))]
    for title, group in groups.items():
        spaces = {name: found for name, found in group.items() if name != "pictures"}
        for number, row in enumerate(rows):
            if number >= len(group["pictures"]):
                row += [None] * (1 + len(spaces))
                continue
            row.append((title, group["pictures"][number]))
            for name, (images, distances) in spaces.items():
                row.append((f"{name} {float(distances[number]):.3g}", images[number]))
    write_titled_sheet(path, rows)
