"""Train a generator on the codes of a SimVQ tokenizer, of images or of audio.

accelerate launch training/train_generator.py --config training/configs/generator_imagenet128.yaml \\
    tokenizer=me/my-tokenizer dataset=codes
accelerate launch training/train_generator.py tokenizer=runs/mine/model dataset=codes validation_split=null \\
    output_dir=runs/generator

The codes are what training/tokenize_dataset.py made with the same tokenizer, here or on the Hub.
"""

import sys
from pathlib import Path

# `accelerate launch` puts this file's folder on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.data.codes import TokenDataConfig
from training.recipes.drawn_samples import SampleSettings
from training.recipes.generator import (
    GeneratorLoopSettings,
    GeneratorModelSettings,
    build_generator_recipe,
)
from training.recipes.run import run

if __name__ == "__main__":
    groups = {
        "data": TokenDataConfig,
        "model": GeneratorModelSettings,
        "samples": SampleSettings,
        "loop": GeneratorLoopSettings,
    }
    run(groups, build_generator_recipe, description=__doc__, may_shard=True)
