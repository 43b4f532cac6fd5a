"""Voiced and unvoiced frames of speech."""

from training.metrics import bases


class VuvF1(bases.SpeechMetric):
    """V/UV F1: do the voiced frames stay voiced, by CREPE (protocol of CARGAN and Vocos)."""
