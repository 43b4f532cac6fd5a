"""STOI of speech."""

from training.metrics import bases


class Stoi(bases.SpeechMetric):
    """STOI (not the extended one), at the recordings' own rate."""
