"""Orders that are computed place by place: any of them can begin anywhere, and none is ever held in memory."""

from collections.abc import Iterator

import numpy as np
import torch

PIECE = 4096  # places that are computed at once
# Four rounds make a Feistel network pseudorandom on large domains; more cost little, and small ones need them.
ROUNDS = 8


def mixed(values: np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits for each of some uint64 numbers: the finaliser of SplitMix64, a bijection.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """Return a key of 64 bits for some integers, for their order too."""
    state = np.random.SeedSequence([number % 2**64 for number in numbers])
    return int(state.generate_state(1, np.uint64)[0])


def seeds_of(key: int, numbers: np.ndarray) -> np.ndarray:
    """Return a seed for torch's generators, int64 >= 0, for each of some numbers."""
    return (mixed(mixed(numbers.astype(np.uint64)) ^ np.uint64(key)) >> np.uint64(1)).astype(
        np.int64
    )


class Permutation:
    """Pseudorandom permutation of range(length), computed for the places that are asked for.

    A Feistel network permutes the next larger power of four; what falls outside of the range is permuted again
    until it is inside (cycle walking), which takes less than four times on average.

    Args:
        key: chooses the permutation, 64 bits.
    """

    def __init__(self, length: int, key: int):
        self.length = length
        self.half = np.uint64(max(3, (max(length - 1, 1).bit_length() + 1) // 2))
        self.mask = (np.uint64(1) << self.half) - np.uint64(1)
        self.keys = mixed(np.arange(ROUNDS, dtype=np.uint64) ^ mixed(np.array([key], np.uint64)))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers at some places of 0, 1, ..., length - 1; int64."""
        values = self._network(places.astype(np.uint64))
        outside = np.flatnonzero(values >= self.length)
        while len(outside):
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.length]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half, values & self.mask
        for key in self.keys:
            left, right = right, left ^ (mixed(right ^ key) & self.mask)
        return (left << self.half) | right


class SeededOrder(torch.utils.data.Sampler):
    """Indices of a training epoch in random order, each with the seed of its crop.

    Both follow from (seed, epoch) alone. So every rank draws the same order, and a resumed run sees the
    very crops that it would have seen, with any number of workers; torch's seeds of workers do not give
    that. Call set_epoch before each epoch (Accelerate's loaders do), or all epochs are alike.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        key = key_of(self.seed, self.epoch)
        permutation = Permutation(self.length, key)
        for begin in range(0, self.length, PIECE):
            indices = permutation(np.arange(begin, min(begin + PIECE, self.length)))
            yield from zip(indices.tolist(), seeds_of(key, indices).tolist(), strict=True)
