"""PESQ of speech."""

from training.metrics import bases


class Pesq(bases.SpeechMetric):
    """PESQ, wide band (ITU-T P.862.2), at 16 kHz."""
