"""Word error rate of speech."""

from training.metrics import bases
from training.metrics.transcripts import load_wer


class Wer(bases.SpeechMetric):
    """Word error rate of all recordings together, against the recogniser's own transcripts of the originals.

    `model`: a recogniser, folder or name on the Hub, is needed.
    """

    def prepare(self, model: str):
        return load_wer(bases.default_device(), model)

    def _compute(self, predictions, references, sampling_rate: int, **options) -> dict[str, float]:
        found = super()._compute(predictions, references, sampling_rate, **options)
        # Means of the same recordings, so that the quotient is that of the sums.
        return {"wer": found["word_errors"] / found["words"], "failures": found["failures"]}
