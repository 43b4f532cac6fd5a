"""A small image recipe without data on disk, for tests of the loop."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from modeling_simvq import SimVQImageConfig, SimVQImageModel
from training.image_discriminator import PatchDiscriminator
from training.image_losses import ImageLoss
from training.image_recipe import ImageRecipe
from training.launch import make_accelerator
from training.loop import Trainer
from training.tokenizer_recipe import TokenizerLoopSettings

TINY = SimVQImageConfig(
    base_channels=32,
    channel_multipliers=[1, 2],
    num_res_blocks=1,
    codebook_size=64,
    codebook_dim=16,
)


class Pictures(torch.utils.data.Dataset):
    """Random smooth pictures, the same at every access."""

    def __init__(self, count: int, side: int = 32):
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
        self.pixels = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        return {
            "pixel_values": self.pixels[index],
            "valid": torch.tensor(True),
            "unreadable": torch.tensor(0),
        }


def build_tiny_recipe(
    count: int = 16, batch_size: int = 4, validation: int = 6, **loss
) -> ImageRecipe:
    torch.manual_seed(0)
    return ImageRecipe(
        SimVQImageModel(TINY),
        PatchDiscriminator(base_channels=8),
        ImageLoss(None, **loss),
        None,
        DataLoader(Pictures(count), batch_size, shuffle=True, drop_last=True),
        DataLoader(Pictures(validation), batch_size) if validation else None,
        32,
    )


@pytest.fixture
def one_process():
    """Accelerate without what an earlier test has set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def tiny_recipe():
    """Builds an ImageRecipe over random pictures."""
    return build_tiny_recipe


@pytest.fixture
def make_trainer(tiny_recipe, tmp_path):
    """Builds a Trainer over the tiny recipe; later ones start from the same weights."""

    def make(recipe: dict | None = None, scaler=None, **settings) -> Trainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "tracker": "none",
            "batch_size": 4,
        } | settings
        loop = TokenizerLoopSettings(**settings)
        Path(loop.output_dir).mkdir(exist_ok=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.manual_seed(1)
        accelerator = make_accelerator(loop)
        if scaler is not None:  # which Accelerate makes only for a GPU
            accelerator.scaler, accelerator.native_amp = scaler, True
        return Trainer(tiny_recipe(**(recipe or {})), loop, accelerator)

    return make
