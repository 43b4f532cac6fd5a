"""The search of nearest_code.py for a GPU, as two Triton kernels. nearest_code chooses it by itself.

1. `_maxima_kernel` is a matrix product of queries and codes that keeps, of every query and every group of
   128 codes, the best score ``z.e - |e|^2 / 2`` and nothing else. On tensor cores, in TF32.
2. `_resolve_kernel` knows how far such a score can lie from the true one. It scores again in float64 the
   groups that can still hold the nearest code, so the answer does not depend on how pass 1 rounded.

Neither waits for the host, and the same inputs give the same indices.
"""

import os
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # machines without a GPU
    triton = None

# Triton reads this when a kernel is defined. The kernels then run on the CPU, slowly: for tests.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
GROUP_CODES = 128
TILE_QUERIES = 128
# Maxima of pass 1 that exist at a time.
MAXIMA_BYTES = 64 << 20
PROGRAMS_PER_MULTIPROCESSOR = 4
# Triton's own default changes between its versions, and it warns of that. The bounds hold either way.
FUSED = {"enable_fp_fusion": True}


def triton_can_search(queries: Tensor) -> bool:
    """Tell whether `search_gpu` can run on the device of queries, here and now."""
    if triton is None or torch.compiler.is_compiling():
        return False
    return queries.is_cuda or INTERPRETED


