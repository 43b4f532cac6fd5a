"""Predictability of codes: a cheap figure of how hard they are for a code model, without training one.

Counts from most samples, tried on the rest: how often each code comes, and how often codes of each class come
beside given classes. The classes are runs of similar codes, so that neighbours tell something however many
codes there are (class-based n-grams: Brown et al. 1992).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling_simvq.code_prediction import order_by_similarity

# Numbers of classes that are tried: many tell more and need more samples. One is to leave the neighbours out.
CLASSES = (1, 16, 64)
# One sample in so many is held out.
HELD_OUT = 10


@dataclass(frozen=True)
class Predictability:
    """Bits that held-out codes cost by simple models; at most log2 K if they are no worse than a guess.

    Attributes:
        uniform_bits: log2 K, of a code if all are equally likely.
        frequency_bits: by how often each code comes.
        neighbour_bits: by that, and by the classes of the codes before it: left and above, or only before it.
            Of the numbers of classes the best.
        unseen: share of the held-out codes that no other sample has.
        held_out_tokens: held-out codes.
    """

    uniform_bits: float
    frequency_bits: float
    neighbour_bits: float
    unseen: float
    held_out_tokens: int

    @property
    def told_by_neighbours(self) -> float:
        """Bits that the neighbours tell about a code."""
        return self.frequency_bits - self.neighbour_bits

    def metrics(self) -> dict[str, float]:
        """Return the figures by name."""
        return vars(self) | {"told_by_neighbours": self.told_by_neighbours}


def predictability(codes: Tensor, codebook: Tensor, seed: int = 0) -> Predictability:
    """Estimate on nine tenths of the samples, measure on the others.

    Args:
        codes: (N, h, w) or (N, T) integers, N >= 2.
        codebook: (K, d), the vectors of the codes, which decide what is similar.
        seed: draws the samples that are held out.

    Raises:
        ValueError: if there are fewer than two samples.
    """
    if len(codes) < 2:
        raise ValueError("one sample cannot be predicted from others: there must be two")
    size = len(codebook)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    split = -(-len(codes) // HELD_OUT)
    fit, tried = codes[order[split:]].long(), codes[order[:split]].long()

    counts = fit.flatten().bincount(minlength=size).double()
    frequencies = _smoothed(counts, torch.tensor(1 / size, dtype=torch.float64))
    by_frequency = frequencies[tried].log2()
    gains = [0.0]
    for number in CLASSES[1:]:
        if number < size:
            classes = torch.empty(size, dtype=torch.int64)
            classes[order_by_similarity(codebook, number)] = torch.arange(size) * number // size
            gains.append(_told_by_neighbours(classes[fit], classes[tried], number))
    return Predictability(
        uniform_bits=math.log2(size),
        frequency_bits=-float(by_frequency.mean()),
        neighbour_bits=-float(by_frequency.mean()) - max(gains),
        unseen=float((counts[tried] == 0).double().mean()),
        held_out_tokens=tried.numel(),
    )


def _told_by_neighbours(fit: Tensor, tried: Tensor, number: int) -> float:
    """Return the mean bits by which a class costs less beside its neighbours than by how often it comes.

    Args:
        fit, tried: classes (N, ..., w) in [0, number) of the samples to estimate and to measure on.
    """
    left, above, own = _contexts(fit, number)
    shape = (number + 1, number + 1, number)
    seen = (left * shape[1] + above) * number + own
    counts = seen.flatten().bincount(minlength=math.prod(shape)).double().view(shape)
    alone = _smoothed(counts.sum(dim=(0, 1)), torch.tensor(1 / number, dtype=torch.float64))
    beside = _smoothed(counts, _smoothed(counts.sum(dim=1), alone)[:, None])
    left, above, own = _contexts(tried, number)
    return float((beside[left, above, own] / alone[own]).log2().mean())


def _smoothed(counts: Tensor, before: Tensor) -> Tensor:
    """Turn counts into probabilities over the last dimension, of the unseen too (Witten and Bell 1991).

    Args:
        counts: (..., n). before: probabilities that broadcast against them.
    """
    kinds = (counts > 0).sum(dim=-1, keepdim=True).clamp(min=1)
    return (counts + kinds * before) / (counts.sum(dim=-1, keepdim=True) + kinds)


def _contexts(classes: Tensor, border: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return classes to the left, above, and the classes (N, ..., w); beyond the edge is `border`."""
    left, above = torch.full_like(classes, border), torch.full_like(classes, border)
    left[..., 1:] = classes[..., :-1]
    if classes.ndim == 3:
        above[:, 1:] = classes[:, :-1]
    return left, above, classes


def prefix_entropies(codes: Tensor) -> list[float]:
    """Return the mean bits of a code over these samples themselves, once the codes before it are known.

    They fall to zero where every sample is alone with its beginning: from there on a code model that knows the
    samples by heart is perfect on them: the entropy cliff (arXiv 2605.06207).

    Args:
        codes: (N, T). Over the T results the sum is at most log2 N.
    """
    group = torch.zeros(len(codes), dtype=torch.int64)  # samples that are alike so far
    found, before = [], 0.0
    for position in range(codes.shape[1]):
        pairs = torch.stack([group, codes[:, position].long()], dim=1)
        _, group, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)
        share = counts.double() / len(codes)
        entropy = -float((share * share.log2()).sum())  # of the whole beginning
        found.append(max(0.0, entropy - before))
        before = entropy
    return found


class SampleOfCodes:
    """Codes of whole samples, drawn at random from all that were seen, at most `most_tokens` of them.

    Args:
        most_tokens: codes kept, to bound memory.
    """

    def __init__(self, most_tokens: int = 2**22):
        self.most_tokens, self.generator = most_tokens, torch.Generator().manual_seed(0)
        self.keys, self.codes = torch.empty(0), None

    def add(self, codes: Tensor) -> None:
        """Add codes (B, *spatial), of as many positions every time."""
        codes = codes.cpu()
        keys = torch.rand(len(codes), generator=self.generator)
        self.keys = torch.cat([self.keys, keys])
        self.codes = codes if self.codes is None else torch.cat([self.codes, codes])
        most = max(2, self.most_tokens // max(1, codes[:1].numel()))
        if len(self.codes) > most:
            self.keys, kept = self.keys.topk(most)
            self.codes = self.codes[kept]
