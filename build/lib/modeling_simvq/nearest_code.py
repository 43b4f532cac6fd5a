"""Exact nearest-code search. Nothing else in the project computes distances.

The nearest code to a query z is the row e of the codebook that minimises |z - e|^2. The term |z|^2 is
the same for every code, so the search maximises ``z.e - |e|^2 / 2`` instead: one matrix product, and no
cancellation when |z| is large. A first pass scores all codes in low precision and a second one repeats in
float64 those that can still be the nearest; an (N, K) matrix never exists. nearest_code_cpu.py does it on a
CPU, nearest_code_triton.py on a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .nearest_code_cpu import Book, make_book, search_cpu
from .nearest_code_triton import search_gpu, triton_can_search

__all__ = ["Book", "make_book", "nearest_code"]

# Of an exported graph: codes that are scored at a time, and those whose distance is computed in float64.
EXPORTED_BLOCK = 8192
EXPORTED_CANDIDATES = 4


@torch.no_grad()
def nearest_code(
    queries: Tensor, codes: Tensor | Book, projection: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the index of the nearest code to every query, in Euclidean distance.

    The answer is that of float64 arithmetic on the float32 values of queries and codes, whatever the
    inputs' types, autocast and the precision that torch allows for matrix products. Ties, to float64
    rounding, go to the lowest index, so duplicated codes do too. The same inputs give the same indices.

    Queries that hold NaN or infinity, or whose norm overflows float32, get code 0. Such codes are never
    chosen unless there is no other.

    Memory beyond the arguments, on the CPU: O(N d) plus about 32 MiB.

    Args:
        queries: (N, d), any floating-point type.
        codes: (K, d), any floating-point type, or a book of them. With `projection`, a basis (K, m).
        projection: maps rows (k, m) of the basis to codes (k, d). It is applied block by block, so that
            the projected codebook never exists as a whole.

    Returns:
        (N,) int64, values in [0, K).

    Raises:
        ValueError: if queries and codes do not agree in d, or there is no code to choose from.
    """
    vectors = codes.codes if isinstance(codes, Book) else codes
    if (
        queries.ndim != 2
        or vectors.ndim != 2
        or (not projection and queries.shape[1] != vectors.shape[1])
    ):
        raise ValueError(
            "nearest_code takes queries (N, d) and codes (K, d) of one width d, "
            f"got {tuple(queries.shape)} and {tuple(vectors.shape)}"
        )
    if vectors.shape[0] == 0:
        raise ValueError("nearest_code needs at least one code, got an empty codebook (K = 0)")
    if torch.compiler.is_compiling():
        return _compiled(queries, vectors if projection is None else projection(vectors))
    with torch.autocast(device_type=queries.device.type, enabled=False):
        queries = queries.float()
        if queries.device.type == "mps":  # no float64 there
            vectors = vectors if projection is None else projection(vectors)
            return nearest_code(queries.cpu(), vectors.cpu()).to(queries.device)
        norms = torch.linalg.vector_norm(queries, dim=1)
        usable = norms.isfinite()
        if triton_can_search(queries):
            queries = torch.where(usable[:, None], queries, 0.0)
            found = search_gpu(
                queries, (vectors if projection is None else projection(vectors)).float()
            )
        else:
            found = search_cpu(queries, norms, codes, projection)
    return torch.where(usable, found, 0)


@torch.library.custom_op("simvq::nearest_code", mutates_args=())
def _nearest_code_op(queries: Tensor, codes: Tensor) -> Tensor:
    return nearest_code(queries, codes)


@_nearest_code_op.register_fake
def _(queries: Tensor, codes: Tensor) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


def _compiled(queries: Tensor, codes: Tensor) -> Tensor:
    if not torch.compiler.is_exporting():
        return _nearest_code_op(queries, codes)
    return _exported(queries.float(), codes.float())


def _exported(queries: Tensor, codes: Tensor) -> Tensor:
    """Search in operations that every format has: an exported graph runs where this file is not.

    Exact as long as no more than EXPORTED_CANDIDATES codes lie within float32 rounding of the nearest, and the
    engine has float64. Scores exist of EXPORTED_BLOCK codes at a time.
    """
    kept = min(EXPORTED_CANDIDATES, codes.shape[0])
    scores, found = [], []
    for start in range(0, codes.shape[0], EXPORTED_BLOCK):
        block = codes[start : start + EXPORTED_BLOCK]
        score = queries @ block.T - block.square().sum(dim=1) / 2
        best = score.topk(min(kept, block.shape[0]), dim=1)
        scores.append(best.values)
        found.append(best.indices + start)
    best = torch.cat(scores, dim=1).topk(kept, dim=1).indices
    candidates = torch.cat(found, dim=1).gather(1, best)
    differences = queries.double()[:, None] - codes[candidates].double()
    distances = differences.square().sum(dim=2)
    nearest = distances <= distances.amin(dim=1, keepdim=True)
    return torch.where(nearest, candidates, codes.shape[0] - 1).amin(dim=1)
