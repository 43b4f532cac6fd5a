"""Evaluate an audio tokenizer by the paper's protocol: UTMOS, PESQ, STOI, V/UV F1, utilisation, bitrate.

accelerate launch training/evaluate_audio.py model=me/my-tokenizer output=results
accelerate launch training/evaluate_audio.py model=runs/mine/model dataset=path/to/recordings \\
    config_name=null

Recordings are taken whole, one at a time. The figures go to evaluation.json and evaluation.md, for a local
model beside it, where hub_cards/push_to_hub.py finds them.
"""

import logging
import sys
from pathlib import Path

# `accelerate launch` puts this file's folder on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.evaluation.audio import AudioEvaluationSettings, EvaluatedAudio, run
from training.runtime.console import command


def main() -> None:
    """Command line."""
    # What cannot be downloaded is said once, not at every attempt.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    command({"settings": AudioEvaluationSettings, "data": EvaluatedAudio}, run, __doc__)


if __name__ == "__main__":
    main()
