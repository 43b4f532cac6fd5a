"""Penalty on correlated dimensions of a codebook: what the codebook itself gives, and what it does."""

import pytest
import torch

from modeling_simvq import SimVQ
from training.codebook.decorrelation import Decorrelation
from training.codebook.spectra import spectrum
from training.runtime.settings import SettingsError


def collapsed(dim: int = 8, rank: int = 2) -> SimVQ:
    """Return a quantizer whose codes hardly leave a plane."""
    torch.manual_seed(0)
    quantizer = SimVQ(512, dim)
    with torch.no_grad():
        plane = torch.randn(dim, rank) @ torch.randn(rank, dim)
        quantizer.projection.weight.copy_(plane + 0.05 * torch.randn(dim, dim))
    return quantizer


def test_it_is_that_of_the_codebook():
    quantizer = collapsed()
    codes = quantizer.codebook().double()
    expected = (torch.corrcoef(codes.T) - torch.eye(8)).square().mean()
    torch.testing.assert_close(Decorrelation([quantizer])().double(), expected, rtol=1e-4, atol=0)


def test_its_gradient_is_that_of_the_codebook():
    quantizer = collapsed()
    Decorrelation([quantizer])().backward()
    found, quantizer.projection.weight.grad = quantizer.projection.weight.grad, None
    codes = quantizer.basis @ quantizer.projection.weight.T
    (torch.corrcoef(codes.T) - torch.eye(8)).square().mean().backward()
    torch.testing.assert_close(found, quantizer.projection.weight.grad, rtol=1e-3, atol=1e-6)
    assert quantizer.basis.grad is None


def test_it_raises_the_rank():
    quantizer = collapsed()
    penalty = Decorrelation([quantizer])
    before = spectrum(quantizer.codebook()).effective_rank
    optimizer = torch.optim.Adam(quantizer.projection.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert before < 4 and spectrum(quantizer.codebook()).effective_rank > 6


def test_a_basis_that_is_drawn_again_counts_as_it_is():
    quantizer = collapsed()
    penalty = Decorrelation([quantizer])
    first = penalty()
    with torch.no_grad():
        quantizer.basis.copy_(quantizer.basis @ torch.randn(8, 8))
    torch.testing.assert_close(penalty(), Decorrelation([quantizer])())
    assert not torch.equal(penalty(), first)


@pytest.mark.parametrize("options", [{"projection_hidden_dim": 4}, {"train_basis": True}])
def test_what_it_cannot_take(options):
    with pytest.raises(SettingsError, match="decorrelation_weight: it takes the quantizer simvq"):
        Decorrelation([SimVQ(16, 4, **options)])
