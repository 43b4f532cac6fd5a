"""Modules without what a launch has put around them."""

from accelerate import Accelerator
from torch import nn


def unwrapped(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Return the module itself, whose weights have their own names.

    DistributedDataParallel puts "module." before them and torch.compile "_orig_mod.", which Accelerate's own
    unwrap_model leaves there unless it is told.
    """
    return accelerator.unwrap_model(module, keep_torch_compile=False)
