"""NaN and infinity, injected everywhere: skipped, without a trace in what lasts, and with a named cause."""

import pytest
import torch

from tests.training.loop.test_checkpoints import equal, everything, names
from training.loop.checkpoints import list_checkpoints
from training.loop.finite import DivergedError, first_non_finite

NAN = float("nan")
# A recipe in which the losses have running means too.
LECAM = {"lecam_weight": 0.1}


class Injection:
    """Spoils chosen calls of a step, and compares what lasts before and after it."""

    def __init__(self, trainer, steps=(2,)):
        self.trainer, self.steps, self.active = trainer, steps, False
        self.untouched: list[bool] = []
        train_batch = trainer._train_batch

        def watched(batch):
            # A step starts with its first batch.
            if not trainer.window:
                self.before = self._lasting()
            self.active = trainer.progress.step in steps
            stepped = train_batch(self.spoil_batch(batch) if self.active else batch)
            if stepped and trainer.progress.step - 1 in steps:
                self.untouched.append(equal(self.before, self._lasting()))
            return stepped

        trainer._train_batch = watched

    def _lasting(self) -> dict:
        trainer = self.trainer
        state = everything(trainer) | {"means": trainer.reports.means.state_dict()["sums"]}
        del state["rates"]  # schedules continue with the steps
        state["codes"] = trainer.stepper.watch.counter.counts
        clone = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, state)
        return clone

    def spoil_batch(self, batch):
        return batch


class BatchOfNaN(Injection):
    cause = "the batch itself: pixel_values"

    def spoil_batch(self, batch):
        pixels = batch["pixel_values"].clone()
        pixels[1, 0, 3, 3] = NAN
        return batch | {"pixel_values": pixels}


class LossOf(Injection):
    cause = "terms: generator/total, generator/perceptual"

    def __init__(self, trainer, steps=(2,), value=NAN):
        super().__init__(trainer, steps)
        original = trainer.recipe.loss.generator

        def poisoned(*args, **kwargs):
            total, terms = original(*args, **kwargs)
            if self.active:
                total = total + value
                terms = terms | {"total": total.detach(), "perceptual": terms["total"] * value}
            return total, terms

        trainer.recipe.loss.generator = poisoned


class LossOfInfinity(LossOf):
    def __init__(self, trainer, steps=(2,)):
        super().__init__(trainer, steps, value=float("inf"))


class GradientOfNaN(Injection):
    cause = "terms: all finite; first layer with such a gradient: decoder.conv_in"

    def __init__(self, trainer, steps=(2,)):
        super().__init__(trainer, steps)
        decoder = trainer.recipe.model.decoder

        def spoil(layer, args, output):
            if self.active and output.requires_grad:
                output.register_hook(lambda gradient: gradient * float("inf"))

        decoder.conv_in.register_forward_hook(spoil)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BatchOfNaN, LossOf, LossOfInfinity, GradientOfNaN])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_bad_step_leaves_no_trace(make_trainer, caplog, kind, passes):
    trainer = make_trainer(LECAM, max_steps=4, gradient_accumulation_steps=passes, epochs=9)
    injection = kind(trainer)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert injection.untouched == [True]
    assert trainer.progress.bad_steps == 1 and trainer.progress.step == 4
    assert first_non_finite(everything(trainer)) is None
    assert "step 2 skipped" in caplog.text and kind.cause in caplog.text


@pytest.mark.slow
def test_a_bad_discriminator_loss_stops_the_discriminator_only(make_trainer, caplog):
    trainer = make_trainer(LECAM, max_steps=4)
    original, calls = trainer.recipe.loss.discriminator, []

    def poisoned(*args, **kwargs):
        total, terms = original(*args, **kwargs)
        calls.append(1)
        return (total * NAN if len(calls) == 2 else total), terms

    trainer.recipe.loss.discriminator = poisoned
    seen = []
    train_batch = trainer._train_batch

    def watched(batch):
        stepped = train_batch(batch)
        state = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, everything(trainer))
        seen.append(state)
        return stepped

    trainer._train_batch = watched
    trainer.train()
    changed = [
        {k: not equal(before[k], after[k]) for k in before}
        for before, after in zip(seen, seen[1:], strict=False)
    ]
    assert trainer.progress.bad_steps == 1
    own = ("discriminator", "discriminator optimizer", "loss")
    assert changed[0]["generator"] and not any(changed[0][name] for name in own)
    assert all(changed[1].values())


@pytest.mark.slow
def test_a_window_of_bad_steps_is_reported(make_trainer):
    trainer = make_trainer(max_steps=3, log_every=1)
    BatchOfNaN(trainer, steps=(0, 1))
    logged = []
    trainer.accelerator.log = lambda values, step: logged.append(values)
    trainer.train()
    figures = [values for values in logged if "run/bad_steps" in values]
    assert [values["run/bad_steps"] for values in figures] == [1, 2, 2]
    assert "generator/total" not in figures[1] and figures[2]["generator/total"] > 0


