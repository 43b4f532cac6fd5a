"""DistillMOS of speech."""

from training.metrics import bases


class Distillmos(bases.SpeechMetric):
    """DistillMOS of the reconstructions."""
