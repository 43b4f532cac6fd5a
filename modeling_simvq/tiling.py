"""Run a network over overlapping tiles and blend the results, so that memory does not grow with the image."""

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """Return where tiles of `tile` cells start to cover `length` cells; the last one ends at the end."""
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, stride))
    return [*starts, length - tile]


def _ramp(length: int, overlap: int, at_start: bool, at_end: bool, like: Tensor) -> Tensor:
    """Weights that rise over `overlap` cells from a neighbouring tile, and are 1 at a border of the image."""
    cells = torch.arange(length, device=like.device, dtype=torch.float32) + 0.5
    ones = torch.ones_like(cells)
    rise = ones if at_start else (cells / overlap).clamp(max=1)
    fall = ones if at_end else ((length - cells) / overlap).clamp(max=1)
    return torch.minimum(rise, fall)


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
    rows = -(-inputs.shape[-2] // input_cell)
    cols = -(-inputs.shape[-1] // input_cell)
    stride = tile - overlap
    output = total = None
    for top in tile_starts(rows, tile, stride):
        for left in tile_starts(cols, tile, stride):
            bottom, right = min(top + tile, rows), min(left + tile, cols)
            piece = network(
                inputs[
                    ...,
                    top * input_cell : bottom * input_cell,
                    left * input_cell : right * input_cell,
                ]
            )
            if output is None:
                size = (rows * output_cell, cols * output_cell)
                output = piece.new_zeros(*piece.shape[:2], *size, dtype=torch.float32)
                total = torch.zeros(size, device=piece.device)
            margin = overlap * output_cell
            vertical = _ramp(piece.shape[-2], margin, top == 0, bottom == rows, piece)
            horizontal = _ramp(piece.shape[-1], margin, left == 0, right == cols, piece)
            weights = vertical[:, None] * horizontal
            at = (
                ...,
                slice(top * output_cell, bottom * output_cell),
                slice(left * output_cell, right * output_cell),
            )
            output[at] += piece * weights
            total[at] += weights
            dtype = piece.dtype
    return output.div_(total).to(dtype)