@pytest.mark.slow
def test_bad_steps_in_a_row_end_the_run_with_a_diagnosis(make_trainer, tmp_path):
    """A layer that turns to NaN is found by its output."""
    trainer = make_trainer(max_steps=50, epochs=50, max_bad_steps=3, save_every=1)
    conv = trainer.recipe.model.decoder.conv_in

    def spoil(layer, args, output):
        return output * NAN if trainer.progress.step >= 2 else output

    conv.register_forward_hook(spoil)
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "3 steps in a row" in message and "generator/reconstruction" in message
    assert "first layer with such an output: generator.decoder.conv_in" in message
    # The steps that were skipped had their checkpoints, which are as good as the one before.
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert f"The last good checkpoint is {newest}" in message and trainer.progress.step == 4


@pytest.mark.slow
def test_bad_weights_are_told_from_bad_batches(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=9, epochs=9, save_every=2, keep_checkpoints=1)
    train_batch = trainer._train_batch

    def watched(batch):
        if trainer.progress.step == 3:
            trainer.recipe.model.decoder.conv_in.weight.data[0, 0] = NAN
        return train_batch(batch)

    trainer._train_batch = watched
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "generator.decoder.conv_in.weight are not finite, and skipping steps cannot" in message
    (newest,) = list_checkpoints(tmp_path / "run")
    assert newest.name == "step-00000002" and str(newest) in message


@pytest.mark.slow
@pytest.mark.parametrize("place", ["average", "generator optimizer", "discriminator"])
def test_bad_values_never_reach_a_checkpoint(make_trainer, tmp_path, place):
    trainer = make_trainer(max_steps=4, save_every=2, keep_checkpoints=1)
    train_batch = trainer._train_batch

    def watched(batch):
        stepped = train_batch(batch)
        if trainer.progress.step == 4:  # nothing that the next step would notice before the save
            if place == "average":
                trainer.ema.module.decoder.conv_in.weight.data[0, 0] = NAN
            elif place == "discriminator":
                next(trainer.recipe.discriminator.parameters()).data[0] = float("inf")
            else:
                state = trainer.stepper.optimizers["generator"].state
                next(iter(state.values()))["exp_avg_sq"].fill_(float("inf"))
        return stepped

    trainer._train_batch = watched
    with pytest.raises(DivergedError, match=f"{place}.* is not finite: no checkpoint is written"):
        trainer.train()
    assert names(tmp_path / "run") == ["step-00000002"]


def fp16(make_trainer, init_scale: float, **settings):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=10**6)
    # fp16 is slow on a CPU.
    recipe = {"count": 64, "batch_size": 1, "validation": 0}
    return scaler, make_trainer(recipe, scaler, mixed_precision="fp16", **settings)


@pytest.mark.slow
def test_overflow_of_fp16_is_no_fault(make_trainer, caplog):
    """With far too large a scale the scaler halves it until gradients fit: no step counts as bad."""
    scaler, trainer = fp16(make_trainer, 2.0**26, max_steps=10, max_bad_steps=1, epochs=9)
    before = everything(trainer)["generator"]["decoder.conv_in.weight"].clone()
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.progress.bad_steps == 0 and "skipped" not in caplog.text
    assert trainer.stepper.guard.overflows > 0
    assert scaler.get_scale() == 2.0 ** (26 - trainer.stepper.guard.overflows)
    assert first_non_finite(everything(trainer)) is None
    after = everything(trainer)["generator"]["decoder.conv_in.weight"]
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_a_loss_of_nan_is_a_fault_with_fp16_too(make_trainer, caplog):
    scaler, trainer = fp16(make_trainer, 2.0**10, max_steps=4, epochs=9)
    injection = LossOf(trainer)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert injection.untouched == [True] and trainer.progress.bad_steps == 1
    assert trainer.stepper.guard.overflows == 0 and LossOf.cause in caplog.text


@pytest.mark.slow
def test_gradients_that_no_scale_saves_are_a_fault(make_trainer):
    scaler, trainer = fp16(make_trainer, 4.0, max_steps=50, max_bad_steps=2, epochs=50)
    GradientOfNaN(trainer, steps=range(50))
    with pytest.raises(DivergedError, match="2 steps in a row.*gradient: decoder.conv_in"):
        trainer.train()
    assert trainer.stepper.guard.overflows == 3  # at scales 4, 2 and 1


def test_a_run_of_bad_steps_alone_is_no_finished_run(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=3)
    LossOf(trainer, steps=(0, 1, 2))
    with pytest.raises(DivergedError, match="no step of this run was finite"):
        trainer.train()
    assert not (tmp_path / "finished.json").exists()
