"""Outputs of the audio tokenizer, and what chunks of a stream hand on."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .nearest_code import Book
from .streaming_layers import State


@dataclass(frozen=True)
class AudioPast:
    """State of a stream, of the chunks before: encode and decode take one and return the next.

    It is never changed, so that a chunk can be tried twice.

    Attributes:
        layers: tensors of the layers, by name; their sizes do not grow.
        pending: (B, 1, n) samples of the encoder that do not fill a frame yet.
        frames: that the encoder has had.
        books: codebooks that the stream began with, one a quantizer; whether their weights are still the same
            is not looked at.
        lag: samples that the decoder still has to leave out: those before the clip's first.
    """

    layers: State = field(default_factory=dict)
    pending: Tensor | None = None
    frames: int = 0
    books: tuple[Book | None, ...] = ()
    lag: int = 0


@dataclass
class SimVQAudioEncoderOutput(ModelOutput):
    """Output of encode; T is the padded length over config.hop_length, rounded up.

    Attributes:
        audio_codes: (B, q, T) int64, in [0, codebook_size), of q quantizers. Behind a clip's end they mean
            nothing.
        audio_codes_mask: (B, 1, T) bool, true where a code belongs to its clip.
        quantized_latents: (B, d, T), the codes' vectors.
        commitment_loss: float32 scalar, ``beta |z - sg[q]|^2 + |q - sg[z]|^2``, over the real frames.
        latents: (B, d, T), the encoder's output before quantization.
        encoder_past_key_values: for the next chunk, if this was one of a stream.
    """

    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    quantized_latents: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    encoder_past_key_values: AudioPast | None = None

    @property
    def quantized_representation(self) -> Tensor:
        """The quantized latents, by DAC's name."""
        return self.quantized_latents

    @property
    def projected_latents(self) -> Tensor:
        """The latents, by DAC's name."""
        return self.latents

    @property
    def loss(self) -> Tensor:
        """The commitment loss, by DAC's name."""
        return self.commitment_loss

    @property
    def last_frame_pad_length(self) -> int:
        """EnCodec's padding of the last chunk: none here."""
        return 0

    @property
    def audio_scales(self) -> list[None]:
        """EnCodec's scales, one a chunk: none here."""
        return [None]

    @property
    def padding_cache(self) -> None:
        """Mimi's second cache: encoder_past_key_values holds all state here."""
        return None


@dataclass
class SimVQAudioDecoderOutput(ModelOutput):
    """Output of decode.

    Attributes:
        audio_values: (B, 1, T * hop_length), trained towards [-1, 1] and not clamped. Zero behind a
            clip's last real frame.
        decoder_past_key_values: for the next chunk, if this was one of a stream.
    """

    audio_values: torch.FloatTensor | None = None
    decoder_past_key_values: AudioPast | None = None


@dataclass
class SimVQAudioOutput(ModelOutput):
    """Output of the model's forward: reconstruction, codes, their mask, loss and latents."""

    audio_values: torch.FloatTensor | None = None
    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
