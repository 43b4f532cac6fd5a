"""Speaker similarity of speech."""

from training.metrics import bases
from training.metrics.speakers import load_speaker_similarity


class SpeakerSimilarity(bases.SpeechMetric):
    """Cosine of x-vectors of original and reconstruction; `model`: a folder or name on the Hub, is needed."""

    def prepare(self, model: str):
        return load_speaker_similarity(bases.default_device(), model)
