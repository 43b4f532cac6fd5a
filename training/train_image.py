"""Train a SimVQ image tokenizer on ImageNet, an image folder or a parquet set.

accelerate launch training/train_image.py --config training/configs/imagenet128_k65536.yaml
accelerate launch training/train_image.py --config FILE dataset=path/to/photos output_dir=runs/mine
"""

import sys
from pathlib import Path

# `accelerate launch` puts this file's folder on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.data.images import ImageDataConfig
from training.recipes.image import ImageLossSettings, ImageModelSettings, build_image_recipe
from training.recipes.run import run
from training.recipes.tokenizer import TokenizerLoopSettings

if __name__ == "__main__":
    groups = {
        "data": ImageDataConfig,
        "model": ImageModelSettings,
        "loss": ImageLossSettings,
        "loop": TokenizerLoopSettings,
    }
    run(groups, build_image_recipe, description=__doc__)
