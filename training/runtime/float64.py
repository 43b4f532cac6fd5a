"""Float64 where a device has none, as MPS, which Accelerate takes by itself on a Mac."""

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """Return where to compute in float64 with values of a device: there, or on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(values: Tensor) -> Tensor:
    """Values as float64, on float64_device of theirs."""
    return values.to(float64_device(values.device)).double()
