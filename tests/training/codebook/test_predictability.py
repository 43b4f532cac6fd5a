"""Cheap figures of how far codes can be predicted, where the answer is known."""

import math

import pytest
import torch

from training.codebook.predictability import (
    SampleOfCodes,
    _smoothed,
    predictability,
    prefix_entropies,
)


def random_codes(*shape: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


def vectors(size: int) -> torch.Tensor:
    """On a line, so that codes are similar to those of nearby numbers."""
    return torch.arange(size)[:, None].float().expand(size, 2)


def test_codes_at_random_cost_their_full_bits():
    found = predictability(random_codes(4000, 4, 4, size=64), vectors(64))
    assert found.uniform_bits == 6 and found.unseen == 0
    assert found.frequency_bits == pytest.approx(6, abs=0.02)
    assert found.told_by_neighbours == pytest.approx(0, abs=0.01)
    assert found.held_out_tokens == 400 * 16


def test_unequal_frequencies_cost_their_entropy():
    codes = torch.where(random_codes(4000, 16, size=4) == 0, 1, 9)
    found = predictability(codes, vectors(64))
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert found.frequency_bits == pytest.approx(entropy, abs=0.02)


@pytest.mark.parametrize("side", ["left", "above", "before"])
def test_neighbours_tell_the_class(side):
    """256 codes of which each is like its neighbour: 4 bits stay, the place in one of 16 classes."""
    classes, places = random_codes(3000, 4, 4, size=16), random_codes(3000, 4, 4, size=16, seed=1)
    if side == "above":
        classes[:, 1:] = classes[:, :1]
    else:
        classes[:, :, 1:] = classes[:, :, :1]
    codes = classes * 16 + places
    if side == "before":  # no grid, as of audio
        codes = codes.flatten(0, 1)
    found = predictability(codes, vectors(256))
    # Of four codes three have a neighbour that tells four of eight bits.
    assert found.frequency_bits == pytest.approx(8, abs=0.1)
    assert found.neighbour_bits == pytest.approx(5, abs=0.2)


def test_codes_that_nobody_has_seen_are_counted_and_have_a_price():
    codes = torch.arange(400).view(100, 4)
    found = predictability(codes, vectors(400))
    assert found.unseen == 1 and math.log2(400) < found.frequency_bits < 20
    with pytest.raises(ValueError, match="there must be two"):
        predictability(codes[:1], vectors(400))


def test_smoothed_counts_are_probabilities():
    counts = random_codes(5, 7, size=4).double()
    counts[2] = 0
    before = torch.full((7,), 1 / 7, dtype=torch.float64)
    found = _smoothed(counts, before)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert (found > 0).all() and torch.equal(found[2], before)


def test_beginnings_tell_samples_apart():
    """Eight samples: two bits with the first code, one with the second, and then each is alone."""
    numbers = torch.arange(8)
    codes = torch.stack([numbers // 2, numbers % 2, numbers, numbers % 3], dim=1)
    assert prefix_entropies(codes) == pytest.approx([2, 1, 0, 0])
    assert prefix_entropies(codes[:, [3]])[0] < math.log2(3)


def test_the_sample_of_codes_is_bounded_and_drawn_from_all():
    sample = SampleOfCodes(most_tokens=400)
    for start in range(0, 1000, 50):
        sample.add(torch.arange(start, start + 50)[:, None].expand(50, 4))
    assert sample.codes.shape == (100, 4) and len(sample.codes[:, 0].unique()) == 100
    assert 300 < sample.codes.float().mean() < 700