@torch.no_grad()
def search_gpu(queries: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code to every query: the float64 answer, the lowest index on ties.

    Memory beyond the arguments: at most 64 MiB, and O(N + K).

    Args:
        queries: (N, d) float32, finite, of finite norms.
        codes: (K, d) float32, K > 0. One that is not finite, or whose squared norm is not, is never
            chosen unless there is no other.

    Returns:
        (N,) int64, values in [0, K).
    """
    queries, codes = queries.contiguous(), codes.contiguous()
    total, width = codes.shape
    norms = torch.linalg.vector_norm(codes, dim=1)
    half = norms.square() * -0.5
    usable = half.isfinite()
    half = half.where(usable, -torch.inf)
    groups = -(-total // GROUP_CODES)
    norms = F.pad(norms.where(usable, 0.0), (0, groups * GROUP_CODES - total))
    # Squares of norms below 1e-19 vanish in float32, and the bound would with them.
    largest = norms.view(groups, GROUP_CODES).amax(dim=1).clamp(min=1e-18)
    lengths = torch.linalg.vector_norm(queries, dim=1)
    overall = largest.amax().double()
    # Scores that are this close in float64 are equal but for the order of summation.
    tie = (width + 8) * torch.finfo(torch.float64).eps * (lengths.double() + overall) * overall

    precision = _precision(queries.device)
    found = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    size = max(TILE_QUERIES, MAXIMA_BYTES // (4 * groups) // TILE_QUERIES * TILE_QUERIES)
    with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
        for first in range(0, len(queries), size):
            part = slice(first, first + size)
            maxima = _group_maxima(queries[part], codes, half, precision)
            _resolve_kernel[(maxima.shape[1],)](
                *(queries[part], codes, half, maxima, lengths[part], largest, tie[part]),
                *(found[part], maxima.shape[1], total, groups),
                ROUNDING=_rounding(width, precision),
                WIDTH=width,
                GROUP=GROUP_CODES,
                CHUNK=32,
                **FUSED,
            )
    return found


def _group_maxima(queries: Tensor, codes: Tensor, half: Tensor, precision: str) -> Tensor:
    """Best score of every query (n, d) in every group of codes (K, d): (groups, n) float32."""
    rows, width = queries.shape
    groups = -(-len(codes) // GROUP_CODES)
    maxima = queries.new_empty(groups, rows)
    tiles = -(-rows // TILE_QUERIES)
    multiprocessors, shared = 4, 0
    if queries.is_cuda:
        properties = torch.cuda.get_device_properties(queries.device)
        multiprocessors = properties.multi_processor_count
        shared = getattr(properties, "shared_memory_per_block_optin", 0)
    # A small batch is few tiles: the groups are split as well, until every multiprocessor has work.
    splits = min(groups, -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // tiles))
    # Where whole rows of queries and two tiles of codes fit, the queries are loaded only once.
    whole = max(16, triton.next_power_of_2(width))
    held = 4 * whole * (TILE_QUERIES + 2 * GROUP_CODES) + 4096 <= shared or whole == 16
    _maxima_kernel[(tiles, splits)](
        *(queries, codes, half, maxima, rows, len(codes), groups, -(-groups // splits)),
        WIDTH=width,
        TILE=TILE_QUERIES,
        GROUP=GROUP_CODES,
        CHUNK=whole if held else 32,
        PRECISION=precision,
        num_warps=8,
        num_stages=2 if held else 3,
        **FUSED,
    )
    return maxima


def _precision(device: torch.device) -> str:
    """Return how pass 1 rounds its inputs: "tf32" where tensor cores take it, or "ieee", not at all."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "tf32" if nvidia and torch.cuda.get_device_capability(device) >= (8, 0) else "ieee"


def _rounding(width: int, precision: str) -> float:
    """Error of a score of pass 1 relative to (|z| + |e|) |e|, in any order of summation."""
    if precision == "ieee":
        return (width + 8) * 2.0**-24
    # Inputs cut to 10 bits. Tensor cores also keep fewer bits of the sums than float32 has.
    return 2 * 2.0**-10 + 2.0**-20 + (width + 8) * 2.0**-21


if triton is not None:

    @triton.jit
    def _maxima_kernel(
        queries,  # (rows, WIDTH) float32
        codes,  # (total, WIDTH) float32
        half,  # (total,) float32: -|e|^2/2, or -inf for a code that is not usable
        maxima,  # (groups, rows) float32, written
        rows,
        total,
        groups,
        groups_per_program,
        WIDTH: tl.constexpr,
        TILE: tl.constexpr,
        GROUP: tl.constexpr,
        CHUNK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.arange(0, CHUNK)
        # 64 bits: rows * WIDTH can exceed what 32 hold.
        z_at = queries + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        if WIDTH <= CHUNK:
            held = tl.load(z_at, mask=(row < rows)[:, None] & (column < WIDTH)[None, :], other=0.0)
        first = tl.program_id(1) * groups_per_program
        for group in range(first, tl.minimum(first + groups_per_program, groups)):
            code = group * GROUP + tl.arange(0, GROUP)
            e_at = codes + code.to(tl.int64)[None, :] * WIDTH + column[:, None]
            if WIDTH <= CHUNK:
                inside = (code < total)[None, :] & (column < WIDTH)[:, None]
                e = tl.load(e_at, mask=inside, other=0.0)
                score = tl.dot(held, e, input_precision=PRECISION)
            else:
                score = tl.zeros((TILE, GROUP), dtype=tl.float32)
                for start in range(0, WIDTH, CHUNK):
                    inside = column < WIDTH - start
                    z = tl.load(
                        z_at + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0
                    )
                    e = tl.load(
                        e_at + start, mask=(code < total)[None, :] & inside[:, None], other=0.0
                    )
                    score = tl.dot(z, e, score, input_precision=PRECISION)
            bias = tl.load(half + code, mask=code < total, other=float("-inf"))[None, :]
            # A code that is not usable can have made NaN, in its own column only.
            score = tl.where(bias == float("-inf"), float("-inf"), score + bias)
            tl.store(maxima + group * rows + row, tl.max(score, axis=1), mask=row < rows)

    @triton.jit
    def _resolve_kernel(
        queries,  # (rows, WIDTH) float32
        codes,  # (total, WIDTH) float32
        half,  # (total,) float32
        maxima,  # (groups, rows) float32
        lengths,  # (rows,) float32: the norms of the queries
        largest,  # (groups,) float32: the largest norm of a code in the group
        ties,  # (rows,) float64
        found,  # (rows,) int64, written
        rows,
        total,
        groups,
        ROUNDING: tl.constexpr,
        WIDTH: tl.constexpr,
        GROUP: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        row = tl.program_id(0)
        length, tie = tl.load(lengths + row), tl.load(ties + row)
        many = tl.arange(0, GROUP)
        column = tl.arange(0, CHUNK)
        # The best score is at least `floor`. Pass 1 may have overflowed where there is no bound.
        floors = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
        for start in range(0, groups, GROUP):
            group = start + many
            best = tl.load(maxima + group * rows + row, mask=group < groups, other=float("-inf"))
            bound = _bound(length, largest, group, groups, ROUNDING)
            floors = tl.maximum(floors, tl.where(bound < float("inf"), best - bound, float("-inf")))
        floor = tl.max(floors, axis=0).to(tl.float64)

        top = tl.full((), float("-inf"), dtype=tl.float64)
        index = tl.full((), 0, dtype=tl.int32)
        for start in range(0, groups, GROUP):
            group = start + many
            best = tl.load(maxima + group * rows + row, mask=group < groups, other=float("-inf"))
            bound = _bound(length, largest, group, groups, ROUNDING)
            reach = (best + bound).to(tl.float64)
            # Written so that NaN, from a score that overflowed, stays a candidate.
            candidates = (group < groups) & ~(reach < floor)
            at = tl.min(tl.where(candidates, group, groups), axis=0)
            while at < groups:
                code = at * GROUP + tl.arange(0, GROUP)
                e_at = codes + code.to(tl.int64)[:, None] * WIDTH + column[None, :]
                z_at = queries + row.to(tl.int64) * WIDTH + column
                score = tl.zeros((GROUP,), dtype=tl.float64)
                for begin in range(0, WIDTH, CHUNK):
                    inside = column < WIDTH - begin
                    z = tl.load(z_at + begin, mask=inside, other=0.0).to(tl.float64)
                    both = (code < total)[:, None] & inside[None, :]
                    e = tl.load(e_at + begin, mask=both, other=0.0).to(tl.float64)
                    score += tl.sum(e * (z[None, :] - 0.5 * e), axis=1)
                bias = tl.load(half + code, mask=code < total, other=float("-inf"))
                score = tl.where(bias == float("-inf"), float("-inf"), score)
                here = tl.max(score, axis=0)
                lowest = tl.min(tl.where(score >= here - tie, code, 2147483647), axis=0)
                # Groups come in ascending order: an equal code found before has the lower index.
                better = here > top + tie
                index = tl.where(better, lowest, index)
                top = tl.where(better, here, top)
                floor = tl.maximum(floor, top)
                candidates = candidates & (group > at) & ~(reach < floor)
                at = tl.min(tl.where(candidates, group, groups), axis=0)
        tl.store(found + row, index.to(tl.int64))

    @triton.jit
    def _bound(length, largest, group, groups, ROUNDING: tl.constexpr):
        """Bound how far a score of pass 1 can lie from the true one. The sum: products can underflow."""
        norm = tl.load(largest + group, mask=group < groups, other=0.0)
        terms = (length + norm) * norm
        return tl.where(terms < 1e37, ROUNDING * terms + 1e-34, float("inf"))
