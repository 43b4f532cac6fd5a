"""What the page does, without the page: pictures and sounds to codes and back."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel

try:
    import modeling_simvq  # noqa: F401  registers the models

    REMOTE = {}
except ImportError:
    # Only checkpoints that the Space's owner listed are ever loaded; their code is trusted with them.
    REMOTE = {"trust_remote_code": True}

LONGEST_SIDE = 1024
LONGEST_SECONDS = 30
MOST_CODES = 1 << 18


class InputError(ValueError):
    """Something that a visitor can mend. The message says how."""


@dataclass(frozen=True)
class Tokenizer:
    """A loaded checkpoint.

    Attributes:
        kind: "picture" or "sound".
        codebook_size: K.
    """

    model: torch.nn.Module
    processor: object
    kind: str
    codebook_size: int


@lru_cache(maxsize=4)
def load(checkpoint: str) -> Tokenizer:
    """Load a checkpoint once.

    Raises:
        InputError: if it cannot be loaded, or is no SimVQ tokenizer.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint, **REMOTE)
        if config.model_type not in ("simvq_image", "simvq_audio"):
            raise InputError(f"{checkpoint} holds a {config.model_type} model, no SimVQ tokenizer")
        kind = "picture" if config.model_type == "simvq_image" else "sound"
        auto = AutoImageProcessor if kind == "picture" else AutoFeatureExtractor
        model = AutoModel.from_pretrained(checkpoint, **REMOTE).eval()
        processor = auto.from_pretrained(checkpoint, **REMOTE)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InputError(f"{checkpoint} cannot be loaded: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Tokenizer(model.to(device), processor, kind, config.codebook_size)


@torch.inference_mode()
def encode_picture(tokenizer: Tokenizer, picture: Image.Image) -> tuple[np.ndarray, Image.Image]:
    """Codes (h, w) of a picture, and the picture as it was encoded: no side above LONGEST_SIDE."""
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    inputs = tokenizer.processor(
        picture, do_resize=False, do_center_crop=False, return_tensors="pt"
    )
    pixels = inputs.pixel_values.to(tokenizer.model.device)
    return tokenizer.model.encode(pixels).image_codes[0].cpu().numpy(), picture


@torch.inference_mode()
def decode_picture(
    tokenizer: Tokenizer, codes: np.ndarray, size: tuple[int, int] | None = None
) -> Image.Image:
    """Picture of codes (h, w), cropped to a size (width, height) if one is given."""
    tensor = torch.from_numpy(codes)[None].to(tokenizer.model.device)
    pixels = tokenizer.model.decode(image_codes=tensor).pixel_values.cpu()
    height, width = pixels.shape[-2:]
    if size is not None:
        width, height = min(width, size[0]), min(height, size[1])
    return tokenizer.processor.post_process(pixels, [(height, width)])[0]


@torch.inference_mode()
def encode_sound(tokenizer: Tokenizer, rate: int, samples: np.ndarray) -> tuple[np.ndarray, float]:
    """Codes (1, T) of a recording, and the seconds that were encoded: at most LONGEST_SECONDS.

    Args:
        rate: in Hz.
        samples: (L,) or (L, channels), integers or floats in [-1, 1].

    Raises:
        InputError: if it is empty or not finite.
    """
    import soxr

    if samples.dtype.kind in "iu":
        samples = samples.astype(np.float32) / (np.iinfo(samples.dtype).max + 1)
    samples = samples.astype(np.float32)
    samples = samples.mean(axis=1) if samples.ndim == 2 else samples
    samples = samples[: LONGEST_SECONDS * rate]
    if not samples.size or not np.isfinite(samples).all():
        raise InputError("this recording is empty or damaged")
    own_rate = tokenizer.model.config.sampling_rate
    samples = soxr.resample(samples, rate, own_rate)
    inputs = tokenizer.processor(samples, sampling_rate=own_rate, return_tensors="pt")
    inputs = inputs.to(tokenizer.model.device)
    return tokenizer.model.encode(**inputs).audio_codes[0].cpu().numpy(), len(samples) / own_rate


@torch.inference_mode()
def decode_sound(tokenizer: Tokenizer, codes: np.ndarray) -> tuple[int, np.ndarray]:
    """Sampling rate and 16-bit samples of codes (1, T)."""
    tensor = torch.from_numpy(codes)[None].to(tokenizer.model.device)
    values = tokenizer.model.decode(audio_codes=tensor).audio_values[0, 0].cpu().numpy()
    samples = (np.nan_to_num(values).clip(-1, 1) * 32767).astype(np.int16)
    return tokenizer.model.config.sampling_rate, samples


def describe(codes: np.ndarray, codebook_size: int, amount: float, kind: str) -> str:
    """Figures of an input's codes, as Markdown.

    Args:
        codes: of any shape.
        amount: pixels of the picture, or seconds of the sound.
        kind: "picture" or "sound".
    """
    _, counts = np.unique(codes, return_counts=True)
    share = counts / codes.size
    perplexity = math.exp(-(share * np.log(share)).sum())
    bits = math.log2(codebook_size) * codes.size
    rate = (
        f"**{bits / amount:.3f}** bits per pixel"
        if kind == "picture"
        else f"**{bits / amount / 1000:.3f}** kbit per second"
    )
    return (
        f"**{codes.size:,}** codes, **{len(counts):,}** different ones of {codebook_size:,} "
        f"({len(counts) / codebook_size:.1%}), perplexity **{perplexity:,.1f}** · {rate}"
    )


def draw_codes(codes: np.ndarray) -> Image.Image:
    """Codes (h, w) as a picture: every code has its colour, in every picture the same."""
    # Steps of the golden ratio keep the hues of neighbouring codes far apart.
    hue = (codes * 0.618033988749895 % 1 * 255).astype(np.uint8)
    value = (150 + codes * 7919 % 106).astype(np.uint8)
    pixels = np.stack([hue, np.full_like(hue, 170), value], axis=-1)
    picture = Image.fromarray(pixels, mode="HSV").convert("RGB")
    height, width = codes.shape
    if height == 1:  # a strip in time
        return picture.resize((max(512, width * 4), 64), Image.Resampling.NEAREST)
    scale = max(1, 384 // max(height, width))
    return picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)


def write_codes(codes: np.ndarray) -> str:
    """Codes (h, w) as lines of integers."""
    return "\n".join(" ".join(map(str, row)) for row in codes.tolist())


def read_codes(text: str, codebook_size: int, kind: str) -> np.ndarray:
    """Lines of integers, separated by blanks or commas, to codes (h, w) int64; one line for sound.

    Raises:
        InputError: naming what is wrong, and where.
    """
    rows = [line.replace(",", " ").split() for line in (text or "").splitlines() if line.strip()]
    if not rows:
        raise InputError("there are no codes: encode something first, or type some")
    if sum(map(len, rows)) > MOST_CODES:
        raise InputError(f"these are more than {MOST_CODES:,} codes")
    if kind == "sound" and len(rows) > 1:
        raise InputError(f"codes of sound are one line, got {len(rows)}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise InputError(
                f"line {number} has {len(row)} codes and line 1 has {len(rows[0])}: all need the same"
            )
        for word in row:
            # isdecimal also holds for digits of other scripts, which int reads too.
            if not word.isdecimal() or len(word) > 9 or int(word) >= codebook_size:
                raise InputError(
                    f"{word[:20]!r} in line {number} is no code: codes of this checkpoint are integers "
                    f"from 0 to {codebook_size - 1:,}"
                )
    return np.array([[int(word) for word in row] for row in rows], dtype=np.int64)
