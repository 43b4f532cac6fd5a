"""Tiny tokenizers of both modalities with an evaluation, ready to be published."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor
from modeling_simvq.convert_simvq_checkpoint import convert_simvq_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
EVALUATION = {
    "dataset": {"name": "Photographs", "id": "org/photographs", "split": "test", "samples": 16},
    "metrics": {"psnr": 21.53, "lpips": 0.213, "utilisation": 0.93, "perplexity": 55.1},
    "protocol": "Short side to 32 pixels, centre crop.",
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> dict[str, Path]:
    """Modality to a folder with a converted checkpoint of the authors' trainer and an evaluation."""
    folders = {}
    for modality in ("image", "audio"):
        folder = tmp_path_factory.mktemp(modality) / "model"
        convert_simvq_checkpoint(FIXTURES / f"{modality}_tiny1" / "checkpoint.ckpt", folder)
        (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
        folders[modality] = folder
    return folders


@pytest.fixture
def image_folder(converted, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(converted["image"], tmp_path / "image"))


@pytest.fixture
def audio_folder(converted, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(converted["audio"], tmp_path / "audio"))


@pytest.fixture(scope="session")
def checkpoints(converted, tmp_path_factory) -> dict[str, Path]:
    """K = 64, with their code: pictures, random weights, 2 x 2 pixels a code; sounds, 320 samples a code."""
    folder = tmp_path_factory.mktemp("checkpoints") / "pictures"
    made = {"pictures": folder, "sounds": converted["audio"]}
    image = SimVQImageConfig(
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        codebook_size=64,
        codebook_dim=8,
    )
    SimVQImageModel(image).save_pretrained(made["pictures"])
    SimVQImageProcessor(size_divisor=2).save_pretrained(made["pictures"])
    return made


@pytest.fixture
def waves():
    """Makes a smooth picture of a width and height."""

    def make(width: int, height: int) -> Image.Image:
        y, x = np.mgrid[:height, :width]
        wave = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=-1)
        return Image.fromarray((wave * 100 + 128).astype(np.uint8))

    return make
