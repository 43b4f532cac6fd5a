"""Train a SimVQ audio tokenizer on LibriTTS, a folder of recordings or a parquet set.

accelerate launch training/train_audio.py --config training/configs/libritts24k_k4096.yaml
accelerate launch training/train_audio.py --config FILE dataset=path/to/recordings train_split=train \
    validation_split=null output_dir=runs/mine
"""

import sys
from pathlib import Path

# `accelerate launch` puts this file's folder on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.data.recordings import AudioDataConfig
from training.recipes.audio import (
    AudioLoopSettings,
    AudioLossSettings,
    AudioModelSettings,
    build_audio_recipe,
)
from training.recipes.run import run

if __name__ == "__main__":
    groups = {
        "data": AudioDataConfig,
        "model": AudioModelSettings,
        "loss": AudioLossSettings,
        "loop": AudioLoopSettings,
    }
    run(groups, build_audio_recipe, description=__doc__)
