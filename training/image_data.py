"""Pictures for training: any Datasets source, decoded here so that a broken file is skipped and counted."""

import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from training.settings import SettingsError, at_least, setting

logger = logging.getLogger(__name__)

# So many broken files in a row mean that something else is wrong.
MOST_UNREADABLE_IN_A_ROW = 100
NAMED_UNREADABLE = 10


@dataclass
class ImageDataConfig:
    """The pictures."""

    dataset: str = setting(
        "ILSVRC/imagenet-1k", "Hub id, folder of pictures, parquet or arrow file or folder"
    )
    config_name: str | None = setting(None, "configuration of a Hub data set that has several")
    revision: str | None = setting(None, "branch, tag or commit of a Hub data set")
    train_split: str = setting("train", "split to train on")
    validation_split: str | None = setting("validation", "split to validate on; null for none")
    image_column: str = setting("image", "column that holds the pictures")
    streaming: bool = setting(False, "read while training instead of downloading first")
    shuffle_buffer: int = setting(10_000, "pictures to shuffle among when streaming")
    resolution: int = setting(128, "short side, and side of the crop, in pixels")
    num_workers: int = setting(2, "processes that decode, per training process")
    max_train_samples: int | None = setting(None, "use only the first so many pictures")
    max_validation_samples: int | None = setting(None, "validate on only the first so many")

    def __post_init__(self):
        at_least(self, 1, "resolution", "shuffle_buffer")
        at_least(self, 0, "num_workers")
        for name in ("max_train_samples", "max_validation_samples"):
            if getattr(self, name) is not None:
                at_least(self, 1, name)


class UnreadableImage(ValueError):
    """A file or a cell holds no picture that can be decoded. The message names it and the reason."""


