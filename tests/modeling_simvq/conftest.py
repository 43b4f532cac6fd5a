"""Real, tiny tokenizers: the authors' checkpoints of fixtures image_tiny1 and audio_tiny1, converted once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from modeling_simvq.convert_simvq_checkpoint import convert_simvq_checkpoint

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "image_tiny1" / "checkpoint.ckpt"
AUDIO_CHECKPOINT = CHECKPOINT.parents[1] / "audio_tiny1" / "checkpoint.ckpt"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The authors' .ckpt file (2 x down-sampling, d = 16, K = 64, base width 32)."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def audio_checkpoint() -> Path:
    """The authors' .ckpt file (hop 320, d = 24, K = 64)."""
    return AUDIO_CHECKPOINT


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


@pytest.fixture(scope="session")
def tiny_audio_folder(tmp_path_factory) -> Path:
    """The authors' checkpoint of fixture audio_tiny1, converted. Do not change it."""
    folder = tmp_path_factory.mktemp("tiny_audio") / "model"
    convert_simvq_checkpoint(AUDIO_CHECKPOINT, folder, weights="raw")
    return folder


@pytest.fixture
def tiny_audio_model(tiny_audio_folder):
    """A fresh copy of the tokenizer in that folder (hop 320, d = 24, K = 64), in evaluation mode."""
    return AutoModel.from_pretrained(tiny_audio_folder)


@pytest.fixture
def waveform() -> torch.Tensor:
    """Four seconds of a voice-like sound: harmonics of a gliding pitch, with pauses; (1, 1, 96000)."""
    time = torch.arange(96000) / 24000
    phase = 2 * torch.pi * (120 * time + 10 * torch.sin(2 * time))
    tone = sum(torch.sin(k * phase) / k for k in range(1, 20))
    loudness = torch.sin(2 * torch.pi * 1.5 * time).clamp(min=0)
    return (0.1 * tone * loudness)[None, None]
