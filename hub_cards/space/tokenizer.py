"""A SimVQ checkpoint at work: images and audio to codes, and codes back."""

import math
import sys
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import soundfile
import soxr
import torch
from PIL import Image
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel

try:
    import modeling_simvq  # noqa: F401  (registers the models with the Auto classes)

    REMOTE_CODE = False
except ImportError:
    REMOTE_CODE = True  # the checkpoints bring their code; the Space's owner chose them

LONGEST_SIDE = 512  # at the published size a CPU takes seconds for it, and a minute for 1024
LONGEST_SECONDS = 30
LONGEST_MENTIONED = 1e6  # seconds; what was written to a pipe declares more
MOST_PIXELS = 100_000_000
# Only these parsers see an upload: Pillow would hand EPS files to Ghostscript, for one.
Image.init()
PICTURE_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"} & Image.OPEN.keys()
MODEL_TYPES = ("simvq_image", "simvq_audio")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded, or is no SimVQ tokenizer."""


@dataclass
class Encoded:
    """Codes of one input.

    codes: (h, w), or (1, T) for audio; of several quantizers (levels * h, w), one grid below the other, or
    (levels, T). size: (height, width) in pixels, or (samples,). levels: quantizers whose codes these are.
    """

    codes: np.ndarray
    size: tuple[int, ...]
    levels: int = 1

    def first(self, count: int) -> "Encoded":
        """The codes of the first quantizers."""
        rows = len(self.codes) // self.levels
        return Encoded(self.codes[: count * rows], self.size, count)


def quantizers(config) -> int:
    """Codes of a position; configurations of checkpoints from before there were several have no such field."""
    return getattr(config, "num_quantizers", 1)


@cache
def load_config(name: str):
    """The configuration of a checkpoint: a folder, or a repository of the Hub.

    Raises:
        CheckpointError: if it cannot be loaded, or is of another type.
    """
    with _told(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=REMOTE_CODE)
    if config.model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"The checkpoint {name} is of type {config.model_type}, not {' or '.join(MODEL_TYPES)}."
        )
    return config


# A few stay loaded: a large codebook takes half a gigabyte.
@lru_cache(maxsize=4)
def load(name: str) -> tuple:
    """Model in evaluation mode, and its image processor or feature extractor.

    Raises:
        CheckpointError: if they cannot be loaded.
    """
    image = load_config(name).model_type == "simvq_image"
    preparing = AutoImageProcessor if image else AutoFeatureExtractor
    with _told(name):
        model, report = AutoModel.from_pretrained(
            name, trust_remote_code=REMOTE_CODE, output_loading_info=True
        )
        # transformers would put random numbers in their place, and the page would show noise.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights: {', '.join(missing[:3])}")
        processor = preparing.from_pretrained(name, trust_remote_code=REMOTE_CODE)
    return model.eval().to(DEVICE), processor


class _told:
    """Whatever goes wrong inside becomes a CheckpointError that names the checkpoint."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"The checkpoint {self.name} could not be loaded: {reason}"
            ) from error


def read_picture(path: str, processor) -> tuple[Image.Image, str]:
    """An image file as RGB, upright, its long side at most LONGEST_SIDE; and a note if it was scaled.

    Args:
        processor: the checkpoint's image processor, whose own reading of bit depths, palettes and orientation
            this is.

    Raises:
        ValueError: if the file is no image, is damaged, has more than MOST_PIXELS, or pixels of no known range.
    """
    reading = sys.modules[type(processor).__module__]
    try:
        with Image.open(path, formats=sorted(PICTURE_FORMATS)) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise ValueError(
                    f"The image has {width} x {height} pixels, more than {MOST_PIXELS:,}."
                )
            picture.draft("RGB", (2 * LONGEST_SIDE, 2 * LONGEST_SIDE))
            picture.load()
            upright = reading.upright(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            "The upload is not an image that can be read: it is damaged, or of another format."
        ) from error
    try:
        picture = reading.pil_to_rgb(upright)
    except ValueError as error:  # in words
        raise ValueError(f"The image cannot be used: {error}.") from error
    if max(picture.size) <= LONGEST_SIDE:
        return picture, ""
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    new = "{} x {}".format(*picture.size)
    return picture, f"The image was scaled from {width} x {height} down to {new} pixels."


@torch.inference_mode()
def encode_picture(model, processor, picture: Image.Image) -> Encoded:
    """Codes (h, w) of a whole RGB image, each standing for f x f pixels; the border is padded to whole codes.

    Raises:
        ValueError: if the image is smaller than one code.
    """
    side = model.config.downsample_factor
    if min(picture.size) < side:
        raise ValueError(
            f"An image of {picture.width} x {picture.height} pixels (scaled down if it was large) "
            f"is smaller than one code, {side} x {side} pixels: give a larger or less narrow one."
        )
    inputs = processor(picture, do_resize=False, do_center_crop=False, return_tensors="pt")
    codes = model.encode(**inputs.to(DEVICE)).image_codes[0].cpu().numpy()
    grids = codes.reshape(-1, codes.shape[-1])
    return Encoded(grids, (picture.height, picture.width), quantizers(model.config))


