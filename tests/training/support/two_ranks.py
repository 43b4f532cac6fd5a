"""What two processes do in one launch, each writing what it saw; test_many_processes.py starts and judges it.

The same functions give the traces of one process, which takes both ranks' samples as one batch. Pictures are
computed in float64: where sums in another order do not count, equality can be asked for. The discriminators of
sound work in float32 whatever they are given.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel, SimVQImageConfig, SimVQImageModel
from tests.training.support import code_gradients, quantizer_phases
from tests.training.support.tiny_recipe import TINY, Pictures, build_tiny_recipe
from training.data.images import ImageDataConfig, build_image_dataloader
from training.loop.trainer import Trainer
from training.loop.validation import measured_batches
from training.losses.audio import AudioLoss
from training.losses.audio_discriminators import AudioDiscriminator
from training.recipes.audio import AudioRecipe
from training.recipes.run import make_accelerator
from training.recipes.tokenizer import TokenizerLoopSettings
from training.runtime.processes import end_processes
from training.runtime.settings import SettingsError

RANKS = 2
BATCH = 2  # samples of a rank
STEPS = 3
TINY_AUDIO = SimVQAudioConfig(
    num_filters=2,
    codebook_size=64,
    codebook_dim=16,
    hidden_size=32,
    intermediate_size=64,
    num_decoder_layers=1,
    dropout=0.0,
)
# Settings of the loop and of the loss.
CASES = {
    "pictures": ({}, {}),
    "images, all options": (
        {
            "gradient_accumulation_steps": 2,
            "autoencoder_steps": 1,
            "warmup_steps": 2,
            "lr_schedule": "cosine",
            "max_grad_norm": 0.1,
        },
        {"adversarial_weight": None, "lecam_weight": 0.1},
    ),
    "images, whitened": ({}, {}),
    "sound": ({}, {}),
}
# Folder, streaming, workers, training, epoch.
SOURCES = {
    "whole": ("pictures", False, 2, True, 0),
    "whole, next epoch": ("pictures", False, 0, True, 1),
    "stream of one shard": ("table", True, 0, True, 0),
    "stream, next epoch": ("table", True, 0, True, 1),
    "stream of four shards": ("shards", True, 2, True, 0),
    "validation": ("pictures", False, 0, False, 0),
    "validation of a stream": ("table", True, 0, False, 0),
    "validation of a stream by workers": ("shards", True, 2, False, 0),
    # Two whole shards for the first worker of each rank, and one shard that all of them share.
    "stream of five shards": ("five", True, 2, True, 0),
    "validation of five shards": ("five", True, 2, False, 0),
}


class Parts(nn.Module):
    """Judges the ranks' parts of a batch one by one: batch norm has statistics of its own on every rank."""

    def __init__(self, judge: nn.Module):
        super().__init__()
        self.judge = judge

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.judge(part) for part in pixels.chunk(RANKS)])


class Clips(torch.utils.data.Dataset):
    """Random clips, the same at every access."""

    clips = torch.randn(16, 1, 3840, generator=torch.Generator().manual_seed(0)) * 0.1

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        return {"input_values": self.clips[index], "unreadable": torch.tensor(0)}


def build(case: str, batch_size: int, loss: dict):
    """A tiny recipe of a case."""
    if case != "sound":
        recipe = build_tiny_recipe(16, batch_size, validation=0, **loss)
        if case == "images, whitened":
            torch.manual_seed(0)
            config = TINY.to_dict() | {"whiten_latents": True}
            recipe.model = SimVQImageModel(SimVQImageConfig.from_dict(config))
        return recipe
    torch.manual_seed(0)
    loader = DataLoader(Clips(), batch_size, shuffle=True, drop_last=True)
    model, judge = SimVQAudioModel(TINY_AUDIO), AudioDiscriminator(1, 1, 1)
    return AudioRecipe(model, judge, AudioLoss(**loss), loader, None)


