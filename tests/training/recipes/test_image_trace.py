"""Three optimiser steps of the original trainer, reproduced (fixture image_tiny1, train_trace).

The original lets the generator's gradients leak into the discriminator. Ours must match the clean gradients
that the fixture stores beside the leaking ones, and the generator's side of the trace, which at these
three steps the leak changes by less than the tolerance.
"""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from modeling_simvq import SimVQImageConfig, SimVQImageModel
from modeling_simvq.convert_simvq_image import rename
from tests.training.support.lpips_fixture import FIXTURES, narrow_lpips, value
from training.loop.trainer import Trainer
from training.losses.image import ImageLoss
from training.losses.patch_discriminator import PatchDiscriminator
from training.losses.perceptual import PerceptualDistance
from training.recipes.image import ImageRecipe
from training.recipes.tokenizer import TokenizerLoopSettings

TRACE = FIXTURES / "image_tiny1"
CONFIG = SimVQImageConfig(
    base_channels=32,
    channel_multipliers=[1, 2],
    num_res_blocks=1,
    codebook_size=64,
    codebook_dim=16,
)


def recipe_state(names_and_shapes: dict) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(value(n, tuple(s))) for n, s in names_and_shapes.items()}


@pytest.fixture
def trainer(tmp_path):
    keys = json.loads((TRACE / "keys.json").read_text())
    shapes = {n: s for n, s, dtype in keys if not n.startswith("model_ema") and dtype == "float32"}
    state = recipe_state(shapes)
    model = SimVQImageModel(CONFIG)
    own = ("encoder.", "decoder.", "quantize.")
    model.load_state_dict({rename(n, CONFIG): t for n, t in state.items() if n.startswith(own)})
    discriminator = PatchDiscriminator(base_channels=8)
    prefix = "loss.discriminator."
    discriminator.load_state_dict(
        {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}, strict=False
    )
    prefix = "loss.perceptual_loss."
    perceptual_state = {
        n.removeprefix(prefix): t
        for n, t in state.items()
        if n.startswith(prefix) and "scaling_layer" not in n
    }
    perceptual = PerceptualDistance(narrow_lpips(perceptual_state))
    batches = load_file(TRACE / "train_trace.safetensors")
    pictures = [batches[f"step{i}.image_bhwc"].permute(0, 3, 1, 2).contiguous() for i in range(3)]
    samples = [
        {"pixel_values": p, "valid": torch.tensor(True), "unreadable": torch.tensor(0)}
        for p in torch.cat(pictures)
    ]
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    recipe = ImageRecipe(
        model, discriminator, ImageLoss(perceptual), perceptual, loader, None, resolution=32
    )
    settings = TokenizerLoopSettings(
        output_dir=str(tmp_path), max_steps=3, epochs=1, tracker="none"
    )
    return Trainer(recipe, settings, Accelerator(cpu=True))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def record(trainer: Trainer, monkeypatch) -> tuple[list[dict], list[dict]]:
    """Train to the end; figures of every step, and the discriminator's gradients as they are applied."""
    figures, gradients = [], []
    adversaries = trainer.stepper
    original_step, original_due = adversaries.step, adversaries._due

    def step(*args, **kwargs):
        result = original_step(*args, **kwargs)
        figures.append({k: float(v) for k, v in result.figures.items()})
        return result

    def due(name, module, *args):
        if name == "discriminator":
            gradients.append({n: p.grad.clone() for n, p in module.named_parameters()})
        return original_due(name, module, *args)

    monkeypatch.setattr(adversaries, "step", step)
    monkeypatch.setattr(adversaries, "_due", due)
    for batch in trainer.batches:
        trainer._train_batch(batch)
    return figures, gradients


@pytest.mark.slow
def test_discriminator_gradients_hold_nothing_of_the_generator(trainer, monkeypatch):
    trace = load_file(TRACE / "train_trace.safetensors")
    _, gradients = record(trainer, monkeypatch)
    for name, gradient in gradients[0].items():
        clean = trace[f"step0.disc_grad_clean.{name}"]
        if clean.norm() > 1e-5:  # the last bias's gradient is nothing but rounding
            assert relative(gradient, clean) < 1e-4, name
            assert relative(trace[f"step0.disc_grad_applied.{name}"], clean) > 1e-3, name


@pytest.mark.slow
def test_three_steps_equal_the_original(trainer, monkeypatch):
    """With the original's leak put back in, all of its figures and weights come out."""
    trace = load_file(TRACE / "train_trace.safetensors")
    logs = json.loads((TRACE / "train_trace.json").read_text())["logs"]
    discriminator = trainer.recipe.discriminator
    monkeypatch.setattr(discriminator, "requires_grad_", lambda wanted: discriminator)
    figures, gradients = record(trainer, monkeypatch)

    for name, gradient in gradients[0].items():
        applied = trace[f"step0.disc_grad_applied.{name}"]
        assert (gradient - applied).norm() < 1e-4 * applied.norm() + 1e-6, name

    names = {
        "train/total_loss": "generator/total",
        "train/reconstruct_loss": "generator/reconstruction",
        "train/perceptual_loss": "generator/perceptual",
        "train/commit_loss": "generator/commitment",
    }
    for index in range(3):
        ours = figures[index]
        discriminator_log, generator_log = logs[2 * index : 2 * index + 2]
        for theirs, name in names.items():
            assert ours[name] == pytest.approx(generator_log[theirs], rel=1e-4), (index, name)
        weighted = ours["generator/adversarial"] * 0.1
        assert weighted == pytest.approx(generator_log["train/g_loss"], rel=1e-4)
        expected = pytest.approx(discriminator_log["train/disc_loss"], rel=1e-4)
        assert ours["discriminator/total"] == expected

    model = trainer.recipe.model.state_dict()
    averaged = trainer.ema.module.state_dict()
    for key, theirs in trace.items():
        if key.startswith("after.loss.discriminator."):
            ours = discriminator.state_dict()[key.removeprefix("after.loss.discriminator.")]
            assert relative(ours, theirs) < 1e-4, key
        elif key.startswith("after.") and "model_ema" not in key:
            original = key.removeprefix("after.")
            ours = rename(original, CONFIG)
            start = torch.from_numpy(value(original, tuple(theirs.shape)))
            assert relative(model[ours], theirs) < 1e-5, key
            # The weights hardly move in three steps, so their movement is compared too.
            assert relative(model[ours] - start, theirs - start) < 1e-2, key
            theirs = trace[f"after.model_ema.{original.replace('.', '')}"]
            assert relative(averaged[ours], theirs) < 1e-5, key
