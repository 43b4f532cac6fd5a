"""One face for every tokenizer: that of this project's own models, which the evaluators call.

A tokenizer is a module with `config` and a forward of pixels or samples and `num_quantizers`. SimVQ's models
are such; Peer gives the same face to those of other libraries.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.runtime.errors import SettingsError


@dataclass(frozen=True)
class PeerConfig:
    """Facts about a tokenizer, under the names of SimVQImageConfig and SimVQAudioConfig.

    Attributes:
        name: for people.
        codebook_size: K, of every quantizer; None if there is no discrete code.
        num_quantizers: Q, codes of one position.
        downsample_factor: sides of images must be multiples of it, in pixels.
        resolution: side in pixels of the images it was made for, where its configuration says so.
        sampling_rate: samples per second that it takes and gives.
        target_bandwidths: kbit/s with the first 1, 2, ..., Q quantizers.
        note: a sentence for the protocol.
    """

    name: str
    codebook_size: int | None = None
    num_quantizers: int = 1
    downsample_factor: int = 1
    resolution: int | None = None
    sampling_rate: int | None = None
    target_bandwidths: tuple[float, ...] = ()
    note: str = ""


@dataclass
class ImageReconstruction:
    """Images that went through a tokenizer.

    Attributes:
        pixel_values: (B, 3, H, W), about [-1, 1].
        image_codes: (B, h, w) int64, of several quantizers (B, q, h, w); None without a discrete code.
        bits: (B,) that each image took, where that depends on the image.
    """

    pixel_values: Tensor
    image_codes: Tensor | None = None
    bits: Tensor | None = None


@dataclass
class AudioReconstruction:
    """A recording that went through a tokenizer.

    Attributes:
        audio_values: (B, 1, L), about [-1, 1].
        audio_codes: (B, q, T) int64; None without a discrete code.
        bits: (B,) that each recording took, where that depends on the recording.
    """

    audio_values: Tensor
    audio_codes: Tensor | None = None
    bits: Tensor | None = None


class Peer(nn.Module):
    """Base of the adapters: another library's model with the face of ours.

    Args:
        model: of the other library.
        config: its facts.
    """

    def __init__(self, model: nn.Module, config: PeerConfig):
        super().__init__()
        self.model, self.config = model.eval(), config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def count(self, num_quantizers: int | None) -> int:
        """Return how many quantizers are used.

        Args:
            num_quantizers: asked for; all by default.

        Raises:
            SettingsError: if there are not so many.
        """
        most = self.config.num_quantizers
        if num_quantizers is None:
            return most
        if not 1 <= num_quantizers <= most:
            raise SettingsError(
                f"num_quantizers: {self.config.name} has {most}, got {num_quantizers}"
            )
        return num_quantizers


def bits_of(output, codes: Tensor | None, codebook_size: int | None) -> Tensor | None:
    """Bits (B,) float32 of each sample: what the output states, otherwise log2 K for each of its codes.

    Args:
        output: of a tokenizer.
        codes: (B, ...), or None.
        codebook_size: K, or None.

    Returns:
        None where there is neither: the latents of a continuous autoencoder are no discrete code.
    """
    stated = getattr(output, "bits", None)
    if stated is not None or codes is None:
        return stated
    return torch.full((len(codes),), codes[0].numel() * math.log2(codebook_size)).to(codes.device)
