"""Clips of very different lengths, and what a code model's gradient over several batches of them must be.

Run in one process and, by two_ranks.py, in two.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modeling_simvq import SimVQAudioGenerationConfig, SimVQForAudioGeneration
from training.loop.trainer import Trainer
from training.recipes.drawn_samples import SampleSettings
from training.recipes.generator import GeneratorLoopSettings, GeneratorRecipe
from training.recipes.run import make_accelerator

PASSES = 2
LONGEST = 40
# Of each clip: whole ones and such of hardly any codes come in batches, and on ranks, of their own.
LENGTHS = [40, 38, 3, 5, 2, 37, 1, 4]


class Clips(torch.utils.data.Dataset):
    """As AudioTokenDecoder makes them."""

    def __init__(self, count: int):
        self.lengths = LENGTHS[:count]
        generator = torch.Generator().manual_seed(0)
        self.codes = torch.randint(16, (count, 1, LONGEST), generator=generator)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = (torch.arange(LONGEST) < self.lengths[index]).long()[None]
        return {
            "audio_codes": self.codes[index] * mask,
            "audio_codes_mask": mask,
            "valid": torch.tensor(True),
            "unreadable": torch.tensor(0),
        }


def code_model() -> SimVQForAudioGeneration:
    """In float64, where the order of a sum does not show."""
    torch.manual_seed(0)
    config = SimVQAudioGenerationConfig(
        codebook_size=16,
        max_codes=LONGEST,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return SimVQForAudioGeneration(config).double()


def of_all_codes(clips: Clips) -> dict[str, Tensor]:
    """Loss of a code and its gradient, by name: what any split into batches has to give."""
    model = code_model()
    batch = torch.utils.data.default_collate([clips[index] for index in range(len(clips))])
    loss = model(audio_codes=batch["audio_codes"], audio_codes_mask=batch["audio_codes_mask"]).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def of_a_step(clips: Clips, batch_size: int, folder: Path) -> dict[str, Tensor]:
    """The same of the first step of a training, as reported and as the optimiser gets it."""
    loader = DataLoader(clips, batch_size, drop_last=True)
    recipe = GeneratorRecipe(code_model(), None, None, loader, None, SampleSettings())
    settings = GeneratorLoopSettings(
        output_dir=str(folder),
        tracker="none",
        max_steps=1,
        gradient_accumulation_steps=PASSES,
        max_grad_norm=None,
        log_every=1,
    )
    trainer = Trainer(recipe, settings, make_accelerator(settings))
    found: dict[str, Tensor] = {}

    def keep(*_) -> None:
        found.update({n: p.grad.clone() for n, p in recipe.model.named_parameters()})

    trainer.stepper.optimizers["generator"].optimizer.register_step_pre_hook(keep)
    trainer.accelerator.log = lambda figures, step: found.update(
        loss=torch.tensor(figures["generator/total"], dtype=torch.float64)
    )
    trainer.reports.start()
    for batch in trainer.batches:
        if trainer._train_batch(batch):
            trainer._log()
    return found


def distances(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Of the loss, and of all gradients together, relative."""
    assert set(expected) == set(found)
    names = sorted(set(expected) - {"loss"})
    ours, theirs = (torch.cat([d[n].double().flatten() for n in names]) for d in (found, expected))
    return {
        "loss": abs(float(found["loss"] / expected["loss"]) - 1),
        "gradient": float((ours - theirs).norm() / theirs.norm()),
    }
