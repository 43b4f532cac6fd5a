"""Samples of a dataset to codes, for both modalities: what tokenize_dataset makes of a row."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from hub_cards.dataset_card import code_type
from training.data.images import ImageDataConfig, decode_crops, to_values
from training.data.recordings import AudioDataConfig, decode_audio
from training.runtime import fast_math
from training.runtime.settings import SettingsError

MANIFEST = "tokenization.json"  # beside the codes: how they were made


@dataclass(frozen=True)
class Variant:
    """Variant of an image that is encoded.

    Attributes:
        crop: number of a random crop; None for the centre.
        flipped: mirrored left to right.
    """

    crop: int | None = None
    flipped: bool = False


def encoder_of(
    model: nn.Module,
    dtype: str = "float32",
    compile: bool = False,
    num_quantizers: int | None = None,
) -> Callable:
    """Return the model's `encode`, with convolutions of this type, compiled or not, of the first quantizers.

    The quantizer computes in float32 in any case: codes are those nearest to latents that are rounded.
    """
    encode = torch.compile(model.encode) if compile else model.encode

    def run(*inputs: Tensor):
        with torch.autocast(model.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            return encode(*inputs, num_quantizers=num_quantizers)

    return run


def listed(feature: datasets.List, count: int) -> datasets.List:
    """Return the column of the codes of so many quantizers; of one there is no axis."""
    return feature if count == 1 else datasets.List(feature, length=count)


class ImageTokens:
    """Images to codes (h, w), or (Q, h, w) of several quantizers.

    Args:
        model: an image tokenizer in evaluation mode.
        num_quantizers: how many of the model's, the first ones.
        options: of encoder_of.
        seed: of the random crops: each follows from it, the row and the number of the crop alone.

    Raises:
        SettingsError: if the model is no image tokenizer, or the resolution no multiple of its factor.
    """

    column, plural = "image_codes", "images"

    def __init__(
        self, model: nn.Module, data: ImageDataConfig, seed: int, num_quantizers: int = 1, **options
    ):
        if model.config.model_type != "simvq_image":
            raise SettingsError(f"model: {model.config.model_type} is no tokenizer of images")
        factor = model.config.downsample_factor
        if data.resolution % factor:
            raise SettingsError(f"resolution: {data.resolution} is no multiple of {factor}")
        self.model, self.seed, self.resolution = model, seed, data.resolution
        fast_math.lay_out(model, model.device)
        self.num_quantizers = num_quantizers
        self._encode = encoder_of(model, num_quantizers=num_quantizers, **options)
        self.source_column, side = data.column, data.resolution // factor
        value = datasets.Value(code_type(model.config.codebook_size))
        grid = datasets.List(datasets.List(value, length=side), length=side)
        self.feature = listed(grid, num_quantizers)

    def decode(self, cell: dict, row: int, variants: list[Variant]) -> list[Tensor]:
        """A cell to (3, R, R) uint8 of each variant; the file is decoded once. Raises UnreadableSample."""
        crops = {variant.crop: self._generator(row, variant.crop) for variant in variants}
        decoded = decode_crops(cell, f"row {row}", list(crops.values()), self.resolution)
        pixels = dict(zip(crops, decoded, strict=True))
        return [pixels[v.crop].flip(-1) if v.flipped else pixels[v.crop] for v in variants]

    def _generator(self, row: int, crop: int | None) -> torch.Generator | None:
        if crop is None:
            return None
        state = np.random.SeedSequence((self.seed, row, crop)).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))

    @torch.inference_mode()
    def encode(self, samples: list[Tensor]) -> list[np.ndarray]:
        """Codes (h, w) of each image, or (Q, h, w)."""
        pixels = to_values(torch.stack(samples).to(self.model.device))
        codes = self._encode(fast_math.laid_out(pixels)).image_codes
        if self.num_quantizers == 1 and codes.ndim == 4:  # the first of several
            codes = codes[:, 0]
        return list(codes.cpu().numpy())


class AudioTokens:
    """Recordings, whole, to codes (T,), or (Q, T) of several quantizers. Arguments as of ImageTokens.

    Raises:
        SettingsError: if the model is no audio tokenizer.
    """

    column, plural = "audio_codes", "recordings"

    def __init__(
        self, model: nn.Module, data: AudioDataConfig, seed: int, num_quantizers: int = 1, **options
    ):
        if model.config.model_type != "simvq_audio":
            raise SettingsError(f"model: {model.config.model_type} is no tokenizer of audio")
        self.model, self.source_column = model, data.column
        self.num_quantizers = num_quantizers
        self._encode = encoder_of(model, num_quantizers=num_quantizers, **options)
        self.rate = model.config.sampling_rate
        codes = datasets.List(datasets.Value(code_type(model.config.codebook_size)))
        self.feature = listed(codes, num_quantizers)

    def decode(self, cell: dict, row: int, variants: list[Variant]) -> list[Tensor]:
        """A cell to a waveform (1, L) at the model's rate: its one variant. Raises UnreadableSample."""
        return [decode_audio(cell, self.rate, name=f"row {row}")] * len(variants)

    @torch.inference_mode()
    def encode(self, samples: list[Tensor]) -> list[np.ndarray]:
        """Codes (T,) of each recording, or (Q, T), padded to the longest: padding changes no code."""
        lengths = [sample.shape[1] for sample in samples]
        hop = self.model.config.hop_length
        longest = -(-max(lengths) // hop) * hop
        waveforms = torch.zeros(len(samples), 1, longest)
        mask = torch.zeros(len(samples), longest, dtype=torch.int64)
        for index, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            waveforms[index, :, :length], mask[index, :length] = sample, 1
        device = self.model.device
        encoded = self._encode(waveforms.to(device), mask.to(device))
        codes, real = encoded.audio_codes.cpu(), encoded.audio_codes_mask.cpu()
        real = real.reshape(len(codes), -1).bool()
        clips = [row[:, kept].numpy() for row, kept in zip(codes, real, strict=True)]
        return [clip[0] for clip in clips] if self.num_quantizers == 1 else clips


def weights_hash(model: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits of a model's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
