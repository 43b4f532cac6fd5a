"""Audio tokenizers of transformers that also see a speech model's features: X-Codec 2, NeuCodec."""

import math

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SeamlessM4TFeatureExtractor

from training.peers.face import AudioReconstruction, Peer, PeerConfig

RATE = 16_000  # of what both encoders take


class SemanticPeer(Peer):
    """Gives X-Codec 2 and NeuCodec the face of SimVQAudioModel.

    Recordings are filled up and turned into features as the models' own extractors do it; those want torchaudio
    for the features. SeamlessM4TFeatureExtractor's, which the authors of X-Codec 2 used, differ from these by
    1e-5 (relative, Frobenius; torchaudio 2.11, recordings of LibriSpeech).

    Args:
        model: Xcodec2Model or NeuCodecModel.
        name: for people.
    """

    def __init__(self, model, name: str):
        config = model.config
        self.hop = math.prod(config.downsampling_ratios)
        size = math.prod(config.quantization_levels)
        facts = PeerConfig(
            name,
            size,
            sampling_rate=getattr(config, "output_sampling_rate", RATE),
            target_bandwidths=(math.log2(size) * RATE / self.hop / 1000,),
        )
        super().__init__(model, facts)
        self.extractor = SeamlessM4TFeatureExtractor()

    def forward(self, samples: Tensor, num_quantizers: int | None = None) -> AudioReconstruction:
        """Encode and decode samples (1, 1, L) in [-1, 1]; the reconstruction has as many."""
        self.count(num_quantizers)
        values = resampled(samples, self.config.sampling_rate, RATE)
        length = values.shape[-1] + 1  # the extractors' extra sample
        values = F.pad(values, (0, 1 + -length % self.hop))
        mask = (torch.arange(values.shape[-1], device=values.device) < length).long()[None]
        # Frames of 25 ms, of which half a position hangs over at both ends.
        wide = F.pad(values[0, 0], (self.hop // 2, self.hop // 2))
        features = self.extractor(wide.cpu().numpy(), sampling_rate=RATE, return_tensors="pt")
        encoded = self.model.encode(
            values, features["input_features"].to(values.device), padding_mask=mask
        )
        options = {}
        if hasattr(self.model.config, "output_sampling_rate"):  # X-Codec 2 sees the filled end
            options["audio_codes_mask"] = encoded.audio_codes_mask
        decoded = self.model.decode(audio_codes=encoded.audio_codes, **options).audio_values
        decoded = decoded.view(1, 1, -1)[..., : samples.shape[-1]]
        return AudioReconstruction(decoded, encoded.audio_codes.long())


def resampled(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """Resample (1, 1, L) from one rate to another, both in Hz (soxr, HQ)."""
    if rate == wanted:
        return samples
    found = soxr.resample(samples[0, 0].cpu().numpy(), rate, wanted, "HQ")
    return torch.from_numpy(found.astype(np.float32))[None, None].to(samples.device)


SEMANTIC = {"xcodec2": "X-Codec 2", "neucodec": "NeuCodec"}
