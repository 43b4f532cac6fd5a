"""Speaker similarity: whether a reconstruction has kept the voice."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

from training.metrics.speech import RATE, SpeechPair
from training.runtime.errors import SettingsError
from training.runtime.pretrained import load_pretrained


def load_speaker_similarity(
    device: torch.device, model: str
) -> Callable[[SpeechPair], dict[str, float]]:
    """Cosine between the x-vectors of original and reconstruction, between -1 and 1.

    Args:
        model: folder, or name on the Hub, of a model for x-vectors such as WavLMForXVector; its weights must be
            safetensors.

    Raises:
        SettingsError: if weights are missing, or it takes another sampling rate than 16 kHz.
    """
    extractor = AutoFeatureExtractor.from_pretrained(model)
    if extractor.sampling_rate != RATE:
        raise SettingsError(
            f"speaker_model: {model} takes {extractor.sampling_rate:,} Hz, it must take {RATE:,} Hz"
        )
    network = load_pretrained(
        AutoModelForAudioXVector, model, dtype=torch.float32, trust_remote_code=False
    ).to(device)

    @torch.no_grad()
    def embedding(waveform: np.ndarray) -> Tensor:
        inputs = extractor(waveform, sampling_rate=RATE, return_tensors="pt").to(device)
        return network(**inputs).embeddings[0]

    def measure(pair: SpeechPair) -> dict[str, float]:
        both = map(embedding, pair.trimmed_16k)
        return {"speaker_similarity": float(F.cosine_similarity(*both, dim=0))}

    return measure