@torch.inference_mode()
def decode_picture(model, processor, encoded: Encoded) -> Image.Image:
    """The image of codes, cropped to encoded.size."""
    codes = torch.from_numpy(encoded.codes)[None].to(DEVICE)
    if quantizers(model.config) > 1:
        codes = codes.unflatten(1, (encoded.levels, -1))
    return processor.post_process(model.decode(image_codes=codes).pixel_values, [encoded.size])[0]


def read_sound(path: str, sampling_rate: int) -> tuple[np.ndarray, str]:
    """The first LONGEST_SECONDS of an audio file, (L,) float32 mono at `sampling_rate`; a note if it was cut.

    Raises:
        ValueError: if the file is not audio, is damaged or empty.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            guessed = "MPEG" in file.subtype and not _tells_length(path)
            samples = file.read(LONGEST_SECONDS * rate, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise ValueError(
            "The upload is not an audio file that can be read: it is damaged, or not WAV, FLAC, OGG or MP3."
        ) from error
    if len(samples) == 0:
        raise ValueError("The recording is empty.")
    if not np.isfinite(samples).all():
        raise ValueError("The recording holds samples that are not finite numbers.")
    note = ""
    if len(samples) == LONGEST_SECONDS * rate and (guessed or seconds > LONGEST_MENTIONED):
        note = f"The recording was cut to its first {LONGEST_SECONDS} seconds."
    elif guessed:
        note = "This MP3 does not tell how long it is: the end may be missing."
    elif seconds > LONGEST_SECONDS:
        note = f"The recording was cut from {seconds:.1f} to its first {LONGEST_SECONDS} seconds."
    return to_mono(samples, rate, sampling_rate), note


def _tells_length(path: str) -> bool:
    """Tell whether an MP3 begins with a header that counts its frames; otherwise their number is a guess."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head.startswith(b"ID3") and len(head) == 10:
            a, b, c, d = head[6:]
            file.seek(10 + (a << 21 | b << 14 | c << 7 | d))
        first = file.read(4096)
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))


def to_mono(samples: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    """Samples (L, channels) float32 at `rate` to (L',) float32 at `sampling_rate`, at least one."""
    mono = samples.mean(axis=1, dtype=np.float32)
    if rate == sampling_rate:
        return mono
    resampled = soxr.resample(mono, rate, sampling_rate).astype(np.float32)
    return resampled if len(resampled) else mono[:1]


@torch.inference_mode()
def encode_sound(model, extractor, sound: np.ndarray) -> Encoded:
    """Codes (Q, T) of a clip (L,) at the model's rate; each stands for one hop, the last one may be partial."""
    rate = model.config.sampling_rate
    inputs = extractor(sound, sampling_rate=rate, return_tensors="pt")
    codes = model.encode(**inputs.to(DEVICE)).audio_codes[0]
    return Encoded(codes.cpu().numpy(), (len(sound),), quantizers(model.config))


@torch.inference_mode()
def decode_sound(model, encoded: Encoded) -> np.ndarray:
    """The audio of codes (q, T): (L,) int16 at the model's rate, cut to encoded.size.

    Raises:
        ValueError: if the model makes something that is not finite.
    """
    codes = torch.from_numpy(encoded.codes)[None].to(DEVICE)
    samples = model.decode(audio_codes=codes).audio_values[0, 0, : encoded.size[0]]
    samples = samples.float().cpu().numpy()
    if not np.isfinite(samples).all():
        raise ValueError("The model's audio holds values that are not finite numbers.")
    # Integers, because Gradio would scale floating-point samples to full loudness.
    return (samples.clip(-1, 1) * 32767).round().astype(np.int16)


def largest_grid(config) -> tuple[int, int]:
    """Rows and columns of codes of the largest input that is taken."""
    levels = quantizers(config)
    if config.model_type == "simvq_image":
        side = math.ceil(LONGEST_SIDE / config.downsample_factor)
        return levels * side, side
    return levels, math.ceil(LONGEST_SECONDS * config.sampling_rate / config.hop_length)


def whole_size(config, codes: np.ndarray) -> tuple[int, ...]:
    """Size of what codes of all quantizers decode to if nothing is cut off: (height, width), or (samples,).

    Raises:
        ValueError: if the rows cannot be those of all quantizers.
    """
    levels, (rows, columns) = quantizers(config), codes.shape
    image = config.model_type == "simvq_image"
    if rows % levels or not (image or rows == levels):
        wanted = f"a multiple of {levels} rows" if image else f"{levels} rows"
        raise ValueError(f"Codes of {levels} quantizers are {wanted} of codes, found {rows}.")
    if image:
        return tuple(side * config.downsample_factor for side in (rows // levels, columns))
    return (columns * config.hop_length,)
