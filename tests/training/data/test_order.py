"""Orders computed place by place: true permutations, well mixed, the same from any place on."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.order import PIECE, Permutation, SeededOrder, key_of, mixed, seeds_of

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(0, 5000), KEYS)
def test_every_number_comes_once(length, key):
    numbers = Permutation(length, key)(np.arange(length))
    assert np.array_equal(np.sort(numbers), np.arange(length))


@given(st.integers(1, 2**40), KEYS, st.data())
def test_any_places_of_a_large_range(length, key, data):
    places = data.draw(st.lists(st.integers(0, length - 1), max_size=20, unique=True))
    permutation = Permutation(length, key)
    numbers = permutation(np.array(places, np.int64))
    assert len(set(numbers.tolist())) == len(places)
    assert all(0 <= number < length for number in numbers)
    one_by_one = [int(permutation(np.array([place]))[0]) for place in places]
    assert one_by_one == numbers.tolist()


@pytest.mark.parametrize("length", [7, 64, 1000, 65536, 100_003])
def test_it_is_well_mixed(length):
    """Every place meets every number as often, and neighbours are no nearer to each other than strangers."""
    bins, draws = min(length, 10), max(2, 4_000 // length)
    counts = np.zeros((bins, bins))
    distances = []
    for draw in range(draws):
        numbers = Permutation(length, key_of(3, draw))(np.arange(length))
        np.add.at(counts, (np.arange(length) * bins // length, numbers * bins // length), 1)
        distances.append(np.abs(np.diff(numbers)).mean())
    rows, columns = counts.sum(1, keepdims=True), counts.sum(0, keepdims=True)
    expected = rows * columns / counts.sum()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (bins - 1) ** 2
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    assert np.mean(distances) == pytest.approx((length + 1) / 3, rel=0.05)


def test_mixed_bits_are_even():
    bits = np.unpackbits(mixed(np.arange(10_000, dtype=np.uint64)).view(np.uint8)).reshape(-1, 64)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.03
    seeds = seeds_of(1, np.arange(10_000))
    assert len(np.unique(seeds)) == 10_000 and seeds.min() >= 0
    assert key_of(1, 2) != key_of(2, 1) and key_of(-1, 0) != key_of(1, 0)


def test_an_order_follows_from_seed_and_epoch():
    def drawn(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = SeededOrder(2 * PIECE + 1, seed)
        order.set_epoch(epoch)
        return list(order)

    first = drawn(0, 0)
    assert first == drawn(0, 0)
    assert sorted(index for index, _ in first) == list(range(2 * PIECE + 1))
    for other in (drawn(0, 1), drawn(1, 0), drawn(-1, 0)):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10
    # An index has another crop in another epoch.
    assert not set(drawn(0, 0)) & set(drawn(0, 1))


def test_memory_does_not_grow_with_the_length():
    tracemalloc.start()
    order = iter(SeededOrder(10**12, 0))
    for _ in range(3 * PIECE):
        next(order)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3e6
