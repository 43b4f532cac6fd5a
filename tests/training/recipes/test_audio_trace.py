"""Three optimiser steps of the original audio trainer, reproduced (fixture audio_tiny1, train_trace)."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel
from modeling_simvq.convert_simvq_audio import DROPPED, KEPT, rename
from tests.training.support.audio_fixture import FIXTURES, narrowed_discriminator, value
from training.loop.trainer import Trainer
from training.losses.audio import AudioLoss
from training.recipes.audio import AudioRecipe
from training.recipes.tokenizer import TokenizerLoopSettings

TRACE = FIXTURES / "audio_tiny1"
CONFIG = SimVQAudioConfig(
    num_filters=2,
    codebook_size=64,
    codebook_dim=24,
    hidden_size=32,
    intermediate_size=96,
    num_decoder_layers=2,
    dropout=0.0,
)
# Our names of the original's figures.
GENERATOR = {
    "total_loss": "total",
    "commit_loss": "commitment",
    "reconstruct_loss": "mel",
    "multi_period_loss": "adversarial_multi_period",
    "multi_res_loss": "adversarial_multi_resolution",
    "feature_matching_mp": "features_multi_period",
    "feature_matching_mrd": "features_multi_resolution",
    "loss_dac_1": "adversarial_dac",
    "loss_dac_2": "features_dac",
}
DISCRIMINATOR = {
    "total_loss": "total",
    "multi_period_loss": "multi_period",
    "multi_res_loss": "multi_resolution",
    "dac": "dac",
}


@pytest.fixture
def trainer(tmp_path):
    keys = json.loads((TRACE / "keys.json").read_text())
    state = {
        name: torch.from_numpy(value(name, tuple(shape)))
        for name, shape, dtype in keys
        if not name.startswith("model_ema") and dtype == "float32"
    }
    model = SimVQAudioModel(CONFIG)
    kept = [n for n in state if n.startswith(KEPT) and not n.startswith(DROPPED)]
    model.load_state_dict({rename(name, CONFIG): state[name] for name in kept})
    weights = {n.removeprefix("loss."): t for n, t in state.items() if n.startswith("loss.")}
    discriminator = narrowed_discriminator(weights)
    stored = load_file(TRACE / "train_trace.safetensors")
    clips = torch.cat([stored[f"step{i}.waveform"] for i in range(3)])
    samples = [
        {"input_values": c, "valid": torch.tensor(True), "unreadable": torch.tensor(0)}
        for c in clips
    ]
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    recipe = AudioRecipe(model, discriminator, AudioLoss(), loader, None)
    settings = TokenizerLoopSettings(
        output_dir=str(tmp_path), max_steps=3, epochs=1, tracker="none"
    )
    return Trainer(recipe, settings, Accelerator(cpu=True))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.slow
def test_three_steps_equal_the_original(trainer, monkeypatch):
    logs = json.loads((TRACE / "train_trace.json").read_text())["logs"]
    figures = []
    original_step = trainer.stepper.step

    def step(*args, **kwargs):
        result = original_step(*args, **kwargs)
        figures.append({k: float(v) for k, v in result.figures.items()})
        return result

    monkeypatch.setattr(trainer.stepper, "step", step)
    for batch in trainer.batches:
        trainer._train_batch(batch)

    for index in range(3):
        judge, generator = logs[2 * index : 2 * index + 2]
        for theirs, ours in GENERATOR.items():
            expected = pytest.approx(generator[f"train/{theirs}"], rel=1e-4)
            assert figures[index][f"generator/{ours}"] == expected, (index, theirs)
        for theirs, ours in DISCRIMINATOR.items():
            expected = pytest.approx(judge[f"train/{theirs}"], rel=1e-4)
            assert figures[index][f"discriminator/{ours}"] == expected, (index, theirs)

    stored = load_file(TRACE / "train_trace.safetensors")
    model, averaged = trainer.recipe.model.state_dict(), trainer.ema.module.state_dict()
    compared = 0
    for key, theirs in stored.items():
        original = key.removeprefix("after.")
        if key.startswith("after.") and original.startswith(KEPT):
            ours = rename(original, CONFIG)
            start = torch.from_numpy(value(original, tuple(theirs.shape)))
            if original == "backbone.embed.bias":
                # Norms undo this bias, so its gradient is rounding, of which Adam makes whole steps.
                assert (model[ours] - start).abs().max() < 3.1 * 1e-4
                continue
            assert relative(model[ours], theirs) < 1e-5, key
            # The weights hardly move in three steps, so their movement is compared too.
            assert relative(model[ours] - start, theirs - start) < 1e-2, key
            theirs = stored[f"after.model_ema.{original.replace('.', '')}"]
            assert relative(averaged[ours], theirs) < 1e-5, key
            compared += 1
    assert compared >= 7