def load_image_dataset(
    config: ImageDataConfig, split: str
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a split through Datasets, its pictures still encoded.

    Raises:
        SettingsError: if the source, the split or the column is not there, naming what is.
    """
    source = _open(config, split)
    names = source.column_names
    if names is not None and config.image_column not in names:
        raise SettingsError(
            f"image_column: {config.dataset} has no column {config.image_column!r}, "
            f"it has {', '.join(names)}"
        )
    return source.cast_column(config.image_column, datasets.Image(decode=False))


def _open(config: ImageDataConfig, split: str) -> datasets.Dataset | datasets.IterableDataset:
    path = Path(config.dataset).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.Dataset):
                loaded = {config.train_split: loaded}
            if split not in loaded:
                _refuse_split(config, split, list(loaded))
            source = loaded[split]
            return source.to_iterable_dataset() if config.streaming else source
        return datasets.load_dataset(
            **_builder(config, path),
            split=split,
            streaming=config.streaming,
        )
    except ValueError as error:
        if isinstance(error, SettingsError) or "split" not in str(error).lower():
            raise
        raise SettingsError(
            f"{config.dataset} has no split {split!r} ({str(error).splitlines()[0]}): set train_split "
            "and validation_split; validation_split=null turns validation off"
        ) from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise SettingsError(
            f"cannot open the data set {config.dataset!r}: {str(error).splitlines()[0]} Give a folder, "
            "or a Hub id that you can reach; for a gated set accept its terms and run `hf auth login`"
        ) from error


def _refuse_split(config: ImageDataConfig, split: str, found: list[str]) -> None:
    raise SettingsError(
        f"{config.dataset} has no split {split!r}, it has {', '.join(found)}: set train_split and "
        "validation_split; validation_split=null turns validation off"
    )


def _builder(config: ImageDataConfig, path: Path) -> dict:
    """Arguments of load_dataset for a local path or a Hub id."""
    if path.is_file():
        kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
        if kind is None:
            raise SettingsError(
                f"dataset: {path} is neither a parquet nor an arrow file, nor a folder"
            )
        return {"path": kind, "data_files": {config.train_split: str(path)}}
    if path.is_dir():
        for kind in ("parquet", "arrow"):
            if any(path.rglob(f"*.{kind}")):
                return {"path": kind, "data_dir": str(path)}
        return {"path": "imagefolder", "data_dir": str(path)}
    looks_local = config.dataset.startswith((".", "/", "~")) or config.dataset.count("/") > 1
    if looks_local:
        raise SettingsError(f"dataset: there is no file or folder {config.dataset}")
    return {"path": config.dataset, "name": config.config_name, "revision": config.revision}


def decode_image(cell: dict | None) -> Image.Image:
    """Decode a cell of an image column to an RGB picture, as a person would see it.

    EXIF orientation is applied, 16 bits are scaled to 8, transparency is dropped, and of an animation the
    first frame is taken.

    Args:
        cell: {"bytes": ..., "path": ...}, one of which may be None.

    Raises:
        UnreadableImage: naming the file and the reason.
    """
    cell = cell or {}
    name = os.path.basename(cell.get("path") or "") or "a picture without a name"
    try:
        content = cell.get("bytes")
        if content is None:
            if not cell.get("path"):
                raise UnreadableImage("an empty cell")
            content = Path(cell["path"]).read_bytes()
        image = Image.open(io.BytesIO(content))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        reason = "not a picture" if content else "empty file"
    except Exception as error:  # decoders of hostile files raise nearly anything
        reason = str(error) or type(error).__name__
    raise UnreadableImage(f"{name}: {reason}")


def make_transform(resolution: int, train: bool) -> transforms.Compose:
    """PIL picture to (3, R, R) float32 in [-1, 1] (original.md section 5; fixture data).

    The short side is resized to `resolution`; then a random crop, or the centre crop. No flips.
    """
    crop = transforms.RandomCrop if train else transforms.CenterCrop
    return transforms.Compose(
        [
            transforms.Resize(resolution, transforms.InterpolationMode.BILINEAR, antialias=True),
            crop(resolution),
            _to_range,
        ]
    )


def _to_range(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels / 127.5 - 1.0).contiguous()


class _Decoder:
    """Cells to samples. An unreadable cell is named in the log, ten times at the most."""

    def __init__(self, config: ImageDataConfig, train: bool):
        self.column = config.image_column
        self.transform = make_transform(config.resolution, train)
        self.blank = torch.zeros(3, config.resolution, config.resolution)
        self.named = 0

    def __call__(self, row: dict) -> Tensor | None:
        try:
            return self.transform(decode_image(row[self.column]))
        except UnreadableImage as error:
            self.named += 1
            if self.named <= NAMED_UNREADABLE:
                logger.warning(f"skipped {error}")
            return None

    def sample(self, pixel_values: Tensor | None, unreadable: int) -> dict:
        valid = pixel_values is not None
        return {
            "pixel_values": pixel_values if valid else self.blank,
            "valid": torch.tensor(valid),
            "unreadable": torch.tensor(unreadable),
        }


class ImageDataset(torch.utils.data.Dataset):
    """A data set with a length.

    In training an unreadable picture is replaced by the next readable one, so that batches keep their
    size; in validation it comes as a blank marked invalid, so that no picture counts twice.
    """

    def __init__(self, source: datasets.Dataset, config: ImageDataConfig, train: bool):
        self.source, self.train = source, train
        self.decoder = _Decoder(config, train)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        tries = min(len(self.source), MOST_UNREADABLE_IN_A_ROW) if self.train else 1
        for skipped in range(tries):
            pixels = self.decoder(self.source[(index + skipped) % len(self.source)])
            if pixels is not None:
                return self.decoder.sample(pixels, skipped)
        if self.train:
            raise UnreadableImage(
                f"{tries} pictures in a row cannot be read: is this a set of images?"
            )
        return self.decoder.sample(None, 1)


class ImageStream(torch.utils.data.IterableDataset):
    """A data set that is read on the way; otherwise as ImageDataset."""

    def __init__(self, source: datasets.IterableDataset, config: ImageDataConfig, train: bool):
        self.source, self.train = source, train
        self.decoder = _Decoder(config, train)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        skipped = 0
        for row in self.source:
            pixels = self.decoder(row)
            if pixels is not None:
                yield self.decoder.sample(pixels, skipped)
                skipped = 0
            elif self.train:
                skipped += 1
                if skipped >= MOST_UNREADABLE_IN_A_ROW:
                    raise UnreadableImage(
                        f"{skipped} pictures in a row cannot be read: is this a set of images?"
                    )
            else:
                yield self.decoder.sample(None, 1)


def build_image_dataloader(
    config: ImageDataConfig, split: str, *, batch_size: int, train: bool, seed: int
) -> DataLoader:
    """Batches {"pixel_values": (B, 3, R, R) in [-1, 1], "valid": (B,) bool, "unreadable": (B,) int64}.

    Training data are shuffled and lose their last partial batch; validation data keep order and rest.

    Raises:
        SettingsError: if the data set cannot be opened or has fewer pictures than a training batch.
    """
    source = load_image_dataset(config, split)
    limit = config.max_train_samples if train else config.max_validation_samples
    streaming = isinstance(source, datasets.IterableDataset)
    if limit is not None:
        source = source.take(limit) if streaming else source.select(range(min(limit, len(source))))
    if streaming:
        if train:
            source = source.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
        dataset = ImageStream(source, config, train)
    else:
        least = batch_size if train else 1
        if len(source) < least:
            raise SettingsError(
                f"{config.dataset} has {len(source)} pictures in split {split!r}, fewer than "
                f"batch_size={batch_size}"
                if train
                else f"split {split!r} of {config.dataset} is empty"
            )
        dataset = ImageDataset(source, config, train)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train and not streaming,
        drop_last=train,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
