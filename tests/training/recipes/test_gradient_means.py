"""What a step of several batches learns from is the mean over all of them, whatever their number and scale."""

import contextlib

import pytest
import torch

from tests.training.loop.test_finite import GradientOfNaN, LossOf
from tests.training.support import code_gradients
from training.loop.trainer import Trainer


def keep_gradients(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Of each module all gradients in one vector, of every step, as its optimiser gets them."""
    kept: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, module: torch.nn.Module) -> None:
        gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        kept.setdefault(name, []).append(torch.cat(gradients))

    for name, optimizer in trainer.stepper.optimizers.items():
        module = trainer.recipe.modules[name]
        optimizer.optimizer.register_step_pre_hook(
            lambda *_, name=name, module=module: keep(name, module)
        )
    return kept


def run(trainer: Trainer) -> None:
    """All steps, and nothing else."""
    for batch in trainer.batches:
        trainer._train_batch(batch)


def scaled(make_trainer, scale: float, **settings) -> tuple[torch.amp.GradScaler, Trainer]:
    """All that fp16 does but the half precision itself: factors that are powers of two then show nowhere."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    trainer = make_trainer({"validation": 0}, scaler, epochs=9, **settings)
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.autocast = contextlib.nullcontext
    return scaler, trainer


@pytest.mark.slow
def test_the_last_step_of_an_epoch_is_the_mean_over_the_batches_that_came(make_trainer):
    """Three batches an epoch, two a step: the second step has one, and is no weaker for that."""
    still = {"learning_rate": 1e-12, "epochs": 1}
    found = {}
    for passes in (1, 2):
        trainer = make_trainer(
            {"count": 12, "validation": 0}, gradient_accumulation_steps=passes, **still
        )
        found[passes] = keep_gradients(trainer)
        run(trainer)
    for name, (first, second, third) in found[1].items():
        pair, rest = found[2][name]
        assert (pair - (first + second) / 2).norm() < 1e-5 * pair.norm(), name
        assert (rest - third).norm() < 1e-5 * third.norm(), name


def test_a_code_counts_the_same_in_whatever_batch_it_comes(tmp_path, one_process):
    clips = code_gradients.Clips(4)
    found = code_gradients.of_a_step(clips, 2, tmp_path)
    distances = code_gradients.distances(code_gradients.of_all_codes(clips), found)
    assert distances["gradient"] < 1e-6 and distances["loss"] < 1e-6, distances


@pytest.mark.soak
@pytest.mark.slow
def test_a_growing_scale_of_fp16_changes_no_gradient(make_trainer):
    """The scale doubles after every step, once, and never between the batches of one."""
    found = {}
    for growth in (1, 10**6):
        scaler, trainer = scaled(make_trainer, 2.0**8, max_steps=2, gradient_accumulation_steps=2)
        scaler.set_growth_interval(growth)
        found[growth] = keep_gradients(trainer)
        run(trainer)
        assert scaler.get_scale() == (2.0**10 if growth == 1 else 2.0**8)
    for name, growing in found[1].items():
        assert len(growing) == 2
        for one, other in zip(growing, found[10**6][name], strict=True):
            assert (one - other).norm() < 1e-5 * other.norm(), name


@pytest.mark.slow
def test_an_overflow_of_one_module_lowers_the_scale_of_both_at_the_end_of_the_step(make_trainer):
    scaler, trainer = scaled(make_trainer, 2.0**8, max_steps=3, gradient_accumulation_steps=2)
    kept = keep_gradients(trainer)
    GradientOfNaN(trainer, steps=(1,))
    scales = []
    backward = trainer.accelerator.backward

    def watched(loss):
        scales.append(scaler.get_scale())
        backward(loss)

    trainer.accelerator.backward = watched
    run(trainer)
    # Two batches a step, with a backward pass each of generator and discriminator.
    assert scales == [2.0**8] * 8 + [2.0**7] * 4
    assert (len(kept["generator"]), len(kept["discriminator"])) == (2, 3)
    assert trainer.stepper.guard.overflows == 1 and trainer.progress.bad_steps == 0


def test_a_skipped_step_and_a_late_discriminator_leave_the_scaler_in_order(make_trainer):
    scaler, trainer = scaled(make_trainer, 2.0**8, max_steps=3)
    trainer.recipe.loss.discriminator_start = 2
    LossOf(trainer, steps=(1,))
    kept = keep_gradients(trainer)
    run(trainer)
    assert (len(kept["generator"]), len(kept["discriminator"])) == (2, 1)
    assert trainer.progress.bad_steps == 1 and scaler.get_scale() == 2.0**7