def trace(case: str, batch_size: int, folder: Path, parts: bool = False) -> tuple[dict, list]:
    """Train a case for a few steps.

    Args:
        parts: let the discriminator judge a batch in as many parts as there are ranks.

    Returns:
        Gradients of every step, and weights, averages, sums of the batches and code counts at the end, by
        name; and the figures of every step.
    """
    settings, loss = CASES[case]
    loop = TokenizerLoopSettings(
        output_dir=str(folder), tracker="none", max_steps=STEPS, epochs=9, log_every=1, **settings
    )
    recipe = build(case, batch_size, loss)
    if parts:
        recipe.discriminator = Parts(recipe.discriminator)
    if case != "sound":
        recipe.model.double()
        recipe.discriminator.double()
    accelerator = make_accelerator(loop)
    trainer = Trainer(recipe, loop, accelerator)
    found, figures = {}, []
    accelerator.log = lambda values, step: figures.append(values)
    counter, inputs = trainer.stepper.watch.counter, recipe.inputs
    read = counter.read

    def keep_gradients(name: str, module: nn.Module) -> None:
        for key, parameter in module.named_parameters():
            if parameter.grad is not None:
                key = f"gradient.{trainer.progress.step}.{name}.{key.removeprefix('judge.')}"
                found[key] = parameter.grad.clone()

    for (name, module), optimizer in zip(
        recipe.modules.items(), accelerator._optimizers, strict=True
    ):
        optimizer.optimizer.register_step_pre_hook(
            lambda *_, name=name, module=module: keep_gradients(name, module)
        )

    def keep_codes(accelerator):
        counts = accelerator.reduce(counter.counts.clone(), reduction="sum")
        found[f"codes.{len(figures)}"] = counts
        return read(accelerator)

    counter.read = keep_codes
    recipe.inputs = lambda batch: inputs(batch).to(recipe.model.dtype)
    trainer.reports.start()
    for batch in trainer.batches:
        if trainer._train_batch(batch):
            trainer._log()
    assert trainer.progress.step == STEPS
    assert all(scheduler.last_epoch == STEPS for scheduler in trainer.schedulers)
    states = {"model": recipe.model, "judge": recipe.discriminator, "average": trainer.ema.module}
    for name, module in (states | {"loss": recipe.loss}).items():
        for key, values in module.state_dict().items():
            found[f"{name}.{key.removeprefix('judge.')}"] = values.detach().clone()
    return found, figures


def communication(folder: Path) -> dict:
    """What ranks send each other in a step, by operation: numbers of tensors and bytes."""
    torch.manual_seed(0)
    recipe = build_tiny_recipe(16, BATCH, validation=0)
    config = TINY.to_dict() | {
        "codebook_size": 65_536
    }  # its basis has 4 MB, more than all the rest
    recipe.model = SimVQImageModel(type(TINY).from_dict(config))
    loop = TokenizerLoopSettings(output_dir=str(folder), tracker="none", max_steps=3)
    trainer = Trainer(recipe, loop, make_accelerator(loop))
    batches = iter(trainer.batches)
    for _ in range(2):  # buckets are built, and the ranks agree on them
        trainer._train_batch(next(batches))
    batch = next(batches)
    with torch.profiler.profile(record_shapes=True) as profile:
        trainer._train_batch(batch)
    numbers, sizes = Counter(), Counter()
    for event in profile.events():
        if event.name.startswith("gloo:"):
            numbers[event.name] += 1
            sizes[event.name] += sum(4 * torch.Size(shape).numel() for shape in event.input_shapes)
    trained = sum(
        p.numel() for m in recipe.modules.values() for p in m.parameters() if p.requires_grad
    )
    basis = recipe.model.quantizer.basis
    buffers = sum(b.numel() for m in recipe.modules.values() for b in m.buffers())
    return {
        "operations": dict(numbers),
        "bytes": dict(sizes),
        "trained": 4 * trained,
        "basis": 4 * basis.numel(),
        "buffers": 4 * buffers,
    }


