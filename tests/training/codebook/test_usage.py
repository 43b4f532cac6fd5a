import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from training.codebook.usage import (
    CodeCounter,
    CodeUsage,
    effective_rank,
    latent_statistics,
    reachable_utilisation,
)


def test_usage_of_a_known_case():
    usage = CodeUsage.from_counts(torch.tensor([2, 0, 1, 1]))
    assert usage.utilisation == 0.75
    assert usage.perplexity == pytest.approx(2**1.5)  # entropy 1.5 bits
    assert (usage.tokens, usage.ceiling) == (4, 1.0)


@pytest.mark.parametrize(("tokens", "size"), [(0, 5), (1, 1), (0, 1), (256, 1024), (9, 262_144)])
def test_reachable_utilisation_is_the_mean_over_random_tokens(tokens, size):
    assert reachable_utilisation(tokens, size) == pytest.approx(1 - (1 - 1 / size) ** tokens)
    drawn = torch.randint(size, (400, tokens), generator=torch.Generator().manual_seed(0))
    found = sum(len(row.unique()) / size for row in drawn) / len(drawn)
    assert reachable_utilisation(tokens, size) == pytest.approx(found, rel=0.01)


def test_usage_stands_beside_what_so_many_tokens_could_reach():
    counts = torch.zeros(1024, dtype=torch.int64)
    counts[:122] = 2
    counts[0] += 12
    usage = CodeUsage.from_counts(counts)
    assert str(usage) == "11.9% of 1,024 codes used (256 tokens could reach 22.1%)"
    assert usage.metrics()["reachable_utilisation"] == pytest.approx(0.2213, abs=1e-4)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=40))
def test_usage_bounds(counts):
    usage = CodeUsage.from_counts(torch.tensor(counts))
    used = sum(count > 0 for count in counts)
    assert usage.utilisation == used / len(counts)
    if used:
        assert 1 - 1e-9 <= usage.perplexity <= used + 1e-9
    assert usage.utilisation <= usage.ceiling


def test_counter_sums_batches_and_resets():
    counter = CodeCounter(8, torch.device("cpu"))
    counter.update(torch.tensor([[[1, 1], [2, 7]]]))
    counter.update(torch.tensor([[[1, 0], [2, 7]]]))
    assert counter.counts.tolist() == [1, 3, 2, 0, 0, 0, 0, 2]
    assert counter.read(Accelerator(cpu=True)).tokens == 8
    counter.reset()
    assert counter.counts.sum() == 0


def test_effective_rank_of_known_spectra():
    rows = torch.eye(6).repeat(50, 1)  # centred: five equal directions
    assert effective_rank(rows) == pytest.approx(5, rel=1e-6)
    line = torch.linspace(-1, 1, 100)[:, None] * torch.randn(6)
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(10, 6)) == 0.0
    assert effective_rank(torch.full((10, 6), float("nan"))) == 0.0
    spectrum = torch.tensor([3.0, 1.0])
    rows = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) * spectrum
    shares = spectrum / spectrum.sum()
    assert effective_rank(rows) == pytest.approx(math.exp(-float((shares * shares.log()).sum())))


def test_scale_ratio_ignores_the_mean():
    codebook = torch.randn(500, 16)
    latents = (3 * codebook[:400] + 7).view(4, 10, 10, 16).permute(0, 3, 1, 2)
    statistics = latent_statistics(latents, codebook)
    assert statistics["scale_ratio"] == pytest.approx(3, rel=0.05)


def test_codes_start_where_the_latents_are():
    from modeling_simvq import SimVQ
    from training.codebook.start import match_codes_to_latents

    torch.manual_seed(0)
    mixing = torch.randn(8, 8) * 5
    latents = (torch.randn(4, 100, 8) @ mixing + 3).view(4, 10, 10, 8).permute(0, 3, 1, 2)
    quantizer, other = SimVQ(4096, 8), SimVQ(4096, 8)
    used_before = quantizer(latents)[1].unique().numel()
    match_codes_to_latents([quantizer, other], latents, Accelerator(cpu=True))
    codes, rows = quantizer.codebook(), latents.movedim(1, -1).reshape(-1, 8)
    assert torch.allclose(codes.mean(dim=0), rows.mean(dim=0), atol=0.1 * float(rows.std()))
    difference = torch.cov(codes.T) - torch.cov(rows.T)
    assert difference.norm() < 0.15 * torch.cov(rows.T).norm()
    assert torch.equal(other.projection.weight, quantizer.projection.weight)
    assert quantizer(latents)[1].unique().numel() > 3 * used_before
    # Latents that are not finite change nothing.
    before = quantizer.projection.weight.clone()
    match_codes_to_latents([quantizer], latents * float("nan"), Accelerator(cpu=True))
    assert torch.equal(quantizer.projection.weight, before)


def test_features_in_the_place_of_c_start_where_the_latents_are_too():
    from modeling_simvq import SimVQ
    from training.codebook.start import match_codes_to_latents

    torch.manual_seed(0)
    features = torch.randn(4000, 9) @ torch.randn(9, 9) + 5
    quantizer = SimVQ(4000, 6, basis_dim=9, basis_init=features)
    latents = (torch.randn(3000, 6) @ torch.randn(6, 6) - 2).T[None]
    others = [SimVQ(10, 6, train_basis=True, train_projection=False), SimVQ(10, 6, basis_dim=3)]
    states = [[p.clone() for p in other.parameters()] for other in others]
    match_codes_to_latents([quantizer, *others], latents, Accelerator(cpu=True))
    rows, codes = latents[0].T, quantizer.codebook()
    assert torch.allclose(codes.mean(0), rows.mean(0), atol=1e-3)
    assert torch.allclose(codes.T.cov(), rows.T.cov(), rtol=1e-2, atol=1e-2)
    for other, state in zip(others, states, strict=True):
        assert all(p.equal(q) for p, q in zip(other.parameters(), state, strict=True))
