"""Evaluate generated images: gFID, Inception Score, nearest training images, samples of each class.

accelerate launch training/evaluate_generation.py pipeline=me/my-generator output=results dataset=path/to/photos
accelerate launch training/evaluate_generation.py pictures=path/to/made output=results dataset=path/to/photos

`dataset` are the real images: those that the generator was trained on (train_split), and others that it never
saw (validation_split), the yardstick of the nearest neighbours. evaluation.json, evaluation.md, samples.png and
neighbours.png go to `output`, for a local pipeline beside it.
"""

import sys
from pathlib import Path

# `accelerate launch` puts this file's folder on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.data.model_images import EvaluatedImages
from training.evaluation.generation import GenerationEvaluationSettings, run
from training.runtime.console import command


def main() -> None:
    """Command line."""
    command({"settings": GenerationEvaluationSettings, "data": EvaluatedImages}, run, __doc__)


if __name__ == "__main__":
    main()
