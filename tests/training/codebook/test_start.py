"""Codes that start where the latents are: by their moments, or drawn from them."""

import pytest
import torch

from modeling_simvq import SimVQ, SimVQImageConfig
from modeling_simvq.quantization_baselines import make_quantizer
from training.codebook.start import (
    LatentSample,
    match_codes_to_latents,
    put_codes_on,
    takes_latents_as_codes,
    whiten_codes,
)
from training.recipes.tokenizer import TokenizerLoopSettings
from training.runtime.settings import SettingsError


class OneProcess:
    """What the start asks of an Accelerator."""

    def gather(self, values):
        return values

    def reduce(self, values, reduction):
        return values


def two_heaps(count: int, dim: int = 4) -> torch.Tensor:
    """Latents (1, d, count), nine in ten of them in a small heap: their moments tell little of them."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(count, dim, generator=draw) * 3 + 5
    silent = torch.rand(count, generator=draw) < 0.9
    rows[silent] = torch.randn(int(silent.sum()), dim, generator=draw) * 0.05
    return rows.T[None].contiguous()


def used(quantizer: SimVQ, latents: torch.Tensor) -> float:
    codes = quantizer.eval()(latents)[1]
    return len(codes.unique()) / quantizer.codebook_size


@pytest.mark.parametrize("options", [{}, {"basis_dim": 6}, {"basis_init": "uniform"}])
def test_whitened_codes_have_no_mean_and_the_identity_as_covariance(options):
    quantizer = SimVQ(20_000, 4, **options)
    whiten_codes(quantizer)
    codes = quantizer.codebook()
    assert codes.mean(dim=0).abs().max() < 0.05
    torch.testing.assert_close(torch.cov(codes.T), torch.eye(4), atol=0.05, rtol=0)


@pytest.mark.parametrize("options", [{"projection_hidden_dim": 8}, {"basis_dim": 2}])
def test_projections_that_cannot_be_set_stay_as_they_are(options):
    quantizer = SimVQ(64, 4, **options)
    before = quantizer.codebook()
    whiten_codes(quantizer)
    put_codes_on([quantizer], torch.randn(64, 4) if "basis_dim" in options else torch.empty(0, 4))
    assert torch.equal(quantizer.codebook(), before)


def test_drawn_codes_are_the_latents_and_the_basis_keeps_its_moments():
    rows = two_heaps(500)[0].T
    ours, average = SimVQ(500, 4), SimVQ(500, 4)
    put_codes_on([ours, average], rows)
    torch.testing.assert_close(ours.codebook(), rows, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.codebook(), average.codebook())
    torch.testing.assert_close(
        torch.cov(ours.basis.T, correction=0), torch.eye(4) / 4, atol=1e-3, rtol=0
    )
    assert not ours.basis.requires_grad


def test_drawn_codes_are_used_where_matched_ones_are_not():
    latents = two_heaps(4000)
    matched, drawn = SimVQ(512, 4), SimVQ(512, 4)
    match_codes_to_latents([matched], latents, OneProcess())
    sample = LatentSample(512, 4, torch.device("cpu"))
    sample.add(latents)
    put_codes_on([drawn], sample.draw(512, OneProcess()))
    assert used(matched, latents) < 0.6
    assert used(drawn, latents) > 0.85


def test_the_sample_keeps_the_newest_latents():
    sample = LatentSample(10, 2, torch.device("cpu"))
    for step in range(8):
        sample.add(torch.full((1, 2, 16), float(step)))
    drawn = sample.draw(10, OneProcess())
    assert sorted(drawn[:, 0].tolist()) == [5.0, 5.0, 6.0, 6.0, 6.0, 6.0, 7.0, 7.0, 7.0, 7.0]


def test_too_few_latents_give_codes_that_differ_and_broken_ones_give_none():
    sample = LatentSample(100, 2, torch.device("cpu"))
    assert len(sample.draw(100, OneProcess())) == 0
    latents = torch.randn(1, 2, 40)
    latents[0, 0, 0] = torch.nan
    for _ in range(2):
        sample.add(latents)
    drawn = sample.draw(100, OneProcess())
    assert drawn.shape == (100, 2) and drawn.isfinite().all()
    assert len(drawn.unique(dim=0)) > 80
    quantizer = SimVQ(100, 2)
    before = quantizer.codebook()
    put_codes_on([quantizer], torch.full((0, 2), 0.0))
    assert torch.equal(quantizer.codebook(), before)


def test_a_sample_goes_on_where_it_was_saved():
    whole, part = (LatentSample(10, 2, torch.device("cpu")) for _ in range(2))
    first, second = torch.randn(2, 1, 2, 16)
    for sample in (whole, part):
        torch.manual_seed(0)
        sample.add(first)
    again = LatentSample(10, 2, torch.device("cpu"))
    again.load_state_dict(part.state_dict())
    for sample in (whole, again):
        torch.manual_seed(1)
        sample.add(second)
    assert torch.equal(whole.draw(10, OneProcess()), again.draw(10, OneProcess()))


def test_codes_from_latents_needs_a_first_phase():
    with pytest.raises(SettingsError, match="set autoencoder_steps"):
        TokenizerLoopSettings(codes_from_latents=True)


def test_a_basis_that_groups_share_is_set_by_the_first_and_the_others_can_still_be_matched():
    quantizer = make_quantizer(
        SimVQImageConfig(
            codebook_size=64,
            codebook_dim=6,
            num_quantizers=2,
            quantizer_arrangement="grouped",
            share_basis=True,
        )
    )
    assert takes_latents_as_codes(quantizer)
    torch.manual_seed(0)
    rows = torch.randn(64, 6) * 3 + 5
    put_codes_on([quantizer], rows)
    torch.testing.assert_close(quantizer.levels[0].codebook(), rows[:, :3], rtol=1e-4, atol=1e-4)
    match_codes_to_latents([quantizer], rows.T[None], OneProcess(), first=1)
    assert float((quantizer.levels[1].codebook().mean(0) - rows[:, 3:].mean(0)).abs().max()) < 0.5


@pytest.mark.slow
def test_the_trainer_draws_the_codes_when_the_phase_ends(make_trainer):
    trainer = make_trainer(max_steps=4, autoencoder_steps=3, codes_from_latents=True)
    quantizer = trainer.recipe.model.quantizer
    before, books = quantizer.basis.clone(), []
    step = trainer.stepper.step

    def watched(batch, number):
        result = step(batch, number)
        books.append(quantizer.codebook())
        return result

    trainer.stepper.step = watched
    trainer.train()
    assert torch.equal(books[0], books[1]) and torch.equal(books[1], books[2])
    assert not torch.equal(quantizer.basis, before)
    assert torch.equal(trainer.ema.module.quantizer.basis, quantizer.basis)
