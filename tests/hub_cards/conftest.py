"""Tiny tokenizers of both modalities with an evaluation, ready to be published."""

import json
import shutil
from pathlib import Path

import pytest

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
