"""Image processor of the SimVQ image tokenizer: images to pixel_values in [-1, 1] and back."""

from contextlib import contextmanager

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs

from .configuration_checks import refuse_misspelt, refuse_unknown

CHANNELS = (1, 3, 4)
TIFF_BITS, TIFF_WHITE = 258, 262  # tags: bits of a sample; 0 where white is stored as 0
# Settings of transformers' processors that mean nothing here, with the values that are no wish.
_WITHOUT_EFFECT = {
    "data_format": (None, "channels_first", ChannelDimension.FIRST),
    "device": (None, "cpu", torch.device("cpu")),
    "do_convert_rgb": (None, True),
    "image_seq_length": (None,),
}


class SimVQImageProcessorKwargs(ImagesKwargs, total=False):
    """size_divisor: images are padded to multiples of this, the tokenizer's down-sampling factor."""

    size_divisor: int


class SimVQImageProcessor(PilBackend):
    """Resizes the short side, crops the centre, rescales to [-1, 1] and pads to whole tokens.

    The defaults are the paper's protocol on ImageNet at 128 pixels (fixture ``data``). To tokenise whole
    images at their own size: ``processor(images, do_resize=False, do_center_crop=False)``. Padding then
    repeats the border up to whole tokens, or up to ``pad_size``, which makes one batch of images of several
    sizes. The size of the others in a batch never decides it: codes near padding depend on how much there is.

    PIL images and uint8 arrays (H, W, C) or tensors (C, H, W) are resized by PIL, exactly as in training;
    floating-point arrays and tensors, which must lie in [0, 1], are resized by torch with antialiasing.
    Channels are 1, 3 or 4. An array is read as (C, H, W), and a tensor as (H, W, C), only if the other order
    does not fit its shape; input_data_format says which it is. A stack of any of them, (B, ...), is a batch;
    grey images (H, W) without channels make a batch as a list.
    Grey images become RGB; 16 bits become 8; transparency is dropped. A PIL image that comes straight
    from a file is turned upright (EXIF), as in training. No image may become larger than Pillow's limit on
    decompression bombs, PIL.Image.MAX_IMAGE_PIXELS, whatever the sizes in a configuration say.
    """

    valid_kwargs = SimVQImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_resize = True
    size = {"shortest_edge": 128}
    default_to_square = False
    resample = Image.Resampling.BILINEAR
    do_center_crop = True
    crop_size = {"height": 128, "width": 128}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_pad = True
    size_divisor = 8

    def _prepare_image_like_inputs(self, images, *args, **kwargs) -> list:
        if isinstance(images, (list, tuple)) and len(images) == 0:
            raise ValueError("the processor got an empty list of images")
        # The base class counts a 2-D array as no image: a grey image gets its axis of channels here.
        data_format = kwargs.get("input_data_format")
        if isinstance(images, (list, tuple)):
            images = [_with_channels(image, data_format) for image in images]
        else:
            images = _with_channels(images, data_format)
        return super()._prepare_image_like_inputs(images, *args, **kwargs)

    def __init__(self, **kwargs):
        with _impossible_values():
            known = list(SimVQImageProcessorKwargs.__annotations__)
            refuse_misspelt([key for key in kwargs if key not in known], known)
            super().__init__(**kwargs)

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        """Preprocess as BaseImageProcessor does. An impossible image or setting is always a ValueError."""
        with _impossible_values():
            known = list(SimVQImageProcessorKwargs.__annotations__)
            refuse_unknown("the image processor", kwargs, known)
            return super().preprocess(images, *args, **kwargs)

    def process_image(self, image, input_data_format=None, **kwargs) -> Image.Image | torch.Tensor:
        """One image as RGB: a PIL image, or a float tensor (3, H, W) in [0, 255]."""
        if isinstance(image, Image.Image):
            return pil_to_rgb(_decoded(image))
        data_format = input_data_format or _usual_order(image)
        array = (
            image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
        )
        if array.ndim not in (2, 3):
            raise ValueError(f"an image must have 2 or 3 dimensions, got shape {array.shape}")
        if array.size == 0:
            raise ValueError(f"an image is empty: shape {array.shape}")
        if array.ndim == 3:
            array = _channels_last(array, data_format, guessed=input_data_format is None)
        if array.dtype == np.uint8:
            return pil_to_rgb(Image.fromarray(array))
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"an array image must be uint8 or floating point, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError("an image holds NaN or infinite values")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"a floating-point image must lie in [0, 1], found {low:g} to {high:g}: "
                "give uint8 in [0, 255], or rescale it"
            )
        tensor = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(array), dtype=np.float32))
        return tensor.permute(2, 0, 1)[:3].expand(3, -1, -1) * 255

    def _preprocess(self, images: list, return_tensors=None, **settings) -> BatchFeature:
        if not images:
            raise ValueError("the processor got an empty batch of images")
        for name, values in _WITHOUT_EFFECT.items():
            if settings.get(name) not in values:
                raise ValueError(
                    f"{name} = {settings[name]!r} is not supported: leave it out (pixel_values are RGB with "
                    "channels first, on the CPU)"
                )
        pictures = [self._prepare(image, **settings) for image in images]
        shapes = sorted({tuple(picture.shape[1:]) for picture in pictures})
        if len(shapes) > 1:
            raise ValueError(
                f"the images of one batch came out in different sizes {shapes}: keep do_resize and "
                "do_center_crop on, process them one at a time, or pad all to one size by "
                f"pad_size={_common_size(shapes, settings['size_divisor'])}"
            )
        return BatchFeature({"pixel_values": torch.stack(pictures)}, tensor_type=return_tensors)

    def _prepare(
        self,
        image: Image.Image | torch.Tensor,
        do_resize: bool,
        size,
        resample,
        do_center_crop: bool,
        crop_size,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        do_pad: bool,
        size_divisor: int,
        pad_size=None,
        **kwargs,
    ) -> torch.Tensor:
        if do_resize:
            _check_resized(_width_height(image), _target_size(size))
            image = F.resize(image, _target_size(size), _interpolation(resample), antialias=True)
        if do_center_crop:
            _check_pixels("crop_size", crop_size.width, crop_size.height)
            image = F.center_crop(image, [crop_size.height, crop_size.width])
        width, height = _width_height(image)
        if not isinstance(size_divisor, int) or size_divisor < 1:
            raise ValueError(
                f"size_divisor must be a whole number of at least 1, got {size_divisor!r}"
            )
        if min(width, height) < size_divisor:
            raise ValueError(
                f"an image of {height} x {width} pixels is smaller than one token "
                f"({size_divisor} x {size_divisor}): keep do_resize on, or enlarge it"
            )
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        if do_rescale:
            image = image * rescale_factor
        if do_normalize:
            for name, values in (("image_mean", image_mean), ("image_std", image_std)):
                numbers = values if isinstance(values, (list, tuple)) else [values]
                real = all(isinstance(n, (int, float)) and abs(n) < 3e38 for n in numbers)
                if len(numbers) not in (1, 3) or not real:
                    raise ValueError(f"{name} must be one finite number or three, got {values!r}")
                if name == "image_std" and not all(abs(n) > 1e-30 for n in numbers):
                    raise ValueError(f"image_std must not be zero, got {values!r}")
            image = F.normalize(image, image_mean, image_std)
        if do_pad:
            right, bottom = -width % size_divisor, -height % size_divisor
            if pad_size is not None:
                _check_padded(pad_size, width, height, size_divisor)
                right, bottom = pad_size.width - width, pad_size.height - height
            # Repeating the border costs the fewest artificial edges.
            image = F.pad(image, [0, 0, right, bottom], padding_mode="edge")
        elif pad_size is not None:
            raise ValueError("pad_size does nothing with do_pad=False: leave one of them out")
        return image

    def post_process(
        self, pixel_values: torch.Tensor, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[Image.Image]:
        """Pixel values to PIL images.

        Args:
            pixel_values: (B, 3, H, W), clamped to [-1, 1] here.
            target_sizes: (height, width) of every image as the processor saw it, after resize and crop:
                crops away what padding added at the bottom and on the right.

        Raises:
            ValueError: on a wrong shape, values that are not finite, or a target larger than the image.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be (B, 3, H, W), got {tuple(pixel_values.shape)}")
        if target_sizes is not None and len(target_sizes) != len(pixel_values):
            raise ValueError(f"{len(target_sizes)} target_sizes for {len(pixel_values)} images")
        values = pixel_values.detach().float().cpu()
        if not values.isfinite().all():
            raise ValueError("pixel_values holds NaN or infinite values")
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.image_mean, self.image_std))
        values = ((values * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        height, width = values.shape[-2:]
        pictures = []
        for index, value in enumerate(values):
            if target_sizes is not None:
                rows, cols = (int(side) for side in target_sizes[index])
                if not (0 < rows <= height and 0 < cols <= width):
                    raise ValueError(
                        f"target size {rows} x {cols} does not fit in the image of {height} x {width}: "
                        "target_sizes crops what padding added, it does not resize"
                    )
                value = value[:, :rows, :cols]
            pictures.append(Image.fromarray(value.permute(1, 2, 0).contiguous().numpy()))
        return pictures


@contextmanager
def _impossible_values():
    try:
        yield
    except (
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"impossible image or setting: {reason}") from error


def pil_to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB: 16 bits are scaled, transparency is dropped.

    Raises:
        ValueError: if its pixels have no known range: floating-point ones, and 32-bit ones beyond 16 bits.
    """
    image = _full_levels(image, image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, which have no known range")
    if image.mode.startswith("I"):  # convert("RGB") would clip 16 bits to white instead of scaling
        levels = np.asarray(image)
        # Pillow opens a 16-bit PGM, and older versions a 16-bit PNG, with 32 bits a pixel.
        if levels.min() < 0 or levels.max() > 65_535:
            raise ValueError(
                f"its pixels are 32-bit numbers from {levels.min()} to {levels.max()}, which have no "
                "known range"
            )
        return Image.fromarray((levels // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # straight to RGB Pillow would warn of transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def _decoded(image: Image.Image) -> Image.Image:
    """A PIL image, decoded, and upright if it is still as the file has it."""
    if 0 in image.size:
        raise ValueError(f"an image is empty: {image.width} x {image.height} pixels")
    try:
        image.load()
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError(f"an image cannot be decoded: {error or type(error).__name__}") from error
    return upright(image) if isinstance(image, ImageFile.ImageFile) else image


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says."""
    try:
        # This copy no longer knows the tags of its file.
        return _full_levels(ImageOps.exif_transpose(image), image)
    except Exception:  # the pixels are sound, only the notes beside them are not
        return image


def _full_levels(image: Image.Image, file: Image.Image) -> Image.Image:
    """A 16-bit image from black at 0 to white at 65,535; of a TIFF `file` Pillow gives what is stored."""
    tags = getattr(file, "tag_v2", {})
    white, bits = tags.get(TIFF_WHITE, 1), tags.get(TIFF_BITS, (16,))
    if not image.mode.startswith("I;16") or (white, bits) == (1, (16,)):
        return image
    levels = np.asarray(image).astype(np.int64)
    levels = levels * 65_535 // 4_095 if bits == (12,) else levels
    return Image.fromarray((levels if white else 65_535 - levels).astype(np.uint16))


def _check_resized(size: tuple[int, int], target: list[int]) -> None:
    """The image (width, height) after its short side, or both sides, are resized."""
    if len(target) == 1:
        target = [target[0], target[0] * max(size) // min(size)]
    _check_pixels(f"size, for an image of {size[0]} x {size[1]}", *target)


def _check_padded(pad_size, width: int, height: int, size_divisor: int) -> None:
    _check_pixels("pad_size", pad_size.width, pad_size.height)
    if pad_size.width % size_divisor or pad_size.height % size_divisor:
        raise ValueError(
            f"pad_size must be multiples of size_divisor = {size_divisor}, got {pad_size.height} x "
            f"{pad_size.width}"
        )
    if pad_size.width < width or pad_size.height < height:
        raise ValueError(
            f"an image of {height} x {width} pixels does not fit in pad_size {pad_size.height} x "
            f"{pad_size.width}"
        )


def _common_size(shapes: list[tuple[int, int]], size_divisor: int) -> dict[str, int]:
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    return {"height": height + -height % size_divisor, "width": width + -width % size_divisor}


def _check_pixels(name: str, width: int, height: int) -> None:
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise ValueError(
            f"{name}: sides must be whole numbers of at least 1, got {width} x {height}"
        )
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name}: {width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS, "
            f"{Image.MAX_IMAGE_PIXELS}"
        )


def _usual_order(image) -> ChannelDimension:
    return ChannelDimension.FIRST if isinstance(image, torch.Tensor) else ChannelDimension.LAST


def _with_channels(image, data_format: str | ChannelDimension | None):
    if not isinstance(image, (np.ndarray, torch.Tensor)) or image.ndim != 2:
        return image
    first = ChannelDimension(data_format or _usual_order(image)) == ChannelDimension.FIRST
    return image[None] if first else image[..., None]


def _channels_last(
    array: np.ndarray, data_format: str | ChannelDimension, guessed: bool
) -> np.ndarray:
    """An image (H, W), (H, W, 3) or (H, W, 4), from one whose channels are first or last."""
    axis = 0 if ChannelDimension(data_format) == ChannelDimension.FIRST else -1
    if guessed and array.shape[axis] not in CHANNELS:
        axis = -1 - axis
    if array.shape[axis] not in CHANNELS:
        where = "first or last" if guessed else "last" if axis else "first"
        raise ValueError(f"an image must have 1, 3 or 4 channels, {where}, got shape {array.shape}")
    array = np.moveaxis(array, axis, -1)
    return array[..., 0] if array.shape[-1] == 1 else array


def _target_size(size) -> list[int]:
    if size.shortest_edge:
        return [size.shortest_edge]
    if size.height and size.width:
        return [size.height, size.width]
    raise ValueError(f"size must hold shortest_edge, or height and width, got {dict(size)}")


def _interpolation(resample) -> InterpolationMode:
    if isinstance(resample, InterpolationMode):
        return resample
    try:
        resample = Image.Resampling(resample)
    except ValueError:
        raise ValueError(
            f"resample must be one of PIL.Image.Resampling, got {resample!r}"
        ) from None
    return {
        Image.Resampling.NEAREST: InterpolationMode.NEAREST,
        Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
        Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
        Image.Resampling.LANCZOS: InterpolationMode.LANCZOS,
        Image.Resampling.BOX: InterpolationMode.BOX,
        Image.Resampling.HAMMING: InterpolationMode.HAMMING,
    }[resample]


def _width_height(image: Image.Image | torch.Tensor) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
