"""Effective rank of a spectrum, for the cards and for training's figures of a codebook."""

import math

import torch
from torch import Tensor


def spectral_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values (n,), scaled to sum to one.

    0 if all are 0 or one is NaN. Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    return math.exp(float(torch.special.entr(values / total).sum()))
