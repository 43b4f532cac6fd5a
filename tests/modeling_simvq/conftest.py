"""A real, tiny tokenizer: the authors' checkpoint of fixture image_tiny1, converted once per run."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from modeling_simvq.convert_simvq_checkpoint import convert_simvq_checkpoint

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "image_tiny1" / "checkpoint.ckpt"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The authors' .ckpt file (2 x down-sampling, d = 16, K = 64, base width 32)."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Folder that save_pretrained wrote. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    convert_simvq_checkpoint(CHECKPOINT, folder, weights="raw")
    return folder


@pytest.fixture
def tiny_model(tiny_folder):
    """A fresh copy of the tokenizer in that folder, in evaluation mode."""
    return AutoModel.from_pretrained(tiny_folder)


@pytest.fixture
def pixels() -> torch.Tensor:
    """Two smooth random pictures (2, 3, 32, 40) in [-1, 1]."""
    coarse = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(32, 40), mode="bilinear")