def samples(folder: Path, streaming: bool, workers: int, train: bool, epoch: int = 0) -> list:
    """Grey levels, by which the test knows its pictures, in the batches that this rank gets.

    For validation those that the figures of all ranks are made of.
    """
    config = ImageDataConfig(
        dataset=str(folder), resolution=8, streaming=streaming, num_workers=workers
    )
    loader = build_image_dataloader(config, "train", batch_size=BATCH, train=train, seed=0)
    loop = TokenizerLoopSettings(output_dir=str(folder / "run"), tracker="none", max_steps=1)
    accelerator = make_accelerator(loop)
    loader = accelerator.prepare(loader)
    loader.set_epoch(epoch)

    def level(batch: dict) -> Tensor:
        return batch["pixel_values"].float().mean(dim=(1, 2, 3)).round()

    if train:
        return [level(batch).tolist() for batch in loader]

    def measure(batch: dict) -> tuple[dict, Tensor]:
        return {"level": level(batch)}, torch.zeros(len(batch["valid"]), 1, dtype=torch.int64)

    measured = measured_batches(loader, accelerator, measure, "testing")
    return [figures["level"].tolist() for figures, *_ in measured]


def averages_start_alike(rank: int, folder: Path) -> list[float]:
    """The average's weights where every rank has drawn others."""
    recipe = build_tiny_recipe(16, BATCH, validation=0)
    torch.manual_seed(rank)
    recipe.model = SimVQImageModel(TINY)
    loop = TokenizerLoopSettings(output_dir=str(folder), tracker="none", max_steps=1)
    trainer = Trainer(recipe, loop, make_accelerator(loop))
    return [float(p.detach().double().square().sum()) for p in trainer.ema.module.parameters()]


def a_bad_batch_of_one_rank(rank: int, folder: Path) -> dict:
    """The second rank's loss is not finite in the second step."""
    recipe = build_tiny_recipe(16, BATCH, validation=0)
    loop = TokenizerLoopSettings(output_dir=str(folder), tracker="none", max_steps=3)
    trainer = Trainer(recipe, loop, make_accelerator(loop))
    generator = recipe.loss.generator

    def poisoned(*args, **kwargs):
        total, terms = generator(*args, **kwargs)
        return total * float("nan") if rank == 1 and trainer.progress.step == 1 else total, terms

    recipe.loss.generator = poisoned
    for batch in trainer.batches:
        trainer._train_batch(batch)
    weights = [float(p.detach().double().sum()) for p in recipe.model.parameters()]
    return {"bad_steps": trainer.progress.bad_steps, "weights": weights}


def steps_of_epochs(folder: Path) -> dict:
    """Five batches are two for each of two ranks: epochs must not run over into another one."""
    recipe = build_tiny_recipe(5 * BATCH, BATCH, validation=0)
    loop = TokenizerLoopSettings(output_dir=str(folder), tracker="none", epochs=3)
    trainer = Trainer(recipe, loop, make_accelerator(loop))
    for batch in trainer.batches:
        trainer._train_batch(batch)
    found = {"total": trainer.total_steps, "epochs": trainer.progress.epoch + 1}
    recipe.train_loader = DataLoader(Pictures(BATCH), BATCH, drop_last=True)
    try:
        Trainer(recipe, loop, make_accelerator(loop))
    except SettingsError as error:
        found["too few"] = str(error)
    return found


def gloo_threads() -> int:
    """Threads that may still hold tensors."""
    names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    return sum("gloo" in name for name in names)


def main(folder: Path) -> None:
    loop = TokenizerLoopSettings(output_dir=str(folder), tracker="none")
    accelerator = make_accelerator(loop)
    rank = accelerator.process_index
    assert accelerator.num_processes == RANKS
    said: dict = {"threads before": gloo_threads(), "figures": {}, "samples": {}}
    for case in CASES:
        tensors, figures = trace(case, BATCH, folder)
        save_file(tensors, folder / f"{case}-{rank}.safetensors")
        said["figures"][case] = figures
    said["communication"] = communication(folder)
    for name, (source, *how) in SOURCES.items():
        said["samples"][name] = samples(folder / source, *how)
    said["averages"] = averages_start_alike(rank, folder)
    said["bad batch"] = a_bad_batch_of_one_rank(rank, folder)
    said["epochs"] = steps_of_epochs(folder)
    clips = code_gradients.Clips(8)
    said["codes"] = code_gradients.distances(
        code_gradients.of_all_codes(clips), code_gradients.of_a_step(clips, BATCH, folder)
    )
    said["quantizers"] = quantizer_phases.changes(folder)
    end_processes(accelerator)
    said["threads after"] = gloo_threads()
    (folder / f"rank-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
