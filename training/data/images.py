"""Images for training: any Datasets source, decoded here so that a broken file is skipped and counted."""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, ClassVar

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from modeling_simvq.image_processing_simvq import pil_to_rgb, upright
from training.data.loader import build_dataloader
from training.data.reader import Decoder, UnreadableSample, open_cell
from training.data.source import DataSettings, Kind, open_split
from training.runtime.settings import at_least, setting

# Only these parsers see a file: Pillow would hand PostScript to Ghostscript, for one.
Image.init()
PICTURE_FORMATS = {
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PNG",
    "PPM",
    "TGA",
    "TIFF",
    "WEBP",
}
PICTURE_FORMATS = sorted(PICTURE_FORMATS & Image.OPEN.keys())
EXTENSIONS = frozenset(name for name, form in Image.EXTENSION.items() if form in PICTURE_FORMATS)
# TGA has no mark by which to know it: nearly any file could be one.
MARKED_FORMATS = [form for form in PICTURE_FORMATS if form != "TGA"]

UnreadableImage = UnreadableSample


def is_image(file: BinaryIO) -> bool:
    """Tell whether an open file begins like an image that is read here, whatever its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=MARKED_FORMATS):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # parsers of broken files raise nearly anything
        return False


@dataclass
class ImageDataConfig(DataSettings):
    """The images."""

    kind: ClassVar[Kind] = Kind(
        datasets.Image,
        "imagefolder",
        "image_column",
        "images",
        "images",
        media_column="image",
        extensions=EXTENSIONS,
        reads=is_image,
    )

    dataset: str = setting(
        "ILSVRC/imagenet-1k", "Hub id, folder of images, parquet or arrow file or folder"
    )
    image_column: str = setting("image", "column that holds the images")
    resolution: int = setting(128, "short side, and side of the crop, in pixels")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "resolution")


def decode_image(cell: dict | None, name: str = "an image without a path") -> Image.Image:
    """Decode a cell of an image column to an 8-bit RGB image.

    EXIF orientation is applied, 16 bits are scaled to 8, transparency is dropped (as by the original and
    by SimVQImageProcessor, so that training and use see the same), and of an animation the first frame is
    taken. Pillow's limit on decompression bombs holds, and only PICTURE_FORMATS are read.

    Args:
        cell: {"bytes": ..., "path": ...}, one of which may be None; path may be a URL of fsspec.
        name: what to call the image in errors when it has no path.

    Raises:
        UnreadableImage: naming the file and the reason.
    """
    with open_cell(cell, name) as file:
        return _picture(file)


def _picture(file: BinaryIO) -> Image.Image:
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as image:
            image.load()
            return pil_to_rgb(upright(image))
    except UnidentifiedImageError:
        raise UnreadableImage("not an image in a known format") from None


def decode_pixels(
    cell: dict | None, name: str, generator: torch.Generator | None, resolution: int
) -> Tensor:
    """A cell of an image column to (3, R, R) uint8: decode_image and a crop as of image_to_pixels."""
    return decode_crops(cell, name, [generator], resolution)[0]


def decode_crops(
    cell: dict | None, name: str, generators: list[torch.Generator | None], resolution: int
) -> list[Tensor]:
    """Several crops of one image, which is decoded and resized once: as decode_pixels gives each of them."""
    with open_cell(cell, name) as file:
        image = _resized(_picture(file), resolution)
        return [_cropped(image, resolution, generator) for generator in generators]


def image_to_pixels(
    image: Image.Image, resolution: int, generator: torch.Generator | None = None
) -> Tensor:
    """Turn an RGB image into (3, R, R) float32 in [-1, 1], as the original does (fixture data).

    The short side is resized to `resolution`, bilinear and antialiased; then comes a random crop if there
    is a generator, drawn as torchvision's RandomCrop draws it, else the centre crop. No flips.

    Raises:
        UnreadableImage: if the image is so elongated that resizing it would exceed Pillow's pixel limit.
    """
    return to_values(_cropped(_resized(image, resolution), resolution, generator))


def to_values(pixels: Tensor) -> Tensor:
    """Bytes to what models take, x / 127.5 - 1 in float32, on whatever device they are; other values stay.

    Images travel as bytes, in a quarter of the memory. The value of each is what the original's numpy makes of
    it in float64, rounded to float32 once: 2 x - 255 is whole.
    """
    return (pixels.float() * 2 - 255) / 255 if pixels.dtype == torch.uint8 else pixels


def _resized(image: Image.Image, resolution: int) -> Image.Image:
    stretched = resolution**2 * max(image.size) / min(image.size)
    if Image.MAX_IMAGE_PIXELS is not None and stretched > Image.MAX_IMAGE_PIXELS:
        raise UnreadableImage(f"{image.width} x {image.height} pixels are too elongated")
    return transforms.resize(image, resolution, InterpolationMode.BILINEAR, antialias=True)


def _cropped(image: Image.Image, resolution: int, generator: torch.Generator | None) -> Tensor:
    if generator is None or image.size == (resolution, resolution):
        image = transforms.center_crop(image, [resolution, resolution])
    else:
        top, left = (
            int(torch.randint(0, side - resolution + 1, (1,), generator=generator))
            for side in (image.height, image.width)
        )
        image = transforms.crop(image, top, left, resolution, resolution)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def build_image_dataloader(
    config: ImageDataConfig, split: str, *, batch_size: int, train: bool, seed: int
) -> DataLoader:
    """Open a split and batch it: {"pixel_values": (B, 3, R, R) uint8, "valid": (B,), "unreadable": (B,)}.

    `to_values` makes of them what models take. See build_dataloader: random crops in training, centre crops in
    validation.
    """
    side = config.resolution
    decoder = Decoder(
        config.column,
        "pixel_values",
        (3, side, side),
        partial(decode_pixels, resolution=side),
        torch.uint8,
    )
    source = open_split(config, split)
    return build_dataloader(
        source, split, config, decoder, batch_size=batch_size, train=train, seed=seed
    )
