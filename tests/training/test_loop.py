"""The loop on a tiny model in this process: accumulation, resume, non-finite steps, phases, EMA."""

import json
import time

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from modeling_simvq import SimVQImageModel
from training.checkpoints import CheckpointError, list_checkpoints
from training.launch import make_accelerator
from training.loop import Trainer
from training.settings import SettingsError
from training.stepping import DivergedError
from training.tokenizer_recipe import TokenizerLoopSettings


@pytest.fixture
def make_trainer(tiny_recipe, tmp_path):
    """Builds a Trainer over the tiny recipe; later ones start from the same weights."""

    def make(recipe: dict | None = None, **settings) -> Trainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "tracker": "none",
            "batch_size": 4,
        } | settings
        loop = TokenizerLoopSettings(**settings)
        (tmp_path / "run").mkdir(exist_ok=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.manual_seed(1)
        return Trainer(tiny_recipe(**(recipe or {})), loop, make_accelerator(loop))

    return make


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.recipe.model.named_parameters()}


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


def test_an_accumulated_step_equals_the_large_batch(make_trainer):
    """Without the discriminator, whose batch norm sees each forward pass for itself."""
    after = []
    for batch_size, passes in ((8, 1), (2, 4)):
        recipe = {"count": 8, "batch_size": batch_size, "validation": 0}
        recipe["discriminator_start"] = 1000
        trainer = make_trainer(recipe, max_steps=1, gradient_accumulation_steps=passes)
        gradients = {}
        update = trainer.stepper._update

        def keep(name, module, *args, gradients=gradients, update=update, trainer=trainer):
            if name == "generator" and trainer.accelerator.sync_gradients:
                gradients.update(
                    {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
                )
            return update(name, module, *args)

        trainer.stepper._update = keep
        trainer.train()
        after.append(gradients)
    assert set(after[0]) == set(after[1]) and after[0]
    for name, gradient in after[0].items():
        assert torch.allclose(gradient, after[1][name], rtol=1e-3, atol=1e-6), name


def test_resume_goes_on_bit_for_bit(make_trainer):
    whole = make_trainer(max_steps=6, epochs=9, save_every=100)
    whole.train()
    expected = weights(whole)

    for path in list_checkpoints(whole.output_dir):
        path.rename(path.with_name("set-aside"))
    make_trainer(max_steps=3, epochs=9, save_every=3).train()
    resumed = make_trainer(max_steps=6, epochs=9, resume="latest")
    resumed.train()
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in resumed.ema.module.state_dict().items():
        assert torch.equal(tensor, whole.ema.module.state_dict()[name]), name


def test_resume_from_nothing_and_from_a_wrong_place(make_trainer):
    make_trainer(max_steps=1, resume="latest").train()
    with pytest.raises(CheckpointError, match="no-such-folder"):
        make_trainer(max_steps=1, resume="no-such-folder").train()


def test_resume_from_a_damaged_checkpoint_says_so(make_trainer, tmp_path):
    make_trainer(max_steps=1).train()
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    weights_file = checkpoint / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step-00000001"):
        make_trainer(max_steps=2, resume="latest").train()


def test_non_finite_steps_are_skipped_then_stop_the_run(make_trainer):
    trainer = make_trainer(max_steps=50, epochs=50, max_bad_steps=3)
    before = weights(trainer)
    original = trainer.recipe.loss.generator

    def poisoned(*args, **kwargs):
        total, terms = original(*args, **kwargs)
        return total * float("nan"), terms | {"perceptual": terms["total"] * float("nan")}

    trainer.recipe.loss.generator = poisoned
    with pytest.raises(DivergedError, match="perceptual.*encoder|perceptual.*decoder"):
        trainer.train()
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]), name


def test_one_bad_step_is_counted_and_the_run_goes_on(make_trainer):
    trainer = make_trainer(max_steps=4, max_bad_steps=3)
    original, calls = trainer.recipe.loss.generator, []

    def poisoned(*args, **kwargs):
        total, terms = original(*args, **kwargs)
        calls.append(1)
        return (total * float("inf") if len(calls) == 2 else total), terms

    trainer.recipe.loss.generator = poisoned
    trainer.train()
    assert trainer.progress.bad_steps == 1
    assert all(p.isfinite().all() for p in trainer.recipe.model.parameters())


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


def test_a_stream_needs_max_steps(tiny_recipe):
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
            return sample | {"valid": torch.tensor(index != 1)}

    broken.__class__ = WithBroken
    kept = [0, 2, 3, 4, 5]
    figures = trainer.validate()
    assert figures["l1"] == pytest.approx(float((output - pixels)[kept].abs().mean()), rel=1e-5)


def test_the_time_spent_waiting_for_data_is_told(make_trainer, monkeypatch):
    trainer = make_trainer({"validation": 0}, max_steps=3, log_every=1)
    pictures, logged, pause = type(trainer.train_loader.dataset), [], 0.05
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
