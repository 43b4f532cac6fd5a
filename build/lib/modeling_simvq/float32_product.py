"""Float32 products of rows with a matrix, on a CPU as fast as the processor makes them.

torch gives a product of matrices to its BLAS, which on x86 is MKL, and 1x1 convolutions to oneDNN. They compute
the same; on AMD's processors oneDNN takes half the time (`python benchmarks/quantizer.py --products`).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# A single thread gives 1x1 convolutions to oneDNN only in batches of at least 16 images.
CONVOLUTION_BATCH = 16
# Codes in a tile of scores; of few rows a tile of so many is as large.
TILE_CODES = 256
FEW_ROWS_CODES = 16 * TILE_CODES
# Below this many scores, measuring which product is fastest takes longer than the search.
WORTH_MEASURING = 1 << 22
# A projection of fewer rows is over before a convolution has begun.
WORTH_CONVOLVING = 256

Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def matmul(rows: Tensor, codes: Tensor, half: Tensor, out: Tensor) -> Tensor:
    """Scores ``rows codes^T + half``: (n, d), (k, d), (k,) -> (n, k), in `out`."""
    return torch.addmm(half, rows, codes.T, out=out)


def convolution(rows: Tensor, codes: Tensor, half: Tensor, out: Tensor | None = None) -> Tensor:
    """The same of a multiple of CONVOLUTION_BATCH rows, in new memory: a convolution takes no `out`."""
    pixels = rows.view(CONVOLUTION_BATCH, 1, -1, rows.shape[1]).permute(0, 3, 1, 2)
    scores = F.conv2d(pixels, codes.unsqueeze(-1).unsqueeze(-1), half)
    return scores.permute(0, 2, 3, 1).reshape(len(rows), -1)


def few_rows(rows: Tensor, codes: Tensor, half: Tensor, out: Tensor) -> Tensor:
    """The same of few rows: with the codes as the left matrix, MKL needs half the time."""
    return torch.addmm(half[:, None], codes, rows.T, out=out.view(len(codes), len(rows))).T


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear with gradients, (..., m), (d, m), (d,) -> (..., d).

    Which product makes it depends on the shape alone and not on a clock, so that the same rows give the same
    bits in every process.
    """
    if torch.compiler.is_compiling():
        return F.linear(rows, weight, bias)
    if rows.device.type != "cpu":
        with whole_products(rows.device):
            return F.linear(rows, weight, bias)
    flat = rows.reshape(-1, rows.shape[-1])
    whole = len(flat) >= WORTH_CONVOLVING and len(flat) % CONVOLUTION_BATCH == 0
    if not whole or not torch.backends.mkldnn.is_available():
        return F.linear(rows, weight, bias)
    return convolution(flat, weight, bias).view(*rows.shape[:-1], len(weight))


@contextmanager
def whole_products(device: torch.device) -> Iterator[None]:
    """Let no product on CUDA cut its inputs to TF32, whatever the process allows elsewhere.

    Codes would otherwise differ by a thousandth of themselves from those that a CPU projects.
    """
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision
    if device.type != "cuda" or allowed in ("ieee", "none"):
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = allowed


def plan(rows: Tensor, codes: int) -> tuple[Product, int]:
    """The product to score `codes` codes with, and how many rows go into a tile."""
    if len(rows) <= CONVOLUTION_BATCH:
        return few_rows, CONVOLUTION_BATCH
    if rows.device.type != "cpu" or len(rows) * codes < WORTH_MEASURING:
        return matmul, 1024
    return fastest_plan(rows.shape[1], torch.get_num_threads())


@cache
def fastest_plan(width: int, threads: int) -> tuple[Product, int]:
    """Measure once: 0.2 s at a width of 128, 0.6 s at 512."""
    # glibc maps and zeroes again what is larger than the largest size it has seen freed, and gives back to the
    # system all free memory above twice that. For tiles of a convolution this would double the time.
    torch.empty(16 << 20, dtype=torch.uint8)
    rows, out = torch.rand(4096, width), torch.empty(4096, TILE_CODES)
    codes, half = torch.rand(TILE_CODES, width), torch.zeros(TILE_CODES)

    def seconds(product: Product, height: int) -> float:
        start = time.perf_counter()
        for _ in range(12):
            for some in rows.split(height):
                product(some, codes, half, out[:height])
        return time.perf_counter() - start

    plans = ((matmul, 2048), (convolution, 4096))
    times = [[seconds(*way) for way in plans] for _ in range(4)]
    by_matmul, by_convolution = map(min, zip(*times, strict=True))
    return plans[by_convolution < by_matmul]
