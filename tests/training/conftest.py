"""A trainer over the small image recipe, for tests of the loop."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from tests.training.support.tiny_recipe import build_tiny_recipe
from training.loop.trainer import Trainer
from training.recipes.run import make_accelerator
from training.recipes.tokenizer import TokenizerLoopSettings


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
