"""Evaluate an image tokenizer by the paper's protocol: rFID, LPIPS, PSNR, SSIM, utilisation.

accelerate launch training/evaluate_image.py model=me/my-tokenizer
accelerate launch training/evaluate_image.py model=runs/mine/model dataset=path/to/held_out

The figures go to evaluation.json and evaluation.md, for a local model beside it, where hub_cards/push_to_hub.py
finds them.
"""

import sys
from pathlib import Path

# `accelerate launch` puts this file's folder on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.data.model_images import EvaluatedImages
from training.evaluation.image import ImageEvaluationSettings, run
from training.runtime.console import command


def main() -> None:
    """Command line."""
    command({"settings": ImageEvaluationSettings, "data": EvaluatedImages}, run, __doc__)


if __name__ == "__main__":
    main()
