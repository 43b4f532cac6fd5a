"""One rule for codes, class labels and token ids: integers of any type."""

import numpy as np
import torch
from torch import Tensor

INTEGER_TYPES = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def integers(name: str, values, device: torch.device | str | None = None) -> Tensor:
    """Integers of any type as int64.

    Args:
        name: of the argument, for the message.
        values: a tensor, which stays on its device; or a NumPy array or (nested) list of numbers.
        device: where arrays and lists go.

    Raises:
        ValueError: if they are of another type (bool, floating point, complex), or beyond int64.
    """
    if isinstance(values, Tensor):
        if values.dtype not in INTEGER_TYPES:
            raise ValueError(f"{name} must be integers, got {values.dtype}")
        whole = values.long()
        beyond = values.dtype == torch.uint64 and not torch.compiler.is_compiling()
        if beyond and (whole < 0).any():
            raise ValueError(f"{name} must be below 2 ** 63, got {int(whole.min()) + 2**64}")
        return whole
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"{name} must be one array of integers: {error}") from None
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if array.size and array.max() >= 2**63:
        raise ValueError(f"{name} must be below 2 ** 63, got {array.max()}")
    return torch.from_numpy(array.astype(np.int64)).to(device)


def outside(values: Tensor, limit: int) -> int | None:
    """One of the values that is not in [0, limit); None if all are. It waits for the device."""
    if values.numel() == 0:
        return None
    low, high = torch.stack(values.aminmax()).tolist()
    if low < 0:
        return low
    return high if high >= limit else None
