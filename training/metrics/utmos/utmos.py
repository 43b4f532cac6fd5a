"""UTMOS of speech."""

from training.metrics import bases


class Utmos(bases.SpeechMetric):
    """UTMOS22, strong learner, of the reconstructions. weights: its file; downloaded by default."""
