"""Trainers of the three recipes on a pretended GPU, tiny, on random data."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.utils.data import DataLoader

from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioGenerationConfig,
    SimVQAudioModel,
    SimVQForAudioGeneration,
    SimVQForImageGeneration,
    SimVQImageGenerationConfig,
    SimVQImageModel,
)
from tests.support.pretended_gpu import CUDA
from tests.training.support.tiny_recipe import TINY, build_tiny_recipe
from training.loop.settings import LoopSettings
from training.loop.trainer import Trainer
from training.losses.audio import AudioLoss
from training.losses.audio_discriminators import AudioDiscriminator
from training.recipes.audio import AudioRecipe
from training.recipes.drawn_samples import SampleSettings
from training.recipes.generator import GeneratorRecipe
from training.recipes.run import make_accelerator
from training.recipes.tokenizer import TokenizerLoopSettings

AUDIO = SimVQAudioConfig(
    num_filters=2,
    codebook_size=64,
    codebook_dim=24,
    hidden_size=32,
    intermediate_size=96,
    num_decoder_layers=1,
)
BATCHES = 6


def samples(**values: Tensor) -> list[dict[str, Tensor]]:
    """Return the samples of a dataset in which each is alike but for `values` (N, ...)."""
    known = {"valid": torch.tensor(True), "unreadable": torch.tensor(0)}
    rows = zip(*values.values(), strict=True)
    return [dict(zip(values, row, strict=True)) | known for row in rows]


def image_recipe():
    """Return the recipe of the loop's tests."""
    return build_tiny_recipe(count=2 * BATCHES, batch_size=2, validation=3)


def audio_recipe() -> AudioRecipe:
    torch.manual_seed(0)
    clips = samples(input_values=torch.randn(2 * BATCHES, 1, 10 * AUDIO.hop_length) * 0.1)
    discriminator = AudioDiscriminator(2, 2, 2)
    loaders = DataLoader(clips, 2), DataLoader(clips[:3], 2)
    return AudioRecipe(SimVQAudioModel(AUDIO), discriminator, AudioLoss(), *loaders)


def generator_recipe() -> GeneratorRecipe:
    torch.manual_seed(0)
    config = SimVQImageGenerationConfig(
        codebook_size=TINY.codebook_size,
        grid_size=[4, 4],
        num_classes=3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    rows = samples(
        image_codes=torch.randint(TINY.codebook_size, (2 * BATCHES, 4, 4)),
        class_labels=torch.arange(2 * BATCHES) % 3,
    )
    tokenizer = SimVQImageModel(TINY).eval().requires_grad_(False)
    loaders = DataLoader(rows, 2), DataLoader(rows[:3], 2)
    return GeneratorRecipe(
        SimVQForImageGeneration(config), tokenizer, None, *loaders, SampleSettings(samples=2)
    )


def audio_generator_recipe() -> GeneratorRecipe:
    torch.manual_seed(0)
    config = SimVQAudioGenerationConfig(
        codebook_size=AUDIO.codebook_size,
        max_codes=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    rows = samples(
        audio_codes=torch.randint(AUDIO.codebook_size, (2 * BATCHES, 1, 8)),
        audio_codes_mask=(torch.arange(8) < 5).expand(2 * BATCHES, 1, 8),
    )
    tokenizer = SimVQAudioModel(AUDIO).eval().requires_grad_(False)
    loaders = DataLoader(rows, 2), DataLoader(rows[:3], 2)
    model = SimVQForAudioGeneration(config)
    return GeneratorRecipe(model, tokenizer, None, *loaders, SampleSettings(samples=2))


def rich_image_recipe():
    """Return the image recipe with every term of its loss that needs no downloaded weights."""
    loss = {"adversarial_weight": None, "lecam_weight": 0.1, "colour_weight": 1.0}
    return build_tiny_recipe(count=2 * BATCHES, batch_size=2, validation=3, **loss)


RECIPES = {
    "image": image_recipe,
    "image, all terms": rich_image_recipe,
    "audio": audio_recipe,
    "generator": generator_recipe,
    "audio generator": audio_generator_recipe,
}


def pretended_accelerator(loop: LoopSettings) -> Accelerator:
    """Return Accelerate's on the pretended GPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = make_accelerator(loop)
    for state in (PartialState, AcceleratorState):  # the one is copied to the other now and then
        state._shared_state["device"] = CUDA
    assert accelerator.device == CUDA
    return accelerator


def trainer_of(recipe: str, folder, **settings) -> Trainer:
    """Return a trainer; to be called, and used, on a pretended GPU."""
    kind = LoopSettings if "generator" in recipe else TokenizerLoopSettings
    values = {"tracker": "none", "max_steps": BATCHES, "max_grad_norm": 1.0, "batch_size": 2}
    loop = kind(output_dir=str(folder), **values | settings)
    return Trainer(RECIPES[recipe](), loop, pretended_accelerator(loop))
