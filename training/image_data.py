"""Pictures for training: any Datasets source, decoded here so that a broken file is skipped and counted."""

import io
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from training.settings import SettingsError, at_least, setting

logger = logging.getLogger(__name__)

# So many broken files in a row mean that something else is wrong.
MOST_UNREADABLE_IN_A_ROW = 100
# Names of broken files that a worker writes to the log; the rest are only counted.
NAMED_UNREADABLE = 10
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
# x / 127.5 - 1 of every byte, rounded to float32 once, as the original's numpy does it.
LEVELS = torch.from_numpy((np.arange(256) / 127.5 - 1.0).astype(np.float32))


@dataclass
class ImageDataConfig:
    """The pictures."""

    dataset: str = setting(
        "ILSVRC/imagenet-1k", "Hub id, folder of pictures, parquet or arrow file or folder"
    )
    config_name: str | None = setting(None, "configuration of a data set that has several")
    revision: str | None = setting(None, "branch, tag or commit of a Hub data set")
    train_split: str = setting("train", "split to train on; train[:95%] is a part of one")
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
    """Open a split through Datasets: its image column alone, cells {"bytes", "path"} still encoded.

    Raises:
        SettingsError: if the source, the split or the column is not there, naming what is.
    """
    source = _open(config, split)
    column = config.image_column
    # A stream of JSON lines or of tar files may learn its columns only from its first row.
    names = source.column_names or list(next(iter(source), {}))
    if column not in names:
        raise SettingsError(
            f"image_column: {config.dataset} has no column {column!r}, it has {', '.join(names)}"
        )
    feature = (source.features or {}).get(column)
    # Other than Image: encoded bytes or paths, or such in a struct.
    text = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "string")
    if not (text or feature is None or isinstance(feature, (datasets.Image, dict))):
        raise SettingsError(
            f"image_column: column {column!r} of {config.dataset} holds {feature}, not pictures; "
            f"the columns are {', '.join(names)}"
        )
    return source.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _open(config: ImageDataConfig, split: str) -> datasets.Dataset | datasets.IterableDataset:
    path = Path(config.dataset).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _open_saved(config, path, split)
        return datasets.load_dataset(
            **_builder(config, path), split=split, streaming=config.streaming
        )
    except SettingsError:
        raise
    except ValueError as error:
        reason = " ".join(str(error).split("\n")[:2])
        if reason.startswith(("Unknown split", "Bad split")):  # and the splits there are
            raise SettingsError(_no_split(config, split, reason)) from error
        raise SettingsError(f"cannot open the data set {config.dataset!r}: {reason}") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # the outer one says only that something failed
        reason = (str(error) or type(error).__name__).splitlines()[0]
        advice = (
            ". Check the network; for a gated data set accept its terms on its page and run "
            "`hf auth login`; or set dataset to a local folder of pictures"
        )
        raise SettingsError(
            f"cannot open the data set {config.dataset!r}: {reason}{'' if path.exists() else advice}"
        ) from error


