"""Nearest-code search on a CPU (and on any device without Triton kernels), in two passes over blocks of codes.

1. Scores ``z.e - |e|^2 / 2`` in float32, in tiles that stay in the cache. Only the best score of every query in
   every group of codes is kept, which costs a few per cent of the product; finding *which* code it was would
   cost more.
2. A float32 score differs from the true one by no more than a known bound. Only a group whose best score
   lies within that bound of the best so far can hold the nearest code: one to three groups in a query's
   whole search. Their codes within the bound, one or two, are scored again in float64, so the answer is the
   float64 one.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .float32_product import CONVOLUTION_BATCH, FEW_ROWS_CODES, TILE_CODES, Product, plan

# Codes are projected and scored in blocks of this size, so that the working memory hardly grows with K.
BLOCK_BYTES = 16 << 20
# Codes that are projected at once: their rows stay in the cache until they are in the block.
PIECE_CODES = 4096
# Up to this size a tile of SMALL_TILE scores holds all of many queries, in groups of SMALL_GROUP.
SMALL_CODEBOOK = 2048
SMALL_TILE = 1 << 20
SMALL_GROUP = 64
# Pairs of a query and a group that are scored again at a time.
EXACT_PAIRS = 2048
# Queries up to so many times as long as the longest code have their scores compared as integers.
LONG_QUERY = 8


class Book(NamedTuple):
    """Codebook that is ready to be searched many times.

    Attributes:
        codes: (k, d) float32. Codes that are not finite, or whose squared norm is not, are zeros.
        half: (k,) float32, -|e|^2/2 of every code e; -inf for those, so that they lose every comparison.
        largest: the largest norm of a code, or 1e-18.
    """

    codes: Tensor
    half: Tensor
    largest: float

    def split(self, size: int) -> Iterator["Book"]:
        """Yield books of `size` codes each, which share the memory of this one."""
        for codes, half in zip(self.codes.split(size), self.half.split(size), strict=True):
            yield Book(codes, half, self.largest)


@torch.no_grad()
def make_book(
    codes: Tensor, projection: Callable[[Tensor], Tensor] | None = None, out: Tensor | None = None
) -> Book:
    """Return a book of codes (k, d), or of the projection of a basis (k, m).

    Codes that can be searched as they are stay where they are. `out`: (k, d) to write the others to.
    """
    if projection is None:
        codes = codes.float().contiguous()
    else:
        for start in range(0, len(codes), PIECE_CODES):
            piece = projection(codes[start : start + PIECE_CODES]).float()
            if out is None:
                out = piece.new_empty(len(codes), piece.shape[1])
            out[start : start + PIECE_CODES] = piece
        codes = out
    norms = torch.linalg.vector_norm(codes, dim=1)
    half = norms.square() * -0.5
    usable = half.isfinite()
    if not usable.all():
        codes = codes.where(usable[:, None], 0.0)
        norms, half = norms.where(usable, 0.0), half.where(usable, -torch.inf)
    # Squares of norms below 1e-19 vanish in float32, and bounds on rounding would with them.
    return Book(codes, half, max(float(norms.max()), 1e-18))


@torch.no_grad()
def search_cpu(
    queries: Tensor,
    norms: Tensor,
    codes: Tensor | Book,
    projection: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the index of the nearest code to every query: the float64 answer, the lowest index on ties.

    Args:
        queries: (N, d) float32.
        norms: (N,), of the queries. Where one is not finite, the index is of no meaning.
        codes, projection: see nearest_code.

    Returns:
        (N,) int64, values in [0, K).
    """
    as_it_is = isinstance(codes, Book) or (
        projection is None and codes.dtype == torch.float32 and codes.is_contiguous()
    )
    # Of codes that need no copy, a block holds only the maxima.
    bytes_of_a_code = 4 * (len(queries) // TILE_CODES if as_it_is else queries.shape[1])
    size = max(BLOCK_BYTES // max(bytes_of_a_code, 1) // TILE_CODES, 1) * TILE_CODES
    if isinstance(codes, Book):
        books, total = codes.split(size), len(codes.codes)
    else:
        total = len(codes)
        block = queries.new_empty(min(size, total), queries.shape[1]) if projection else None
        books = (
            make_book(part, projection, out=None if block is None else block[: len(part)])
            for part in codes.split(size)
        )
    best = _Best(queries, norms, total, one_book=total <= size)
    if total <= min(size, SMALL_CODEBOOK) and total % SMALL_GROUP == 0:
        return best.search_small(next(books))
    for number, book in enumerate(books):
        best.update(book, number * size)
    return best.index


class _Best:
    """Running search: the best code so far of every query, by its float64 score.

    Attributes:
        index: (N,) int64.
        score: (N,) float64, ``z.e - |e|^2 / 2``.
    """

    def __init__(self, queries: Tensor, norms: Tensor, codes: int, one_book: bool):
        self.one_book = one_book
        self.norms = norms.double()
        usable = norms.isfinite()
        if not usable.all():
            queries = queries.where(usable[:, None], 0.0)
            self.norms.masked_fill_(~usable, 0.0)
        self.longest = float(self.norms.max()) if len(queries) else 0.0
        # Up to 15 rows of zeros make whole batches for convolution; no one reads their scores.
        missing = -len(queries) % CONVOLUTION_BATCH if len(queries) > CONVOLUTION_BATCH else 0
        self.padded = (F.pad(queries, (0, 0, 0, missing)) if missing else queries).contiguous()
        self.queries = self.padded[: len(queries)]
        self.index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        self.score = torch.full_like(self.norms, -torch.inf)
        self.group = _group_size(len(queries), codes, queries.shape[1])

    def update(self, book: Book, first: int) -> None:
        """Search a book whose first code is number `first`, after all codes before."""
        shift, bound, tie = self._rounding(book)
        product, rows = plan(self.padded, len(book.codes))
        maxima = _group_maxima(self.padded, book, self.group, shift, product, rows)
        maxima = maxima[:, : len(self.queries)]
        floor = torch.maximum(self.score.float(), maxima.amax(dim=0) - shift - bound) - bound
        # Written so that scores which overflowed to NaN stay candidates.
        groups, owners = (~(maxima < floor + shift)).nonzero(as_tuple=True)
        groups_of_query = owners.bincount(minlength=len(self.queries))
        for some, where in zip(owners.split(EXACT_PAIRS), groups.split(EXACT_PAIRS), strict=True):
            queries = self.queries.index_select(0, some)
            pair, codes = _candidates(queries, where, floor[some], tie[some], book, self.group)
            owner = some[pair]
            if self.one_book:  # most queries have a single candidate: nothing left to compare
                sole = (groups_of_query[owner] == 1) & (
                    pair.bincount(minlength=len(some))[pair] == 1
                )
                self.index[owner[sole]] = codes[sole]
                pair, codes, owner = pair[~sole], codes[~sole], owner[~sole]
            score = _float64_scores(
                queries.index_select(0, pair), book.codes.index_select(0, codes), book.half[codes]
            )
            self._keep_best(owner, codes + first, score, tie)

    def search_small(self, book: Book) -> Tensor:
        """Return the index of every query, for a book of whole groups that is all of a small codebook.

        A tile then holds all scores of its queries, so the candidates are read from it and not scored again.
        """
        size = len(book.codes)
        per_query = size // SMALL_GROUP
        shift, bound, tie = self._rounding(book)
        product, _ = plan(self.padded, size)
        level = book.half + shift
        rows = SMALL_TILE // size // CONVOLUTION_BATCH * CONVOLUTION_BATCH
        tile = self.padded.new_empty(min(rows, len(self.padded)), size)
        found = []
        for number, (queries, slack) in enumerate(
            zip(self.padded.split(rows), bound.split(rows), strict=True)
        ):
            scores = product(queries, book.codes, level, tile[: len(queries)])[: len(slack)]
            groups = scores.reshape(-1, SMALL_GROUP)
            maxima = _amax(groups, shift).view(-1, per_query)
            floor = (maxima.amax(dim=1) - 2 * slack)[:, None]
            owner, group = (~(maxima < floor)).nonzero(as_tuple=True)
            if len(owner) > 4 * len(slack):  # many codes alike
                self.update(book, 0)
                return self.index
            hits = ~(groups.index_select(0, owner * per_query + group) < floor[owner])
            del scores, groups  # as in _group_maxima
            found.append((owner + number * rows, group, hits))
        owner, group, hits = map(torch.cat, zip(*found, strict=True))
        pair, code = _true(hits)
        if len(pair) > 4 * len(self.index):
            self.update(book, 0)
            return self.index
        owner, code = owner[pair], code + group[pair] * SMALL_GROUP
        self.index[owner] = code
        several = (owner.bincount(minlength=len(self.index)) > 1)[owner]
        owner, code = owner[several], code[several]
        score = _float64_scores(
            self.queries.index_select(0, owner), book.codes.index_select(0, code), book.half[code]
        )
        self._keep_best(owner, code, score, tie)
        return self.index

    def _rounding(self, book: Book) -> tuple[float, Tensor, Tensor]:
        """Return what to add to all scores, and how far the score of every query may then be from the true one.

        Returns:
            A number that makes all scores positive, or 0 where it would drown those of short queries; bounds
            on the rounding of float32 and float64 scores, (N,) each.
        """
        terms = (self.norms + book.largest) * book.largest
        shift = (self.longest + book.largest) * book.largest
        if self.longest > LONG_QUERY * book.largest or shift > 1e30:
            shift = 0.0
        bound = (_float32_rounding(book.codes) * (terms + shift)).float()
        return shift, bound, _float64_rounding(book.codes) * terms

    def _keep_best(self, rows: Tensor, codes: Tensor, score: Tensor, tie: Tensor) -> None:
        best = self.score.scatter_reduce(0, rows, score, "amax")
        level = score >= (best - tie)[rows]
        lowest = torch.full_like(self.index, torch.iinfo(torch.int64).max)
        lowest.scatter_reduce_(0, rows[level], codes[level], "amin")
        # Codes come in ascending order: an equal one found before has the lower index.
        better = best > self.score + tie
        self.index = torch.where(better, lowest, self.index)
        self.score = torch.where(better, best, self.score)


def _group_size(queries: int, codes: int, width: int) -> int:
    """Return how many codes share one maximum in pass 1.

    Large groups make pass 2 score more codes for every query, small ones make it go through more groups; the
    numbers are the measured ratios of the costs.
    """
    best = (27 * codes * (queries + 10_000) / (max(queries, 1) * width)) ** 0.5
    return min(max(1 << round(math.log2(best)), 64), TILE_CODES)


def _candidates(
    queries: Tensor, groups: Tensor, floor: Tensor, tie: Tensor, book: Book, size: int
) -> tuple[Tensor, Tensor]:
    """Find the codes in a query's group whose float32 score reaches its floor, as pairs (query, code).

    Args:
        queries: (P, d). groups: (P,) ascending. floor, tie: (P,).
        book: of k codes, in groups of `size`.
    """
    numbers, counts = groups.unique_consecutive(return_counts=True)
    counts = counts.tolist()
    hits = torch.zeros(len(queries), size, dtype=torch.bool, device=queries.device)
    spans = [slice(number * size, (number + 1) * size) for number in numbers.tolist()]
    parts = [(book.codes[span], book.half[span]) for span in spans]
    for some, (codes, half), low, hit in zip(
        queries.split(counts), parts, floor[:, None].split(counts), hits.split(counts), strict=True
    ):
        # Few queries a group: with the codes as the left matrix, MKL needs half the time.
        torch.ge(torch.addmm(half[:, None], codes, some.T).T, low, out=hit[:, : len(codes)])
    pair, code = _true(hits)
    if not len(queries) <= len(pair) <= 4 * len(queries):
        # Many codes alike (equal, or far from the origin): float64 settles it and leaves one a query.
        found = zip(queries.split(counts), parts, tie.split(counts), strict=True)
        code = torch.cat([_float64_argmax(some, *part, level) for some, part, level in found])
        pair = torch.arange(len(queries), device=queries.device)
    return pair, code + groups[pair] * size


def _float64_argmax(queries: Tensor, codes: Tensor, half: Tensor, tie: Tensor) -> Tensor:
    """Return the best code of a group (k, d) for every query (n, d), the lowest among equals: (n,)."""
    codes = codes.double()
    exact = codes.square().sum(dim=1).mul_(-0.5).masked_fill_(half.isneginf(), -torch.inf)
    scores = torch.addmm(exact, queries.double(), codes.T)
    return (scores >= (scores.amax(dim=1) - tie)[:, None]).byte().argmax(dim=1)


def _float64_scores(queries: Tensor, codes: Tensor, half: Tensor) -> Tensor:
    """Return ``e.(z - e/2)`` of pairs: (P, d) each -> (P,)."""
    codes = codes.double()
    score = torch.linalg.vecdot(codes, torch.sub(queries, codes, alpha=0.5))
    return score.masked_fill_(half.isneginf(), -torch.inf)


_UNIT_ROUNDOFF = {"none": 2.0**-24, "ieee": 2.0**-24, "tf32": 2.0**-10, "bf16": 2.0**-8}


def _float32_rounding(codes: Tensor) -> float:
    """Bound the error of a float32 score, relative to (|z| + |e|) |e|, for any order of summation."""
    backends = torch.backends
    # A caller may have let float32 products round their inputs; the bound then grows, the answer stays.
    allowed = (
        backends.mkldnn.matmul.fp32_precision,
        backends.mkldnn.conv.fp32_precision,
        backends.cuda.matmul.fp32_precision,
    )
    inputs = max(_UNIT_ROUNDOFF.get(precision, 2.0**-8) for precision in allowed)
    # d products and sums, one for the norm, and those within it; four for adding and taking away a shift.
    return (codes.shape[1] + 13) * 2.0**-24 + 2 * (inputs - 2.0**-24)


def _float64_rounding(codes: Tensor) -> float:
    """Bound the same for float64: closer scores differ only by the order of summation."""
    return (codes.shape[1] + 9) * torch.finfo(torch.float64).eps


def _group_maxima(
    queries: Tensor, book: Book, size: int, shift: float, product: Product, rows: int
) -> Tensor:
    """Return the best score of every query (N, d) in every group of `size` codes, plus `shift`: (groups, N).

    A tile is `rows` queries times TILE_CODES codes of the book, or more for few. `product` makes its scores.
    """
    width = FEW_ROWS_CODES if len(queries) <= CONVOLUTION_BATCH else TILE_CODES
    codes, half = book.codes, book.half + shift
    whole = len(codes) // size * size
    maxima = queries.new_empty(-(-len(codes) // size), len(queries))
    scores = queries.new_empty(min(rows, len(queries)) * width)
    tiles = zip(codes[:whole].split(width), half[:whole].split(width), strict=True)
    tiles = list(tiles) if whole else []
    for some, found in zip(queries.split(rows), maxima.split(rows, dim=1), strict=True):
        for number, (tile, level) in enumerate(tiles):
            out = scores[: len(some) * len(tile)].view(len(some), len(tile))
            first, count = number * width // size, len(tile) // size
            groups = product(some, tile, level, out).unflatten(1, (count, size))
            _amax(groups, shift, out=found[first : first + count].T)
            del groups  # so that the next tile is made in the same memory, which is in the cache
        if whole < len(codes):
            torch.amax(torch.addmm(half[whole:], some, codes[whole:].T), dim=1, out=found[-1])
    return maxima


def _amax(scores: Tensor, shift: float, out: Tensor | None = None) -> Tensor:
    """Return the maxima over the last dimension.

    Scores that were made positive order as the integers of the same bits do, whose maxima take less than half
    the time: floats are tested for NaN one by one.
    """
    if not shift:
        return torch.amax(scores, dim=-1, out=out)
    out = None if out is None else out.view(torch.int32)
    return torch.amax(scores.view(torch.int32), dim=-1, out=out).view(torch.float32)


def _true(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``mask.nonzero(as_tuple=True)`` of a mask (n, 8 m) with few trues, eight at a time."""
    row, word = mask.view(torch.int64).nonzero(as_tuple=True)
    which, byte = mask.unflatten(1, (-1, 8))[row, word].nonzero(as_tuple=True)
    return row[which], word[which] * 8 + byte
