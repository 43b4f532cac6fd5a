"""Word error rate: what a recogniser hears in a reconstruction, against what it hears in the original."""

import math
from collections.abc import Callable

import numpy as np
import torch

from training.metrics.speech import RATE, SpeechPair
from training.runtime.errors import SettingsError

WHISPER_SECONDS = 30  # it hears no more at a time unless it also finds times


def load_wer(device: torch.device, model: str) -> Callable[[SpeechPair], dict[str, float]]:
    """Word error rate by a recogniser of transformers, Whisper or one with CTC.

    The reference is its own transcript of the original, so that its own mistakes do not count. Texts are
    lower-cased and rid of punctuation (BasicTextNormalizer of Whisper).

    Args:
        model: folder, or name on the Hub; its weights must be safetensors.

    Returns:
        A function that gives "word_errors" and "words" of a recording, NaN where the original has no words.

    Raises:
        SettingsError: if the recogniser takes another sampling rate than 16 kHz.
    """
    from torchmetrics.functional.text import word_error_rate
    from transformers import pipeline
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    recogniser = pipeline(
        "automatic-speech-recognition",
        model=model,
        device=device,
        trust_remote_code=False,
        model_kwargs={"use_safetensors": True},
    )
    rate = recogniser.feature_extractor.sampling_rate
    if rate != RATE:
        raise SettingsError(f"asr_model: {model} takes {rate:,} Hz, it must take {RATE:,} Hz")
    normalise = BasicTextNormalizer()
    whisper = recogniser.type == "seq2seq_whisper"

    def transcribe(waveform: np.ndarray) -> str:
        long = whisper and len(waveform) > WHISPER_SECONDS * RATE
        options = {"return_timestamps": True} if long else {}
        heard = recogniser({"raw": waveform, "sampling_rate": RATE}, **options)
        return " ".join(normalise(heard["text"]).split())

    def measure(pair: SpeechPair) -> dict[str, float]:
        reference, heard = map(transcribe, pair.trimmed_16k)
        words = len(reference.split())
        if not words:
            return {"word_errors": math.nan, "words": math.nan}
        return {
            "word_errors": round(float(word_error_rate(heard, reference)) * words),
            "words": words,
        }

    return measure