def _open_saved(
    config: ImageDataConfig, path: Path, split: str
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a folder that save_to_disk wrote; a data set without splits counts as the training split."""
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        saved = {config.train_split: saved}
    if split not in saved:
        found = f"it has {', '.join(map(repr, saved))}"
        raise SettingsError(_no_split(config, split, found))
    if not config.streaming:
        return saved[split]
    # Workers share a stream by its shards.
    shards = max(1, min(config.num_workers, len(saved[split])))
    return saved[split].to_iterable_dataset(num_shards=shards)


def _no_split(config: ImageDataConfig, split: str, found: str) -> str:
    name = "train_split" if split == config.train_split else "validation_split"
    off = "" if name == "train_split" else "; validation_split=null turns validation off"
    return f"{config.dataset} has no split {split!r} ({found}): set {name} to one it has{off}"


def _builder(config: ImageDataConfig, path: Path) -> dict:
    """Arguments of load_dataset for a local path or a Hub id."""
    if path.is_file():
        if path.suffix not in TABLES:
            raise SettingsError(f"dataset: {path} is neither a parquet or arrow file nor a folder")
        return {"path": TABLES[path.suffix], "data_files": {config.train_split: str(path)}}
    if path.is_dir():
        # Tables lie at the top or one folder down; metadata.parquet may accompany a folder of pictures.
        for pattern in ("*.parquet", "*.arrow", "*/*.parquet", "*/*.arrow"):
            if any(file.name != "metadata.parquet" for file in path.glob(pattern)):
                return {"path": str(path), "name": config.config_name}
        return {"path": "imagefolder", "data_dir": str(path)}
    if (
        config.dataset.startswith((".", "/", "~"))
        or config.dataset.count("/") > 1
        or path.suffix in TABLES
    ):
        raise SettingsError(f"dataset: there is no file or folder {config.dataset}")
    return {"path": config.dataset, "name": config.config_name, "revision": config.revision}


def decode_image(cell: dict | None, name: str = "a picture without a path") -> Image.Image:
    """Decode a cell of an image column to an 8-bit RGB picture.

    EXIF orientation is applied, 16 bits are scaled to 8, transparency is dropped (as by the original and
    by SimVQImageProcessor, so that training and use see the same), and of an animation the first frame is
    taken. Pillow's limit on decompression bombs holds.

    Args:
        cell: {"bytes": ..., "path": ...}, one of which may be None; path may be a URL of fsspec.
        name: what to call the picture in errors when it has no path.

    Raises:
        UnreadableImage: naming the file and the reason.
    """
    cell = cell if isinstance(cell, dict) else {}
    path, content = cell.get("path"), cell.get("bytes")
    try:
        if content is None:
            if not path:
                raise UnreadableImage("no bytes and no path")
            with xopen(path, "rb") as file:
                content = file.read()
        if not content:
            raise UnreadableImage("the file is empty")
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return _to_rgb(_upright(image))
    except UnidentifiedImageError:
        reason = "not a picture in a known format"
    except Exception as error:  # decoders of broken files raise nearly anything
        reason = str(error) or type(error).__name__
    if path:  # possibly of a file in an archive, zip://NAME::ARCHIVE
        raise UnreadableImage(f"{os.path.basename(path.split('::')[0])}: {reason} ({path})")
    raise UnreadableImage(f"{name}: {reason}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are sound, only the notes beside them are not
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert("RGB") would clip 16 bits to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def image_to_pixels(
    image: Image.Image, resolution: int, generator: torch.Generator | None = None
) -> Tensor:
    """RGB picture to (3, R, R) float32 in [-1, 1] (original.md section 5; fixture data).

    The short side is resized to `resolution`, bilinear and antialiased; then comes a random crop if there
    is a generator, drawn as torchvision's RandomCrop draws it, else the centre crop. No flips.

    Raises:
        UnreadableImage: if the picture is so elongated that resizing it would exceed Pillow's pixel limit.
    """
    stretched = resolution**2 * max(image.size) / min(image.size)
    if Image.MAX_IMAGE_PIXELS is not None and stretched > Image.MAX_IMAGE_PIXELS:
        raise UnreadableImage(f"{image.width} x {image.height} pixels are too elongated")
    image = transforms.resize(image, resolution, InterpolationMode.BILINEAR, antialias=True)
    if generator is None or image.size == (resolution, resolution):
        image = transforms.center_crop(image, [resolution, resolution])
    else:
        top, left = (
            int(torch.randint(0, side - resolution + 1, (1,), generator=generator))
            for side in (image.height, image.width)
        )
        image = transforms.crop(image, top, left, resolution, resolution)
    return LEVELS[torch.from_numpy(np.array(image)).permute(2, 0, 1).long()].contiguous()


def make_transform(resolution: int, train: bool) -> Callable[[Image.Image], Tensor]:
    """image_to_pixels at a resolution; training crops follow torch's global seed."""
    generator = torch.default_generator if train else None
    return partial(image_to_pixels, resolution=resolution, generator=generator)


class _Reader:
    """Rows to pixels; keeps the account of unreadable ones, each worker its own."""

    def __init__(self, config: ImageDataConfig):
        self.column, self.resolution = config.image_column, config.resolution
        self.named: set[str] = set()
        self.in_a_row = 0

    def read(self, row: dict, name: str, generator: torch.Generator | None) -> Tensor | None:
        """Pixels (3, R, R), or None where the picture is unreadable."""
        try:
            pixels = image_to_pixels(
                decode_image(row[self.column], name), self.resolution, generator
            )
        except UnreadableImage as error:
            self._note(str(error))
            return None
        self.in_a_row = 0
        return pixels

    def _note(self, text: str) -> None:
        self.in_a_row, self.last = self.in_a_row + 1, text
        if text not in self.named and len(self.named) < NAMED_UNREADABLE:
            self.named.add(text)
            logger.warning(f"skipped {text}")
        if self.in_a_row >= MOST_UNREADABLE_IN_A_ROW:
            self.fail(self.in_a_row)

    def fail(self, count: int) -> None:
        raise UnreadableImage(
            f"{count} pictures in a row cannot be read (the last: {self.last}): does column "
            f"{self.column!r} hold pictures, and are the files whole?"
        )

    def sample(self, pixels: Tensor | None, unreadable: int) -> dict[str, Tensor]:
        """A sample; without pixels a blank one, marked invalid."""
        blank = pixels is None
        return {
            "pixel_values": torch.zeros(3, *[self.resolution] * 2) if blank else pixels,
            "valid": torch.tensor(not blank),
            "unreadable": torch.tensor(unreadable),
        }


class ImageDataset(torch.utils.data.Dataset):
    """A data set with a length.

    In training an unreadable picture is replaced by the next readable one, so that batches keep their
    size; in validation it comes as a blank marked invalid, so that no picture counts twice.

    An item's key is an index or, from SeededOrder, (index, seed of the random crop).
    """

    def __init__(self, source: datasets.Dataset, config: ImageDataConfig, train: bool):
        self.source, self.train = source, train
        self.reader = _Reader(config)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        index, crop_seed = key if isinstance(key, tuple) else (key, key)
        generator = torch.Generator().manual_seed(crop_seed) if self.train else None
        for skipped in range(len(self.source) if self.train else 1):
            place = (index + skipped) % len(self.source)
            pixels = self.reader.read(self.source[place], f"row {place}", generator)
            if pixels is not None:
                return self.reader.sample(pixels, skipped)
        if self.train:
            self.reader.fail(len(self.source))
        return self.reader.sample(None, 1)


class SeededOrder(torch.utils.data.Sampler):
    """Indices of a training epoch in random order, each with the seed of its crop.

    Both follow from (seed, epoch) alone. So every rank draws the same order, and a resumed run sees the
    very crops that it would have seen, with any number of workers; torch's seeds of workers do not give
    that. Call set_epoch before each epoch (Accelerate's loaders do), or all epochs are alike.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = _generator(self.seed, self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        crop_seeds = torch.randint(2**31, (self.length,), generator=generator).tolist()
        yield from zip(order, crop_seeds, strict=True)


def _generator(seed: int, *more: int) -> torch.Generator:
    state = np.random.SeedSequence((seed % 2**32, *more)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


class ImageStream(torch.utils.data.IterableDataset):
    """A data set that is read on the way; unreadable pictures as in ImageDataset.

    Workers share the source's shards. Those skipped after a worker's last sample are only in the log.
    """

    def __init__(
        self, source: datasets.IterableDataset, config: ImageDataConfig, train: bool, seed: int
    ):
        self.source, self.train, self.seed = source, train, seed
        self.reader = _Reader(config)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; reaches persistent workers too, through shared memory."""
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        key = (self.seed, self.source.epoch, worker.id if worker else 0)
        generator = _generator(*key) if self.train else None
        skipped, empty = 0, True
        for number, row in enumerate(self.source):
            pixels = self.reader.read(row, f"row {number} of the stream", generator)
            if pixels is None and self.train:
                skipped += 1
                continue
            yield self.reader.sample(pixels, skipped if self.train else int(pixels is None))
            skipped, empty = 0, False
        if empty and skipped:
            self.reader.fail(skipped)


def build_image_dataloader(
    config: ImageDataConfig, split: str, *, batch_size: int, train: bool, seed: int
) -> DataLoader:
    """Batches {"pixel_values": (B, 3, R, R) in [-1, 1], "valid": (B,) bool, "unreadable": (B,) int64}.

    Training data are shuffled and lose their last partial batch; validation data keep order and rest.
    `unreadable` counts the files skipped for a sample; `valid` is false only for blanks in validation.

    Raises:
        SettingsError: if the data set cannot be opened or has fewer pictures than a training batch.
    """
    source = load_image_dataset(config, split)
    limit = config.max_train_samples if train else config.max_validation_samples
    streaming = isinstance(source, datasets.IterableDataset)
    if limit is not None:
        source = source.take(limit) if streaming else source.select(range(min(limit, len(source))))
    sampler = None
    if streaming:
        if train:
            source = source.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
        dataset = ImageStream(source, config, train, seed)
    else:
        if len(source) < (batch_size if train else 1):
            raise SettingsError(
                f"split {split!r} of {config.dataset} has {len(source)} pictures, too few for "
                f"batch_size={batch_size}"
            )
        dataset = ImageDataset(source, config, train)
        sampler = SeededOrder(len(source), seed) if train else None
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=train,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
