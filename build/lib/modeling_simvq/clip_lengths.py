"""Lengths of the clips of a right-padded batch, from its mask."""

import torch
from torch import Tensor


def clip_lengths(name: str, mask: Tensor, shape: tuple[int, ...], device=None) -> Tensor | None:
    """Count the real positions of each row, (B,) int64; None if all are real.

    Args:
        name: of the argument, for messages.
        mask: (B, ..., L), 1 or true where a row is real and then 0: bool, integer or floating point.
        shape: that the mask must have.
        device: of the result.

    Raises:
        ValueError: naming the argument, on another shape, other values, a gap, or a row without anything real.
    """
    mask = torch.as_tensor(mask)  # from a list or NumPy too
    if not mask.is_floating_point():
        mask = mask.long()  # torch does not compare uint16 and the like
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}: one value a position"
        )
    mask = mask.reshape(len(mask), -1)
    real = mask.bool()
    lengths = real.sum(dim=1)
    # All questions at once: on a GPU every answer waits for the device.
    questions = (mask != real, lengths == 0, real[:, 1:] & ~real[:, :-1], ~real)
    strange, empty, gap, padded = torch.stack([some.any() for some in questions]).tolist()
    # A mask that is added to attention scores, say, has 0 where this one has 1.
    if strange:
        raise ValueError(
            f"{name} must be 1 or 0, or true or false, found {mask[mask != real][0].item()}"
        )
    if empty:
        raise ValueError(
            f"clip {int(lengths.argmin())} is empty: its {name} is all 0, but must be 1 at the first code "
            "or sample of every clip"
        )
    if gap:
        raise ValueError(f"{name} must be 1 and then 0 in every clip: pad on the right")
    return lengths.to(device or mask.device) if padded else None


def mask_of_clips(lengths: Tensor, width: int) -> Tensor:
    """Lengths (B,) to the mask (B, 1, width), true where a position is real."""
    return torch.arange(width, device=lengths.device) < lengths[:, None, None]
