"""DNSMOS of speech."""

from training.metrics import bases


class Dnsmos(bases.SpeechMetric):
    """DNSMOS of the reconstructions: overall (dnsmos) and P.808 (dnsmos_p808)."""
