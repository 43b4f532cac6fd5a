"""The loop on a tiny model in this process: what it leaves, accumulation, phases, precision, validation."""

import json
import time

import pytest
import torch
from torch.utils.data import DataLoader

from modeling_simvq import SimVQImageModel
from training.loop.checkpoints import list_checkpoints
from training.loop.trainer import Trainer
from training.recipes.run import make_accelerator
from training.recipes.tokenizer import TokenizerLoopSettings
from training.runtime.settings import SettingsError


@pytest.mark.slow
def test_a_run_leaves_model_pictures_figures_and_checkpoints(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=5, save_every=2, validate_every=3, keep_checkpoints=2)
    basis = trainer.recipe.model.quantizer.basis.clone()
    trainer.train()
    run = tmp_path / "run"
    assert [p.name for p in list_checkpoints(run)] == ["step-00000004", "step-00000005"]
    lines = [json.loads(line) for line in (run / "figures.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5]
    assert {"l1", "psnr", "ssim", "utilisation", "perplexity"} <= set(lines[0])
    assert len(list((run / "reconstructions").glob("*.png"))) == 2
    model = SimVQImageModel.from_pretrained(run / "model")
    for name, tensor in trainer.ema.module.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model.quantizer.basis, basis)
    assert not torch.equal(
        model.encoder.conv_in.weight, trainer.recipe.model.encoder.conv_in.weight
    )


def test_a_validation_gives_back_the_codebook_that_it_kept(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    quantizer, measured = trainer.ema.module.quantizer, []
    validate = trainer.recipe.validate

    def watched(*arguments):
        result = validate(*arguments)
        measured.append(quantizer._kept is not None)
        return result

    monkeypatch.setattr(trainer.recipe, "validate", watched)
    trainer.validate()
    assert measured == [True] and quantizer._kept is None


@pytest.mark.slow
def test_an_accumulated_step_equals_the_large_batch(make_trainer, tmp_path):
    """Without the discriminator, whose batch norm sees each forward pass for itself."""
    after = []
    for batch_size, passes in ((8, 1), (2, 4)):
        recipe = {"count": 8, "batch_size": batch_size, "validation": 0}
        recipe["discriminator_start"] = 1000
        trainer = make_trainer(
            recipe,
            max_steps=1,
            gradient_accumulation_steps=passes,
            output_dir=str(tmp_path / f"{passes}"),
        )
        gradients = {}
        due = trainer.stepper._due

        def keep(name, module, *args, gradients=gradients, due=due):
            if name == "generator":
                gradients.update(
                    {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
                )
            return due(name, module, *args)

        trainer.stepper._due = keep
        trainer.train()
        after.append(gradients)
    assert set(after[0]) == set(after[1]) and after[0]
    for name, gradient in after[0].items():
        assert torch.allclose(gradient, after[1][name], rtol=1e-3, atol=1e-6), name


@pytest.mark.slow
def test_autoencoder_phase_leaves_the_quantizer_alone(make_trainer):
    trainer = make_trainer(max_steps=4, autoencoder_steps=2)
    projection = trainer.recipe.model.quantizer.projection.weight
    start, seen = projection.detach().clone(), []
    train_batch = trainer._train_batch

    def watched(batch):
        stepped = train_batch(batch)
        seen.append(torch.equal(projection, start))
        return stepped

    trainer._train_batch = watched
    trainer.train()
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_searches_codes_in_float32(make_trainer, monkeypatch, precision):
    from modeling_simvq import quantization_simvq

    types = []
    search = quantization_simvq.nearest_code

    def spy(queries, codes, projection=None):
        found = search(queries, codes, projection)
        codes = getattr(codes, "codes", codes if projection is None else projection(codes))
        types.append((queries.dtype, codes.dtype, torch.is_autocast_enabled("cpu")))
        exact = torch.cdist(queries.double(), codes.double()).argmin(dim=1)
        assert (found == exact).float().mean() > 0.999
        return found

    monkeypatch.setattr(quantization_simvq, "nearest_code", spy)
    make_trainer(max_steps=2, mixed_precision=precision).train()
    assert set(types) == {(torch.float32, torch.float32, False)}


def test_gradient_checkpointing_and_clipping_run(make_trainer):
    trainer = make_trainer(max_steps=2, gradient_checkpointing=True, max_grad_norm=1e-3)
    trainer.train()
    assert trainer.recipe.model.encoder.levels[0].blocks[0].gradient_checkpointing


def test_a_stream_needs_max_steps(tiny_recipe, one_process):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ()

    recipe = tiny_recipe()
    recipe.train_loader = DataLoader(Stream(), batch_size=2)
    loop = TokenizerLoopSettings(tracker="none")
    with pytest.raises(SettingsError, match="max_steps"):
        Trainer(recipe, loop, make_accelerator(loop))


def test_validation_counts_no_picture_twice_and_no_broken_one(make_trainer):
    trainer = make_trainer({"validation": 6}, max_steps=1)
    pixels = trainer.validation_loader.dataset.pixels
    figures = trainer.validate()
    with torch.no_grad():
        output = trainer.ema.module(pixels).pixel_values.clamp(-1, 1)
    assert figures["l1"] == pytest.approx(float((output - pixels).abs().mean()), rel=1e-5)
    broken = trainer.validation_loader.dataset
    original = type(broken).__getitem__

    class WithBroken(type(broken)):
        def __getitem__(self, index):
            sample = original(self, index)
            return sample | {
                "valid": torch.tensor(index != 1),
                "unreadable": torch.tensor(int(index == 1)),
            }

    broken.__class__ = WithBroken
    kept = [0, 2, 3, 4, 5]
    figures = trainer.validate()
    assert figures["l1"] == pytest.approx(float((output - pixels)[kept].abs().mean()), rel=1e-5)


@pytest.mark.slow
def test_the_time_spent_waiting_for_data_is_told(make_trainer, monkeypatch):
    trainer = make_trainer({"validation": 0}, max_steps=3, log_every=1)
    pictures, logged, pause = type(trainer.recipe.train_loader.dataset), [], 0.05
    read = pictures.__getitem__
    monkeypatch.setattr(
        pictures, "__getitem__", lambda self, index: time.sleep(pause) or read(self, index)
    )
    trainer.accelerator.log = lambda figures, step: logged.append(figures)
    trainer.train()
    assert len(logged) == 3 and all(0 <= figures["run/data_wait"] < 1 for figures in logged)
    seconds = [1 / figures["run/steps_per_second"] for figures in logged]
    waited = sum(f["run/data_wait"] * s for f, s in zip(logged, seconds, strict=True))
    assert waited >= 3 * 4 * pause  # three batches of four
