"""Entropy loss of lookup-free quantization (MAGVIT-v2, arXiv 2310.05737) without the matrix of latents x codes.

Codes are corners of a cube, so the probability of a code is a product over its bits, and sums over all codes
come apart: the entropy of a latent's codes is the sum over its bits, and the mean over latents is one product
of matrices, (N, sqrt(K))^T (N, sqrt(K)).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Below it a probability counts as this in the logarithm, as in vector-quantize-pytorch.
LEAST = 1e-5


def bit_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of each latent's distribution over the codes, in nats: ().

    Args:
        logits: (N, bits), log odds of a bit being one.
    """
    return (F.softplus(logits) - logits * logits.sigmoid()).sum(dim=1).mean()


def mean_probabilities(logits: Tensor) -> Tensor:
    """Return the probability of each code, the mean over the latents: (2^bits,), first bit the highest.

    Args:
        logits: (N, bits), log odds of a bit being one.
    """
    half = logits.shape[1] // 2
    high, low = _products(logits[:, :half]), _products(logits[:, half:])
    return (high.T @ low).flatten() / len(logits)


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of a distribution (K,), in nats: ()."""
    return -(probabilities * probabilities.clamp(min=LEAST).log()).sum()


def _products(logits: Tensor) -> Tensor:
    """Return the probabilities (N, 2^bits) of all values of some bits."""
    table = logits.new_ones(len(logits), 1)
    for column in logits.T:
        pair = torch.stack([(-column).sigmoid(), column.sigmoid()], dim=1)
        table = (table[:, :, None] * pair[:, None, :]).flatten(1)
    return table
