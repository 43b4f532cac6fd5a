"""Run a network over overlapping pieces and cross-fade them, so that memory does not grow with the input."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """Return where tiles of `tile` cells start to cover `length` cells; the last one ends at the end."""
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, stride))
    return [*starts, length - tile]


class CrossFade:
    """Mean of overlapping pieces in any number of dimensions, each fading linearly into its neighbours.

    Args:
        shape: of the result, (B, C, *sizes).
        overlap: positions over which a piece fades in, or out. It does neither at a border of the whole.
        device: of the result and of the pieces.
    """

    def __init__(self, shape: Sequence[int], overlap: int, device: torch.device):
        self.overlap = overlap
        self.sum = torch.zeros(*shape, device=device)
        self.weight = torch.zeros(shape[0], 1, *shape[2:], device=device)

    def add(
        self, piece: Tensor, starts: Sequence[int], rows=slice(None), ends: Tensor | None = None
    ) -> None:
        """Add a piece.

        Args:
            piece: (R, C, *sizes).
            starts: position of the piece in each dimension after the channels.
            rows: of the batch that the piece holds.
            ends: (R, 1, 1), of one dimension only: where each row ends, if it is shorter than the result.
        """
        weights, window = None, [rows, slice(None)]
        for axis, start in enumerate(starts, start=2):
            stop = start + piece.shape[axis]
            whole = torch.tensor(self.sum.shape[axis]) if ends is None else ends
            ramp = self._ramp(piece.shape[axis], start == 0, whole <= stop)
            weights = ramp if weights is None else weights[..., None] * ramp
            window.append(slice(start, stop))
        self.sum[tuple(window)] += piece * weights
        self.weight[tuple(window)] += weights

    def result(self) -> Tensor:
        """Return the mean, float32, and zero where there is no piece. It takes the place of the sum."""
        return self.sum.div_(self.weight.clamp_(min=1e-12))

    def _ramp(self, length: int, first: bool, last: Tensor) -> Tensor:
        """Return weights of one dimension, (length,), or (R, 1, length) for `last` (R, 1, 1)."""
        device = self.sum.device
        cells = torch.arange(length, device=device, dtype=torch.float32) + 0.5
        ones = torch.ones_like(cells)
        rise = ones if first else (cells / self.overlap).clamp(max=1)
        fall = ((length - cells) / self.overlap).clamp(max=1)
        return torch.minimum(rise, torch.where(last.to(device), ones, fall))


@torch.no_grad()
def run_tiled(
    network: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    input_cell: int,
    output_cell: int,
    tile: int,
    overlap: int,
) -> Tensor:
    """Apply `network` tile by tile, cross-fading linearly where tiles overlap.

    Args:
        network: maps (B, C, h * input_cell, w * input_cell) to (B, C', h * output_cell, w * output_cell).
        inputs: (B, C, H, W). H and W need not be multiples of input_cell: the last cell may be partial.
        input_cell, output_cell: side of one cell (one code) in the input and in the output.
        tile, overlap: side of a tile, and of the overlap of two tiles, in cells.

    Returns:
        (B, C', h * output_cell, w * output_cell) on the inputs' device; one tile's activations is all that
        is held beside the input and the output.
    """
    cells = [-(-size // input_cell) for size in inputs.shape[2:]]
    faded = None
    for starts in itertools.product(*(tile_starts(size, tile, tile - overlap) for size in cells)):
        window = (slice(start * input_cell, (start + tile) * input_cell) for start in starts)
        piece = network(inputs[..., *window])
        if faded is None:
            whole = [size * output_cell for size in cells]
            faded = CrossFade([*piece.shape[:2], *whole], overlap * output_cell, piece.device)
        faded.add(piece, [start * output_cell for start in starts])
    return faded.result().to(piece.dtype)
