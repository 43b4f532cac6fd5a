"""Attention of one wide head whose memory stays bounded, of the image and the audio tokenizer."""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_AT_A_TIME = 1024


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return what each position of a sequence gathers from the others.

    Some queries at a time: on the CPU, attention of so wide a head holds all of its scores.

    Args:
        query, key, value: (B, C, T).
        allowed: (B, 1, T) bool, the positions that may be looked at; None if all may.

    Returns:
        (B, C, T).
    """
    query, key, value = (part.mT[:, None] for part in (query, key, value))
    mask = None if allowed is None else allowed[:, None]
    # An exported graph would have as many pieces as its example, and take no other sizes.
    pieces = [query] if torch.compiler.is_exporting() else query.split(QUERIES_AT_A_TIME, dim=2)
    attended = [F.scaled_dot_product_attention(some, key, value, attn_mask=mask) for some in pieces]
    return torch.cat(attended, dim=2)[:, 0].mT
