"""Audio tokenizers of transformers with residual quantizers: DAC, EnCodec, Mimi."""

import math

import torch.nn.functional as F
from torch import Tensor

from training.peers.face import AudioReconstruction, Peer, PeerConfig

FLOAT_BITS = 32


class ResidualCodec(Peer):
    """Base of codecs whose first q codes of a position decode by themselves.

    Recordings are encoded with all quantizers and decoded from the first q codes alone: a residual quantizer
    takes no notice of those behind it.

    Args:
        model: with `encode` and `decode`.
        name: for people.
        quantizers: Q.
        hop: samples between two positions.
    """

    def __init__(self, model, name: str, quantizers: int, hop: float, note: str = ""):
        config = model.config
        kilobits = math.log2(config.codebook_size) * config.sampling_rate / hop / 1000
        facts = PeerConfig(
            name,
            config.codebook_size,
            quantizers,
            sampling_rate=config.sampling_rate,
            target_bandwidths=tuple(kilobits * (n + 1) for n in range(quantizers)),
            note=note,
        )
        super().__init__(model, facts)

    def encode(self, samples: Tensor) -> Tensor:
        """Return the codes (B, Q, T) of samples (B, 1, L)."""
        return self.model.encode(samples).audio_codes

    def decode(self, codes: Tensor) -> Tensor:
        """Return the samples (B, 1, L) of codes (B, q, T)."""
        return self.model.decode(audio_codes=codes).audio_values

    def forward(self, samples: Tensor, num_quantizers: int | None = None) -> AudioReconstruction:
        """Encode and decode samples (B, 1, L) in [-1, 1]; the reconstruction has as many."""
        codes = self.encode(samples)[:, : self.count(num_quantizers)]
        decoded = self.decode(codes)
        return AudioReconstruction(
            decoded.view(len(samples), 1, -1)[..., : samples.shape[-1]], codes
        )


class DacPeer(ResidualCodec):
    """Gives DAC the face of SimVQAudioModel."""

    def __init__(self, model):
        self.hop = model.config.hop_length
        super().__init__(model, "DAC", model.config.n_codebooks, self.hop)

    def encode(self, samples: Tensor) -> Tensor:
        # Its feature extractor fills the last position up, and without that it drops the end.
        return super().encode(F.pad(samples, (0, -samples.shape[-1] % self.hop)))


class MimiPeer(ResidualCodec):
    """Gives Mimi the face of SimVQAudioModel; its first code is the semantic one."""

    def __init__(self, model):
        config = model.config
        super().__init__(
            model, "Mimi", config.num_quantizers, config.sampling_rate / config.frame_rate
        )


class EncodecPeer(ResidualCodec):
    """Gives EnCodec the face of SimVQAudioModel.

    Its bandwidths are numbers of quantizers: 1.5, 3, 6, 12 and 24 kbit/s of the 24 kHz model the first 2, 4, 8,
    16 and 32. The 48 kHz model takes stereo, here the same twice, in overlapping chunks, each scaled by its
    loudness: a number that is sent along.
    """

    def __init__(self, model):
        config = model.config
        note = ""
        if config.normalize:
            note = "The loudness of each chunk is sent along and counted with 32 bits."
        super().__init__(model, "EnCodec", config.num_quantizers, config.hop_length, note)

    def forward(self, samples: Tensor, num_quantizers: int | None = None) -> AudioReconstruction:
        """Encode and decode samples (B, 1, L) in [-1, 1]; the reconstruction has as many."""
        config, length = self.model.config, samples.shape[-1]
        stereo = samples.repeat(1, config.audio_channels, 1)
        if config.chunk_length is not None:  # as its feature extractor fills the last chunk up
            steps = math.ceil(length / config.chunk_stride) - 1
            whole = steps * config.chunk_stride + config.chunk_length
            stereo = F.pad(stereo, (0, whole - length))
        encoded = self.model.encode(stereo, bandwidth=config.target_bandwidths[-1])
        codes = encoded.audio_codes[:, :, : self.count(num_quantizers)]
        decoded = self.model.decode(
            codes, encoded.audio_scales, last_frame_pad_length=encoded.last_frame_pad_length
        ).audio_values
        # Chunks (N, B, q, T) one after another, without what fills up the last.
        flat = codes.permute(1, 2, 0, 3).flatten(2)
        flat = flat[..., : flat.shape[-1] - encoded.last_frame_pad_length]
        bits = None
        if config.normalize:
            spent = flat[0].numel() * math.log2(config.codebook_size)
            spent += FLOAT_BITS * len(encoded.audio_scales)
            bits = samples.new_full((len(samples),), spent)
        return AudioReconstruction(decoded.mean(dim=1, keepdim=True)[..., :length], flat, bits)


RESIDUAL = {"dac": DacPeer, "mimi": MimiPeer, "encodec": EncodecPeer}
