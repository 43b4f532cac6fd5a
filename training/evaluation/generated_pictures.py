"""Generated images to evaluate: from a pipeline that makes them on the way, or from files."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.data.images import (
    ImageDataConfig,
    UnreadableImage,
    build_image_dataloader,
    decode_image,
    image_to_pixels,
    to_values,
)
from training.data.source import open_split
from training.runtime.settings import SettingsError


@dataclass
class Generated:
    """A set of generated images.

    Attributes:
        loader: batches with "valid" (B,) and whatever `pixels` needs.
        pixels: a batch to images (B, 3, R, R) in [-1, 1] and numbers (B,) of their classes.
        names: of the classes; empty if there are none.
    """

    loader: DataLoader
    pixels: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
    names: list[str]


class _Indices(Dataset):
    """Numbers of samples, filled up so that every rank has the same number of whole batches."""

    def __init__(self, count: int, multiple: int):
        self.count, self.length = count, -(-count // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        counts = torch.tensor(index < self.count)
        return {"index": torch.tensor(index), "valid": counts, "unreadable": torch.tensor(0)}


class _Labelled(Dataset):
    """The images of a dataset with their classes beside them."""

    def __init__(self, pictures: Dataset, labels: list[int]):
        self.pictures, self.labels = pictures, labels

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.pictures[index] | {"label": torch.tensor(self.labels[index])}


def from_pipeline(
    pipe, count: int, *, resolution: int, batch_size: int, ranks: int, seed: int, **sampling
) -> Generated:
    """Sample `count` images from a SimVQImagePipeline, class after class in turn.

    Each batch has a seed of its own, which follows from `seed` and the batch's number, and is always whole: so
    the images are the same for every number of ranks.

    Args:
        sampling: guidance_scale, temperature, top_k, top_p.

    Raises:
        SettingsError: if the pipeline makes images of another size.
    """
    classes = pipe.transformer.config.num_classes
    names = [pipe.transformer.config.id2label[label] for label in range(classes)]

    def pixels(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        index = batch["index"]
        state = np.random.SeedSequence((seed, int(index[0]))).generate_state(1)
        labels = (index % classes).tolist() if classes else [None] * len(index)
        images = pipe(
            labels,
            batch_size=len(labels),
            generator=torch.Generator().manual_seed(int(state[0])),
            **sampling,
        ).images
        if min(images[0].size) != resolution:
            width, height = images[0].size
            raise SettingsError(
                f"resolution: the pipeline makes images of {width} x {height} pixels, not of {resolution}: "
                f"set resolution={min(images[0].size)}, so that real images are resized alike"
            )
        made = torch.stack([image_to_pixels(image, resolution) for image in images])
        classes_made = torch.tensor([-1 if label is None else label for label in labels])
        return made.to(index.device), classes_made.to(index.device)

    loader = DataLoader(_Indices(count, batch_size * ranks), batch_size=batch_size)
    return Generated(loader, pixels, names)


def first_side(data: ImageDataConfig, source: str, split: str) -> int | None:
    """Return the short side in pixels of the first readable image; all of one generator are alike."""
    for index, row in enumerate(open_split(_made(data, source, split), split)):
        with contextlib.suppress(UnreadableImage):
            return min(decode_image(row[data.column], f"row {index}").size)
    return None


def _made(data: ImageDataConfig, source: str, split: str) -> ImageDataConfig:
    return dataclasses.replace(
        data,
        dataset=source,
        config_name=None,
        revision=None,
        train_split=split,
        validation_split=None,
        streaming=False,
    )


def from_files(
    data: ImageDataConfig, source: str, split: str, count: int, batch_size: int
) -> Generated:
    """Take the first `count` images of a folder (of folders, one a class) or of parquet with a column "label".

    Args:
        data: of the real images: column, resolution and workers are the same.

    Raises:
        SettingsError: if they cannot be opened.
    """
    config = dataclasses.replace(_made(data, source, split), max_validation_samples=count)
    loader = build_image_dataloader(config, split, batch_size=batch_size, train=False, seed=0)
    labels, names = _labels(config, split)
    if labels:
        loader = DataLoader(
            _Labelled(loader.dataset, labels), batch_size, num_workers=data.num_workers
        )

    def pixels(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        none = torch.full_like(batch["unreadable"], -1)
        return to_values(batch["pixel_values"]), batch.get("label", none)

    if len(loader.dataset) < count:
        logging.info(f"{source} has {len(loader.dataset):,} images, {count:,} are asked for")
    return Generated(loader, pixels, names)


def _labels(config: ImageDataConfig, split: str) -> tuple[list[int], list[str]]:
    """Classes of all images of a split, as numbers, and their names."""
    source = open_split(config, split, all_columns=True)
    if "label" not in source.column_names:
        return [], []
    feature, labels = source.features["label"], source["label"][:]
    if isinstance(feature, datasets.ClassLabel):
        return [-1 if label is None else label for label in labels], feature.names
    names = sorted({str(label) for label in labels})
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[str(label)] for label in labels], names
