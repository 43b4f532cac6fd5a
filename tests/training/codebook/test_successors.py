"""The losses and schedules of SimVQ's successors: what their equations give, and what they do to a run."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from modeling_simvq import SimVQ, SimVQImageConfig, SimVQImageModel
from modeling_simvq.quantization_baselines import make_quantizer
from tests.training.support.tiny_recipe import TINY, build_tiny_recipe
from training.codebook.drift import DriftLoss, drift_loss, trained_codes
from training.codebook.gram import GramPenalty
from training.codebook.penalties import CodebookPenalties
from training.codebook.phase_end import GaussianCode, PhaseEnd
from training.codebook.replacement import CodeReplacement
from training.loop.trainer import Trainer
from training.loop.validation import run_validation
from training.recipes.run import make_accelerator
from training.recipes.tokenizer import TokenizerLoopSettings
from training.runtime.settings import SettingsError


def plain_vq(codes: int = 64, dim: int = 16) -> SimVQ:
    return SimVQ(codes, dim, train_basis=True, train_projection=False)


@pytest.mark.parametrize("temperature", [10.0, 0.1, 1e-3])
def test_the_drift_loss_is_the_weighted_errors_of_all_pairs(temperature):
    torch.manual_seed(0)
    table = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(300, 6, dtype=torch.float64)
    squares = (rows[:, None] - table).square()
    distances = squares.sum(dim=2).detach()
    codes = distances.argmin(dim=1)
    weights = (0.01 * 40 * (-distances / temperature).softmax(dim=1)).clamp(max=1)
    expected = (weights * (1 - F.one_hot(codes, 40)) * squares.mean(dim=2)).sum() / 300
    expected.backward()
    gradient, table.grad = table.grad, None
    found = drift_loss(table, rows, codes, 0.01, temperature)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(table.grad, gradient)


def test_codes_that_nobody_picks_follow_latents_that_move():
    """What the loss is for: plain VQ's own draws the picked codes alone to latents that are elsewhere."""
    torch.manual_seed(0)
    latents, left = 0.3 * torch.randn(1, 16, 64) + 1, []
    for weight in (0.0, 0.01):
        quantizer = plain_vq()
        optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
        drift = DriftLoss(quantizer, 0.01, steps=200)
        for step in range(200):
            _, codes, loss = quantizer(latents)
            if weight:
                loss = loss + drift(latents, codes, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        distances = (quantizer.codebook() - latents.mean(dim=(0, 2))).norm(dim=1)
        left.append(float(distances.gt(3).float().mean()))
    assert left[0] > 0.5 and left[1] < 0.1, left


def test_the_gram_penalty_is_that_of_the_codes_as_directions():
    torch.manual_seed(0)
    quantizer = SimVQ(100, 5)
    directions = F.normalize(quantizer.codebook().double(), dim=1)
    gram = directions.T @ directions
    expected = (gram * (1 - torch.eye(5))).square().sum() / 20
    found = GramPenalty([quantizer])()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    found.backward()
    assert quantizer.projection.weight.grad.norm() > 0 and quantizer.basis.grad is None


@pytest.mark.parametrize("bits", [1, 4, 10, 40])
def test_the_directions_that_a_code_reaches_are_those_of_water_filling(bits):
    variances = 2.0 ** -torch.arange(12, dtype=torch.float64)
    low, high = 1e-30, 2.0
    for _ in range(300):
        level = math.sqrt(low * high)
        spent = float((variances / level).log2().clamp(min=0).sum() / 2)
        low, high = (level, high) if spent > bits else (low, level)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    covariance = rotation @ variances.diag() @ rotation.T
    code = GaussianCode(torch.zeros(12), covariance, bits)
    assert code.level == pytest.approx(level, rel=1e-6)
    assert code.reached == int((variances > level * (1 + 1e-9)).sum())


def test_a_code_leaves_the_error_of_rate_distortion_theory():
    torch.manual_seed(0)
    mix, mean = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    latents = (mix @ torch.randn(6, 200_000, dtype=torch.float64)).T + mean
    covariance = mix @ mix.T
    code = GaussianCode(mean, covariance, 8)
    coded = code(latents.T[None].float(), torch.Generator().manual_seed(1))[0].T
    expected = float(torch.linalg.eigvalsh(covariance).clamp(max=code.level).sum())
    assert float((coded - latents).square().sum(dim=1).mean()) == pytest.approx(expected, rel=0.02)
    # A code's vectors are means of what they stand for: the error is not correlated with them.
    error = latents - coded
    assert ((coded - mean).T @ error / len(error)).abs().max() < 0.02 * covariance.max()


def test_latents_that_do_not_vary_go_through_as_they_are():
    code = GaussianCode(torch.ones(3), torch.zeros(3, 3, dtype=torch.float64), 10)
    assert torch.allclose(code(torch.ones(2, 3, 4)), torch.ones(2, 3, 4))


def test_a_phase_ends_when_the_loss_through_a_code_does_not_fall(one_process):
    accelerator = make_accelerator(TokenizerLoopSettings(tracker="none"))
    end = PhaseEnd(10, 8, 400, accelerator)
    losses, ends = iter([5.0, 4.0, 3.0, 2.99, 3.2, 2.98, 1.0]), None
    for step in range(1, 400):
        end.note(torch.zeros(4), torch.randn(4, 8, 16))
        end.settle(skipped=False)
        if end.due(step, lambda inputs, latents: torch.tensor(next(losses))):
            ends = step
            break
    assert end.every == 20 and ends == 6 * 20


def trainer_of(
    folder, quantizer: str = "simvq", options=None, num_quantizers: int = 1, **settings
) -> Trainer:
    recipe = build_tiny_recipe(16, 2, validation=0, discriminator_start=99)
    config = TINY.to_dict() | {"quantizer": quantizer, "quantizer_options": options or {}}
    config["num_quantizers"] = num_quantizers
    torch.manual_seed(0)
    recipe.model = SimVQImageModel(SimVQImageConfig.from_dict(config))
    loop = TokenizerLoopSettings(output_dir=str(folder), tracker="none", **settings)
    return Trainer(recipe, loop, make_accelerator(loop))


PLAIN = {"train_basis": True, "train_projection": False}


@pytest.mark.slow
def test_unused_codes_are_put_on_latents(tmp_path, one_process):
    trainer = trainer_of(tmp_path, "simvq", PLAIN, max_steps=2, replace_unused_every=2)
    table, steps = trainer.recipe.model.quantizer.basis, iter(trainer.batches)
    trainer._train_batch(next(steps))
    replacement = trainer.stepper._replacement
    settle, seen = replacement.settle, {}

    def watched(skipped, step):
        seen["counts"] = replacement.counter.counts.clone()
        seen["latents"] = [note for note in replacement._window]
        count = settle(skipped, step)
        seen["count"], seen["table"] = count, table.detach().clone()
        seen["moment"] = trainer.stepper.optimizers["generator"].state[table]["exp_avg"].clone()
        return count

    replacement.settle = watched
    trainer._train_batch(next(steps))
    seen["counts"].index_add_(0, *_ones(seen["latents"][0][0]))
    unused = (seen["counts"] == 0).nonzero()[:, 0]
    assert seen["count"] == len(unused) > 0
    rows = seen["latents"][0][1].movedim(1, -1).reshape(-1, 16)
    assert torch.cdist(seen["table"][unused], rows).amin(dim=1).max() < 1e-3
    assert seen["moment"][unused].abs().max() == 0 < seen["moment"].abs().max()
    assert torch.allclose(trainer.ema.module.quantizer.basis[unused], seen["table"][unused])


def _ones(codes):
    return codes.flatten(), torch.ones_like(codes.flatten())


@pytest.mark.slow
def test_the_encoder_rests_after_its_steps(tmp_path, one_process):
    trainer = trainer_of(tmp_path, max_steps=4, encoder_steps=2)
    model, states = trainer.recipe.model, []
    for batch in trainer.batches:
        trainer._train_batch(batch)
        parts = model.encoder, model.quantizer.projection, model.decoder
        states.append([torch.cat([p.flatten() for p in part.parameters()]) for part in parts])
    second, fourth = states[1], states[3]
    assert torch.equal(second[0], fourth[0])
    assert not torch.equal(second[1], fourth[1]) and not torch.equal(second[2], fourth[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"autoencoder_steps": 6, "end_phase_early": True, "learning_rate": 1e-9},
        {"replace_unused_every": 4, "drift_weight": 0.01, "encoder_steps": 5, "gram_weight": 1e-3},
    ],
    ids=["a phase with an open end", "drift, replacement, freezing"],
)
def test_a_run_goes_on_with_them_bit_for_bit(tmp_path, one_process, monkeypatch, settings):
    monkeypatch.setattr("training.codebook.phase_end.PATIENCE", 1)
    monkeypatch.setattr("training.codebook.phase_end.GAIN", 0.2)
    plain = PLAIN if "drift_weight" in settings else {}

    def trainer(folder: str, **more) -> Trainer:
        options = {"lr_schedule": "constant", "warmup_steps": 0, "save_every": 3, "max_steps": 7}
        return trainer_of(tmp_path / folder, "simvq", plain, **(options | settings | more))

    whole = trainer("whole")
    whole.train()
    cut = trainer("parts")
    validation_due = cut._validation_due
    cut._validation_due = lambda: 1 / 0 if cut.progress.step == 5 else validation_due()
    with pytest.raises(ZeroDivisionError):
        cut.train()
    resumed = trainer("parts", resume="latest")
    resumed.train()
    if "end_phase_early" in settings:
        assert whole.stepper._first_quantized == resumed.stepper._first_quantized < 6
    for one, other in zip(
        whole.recipe.model.parameters(), resumed.recipe.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_what_the_settings_need(tmp_path, one_process):
    with pytest.raises(SettingsError, match="set autoencoder_steps, the longest"):
        TokenizerLoopSettings(end_phase_early=True)
    with pytest.raises(SettingsError, match="encoder_steps"):
        TokenizerLoopSettings(encoder_steps=0)
    with pytest.raises(SettingsError, match="replace_unused_every: only a trained table"):
        trainer_of(tmp_path, max_steps=1, replace_unused_every=2)
    for name in ("drift_weight", "gram_weight"):
        with pytest.raises(SettingsError, match=f"{name}: it takes a quantizer whose codes"):
            trainer_of(tmp_path, "fsq", {"levels": [4, 4, 4]}, max_steps=1, **{name: 0.1})


@pytest.mark.slow
def test_a_run_that_goes_on_may_begin_to_replace_codes(tmp_path, one_process):
    """The resume rules allow it, and a checkpoint from before it has no counts."""
    trainer_of(tmp_path, "simvq", PLAIN, max_steps=2, save_every=1).train()
    resumed = trainer_of(
        tmp_path, "simvq", PLAIN, max_steps=3, replace_unused_every=1, resume="latest"
    )
    resumed.train()
    assert resumed.progress.step == 3


def test_codes_that_a_run_does_not_train_are_not_replaced():
    quantizer = plain_vq().requires_grad_(False)
    with pytest.raises(SettingsError, match="replace_unused_every=4 moves codes .* set it to 0"):
        CodeReplacement([quantizer, quantizer], None, 4, None)


@pytest.mark.parametrize("name", ["decorrelation_weight", "gram_weight", "drift_weight"])
def test_codes_that_a_run_does_not_train_get_no_losses(name):
    """They would be without effect, and nobody would know."""
    settings = TokenizerLoopSettings(**{name: 0.1})
    quantizer = SimVQ(32, 8)
    CodebookPenalties(quantizer, settings, 10)
    with pytest.raises(SettingsError, match=f"{name}=0.1 moves codes .* does not train"):
        CodebookPenalties(quantizer.requires_grad_(False), settings, 10)


def test_a_phase_may_be_due_before_a_resumed_run_has_taken_a_step(tmp_path, one_process):
    """Its first step may be skipped: there are moments then, of the checkpoint, and no latents."""
    stepper = trainer_of(tmp_path, max_steps=99, autoencoder_steps=40, end_phase_early=True).stepper
    rows = torch.cat([torch.randn(128, 16), torch.ones(128, 1)], dim=1)
    saved = {"moments": rows.T @ rows, "best": math.inf, "since": 0}
    stepper._phase_end.load_state_dict(saved)
    stepper._phase_end.note(torch.zeros(2), torch.randn(2, 16, 8, 8))
    stepper._steps = stepper._phase_end.every
    stepper.settle(True)
    assert stepper._phase_end.best == math.inf and stepper._first_quantized == 40


@pytest.mark.parametrize("name", ["vq", "diveq", "ibq", "simvq"])
def test_trained_codes_are_those_of_the_codebook(name):
    if name in ("vq", "diveq"):
        pytest.importorskip("vector_quantize_pytorch")
    config = SimVQImageConfig(codebook_size=64, codebook_dim=16, quantizer=name)
    quantizer = make_quantizer(config)
    codes = trained_codes(quantizer)
    assert codes.requires_grad
    torch.testing.assert_close(codes, quantizer.codebook())


@pytest.mark.parametrize("name", ["vq_ema", "fc", "fsq", "lfq", "fvq"])
def test_codes_that_are_not_trained_as_they_are(name):
    pytest.importorskip("vector_quantize_pytorch")
    options = {"levels": [4, 4, 4]} if name == "fsq" else {}
    config = SimVQImageConfig(
        codebook_size=64, codebook_dim=16, quantizer=name, quantizer_options=options
    )
    assert trained_codes(make_quantizer(config)) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"projection_hidden_dim": 16}, {"basis_dim": 24}, PLAIN], ids=lambda o: [*o][0]
)
def test_codes_that_cannot_be_latents_start_with_their_moments(
    options, tmp_path, one_process, caplog
):
    """It was a crash at the end of the phase, or codes anywhere."""
    settings = {"max_steps": 4, "autoencoder_steps": 2}
    drawn = trainer_of(tmp_path / "a", "simvq", options, codes_from_latents=True, **settings)
    assert "codes_from_latents: only simvq with one linear layer" in caplog.text
    drawn.train()
    matched = trainer_of(tmp_path / "b", "simvq", options, **settings)
    matched.train()
    pairs = zip(drawn.recipe.model.parameters(), matched.recipe.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
def test_a_phase_that_has_not_ended_may_be_made_longer(early, tmp_path, one_process):
    settings = {"end_phase_early": early, "save_every": 2, "warmup_steps": 0}
    trainer_of(tmp_path, autoencoder_steps=5, max_steps=2, **settings).train()
    more = {"autoencoder_steps": 8, "max_steps": 9, "resume": "latest"}
    longer = trainer_of(tmp_path, **more, **settings)
    longer.train()
    assert longer.stepper._first_quantized == 8


def test_an_encoder_that_rests_before_it_sees_a_code(tmp_path):
    with pytest.raises(SettingsError, match="encoder_steps=3 freezes .* autoencoder_steps=5"):
        TokenizerLoopSettings(encoder_steps=3, autoencoder_steps=5)


def test_a_validation_counts_each_quantizer_for_itself(tmp_path, one_process):
    """One of them may be dead while all together use every code."""
    trainer = trainer_of(tmp_path, max_steps=1, num_quantizers=2)
    levels = trainer.ema.module.quantizer.levels
    with torch.no_grad():
        levels[1].projection.weight.zero_()
    pixels = torch.rand(6, 3, 16, 16) * 2 - 1
    rows = {"pixel_values": pixels, "valid": torch.ones(6) > 0, "unreadable": torch.zeros(6).long()}
    batches = [{name: values[i : i + 3] for name, values in rows.items()} for i in (0, 3)]
    figures = run_validation(
        trainer.accelerator.prepare(DataLoader(batches, batch_size=None)),
        trainer.accelerator,
        trainer.ema.module.config,
        lambda batch: ({}, trainer.ema.module.encode(batch["pixel_values"]).image_codes),
    )
    first = len(trainer.ema.module.encode(pixels).image_codes[:, 0].unique()) / 64
    assert figures["utilisation_2"] == 1 / 64 and figures["utilisation_1"] == first
    assert figures["utilisation"] == pytest.approx((first + 1 / 64) / 2)
