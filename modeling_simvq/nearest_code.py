"""Exact nearest-code search. Nothing else in the project computes distances.

The nearest code to a query z is the row e of the codebook that minimises |z - e|^2. The term |z|^2 is
the same for every code, so the search maximises ``z.e - |e|^2 / 2`` instead: one matrix product, and no
cancellation when |z| is large. The scores are made tile by tile; an (N, K) matrix never exists.
"""

import torch
from torch import Tensor

# A tile of scores holds at most this many float32 values (16 MiB).
_TILE_ELEMENTS = 1 << 22
_TILE_CODES = 8192


@torch.no_grad()
def nearest_code(queries: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code to every query, in Euclidean distance.

    The arithmetic is float32 whatever the inputs' type and whatever autocast says, because half-precision
    scores choose other codes. Ties go to the lowest index. Memory: O(N d + K d) plus one 16 MiB tile.

    Args:
        queries: (N, d), any floating-point type. A query that holds NaN gets an arbitrary valid index.
        codes: (K, d), any floating-point type.

    Returns:
        (N,) int64, values in [0, K).

    Raises:
        ValueError: if the two do not agree in d, or there is no code to choose from.
    """
    if queries.ndim != 2 or codes.ndim != 2 or queries.shape[1] != codes.shape[1]:
        raise ValueError(
            "nearest_code takes queries (N, d) and codes (K, d) of one width d, "
            f"got {tuple(queries.shape)} and {tuple(codes.shape)}"
        )
    if codes.shape[0] == 0:
        raise ValueError("nearest_code needs at least one code, got an empty codebook (K = 0)")
    with torch.autocast(device_type=queries.device.type, enabled=False):
        queries, codes = queries.float(), codes.float()
        half_norms = codes.square().sum(dim=1) * -0.5
        rows = max(1, _TILE_ELEMENTS // min(_TILE_CODES, codes.shape[0]))
        found = [_search_rows(chunk, codes, half_norms) for chunk in queries.split(rows)]
    return torch.cat(found)


def _search_rows(queries: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    best_score = best_index = None
    for start in range(0, codes.shape[0], _TILE_CODES):
        stop = start + _TILE_CODES
        scores = torch.addmm(half_norms[start:stop], queries, codes[start:stop].T)
        score, index = scores.max(dim=1)
        if best_score is None:
            best_score, best_index = score, index
        else:
            # Strictly greater: an equal score in a later tile has a higher index and must not win.
            better = score > best_score
            best_score = torch.where(better, score, best_score)
            best_index = torch.where(better, index + start, best_index)
    return best_index
